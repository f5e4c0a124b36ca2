//! An allocator for the addresses at which a device sees memory.
//!
//! Never the addresses of this process: those have 47 bits, and there are IOMMUs with 39. What the device gets is
//! low, inside the ranges that the IOMMU accepts, and never where interrupts are written to.

#![forbid(unsafe_code)]

use std::ops::Range;

/// Addresses stay below this, whatever the IOMMU says: 39 bits, the least that is built.
pub const LIMIT: u64 = 1 << 39;
/// Nothing is placed below: a device that writes to address zero is to be found out.
const LOWEST: u64 = 1 << 20;
/// Where x86 takes writes for interrupts; also where the kernel does not say so.
const INTERRUPTS: Range<u64> = 0xfee0_0000..0xfef0_0000;

/// Free addresses, first fit.
#[derive(Debug)]
pub struct Iova {
    /// In order; no two touch or overlap.
    free: Vec<Range<u64>>,
}

impl Iova {
    /// All addresses of `ranges` that are fit for use.
    pub fn new(ranges: &[Range<u64>]) -> Iova {
        let mut iova = Iova { free: Vec::new() };
        for range in ranges {
            for allowed in [LOWEST..INTERRUPTS.start, INTERRUPTS.end..LIMIT] {
                let (start, end) = (range.start.max(allowed.start), range.end.min(allowed.end));
                if start < end {
                    iova.give_back(start..end);
                }
            }
        }
        iova
    }

    /// `len` bytes at a multiple of `align`, a power of two. `None` when nothing fits.
    pub fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let fit = |range: &Range<u64>| {
            let start = range.start.checked_next_multiple_of(align)?;
            (start.checked_add(len)? <= range.end).then_some(start)
        };
        let (at, start) =
            self.free.iter().enumerate().find_map(|(at, range)| Some((at, fit(range)?)))?;
        let Range { start: before, end: after } = self.free[at].clone();
        let rest = [before..start, start + len..after];
        self.free.splice(at..=at, rest.into_iter().filter(|range| !range.is_empty()));
        Some(start)
    }

    /// Takes a range back that `take` gave, or a part of one.
    pub fn give_back(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let first = self.free.partition_point(|free| free.end < range.start);
        let last = self.free.partition_point(|free| free.start <= range.end);
        let (mut start, mut end) = (range.start, range.end);
        if first < last {
            start = start.min(self.free[first].start);
            end = end.max(self.free[last - 1].end);
        }
        self.free.splice(first..last, std::iter::once(start..end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_low_and_never_where_interrupts_are_written_to() {
        let mut iova = Iova::new(std::slice::from_ref(&(0..u64::MAX)));
        let gib = 1 << 30;
        let mut taken = Vec::new();
        while let Some(at) = iova.take(gib, 1 << 21) {
            assert!(at >= LOWEST && at + gib <= LIMIT && at.is_multiple_of(1 << 21));
            assert!(at + gib <= INTERRUPTS.start || at >= INTERRUPTS.end, "{at:#x}");
            taken.push(at);
        }
        assert!(taken.len() > 500, "{}", taken.len());
        for pair in taken.windows(2) {
            assert!(pair[0] + gib <= pair[1]);
        }
    }

    #[test]
    fn what_is_given_back_in_any_order_is_whole_again() {
        let mut iova = Iova::new(&[0x200_0000..0x300_0000, 0x310_0000..0x400_0000]);
        let before = iova.free.clone();
        let mut taken: Vec<_> = (0..100).map(|n| (iova.take(n * 64 + 4096, 4096), n)).collect();
        let mut at = 7;
        while !taken.is_empty() {
            at = (at * 31 + 11) % taken.len();
            let (start, n) = taken.swap_remove(at);
            let start = start.unwrap();
            iova.give_back(start..start + n * 64 + 4096);
        }
        assert_eq!(iova.free, before);
    }

    #[test]
    fn what_does_not_fit_is_not_given() {
        let mut iova = Iova::new(std::slice::from_ref(&(0x200_0000..0x200_3000)));
        assert_eq!(iova.take(0x4000, 4096), None);
        assert_eq!(iova.take(0x2000, 0x2000), Some(0x200_0000));
        assert_eq!(iova.take(0x1000, 0x4000_0000), None);
        assert_eq!(iova.take(u64::MAX, 1), None);
        assert_eq!(iova.take(0x1000, 4096), Some(0x200_2000));
    }
}
