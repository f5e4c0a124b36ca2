//! Storage whose length changes by itself, as a device's does, and how the graph hears of it.
//!
//! The graph follows such a node ([`Graph::open`](super::Graph::open)): when the driver tells that the
//! storage is longer or shorter, the node's users are paused, its new length is taken, and they are told,
//! as if somebody had resized it.

use super::Error;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Of a driver whose storage has a length of its own.
pub trait OwnLength: Send + Sync {
    /// What the driver tells of changes by, for as long as it is open.
    fn notice(&self) -> Arc<LengthNotice>;

    /// The length that the storage has now, in bytes: what [`Driver::len`](super::Driver::len) told
    /// last, or another.
    fn found(&self) -> u64;

    /// From now on `len` tells what `found` does. No request is in flight on the node.
    fn take(&self);
}

/// Tells the graph to look at a node's length. Its thread-safe half is the driver's.
pub struct LengthNotice {
    told: AtomicBool,
    event: EventFd,
}

impl LengthNotice {
    pub fn new() -> Result<Arc<LengthNotice>, Error> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let event = event.map_err(|e| Error::os("eventfd", e))?;
        Ok(Arc::new(LengthNotice { told: AtomicBool::new(false), event }))
    }

    /// The length may have changed, or the driver is gone.
    pub fn tell(&self) {
        self.told.store(true, Ordering::SeqCst);
        // Full means that it is readable already.
        let _ = self.event.write(1);
    }

    /// Whether it was told since [`LengthNotice::take`].
    pub(super) fn is_told(&self) -> bool {
        self.told.load(Ordering::SeqCst)
    }

    /// The same, and it is heard now.
    pub(super) fn take(&self) -> bool {
        self.is_told() && self.told.swap(false, Ordering::SeqCst)
    }

    /// Makes the event tell of what comes from now on. False if something has come already.
    pub(super) fn arm(&self) -> bool {
        // `told` is set before it is written to, so what is read away here is seen.
        let _ = self.event.read();
        !self.is_told()
    }

    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
