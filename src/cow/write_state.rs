//! Whether a mapping may be changed.
//!
//! Every request that changes the mapping reads it. It changes only when a write of tables fails, or when
//! something else has changed the file.

use std::sync::atomic::{AtomicU8, Ordering};

/// Why writes are refused.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// They are not refused.
    Not,
    /// The disk may have another state of many tables than readers were shown. A flush, or the next write,
    /// writes these tables again first.
    NeedsFlush,
    /// What is in memory no longer matches the file, until it is opened again.
    ForGood,
}

/// A [`Stop`] that threads share.
pub struct Stopped(AtomicU8);

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
