//! Scatter gather lists: how a command describes data that pages cannot describe (section 4.1.2).
//!
//! [`crate::prp`] has the pages. Not all controllers support lists.
//!
//! A list is one segment of data block descriptors, each any number of bytes at any address, or at
//! multiples of four where the controller asks for that.

#![forbid(unsafe_code)]

use crate::prp::List;

/// Bytes of a descriptor.
pub const DESCRIPTOR: u64 = 16;
/// Descriptor types, in the upper half of the last byte.
pub const DATA_BLOCK: u8 = 0x00;
pub const LAST_SEGMENT: u8 = 0x30;

/// A descriptor: an address, a length and a type.
fn descriptor(at: u64, len: u64, kind: u8) -> [u64; 2] {
    [at, len | u64::from(kind) << 56]
}

/// The descriptor in a command for data that is in `pieces` (the device's address and a length, in bytes, not zero),
/// one after the other. More than one go to `list`, one page of `page` bytes.
///
/// `None` if there are more than fit, a piece is not at a multiple of `align` or not so long, or one of
/// them is `None`.
pub fn build(
    pieces: impl Iterator<Item = Option<(u64, usize)>>,
    align: u64,
    page: u64,
    list: List,
) -> Option<[u64; 2]> {
    let most = page / DESCRIPTOR;
    let (mut count, mut begin, mut len) = (0, 0, 0);
    let put = |count: u64, block: [u64; 2]| list.memory.put((count * DESCRIPTOR) as usize, &block);
    for piece in pieces {
        let (at, more) = piece?;
        let more = more as u64;
        if !(at | more).is_multiple_of(align) {
            return None;
        }
        let joined = len + more;
        if len > 0 && begin + len == at && u32::try_from(joined).is_ok() {
            len = joined;
            continue;
        }
        if len > 0 {
            // The last one has its place, too.
            if count + 2 > most {
                return None;
            }
            put(count, descriptor(begin, len, DATA_BLOCK));
            count += 1;
        }
        (begin, len) = (at, more);
    }
    let last = descriptor(begin, len, DATA_BLOCK);
    if count == 0 {
        return Some(last);
    }
    put(count, last);
    Some(descriptor(list.iova, (count + 1) * DESCRIPTOR, LAST_SEGMENT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::Pages;

    const PAGE: u64 = 4096;

    fn built(pieces: &[(u64, usize)], align: u64) -> Option<Vec<(u64, u64)>> {
        let pages = Pages::new(4096, 4096).unwrap();
        let list = List { memory: pages.range(), iova: 0xabc000 };
        let [address, rest] = build(pieces.iter().copied().map(Some), align, PAGE, list)?;
        if rest >> 56 == 0 {
            return Some(vec![(address, rest)]);
        }
        assert_eq!((address, rest >> 56), (0xabc000, 0x30));
        let long =
            |at| u64::from(pages.range().load(at)) | u64::from(pages.range().load(at + 4)) << 32;
        let count = (rest & 0xffff_ffff) as usize / 16;
        Some((0..count).map(|n| (long(n * 16), long(n * 16 + 8))).collect())
    }

    #[test]
    fn one_piece_is_reported_in_the_command_and_more_in_a_segment() {
        assert_eq!(built(&[(0x10001, 511)], 1), Some(vec![(0x10001, 511)]));
        let scattered = [(0x10000, 512), (0x50204, 1024), (0x30000, 512)];
        let reported = scattered.map(|(at, len)| (at, len as u64));
        assert_eq!(built(&scattered, 4), Some(reported.to_vec()));
        assert_eq!(built(&[(0x100, 100), (0x164, 412)], 4), Some(vec![(0x100, 512)]), "adjacent");
    }

    #[test]
    fn what_does_not_fit_or_is_not_aligned_is_left_to_bounce_buffers() {
        assert_eq!(built(&[(0x10002, 512)], 4), None);
        assert_eq!(built(&[(0x10000, 510), (0x20000, 2)], 4), None);
        let apart = |count| (0..count).map(|n| (n * 0x1000, 16)).collect::<Vec<_>>();
        assert_eq!(built(&apart(256), 1).map(|list| list.len()), Some(256));
        assert_eq!(built(&apart(257), 1), None);
        let pages = Pages::new(4096, 4096).unwrap();
        let list = List { memory: pages.range(), iova: 0xabc000 };
        assert_eq!(build([Some((0x1000, 4)), None].into_iter(), 1, PAGE, list), None);
    }
}
