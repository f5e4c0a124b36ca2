//! The interface of rings, which carry out a worker's operations.
//!
//! Implementations are io_uring ([`super::uring`]), threads ([`super::threads`]), and a simulation ([`super::sim`]).

use super::op::Op;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Copy, Debug)]
pub struct Completion {
    pub user_data: u64,
    /// A count, or a negative errno.
    pub result: i32,
    /// More completions of the same submission will come.
    pub more: bool,
}

/// Completions taken from the ring at a time.
pub(super) const BATCH: usize = 256;

/// A file that is pinned, once for each [`Ring::pin`]. No other file gets its descriptor meanwhile.
#[derive(Debug)]
pub struct Pin {
    pub(super) file: Arc<File>,
}

/// How long [`Ring::enter`] may sleep when nothing has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    No,
    For(Duration),
    Forever,
}

pub trait Ring {
    /// Queues an operation; it starts at the next `enter`, or at once when the queue is full. The
    /// completion carries `user_data`. Operations on no descriptor come with -1.
    ///
    /// # Safety
    /// Memory that the operation names stays mapped, and its list in place, until the completion.
    unsafe fn push(&mut self, user_data: u64, fd: RawFd, op: Op);

    /// Whether `enter` would have something to do without sleeping: entries to start, or
    /// completions that only the kernel knows of.
    fn must_enter(&self) -> bool;

    /// Whether there is anything to reap now.
    fn has_completions(&mut self) -> bool;

    /// Starts what is queued and sleeps, as `wait` says, until something completes.
    fn enter(&mut self, wait: Wait);

    /// Moves the completions that are there to `out`, as far as its capacity goes.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Nanoseconds since some point in the past, on the ring's own clock.
    fn now(&self) -> u64;

    /// Keeps a file open while the kernel works for this ring, also when the process has been killed, until
    /// [`Ring::unpin`]. Another process that sees the file's locks gone then knows that nothing of the ring is in flight,
    /// whichever files it was for.
    ///
    /// A ring whose work keeps the process, and so all of its files, need not do anything.
    ///
    /// # Errors
    /// There is no room for another file.
    fn pin(&mut self, file: &Arc<File>) -> io::Result<Pin> {
        Ok(Pin { file: file.clone() })
    }

    fn unpin(&mut self, _pin: Pin) {}

    /// Whether this is a simulation, with files that only it knows ([`super::sim`]).
    fn is_simulated(&self) -> bool {
        false
    }
}
