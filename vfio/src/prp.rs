//! Physical Region Pages: how a command describes its data (section 4.1.1).
//!
//! The first entry may begin anywhere on a dword; every other must begin on a page, so that where one
//! piece of memory ends and the next begins there must be a page boundary on both sides. What does not
//! look so goes through bounce buffers.

#![forbid(unsafe_code)]

use crate::dma::HostRange;

/// A page that a command's list is in.
#[derive(Clone, Copy)]
pub struct List {
    pub memory: HostRange,
    /// Where the device sees it.
    pub iova: u64,
}

/// The two entries of a command for data that is in `pieces` (the device's address and a length, in bytes, not zero),
/// one after the other. More than two go to `list`, one page of `page` bytes.
///
/// `None` if the pieces cannot be described so, or one of them is `None`.
#[inline]
pub fn build(
    pieces: impl Iterator<Item = Option<(u64, usize)>>,
    page: u64,
    list: List,
) -> Option<(u64, u64)> {
    let most = (page / 8) as usize;
    let (mut first, mut second, mut listed) = (0, 0, 0);
    // Where the last piece ended.
    let mut end = 0;
    for piece in pieces {
        let (mut at, len) = piece?;
        let piece_end = at.checked_add(len as u64)?;
        if first == 0 {
            if at % 4 != 0 || at == 0 {
                return None;
            }
            first = at;
            at = at - at % page + page;
        } else if at == end {
            at = at.next_multiple_of(page);
        } else if (at | end) % page != 0 {
            return None;
        }
        while at < piece_end {
            if listed == most {
                return None;
            }
            if listed == 0 {
                second = at;
            }
            list.memory.put(listed * 8, &[at]);
            listed += 1;
            at += page;
        }
        end = piece_end;
    }
    match listed {
        0 | 1 => Some((first, second)),
        _ => Some((first, list.iova)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::Pages;

    const PAGE: u64 = 4096;

    /// The bytes' addresses that two entries and a list mean, by the specification's own rule.
    fn walk(entries: (u64, u64), len: usize, list: List) -> Vec<u64> {
        let mut found = Vec::new();
        let (mut at, mut next) = (entries.0, 0);
        let pages = (entries.0 % PAGE + len as u64).div_ceil(PAGE);
        while found.len() < len {
            found.push(at);
            at += 1;
            if at % PAGE == 0 && found.len() < len {
                at = if pages == 2 {
                    entries.1
                } else {
                    assert_eq!(entries.1, list.iova);
                    let (low, high) = (list.memory.load(next * 8), list.memory.load(next * 8 + 4));
                    u64::from(low) | u64::from(high) << 32
                };
                assert_eq!(at % PAGE, 0);
                next += 1;
            }
        }
        found
    }

    fn check(pieces: &[(u64, usize)]) -> bool {
        let pages = Pages::new(4096, 4096).unwrap();
        let list = List { memory: pages.range(), iova: 0xabc000 };
        let Some(entries) = build(pieces.iter().copied().map(Some), PAGE, list) else {
            return false;
        };
        let want: Vec<u64> = pieces.iter().flat_map(|&(at, len)| at..at + len as u64).collect();
        assert_eq!(walk(entries, want.len(), list), want, "{pieces:x?}");
        true
    }

    #[test]
    fn what_the_entries_say_is_where_the_data_lies() {
        for pieces in [
            &[(0x10000, 512)][..],
            &[(0x10e00, 512)],
            &[(0x10e00, 1024)],
            &[(0x10004, 4096)],
            &[(0x10e00, 8192)],
            &[(0x10000, 4096), (0x50000, 4096)],
            &[(0x10e00, 512), (0x50000, 4096), (0x30000, 512)],
            &[(0x10000, 512), (0x10200, 512)],
            &[(0x10e00, 512), (0x11000, 512)],
            &[(0x10e00, 512), (0x11000, 512), (0x11200, 8192)],
            &[(0x10000, 1 << 20)],
            &[(0x10ffc, 1 << 20)],
        ] {
            assert!(check(pieces), "{pieces:x?}");
        }
    }

    #[test]
    fn what_prps_cannot_say_is_left_to_bounce_buffers() {
        for pieces in [
            &[(0x10001, 512)][..],
            &[(0x10002, 512)],
            &[(0x10000, 512), (0x50000, 512)],
            &[(0x10e00, 512), (0x50200, 512)],
            &[(0x10000, 512), (0x10400, 512)],
            &[(0x10000, (512 + 1) << 12 | 512)],
        ] {
            assert!(!check(pieces), "{pieces:x?}");
        }
        let pages = Pages::new(4096, 4096).unwrap();
        let list = List { memory: pages.range(), iova: 0xabc000 };
        assert_eq!(build([Some((0x1000, 4)), None].into_iter(), PAGE, list), None);
    }
}
