//! Signals, with which a driver asks the graph from any thread to check its node.

use super::Error;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Tells the graph to look at a node. Its thread-safe half is the driver's.
pub struct Signal {
    raised: AtomicBool,
    event: EventFd,
}

impl Signal {
    pub fn new() -> Result<Arc<Signal>, Error> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let event = event.map_err(|e| Error::os("eventfd", e))?;
        Ok(Arc::new(Signal { raised: AtomicBool::new(false), event }))
    }

    /// There may be something to do, or the driver is gone.
    pub fn notify(&self) {
        self.raised.store(true, Ordering::SeqCst);
        // Full means that it is readable already.
        let _ = self.event.write(1);
    }

    /// Whether it was raised since [`Signal::take`].
    pub(super) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    /// The same, and clears it.
    pub(super) fn take(&self) -> bool {
        self.is_raised() && self.raised.swap(false, Ordering::SeqCst)
    }

    /// Arms the event for later signals. False if one has come already.
    pub(super) fn arm(&self) -> bool {
        // `raised` is set before it is written to, so what is read away here is seen.
        let _ = self.event.read();
        !self.is_raised()
    }

    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
