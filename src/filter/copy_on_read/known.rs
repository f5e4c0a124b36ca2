//! The parts of a disk that are known to need no copying, as bits that the fast path reads.
//!
//! Reading takes no lock. A missing bit costs time; a wrongly set bit means that a copy is not made. Neither changes
//! what is read.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most bits: 8 MiB of them. Parts of larger disks are larger.
const MOST: u64 = 1 << 26;

pub struct Known {
    /// Bytes; a power of two.
    part: u64,
    bits: Box<[AtomicU64]>,
}

impl Known {
    /// Nothing is known of a disk of `len` bytes, in parts of `part` bytes or larger ones.
    pub fn new(len: u64, part: u64) -> Known {
        let mut part = part.next_power_of_two();
        while len.div_ceil(part) > MOST {
            part *= 2;
        }
        let words = len.div_ceil(part).div_ceil(64);
        Known { part, bits: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// How many of `want` bytes from `at` on are known.
    pub fn run(&self, at: u64, want: u64) -> u64 {
        let mut end = at;
        while end < at + want && self.has(end / self.part) {
            end = (end / self.part + 1) * self.part;
        }
        end.min(at + want) - at
    }

    fn has(&self, part: u64) -> bool {
        let word = self.bits.get((part / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (part % 64) & 1 == 1)
    }

    /// The parts that lie wholly in the range, or reach from in it beyond the disk's end.
    pub fn add(&self, range: Range<u64>, disk_end: u64) {
        let end = match range.end >= disk_end {
            true => disk_end.div_ceil(self.part),
            false => range.end / self.part,
        };
        for part in range.start.div_ceil(self.part)..end {
            if let Some(word) = self.bits.get((part / 64) as usize) {
                word.fetch_or(1 << (part % 64), Ordering::Relaxed);
            }
        }
    }

    /// The parts that the range touches.
    pub fn remove(&self, range: Range<u64>) {
        for part in range.start / self.part..range.end.div_ceil(self.part) {
            let Some(word) = self.bits.get((part / 64) as usize) else { return };
            word.fetch_and(!(1 << (part % 64)), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_parts_are_known() {
        let known = Known::new(1000 << 10, 4096);
        known.add(4095..3 * 4096 + 1, 1000 << 10);
        assert_eq!(known.run(4096, 100_000), 8192);
        assert_eq!(known.run(5000, 100), 100);
        assert_eq!((known.run(4095, 2), known.run(12288, 1)), (0, 0));
        known.remove(8191..8193);
        assert_eq!((known.run(4096, 1), known.run(8192, 1)), (0, 0));
        // The last part is shorter.
        let known = Known::new(5000, 4096);
        known.add(4096..5000, 5000);
        assert_eq!((known.run(4096, 904), known.run(0, 1)), (904, 0));
        // What a disk has grown to is not known.
        assert_eq!(known.run(1 << 30, 1), 0);
        known.add(0..1 << 40, 1 << 40);
        known.remove(0..1 << 40);
        assert_eq!(known.run(4096, 1), 0);
    }

    #[test]
    fn a_large_disk_has_large_parts() {
        let known = Known::new(1 << 50, 512);
        assert!(known.bits.len() as u64 <= MOST / 64);
        known.add(0..1 << 40, 1 << 50);
        assert_eq!(known.run(0, u64::MAX >> 1), 1 << 40);
    }
}
