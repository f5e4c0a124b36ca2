//! How an open image stands: what the disk has of the header, and whether anything may be written.
//!
//! Both are looked at by every request that changes the mapping, and change only when a write of
//! metadata fails.

use std::sync::atomic::{AtomicU8, Ordering};

/// What the disk has of the header that is in memory.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisk {
    /// The same.
    Same,
    /// That, or the one before: it is written again before anything relies on it.
    InDoubt,
}

/// Why nothing is written.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// It is.
    Not,
    /// Of many L2 tables the disk may have another state than readers were shown: until all are
    /// written once more, by a flush or by whoever wants to write next.
    Doubts,
    /// What is in memory is not what is in the file any more, until it is opened again.
    ForGood,
}

/// An [`OnDisk`] that threads share.
pub struct HeaderState(AtomicU8);

/// A [`Stop`] that threads share.
pub struct Stopped(AtomicU8);

impl Default for HeaderState {
    fn default() -> HeaderState {
        HeaderState(AtomicU8::new(OnDisk::Same as u8))
    }
}

impl HeaderState {
    pub fn get(&self) -> OnDisk {
        match self.0.load(Ordering::SeqCst) {
            n if n == OnDisk::Same as u8 => OnDisk::Same,
            _ => OnDisk::InDoubt,
        }
    }

    pub fn set(&self, state: OnDisk) {
        self.0.store(state as u8, Ordering::SeqCst);
    }
}

impl Default for Stopped {
    fn default() -> Stopped {
        Stopped(AtomicU8::new(Stop::Not as u8))
    }
}

impl Stopped {
    pub fn get(&self) -> Stop {
        match self.0.load(Ordering::Acquire) {
            n if n == Stop::Not as u8 => Stop::Not,
            n if n == Stop::Doubts as u8 => Stop::Doubts,
            _ => Stop::ForGood,
        }
    }

    /// Stops, unless it is stopped for longer.
    pub fn stop(&self, stop: Stop) {
        self.0.fetch_max(stop as u8, Ordering::SeqCst);
    }

    /// There are no doubts any more.
    pub fn go_on(&self) {
        let (doubts, not) = (Stop::Doubts as u8, Stop::Not as u8);
        // Where it is stopped for good it stays so.
        let _ = self.0.compare_exchange(doubts, not, Ordering::SeqCst, Ordering::SeqCst);
    }
}
