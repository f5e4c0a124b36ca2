//! Timers of a worker, on its ring's clock, so that a simulated ring can run them in virtual time.

use super::task::{Either, either};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::task::{Poll, Waker};
use std::time::Duration;

#[derive(Default)]
pub(super) struct Timers {
    heap: RefCell<BinaryHeap<Reverse<Entry>>>,
}

struct Entry {
    /// Nanoseconds on the ring's clock.
    at: u64,
    waker: Waker,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

impl Timers {
    /// When the next one is due.
    pub(super) fn next(&self) -> Option<u64> {
        self.heap.borrow().peek().map(|Reverse(entry)| entry.at)
    }

    pub(super) fn wake_due(&self, now: u64) {
        loop {
            let mut heap = self.heap.borrow_mut();
            match heap.peek() {
                Some(Reverse(entry)) if entry.at <= now => {}
                _ => return,
            }
            let entry = heap.pop();
            drop(heap);
            if let Some(Reverse(entry)) = entry {
                entry.waker.wake();
            }
        }
    }
}

/// Until when an operation may take, on the worker's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub(super) u64);

impl Deadline {
    /// As long as it takes.
    pub const NEVER: Deadline = Deadline(u64::MAX);

    /// So much later than now, on the current worker.
    pub fn after(time: Duration) -> Deadline {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Deadline(super::current().now().saturating_add(ns))
    }

    /// Whether it has come, on the current worker.
    pub fn has_passed(self) -> bool {
        self != Deadline::NEVER && super::current().now() >= self.0
    }
}

/// The result of a future, if it comes within `time` on the current worker. The future is dropped otherwise.
pub async fn in_time<T>(time: Duration, future: impl Future<Output = T>) -> Option<T> {
    match either(future, sleep(time)).await {
        Either::First(result) => Some(result),
        Either::Second(()) => None,
    }
}

/// Waits at least that long on the current worker.
pub async fn sleep(time: Duration) {
    let io = super::current();
    let at = io.now().saturating_add(time.as_nanos() as u64);
    std::future::poll_fn(|cx| {
        if io.now() >= at {
            return Poll::Ready(());
        }
        io.timers.heap.borrow_mut().push(Reverse(Entry { at, waker: cx.waker().clone() }));
        Poll::Pending
    })
    .await
}
