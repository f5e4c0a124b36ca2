//! Words that are zero again after they are freed, as in the product's pages.

use super::Errno;
use super::atomics::{AtomicU64, Ordering};
use std::ops::Range;

/// Small, so that a slice of the models fills one.
pub const PAGE: usize = 16;

pub struct Pages(Box<[AtomicU64]>);

impl Pages {
    /// # Errors
    /// None; the product's can fail.
    pub fn new(len: usize) -> Result<Pages, Errno> {
        Ok(Pages((0..len).map(|_| AtomicU64::new(0)).collect()))
    }

    pub fn words(&self) -> &[AtomicU64] {
        &self.0
    }

    pub fn give_back(&self, words: Range<usize>) {
        self.0[words].iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}
