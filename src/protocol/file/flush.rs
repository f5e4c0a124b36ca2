//! Flushes: how concurrent ones share an fsync, and the permanent effect of a failed one.
//!
//! One fsync runs at a time. A flush that comes meanwhile cannot join it, for the kernel may already
//! have passed the pages of a write that this flush must cover; all flushes that wait share the next
//! one. After a failed fsync the kernel marks the pages clean and reports success the next time,
//! although the data never landed: so the first failure is kept, and every later flush fails with
//! it until the file is opened again, or an operator accepts the loss.

use crate::io::sync::{Mutex, Waiters};
use crate::io::{Errno, IoResult};
use std::future::Future;

/// The flushes of one file, on all workers.
#[derive(Default)]
pub struct Flushes {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How many fsyncs have been started.
    started: u64,
    /// The number, from one on, of the last that succeeded.
    durable: u64,
    running: bool,
    failed: Option<Errno>,
    waiting: Waiters,
}

/// The flush that runs the fsync for all that wait.
struct Leader<'a> {
    flushes: &'a Flushes,
    result: Option<IoResult>,
}

impl Flushes {
    /// Returns when an fsync that started after this call has ended. `fsync` runs if this flush becomes
    /// the leader.
    pub async fn flush(&self, fsync: impl Future<Output = IoResult>) -> IoResult {
        let wanted = self.state.lock().started + 1;
        let leader = self.state.wait_for(|state| {
            if let Some(errno) = state.failed {
                return Ok(Err(errno));
            }
            if state.durable >= wanted {
                return Ok(Ok(None));
            }
            if state.running {
                return Err(&mut state.waiting);
            }
            state.running = true;
            state.started += 1;
            Ok(Ok(Some(Leader { flushes: self, result: None })))
        });
        let Some(mut leader) = leader.await? else { return Ok(()) };
        let result = fsync.await;
        leader.result = Some(result);
        result
    }

    /// Every flush from now on fails with `errno`, if none has failed before.
    pub fn poison(&self, errno: Errno) {
        self.state.lock().failed.get_or_insert(errno);
    }

    /// Flushes reach the file again. What the kernel has forgotten stays lost.
    pub fn forgive(&self) {
        self.state.lock().failed = None;
    }

    pub fn is_poisoned(&self) -> bool {
        self.state.lock().failed.is_some()
    }

    /// How many fsyncs have reached the file.
    pub fn count(&self) -> u64 {
        self.state.lock().started
    }
}

impl Drop for Leader<'_> {
    /// Ends the leadership. If the flush was dropped before its end, one of the waiting flushes
    /// runs another fsync.
    fn drop(&mut self) {
        let mut state = self.flushes.state.lock();
        state.running = false;
        match self.result {
            Some(Ok(())) => state.durable = state.started,
            Some(Err(errno)) => {
                state.failed.get_or_insert(errno);
            }
            None => {}
        }
        let waiting = state.waiting.take();
        drop(state);
        waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// An fsync that ends when the test says so, and counts how often it was started.
    struct Fsync {
        runs: Cell<u32>,
        result: Cell<Option<IoResult>>,
    }

    impl Fsync {
        fn new() -> Fsync {
            Fsync { runs: Cell::new(0), result: Cell::new(None) }
        }

        async fn run(&self) -> IoResult {
            self.runs.set(self.runs.get() + 1);
            poll_fn(|_| self.result.get().map_or(Poll::Pending, Poll::Ready)).await
        }
    }

    macro_rules! poll {
        ($future:expr) => {
            $future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        };
    }

    #[test]
    fn a_flush_does_not_join_an_fsync_that_has_started_but_shares_the_next_one() {
        let (flushes, fsync) = (Flushes::default(), Fsync::new());
        let mut first = pin!(flushes.flush(fsync.run()));
        assert!(poll!(first).is_pending());
        let mut second = pin!(flushes.flush(fsync.run()));
        let mut third = pin!(flushes.flush(fsync.run()));
        assert!(poll!(second).is_pending());
        assert!(poll!(third).is_pending());
        assert_eq!(fsync.runs.get(), 1);
        fsync.result.set(Some(Ok(())));
        assert_eq!(poll!(first), Poll::Ready(Ok(())));
        fsync.result.set(None);
        assert!(poll!(second).is_pending());
        assert!(poll!(third).is_pending());
        assert_eq!(fsync.runs.get(), 2);
        fsync.result.set(Some(Ok(())));
        assert_eq!(poll!(second), Poll::Ready(Ok(())));
        assert_eq!(poll!(third), Poll::Ready(Ok(())));
        assert_eq!((fsync.runs.get(), flushes.count()), (2, 2));
    }

    #[test]
    fn after_a_failed_fsync_every_flush_fails_and_none_reaches_the_file() {
        let (flushes, fsync) = (Flushes::default(), Fsync::new());
        let mut first = pin!(flushes.flush(fsync.run()));
        assert!(poll!(first).is_pending());
        let mut joined = pin!(flushes.flush(fsync.run()));
        assert!(poll!(joined).is_pending());
        fsync.result.set(Some(Err(Errno::ENOSPC)));
        assert_eq!(poll!(first), Poll::Ready(Err(Errno::ENOSPC)));
        fsync.result.set(Some(Ok(())));
        assert_eq!(poll!(joined), Poll::Ready(Err(Errno::ENOSPC)));
        let mut later = pin!(flushes.flush(fsync.run()));
        assert_eq!(poll!(later), Poll::Ready(Err(Errno::ENOSPC)));
        assert_eq!(fsync.runs.get(), 1);
    }

    #[test]
    fn a_flush_dropped_in_the_middle_leaves_the_fsync_to_those_who_wait() {
        let (flushes, fsync) = (Flushes::default(), Fsync::new());
        let mut first = Box::pin(flushes.flush(fsync.run()));
        assert!(poll!(first).is_pending());
        let mut second = pin!(flushes.flush(fsync.run()));
        assert!(poll!(second).is_pending());
        drop(first);
        fsync.result.set(Some(Ok(())));
        assert_eq!(poll!(second), Poll::Ready(Ok(())));
        assert_eq!(fsync.runs.get(), 2);
    }
}
