//! Which bytes of a read have come.

use smallvec::SmallVec;

/// Parts that do not touch, from the front to the back. Chunks come in any order, but all servers that we know
/// send them from the front to the back.
#[derive(Default)]
pub struct Ranges(SmallVec<[(u64, u64); 2]>);

/// More gaps than that are refused: they cost memory and time.
const MOST: usize = 256;

impl Ranges {
    /// Adds the bytes from `begin` up to `end`. False if some of them have come before, or there are too many gaps.
    pub fn add(&mut self, begin: u64, end: u64) -> bool {
        let at = self.0.partition_point(|part| part.1 <= begin);
        // `at` is the first part that ends behind the beginning.
        if self.0.get(at).is_some_and(|part| part.0 < end) {
            return false;
        }
        let joins_before = at > 0 && self.0[at - 1].1 == begin;
        let joins_after = self.0.get(at).is_some_and(|part| part.0 == end);
        match (joins_before, joins_after) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = end,
            (false, true) => self.0[at].0 = begin,
            (false, false) if self.0.len() >= MOST => return false,
            (false, false) => self.0.insert(at, (begin, end)),
        }
        true
    }

    /// Whether these are all bytes from 0 up to `len`.
    pub fn is_whole(&self, len: u64) -> bool {
        *self.0 == [(0, len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_once_and_in_any_order() {
        let mut ranges = Ranges::default();
        for (begin, end) in [(4, 6), (0, 2), (8, 10), (2, 4)] {
            assert!(ranges.add(begin, end));
        }
        for (begin, end) in [(0, 1), (5, 7), (7, 9), (9, 12), (0, 10)] {
            assert!(!ranges.add(begin, end), "{begin} {end}");
        }
        assert!(!ranges.is_whole(10));
        assert!(ranges.add(6, 8));
        assert!(ranges.is_whole(10) && !ranges.is_whole(11));
    }

    #[test]
    fn gaps_are_bounded() {
        let mut ranges = Ranges::default();
        let added = (0..10_000).filter(|n| ranges.add(2 * n, 2 * n + 1)).count();
        assert_eq!(added, MOST);
    }
}
