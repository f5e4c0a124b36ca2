//! Requests that the storage has failed and that are held for a retry (`werror=stop`).
//!
//! They are retried until they succeed or an operator decides otherwise.
//!
//! Of a held request only its number in its queue is kept: a guest cannot make it cost more, nor hold more requests
//! than its queue is long. When it is tried again, its transport reads and checks it as if it had just come: by then
//! the guest's memory may be elsewhere, and a hostile guest may have changed the request.
//!
//! A held request is not in flight: nothing of it is with the kernel, and a drain does not wait for
//! it. In the memory that tracks requests in flight it stays marked.

use std::collections::VecDeque;

/// Nanoseconds from the first failure to the first trial; each trial that fails doubles it.
pub const FIRST_DELAY: u64 = 1_000_000_000;
/// The longest that it grows to.
pub const LONGEST_DELAY: u64 = 30_000_000_000;

/// The held requests of one queue.
pub struct Held {
    /// In the order in which they failed.
    waiting: Vec<u16>,
    /// To be tried again now.
    due: VecDeque<u16>,
    /// When those that wait are due, in nanoseconds on the ring's clock.
    retry_at: u64,
    /// Nanoseconds until the next trial after this one.
    delay: u64,
}

impl Held {
    /// Those that another queue has held of the same ring: they are due at once.
    pub fn carried(heads: Vec<u16>) -> Held {
        Held { waiting: Vec::new(), due: heads.into(), retry_at: 0, delay: FIRST_DELAY }
    }

    /// Holds one more. `again`: it was held before, and has failed once more. Returns when it is
    /// due, and, if it is the first one, the delay until then in nanoseconds.
    pub fn hold(&mut self, head: u16, again: bool, now: u64) -> (u64, Option<u64>) {
        let first = self.waiting.is_empty();
        self.waiting.push(head);
        if !first {
            return (self.retry_at, None);
        }
        if !again {
            self.delay = FIRST_DELAY;
        }
        let delay = self.delay;
        self.retry_at = now.saturating_add(delay);
        self.delay = (2 * delay).min(LONGEST_DELAY);
        (self.retry_at, Some(delay))
    }

    /// One that was held has worked: the next to fail need not wait long.
    pub fn succeeded(&mut self) {
        self.delay = FIRST_DELAY;
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.waiting.len() + self.due.len()
    }

    /// How many are to be tried again now.
    pub fn due(&self) -> u16 {
        self.due.len() as u16
    }

    /// The next one to be tried again, in the order in which they failed.
    #[inline]
    pub fn next_due(&mut self) -> Option<u16> {
        self.due.pop_front()
    }

    /// All are due.
    pub fn retry_now(&mut self) {
        self.due.extend(self.waiting.drain(..));
    }

    /// The clock shows `now`: those whose time has come are due. Returns when the others will be.
    pub fn tick(&mut self, now: u64) -> Option<u64> {
        if now >= self.retry_at {
            self.retry_now();
        }
        (!self.waiting.is_empty()).then_some(self.retry_at)
    }

    /// Takes all away, in the order in which they failed.
    pub fn take_all(&mut self) -> Vec<u16> {
        let mut all: Vec<u16> = std::mem::take(&mut self.due).into();
        all.append(&mut self.waiting);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn the_delay_doubles_up_to_its_limit_and_restarts_after_a_success() {
        let mut held = Held::carried(Vec::new());
        let mut now = 5 * SECOND;
        let mut delays = Vec::new();
        let mut again = false;
        for _ in 0..7 {
            let (at, delay) = held.hold(3, again, now);
            assert_eq!(held.hold(9, again, now), (at, None), "it goes with the first");
            delays.push(delay.unwrap() / SECOND);
            assert_eq!(held.tick(at - 1), Some(at));
            assert_eq!(held.due(), 0);
            assert_eq!(held.tick(at), None);
            assert_eq!(
                (held.next_due(), held.next_due(), held.next_due()),
                (Some(3), Some(9), None)
            );
            (now, again) = (at, true);
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 30, 30]);
        held.succeeded();
        assert_eq!(held.hold(1, true, now).1, Some(SECOND));
        // Another that fails for the first time begins again, too.
        held.tick(u64::MAX);
        held.hold(1, true, now);
        held.tick(u64::MAX);
        assert_eq!(held.hold(2, false, now).1, Some(SECOND));
    }

    #[test]
    fn an_operator_waits_for_no_delay() {
        let mut held = Held::carried(vec![7]);
        assert_eq!(held.due(), 1);
        held.hold(1, false, 0);
        held.hold(2, false, 0);
        held.retry_now();
        assert_eq!(held.due(), 3);
        assert_eq!(held.next_due(), Some(7));
        held.hold(7, true, 0);
        assert_eq!(held.take_all(), [1, 2, 7]);
        assert_eq!((held.due(), held.tick(u64::MAX)), (0, None));
    }
}
