//! What flushes owe: writes that a server has answered, and may have lost.
//!
//! # The rule
//!
//! A connection that ends may have ended with its server, and with the server goes what it had answered and not yet
//! made durable. Nothing in the protocol tells a new server from the old one. So whenever a connection is lost while
//! anything was answered that no flush has covered, on whichever connection, the next flush fails (EIO), and so do
//! those that are in flight; that is said once, as the kernel does for files. Requests without an answer are sent
//! again, and nothing of them is lost.

use crate::io::{Errno, IoResult};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// Of all connections to one export.
#[derive(Default)]
pub struct Flushes {
    /// Flushes that have begun.
    begun: AtomicU64,
    /// The first flush, counted from 1, that covers all that was answered.
    owed: AtomicU64,
    /// The last one that has succeeded.
    done: AtomicU64,
    /// Connections lost with something that no flush had covered.
    losses: AtomicU64,
    /// No flush has told of the last of them.
    is_untold: AtomicBool,
}

/// A flush on its way.
pub struct Flush {
    number: u64,
    losses: u64,
}

impl Flushes {
    /// Something has been answered that is not durable. Writes to shared memory once between two flushes.
    #[inline]
    pub fn owe(&self) {
        let next = self.begun.load(SeqCst) + 1;
        if self.owed.load(SeqCst) < next {
            self.owed.fetch_max(next, SeqCst);
        }
    }

    /// A connection has been lost. True if that may have cost data.
    pub fn lose(&self) -> bool {
        let is_owed = self.owed.load(SeqCst) > self.done.load(SeqCst);
        if is_owed {
            self.losses.fetch_add(1, SeqCst);
            self.is_untold.store(true, SeqCst);
        }
        is_owed
    }

    /// # Errors
    /// EIO: what it would have covered may be lost.
    pub fn begin(&self) -> IoResult<Flush> {
        if self.is_untold.swap(false, SeqCst) {
            return Err(Errno::EIO);
        }
        let losses = self.losses.load(SeqCst);
        Ok(Flush { number: self.begun.fetch_add(1, SeqCst) + 1, losses })
    }

    /// The server says that it has succeeded.
    ///
    /// # Errors
    /// As for [`Flushes::begin`].
    pub fn end(&self, flush: Flush) -> IoResult {
        if self.losses.load(SeqCst) != flush.losses {
            self.is_untold.store(false, SeqCst);
            return Err(Errno::EIO);
        }
        self.done.fetch_max(flush.number, SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_tells_of_what_a_lost_connection_may_have_cost() {
        let flushes = Flushes::default();
        assert!(!flushes.lose(), "nothing was answered");
        flushes.owe();
        assert!(flushes.lose());
        assert!(flushes.begin().is_err());
        let flush = flushes.begin().unwrap();
        flushes.end(flush).unwrap();
        assert!(!flushes.lose(), "a flush has covered it");
    }

    #[test]
    fn a_flush_in_flight_covers_what_was_answered_before_it_and_no_more() {
        let flushes = Flushes::default();
        flushes.owe();
        let flush = flushes.begin().unwrap();
        flushes.owe();
        flushes.end(flush).unwrap();
        assert!(flushes.lose(), "the second write came after the flush");
        assert!(flushes.begin().is_err());
        let (one, other) = (flushes.begin().unwrap(), flushes.begin().unwrap());
        assert!(flushes.lose());
        assert!(flushes.end(one).is_err() && flushes.end(other).is_err());
        flushes.begin().unwrap();
    }
}
