//! The life of an open image: whether it was prepared for writes, and whether it is frozen.

use std::sync::atomic::{AtomicBool, Ordering};

/// See the module's text.
#[derive(Default)]
pub struct Life {
    /// Somebody has begun to prepare it.
    is_begun: AtomicBool,
    /// What has to be on disk before the first write is.
    is_prepared: AtomicBool,
    /// Nothing is written any more ([`Driver::freeze`](crate::block::Driver::freeze)).
    is_frozen: AtomicBool,
}

impl Life {
    pub fn is_prepared(&self) -> bool {
        self.is_prepared.load(Ordering::Acquire)
    }

    /// Whether it is prepared, or being prepared.
    pub fn is_begun(&self) -> bool {
        self.is_begun.load(Ordering::SeqCst)
    }

    /// What has to be on disk before the first write is going to be written.
    pub fn begin(&self) {
        self.is_begun.store(true, Ordering::SeqCst);
    }

    /// What has to be on disk before the first write is.
    pub fn prepare(&self) {
        self.is_prepared.store(true, Ordering::Release);
    }

    /// Before the next write the image has to be prepared again.
    pub fn rest(&self) {
        self.is_prepared.store(false, Ordering::SeqCst);
        self.is_begun.store(false, Ordering::SeqCst);
    }

    pub fn is_frozen(&self) -> bool {
        self.is_frozen.load(Ordering::SeqCst)
    }

    pub fn freeze(&self) {
        self.is_frozen.store(true, Ordering::SeqCst);
    }

    pub fn thaw(&self) {
        self.is_frozen.store(false, Ordering::SeqCst);
    }
}
