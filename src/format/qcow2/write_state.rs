//! Whether an open image may be written, and whether the disk has the header that is in memory.
//!
//! Every request that changes the mapping reads both. They change only when a write of metadata fails.

use std::sync::atomic::{AtomicU8, Ordering};

/// What the disk has of the header that is in memory.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisk {
    /// The same header.
    Same,
    /// This header or the previous one: it is written again before anything relies on it.
    InDoubt,
}

/// Why writes are refused.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// They are not refused.
    Not,
    /// The disk may have another state of many L2 tables than readers were shown. A flush, or the next
    /// write, writes these tables again first.
    NeedsFlush,
    /// What is in memory no longer matches the file, until it is opened again.
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
            n if n == Stop::NeedsFlush as u8 => Stop::NeedsFlush,
            _ => Stop::ForGood,
        }
    }

    /// Refuses writes; a stronger reason that is already set stays.
    pub fn stop(&self, stop: Stop) {
        self.0.fetch_max(stop as u8, Ordering::SeqCst);
    }

    /// All tables in doubt have been written again.
    pub fn flushed(&self) {
        let (needs_flush, not) = (Stop::NeedsFlush as u8, Stop::Not as u8);
        // A stop for good stays.
        let _ = self.0.compare_exchange(needs_flush, not, Ordering::SeqCst, Ordering::SeqCst);
    }
}
