//! Ranges of guest clusters whose mapping is being changed.
//!
//! Writes, zeroes and discards of one cluster take turns, in the order in which they came; different
//! clusters are changed in parallel.

use crate::io::sync::{Mutex, Waiters};
use std::ops::Range;

/// The ranges that tasks hold or wait for, counted in guest clusters.
#[derive(Default)]
pub struct Ranges {
    list: Mutex<RangeList>,
}

#[derive(Default)]
struct RangeList {
    next_id: u64,
    /// Oldest first.
    held: Vec<HeldRange>,
}

struct HeldRange {
    id: u64,
    range: Range<u64>,
    waiting: Waiters,
}

/// The right to change the mapping of a range, until this is dropped.
pub struct RangeGuard<'a> {
    ranges: &'a Ranges,
    id: u64,
}

impl Ranges {
    /// Waits for all overlapping ranges that came before. A task that holds a range must not wait for
    /// a second one.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let id = {
            let mut list = self.list.lock();
            let id = list.next_id;
            list.next_id += 1;
            list.held.push(HeldRange { id, range: range.clone(), waiting: Waiters::new() });
            id
        };
        let guard = RangeGuard { ranges: self, id };
        self.list
            .wait_for(|list| {
                let older = list.held.iter_mut().find(|held| {
                    held.id < id && held.range.start < range.end && range.start < held.range.end
                });
                older.map_or(Ok(()), |older| Err(&mut older.waiting))
            })
            .await;
        guard
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut list = self.ranges.list.lock();
        let Some(at) = list.held.iter().position(|held| held.id == self.id) else { return };
        let held = list.held.remove(at);
        drop(list);
        held.waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cow::poll_once;
    use std::pin::pin;

    #[test]
    fn overlapping_ranges_take_turns_in_the_order_in_which_they_came() {
        let ranges = Ranges::default();
        let first = poll_once(pin!(ranges.lock(0..4))).unwrap();
        let apart = poll_once(pin!(ranges.lock(4..5))).unwrap();
        let mut second = pin!(ranges.lock(3..5));
        assert!(poll_once(second.as_mut()).is_none());
        let mut third = pin!(ranges.lock(2..4));
        assert!(poll_once(third.as_mut()).is_none());
        drop((first, apart));
        assert!(poll_once(third.as_mut()).is_none(), "the second came before");
        let second = poll_once(second).unwrap();
        drop(second);
        assert!(poll_once(third).is_some());
    }
}
