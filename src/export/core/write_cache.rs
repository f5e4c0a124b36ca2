//! The write cache mode, as the front end and the guest set it.
//!
//! A guest sets it once, when its driver starts; front ends do not repeat it. So the choice outlives
//! the connection, and, in the memory that a front end keeps, the daemon.

use super::kept::Kept;
use std::sync::atomic::{AtomicBool, Ordering};

/// The write cache of a disk, across connections. Changed on control threads alone.
#[derive(Debug)]
pub struct WriteCache {
    on: AtomicBool,
    /// It was set in this process, which overrules any memory that comes later.
    is_set: AtomicBool,
}

impl Default for WriteCache {
    fn default() -> WriteCache {
        WriteCache { on: AtomicBool::new(true), is_set: AtomicBool::new(false) }
    }
}

impl WriteCache {
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// The guest has said so, or was reset.
    pub fn set(&self, on: bool, region: Option<&dyn Kept>) {
        self.on.store(on, Ordering::Relaxed);
        self.is_set.store(true, Ordering::Relaxed);
        if let Some(region) = region {
            region.set_write_cache(on);
        }
    }

    /// Memory has come. It may be from a daemon that has died, in which the guest had set it.
    pub fn meet(&self, region: &dyn Kept) {
        match region.write_cache() {
            Some(on) if !self.is_set.load(Ordering::Relaxed) => {
                self.on.store(on, Ordering::Relaxed);
            }
            _ => region.set_write_cache(self.is_on()),
        }
    }
}
