//! The count of operations that use some memory: see [`super::lending`].

use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the operations that use some memory. Those that are forgotten stay in the count.
///
/// All that changes the count borrows the memory, so the owner of the memory sees the last change.
#[derive(Debug, Default)]
pub struct Lent(AtomicUsize);

impl Lent {
    /// Whether no operation uses the memory.
    #[inline]
    pub fn is_free(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    /// Says that the memory is to be used for something else now.
    ///
    /// # Panics
    /// An operation on it was forgotten.
    #[inline]
    pub fn check(&self) {
        assert!(self.is_free(), "an operation on this memory was forgotten, and may still use it");
    }

    pub(super) fn begin(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
