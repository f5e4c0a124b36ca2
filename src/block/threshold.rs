//! The highest offset written to a node, and the event for a write beyond a threshold.
//!
//! The event is sent once, for management software that enlarges the storage of a growing disk.
//!
//! The fast path compares the end of a write with one value, the lesser of both marks. The value changes only when
//! the disk is written beyond all earlier writes.

use super::{Node, Notice};
use std::sync::atomic::{AtomicU64, Ordering};

/// No write goes beyond it.
const NONE: u64 = u64::MAX;

pub(super) struct WriteMarks {
    /// The lesser of both. A write up to it changes nothing.
    least: AtomicU64,
    /// Where the write that went furthest has ended.
    highest: AtomicU64,
    threshold: AtomicU64,
}

/// QEMU's event BLOCK_WRITE_THRESHOLD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThresholdExceeded {
    /// The node's name.
    pub node: String,
    /// Bytes.
    pub threshold: u64,
    /// By how many bytes.
    pub exceeded: u64,
}

impl Default for WriteMarks {
    fn default() -> WriteMarks {
        let (least, highest) = Default::default();
        WriteMarks { least, highest, threshold: AtomicU64::new(NONE) }
    }
}

impl WriteMarks {
    /// Takes over the marks of a node whose place this one takes.
    pub fn continue_from(&self, old: &WriteMarks) {
        for (new, old) in [(&self.highest, &old.highest), (&self.threshold, &old.threshold)] {
            new.store(old.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        self.settle();
    }

    /// Whether a write may end there without an event. Notes it if it is the furthest.
    #[inline]
    pub fn allows(&self, end: u64) -> bool {
        end <= self.least.load(Ordering::Relaxed) || self.raise(end)
    }

    #[cold]
    fn raise(&self, end: u64) -> bool {
        self.highest.fetch_max(end, Ordering::SeqCst);
        self.settle();
        end <= self.threshold.load(Ordering::SeqCst)
    }

    /// Updates `least`. Each change of a mark is followed by a call of this; the last of them sees what all have
    /// changed.
    fn settle(&self) {
        let least = || {
            let highest = self.highest.load(Ordering::SeqCst);
            highest.min(self.threshold.load(Ordering::SeqCst))
        };
        let mut now = least();
        loop {
            self.least.store(now, Ordering::SeqCst);
            match least() {
                same if same == now => return,
                other => now = other,
            }
        }
    }

    /// Takes the threshold away if a write that ends there goes beyond it.
    fn take(&self, end: u64) -> Option<u64> {
        let threshold = self.threshold.load(Ordering::SeqCst);
        let order = Ordering::SeqCst;
        let is_beyond = threshold != NONE && end > threshold;
        if !is_beyond || self.threshold.compare_exchange(threshold, NONE, order, order).is_err() {
            return None;
        }
        self.settle();
        Some(threshold)
    }
}

impl Node {
    /// Reports the first write from now on that goes beyond `threshold` (in bytes); 0 reports none.
    pub fn set_write_threshold(&self, threshold: u64) {
        let value = if threshold == 0 { NONE } else { threshold };
        self.marks().threshold.store(value, Ordering::SeqCst);
        self.marks().settle();
    }

    /// Bytes; 0 if there is none.
    pub fn write_threshold(&self) -> u64 {
        match self.marks().threshold.load(Ordering::Relaxed) {
            NONE => 0,
            threshold => threshold,
        }
    }

    /// Where the write that went furthest has ended, in bytes; 0 if there was none.
    pub fn write_highest(&self) -> u64 {
        self.marks().highest.load(Ordering::Relaxed)
    }

    /// A write to this range is about to begin.
    pub(super) fn mark_write(&self, at: u64, len: u64) {
        let end = at.saturating_add(len);
        if self.marks().allows(end) {
            return;
        }
        if let Some(threshold) = self.marks().take(end) {
            let node = self.name().to_owned();
            let exceeded = end - threshold;
            self.notices().notify(Notice::Exceeded(ThresholdExceeded {
                node,
                threshold,
                exceeded,
            }));
        }
    }
}
