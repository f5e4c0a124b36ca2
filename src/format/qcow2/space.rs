//! The space of an open image: host clusters, from being free to being free again.

use super::alloc::Pool;
use super::holes::Holes;
use super::packed::Packing;
use super::refcounts::Refcounts;
use super::take_back::TakingBack;
use crate::cow::{Freed, Lock};
use crate::io::sync::Mutex;
use std::sync::Arc;

/// See the module's text. Locks that are held across waits are taken in the order of the fields.
pub struct Space {
    /// Held while compressed clusters are given their places.
    pub packing: Lock<Packing>,
    /// None when the image is read-only.
    pub counts: Option<Arc<Lock<Refcounts>>>,
    /// Reserved clusters.
    pub pool: Mutex<Pool>,
    /// Clusters that entries no longer name.
    pub freed: Freed,
    pub holes: Holes,
    /// Whether a killed process has left clusters counted and unused.
    pub taking_back: TakingBack,
    /// Refcount blocks that are kept in memory, in bytes.
    pub cache_bytes: u64,
}

impl Space {
    pub fn new(counts: Option<Refcounts>, cache_bytes: u64) -> Space {
        Space {
            packing: Lock::new(Packing::default()),
            counts: counts.map(|counts| Arc::new(Lock::new(counts))),
            pool: Mutex::default(),
            freed: Freed::default(),
            holes: Holes::default(),
            taking_back: TakingBack::default(),
            cache_bytes,
        }
    }
}
