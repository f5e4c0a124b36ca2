//! Events for the thread that serves front ends: a resize, or a reason to check again.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// A pending resize event and a wake-up. It outlives connections: an event that one front end missed reaches the
/// next.
pub struct ServerEvents {
    resized: AtomicBool,
    wake: EventFd,
}

impl ServerEvents {
    /// None yet.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new() -> std::io::Result<ServerEvents> {
        let wake = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        Ok(ServerEvents { resized: AtomicBool::new(false), wake })
    }

    /// The disk has another size from now on. Never waits.
    pub fn resized(&self) {
        self.resized.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Wakes the thread. Never waits.
    pub fn wake(&self) {
        let _ = self.wake.write(1);
    }

    /// Whether the front end must be notified of a resize.
    pub fn is_due(&self) -> bool {
        self.resized.load(Ordering::SeqCst)
    }

    /// Clears the resize: the front end is notified now.
    pub fn take(&self) {
        self.resized.store(false, Ordering::SeqCst);
    }

    /// Readable after a wake-up.
    pub fn descriptor(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Clears the wake-up.
    pub fn seen(&self) {
        let _ = self.wake.read();
    }
}
