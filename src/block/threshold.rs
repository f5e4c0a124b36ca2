//! Write thresholds: who makes room for a disk on storage that grows is told when a write goes beyond an
//! offset, once.
//!
//! A fast request that would is sent to the slow road by [`WriteThreshold::allows`], one comparison with
//! a value that nearly never changes; there it is told.

use super::{Node, Notice};
use std::sync::atomic::{AtomicU64, Ordering};

/// No write goes beyond it.
const NONE: u64 = u64::MAX;

pub(super) struct WriteThreshold(AtomicU64);

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

impl Default for WriteThreshold {
    fn default() -> WriteThreshold {
        WriteThreshold(AtomicU64::new(NONE))
    }
}

impl WriteThreshold {
    /// Whether a write may end there without anything to be told.
    pub fn allows(&self, end: u64) -> bool {
        end <= self.0.load(Ordering::Relaxed)
    }

    /// Takes the threshold away if a write that ends there goes beyond it.
    fn take(&self, end: u64) -> Option<u64> {
        let threshold = self.0.load(Ordering::Relaxed);
        let is_beyond = threshold != NONE && end > threshold;
        let (once, gone) = (Ordering::SeqCst, Ordering::Relaxed);
        (is_beyond && self.0.compare_exchange(threshold, NONE, once, gone).is_ok())
            .then_some(threshold)
    }
}

impl Node {
    /// Has the first write tell that goes beyond `threshold` (in bytes) from now on; 0 has none tell.
    pub fn set_write_threshold(&self, threshold: u64) {
        let value = if threshold == 0 { NONE } else { threshold };
        self.threshold().0.store(value, Ordering::SeqCst);
    }

    /// Bytes; 0 if there is none.
    pub fn write_threshold(&self) -> u64 {
        match self.threshold().0.load(Ordering::Relaxed) {
            NONE => 0,
            threshold => threshold,
        }
    }

    /// A write to this range is about to begin.
    pub(super) fn tell_threshold(&self, at: u64, len: u64) {
        let end = at.saturating_add(len);
        if self.threshold().allows(end) {
            return;
        }
        if let Some(threshold) = self.threshold().take(end) {
            let node = self.name().to_owned();
            let exceeded = end - threshold;
            self.notices().tell(Notice::Exceeded(ThresholdExceeded { node, threshold, exceeded }));
        }
    }
}
