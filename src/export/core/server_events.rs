//! Events for the thread that serves front ends: a resize, or a reason to check again.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// What front ends are still to be told. Outlives connections: the next one is told what the one before it was
/// not.
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

    /// There is something new to look at. Never waits.
    pub fn wake(&self) {
        let _ = self.wake.write(1);
    }

    /// Whether a front end is to be told of the size.
    pub fn is_due(&self) -> bool {
        self.resized.load(Ordering::SeqCst)
    }

    /// The front end is told now.
    pub fn take(&self) {
        self.resized.store(false, Ordering::SeqCst);
    }

    /// Readable once there is something new.
    pub fn descriptor(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// What has made the descriptor readable is seen.
    pub fn seen(&self) {
        let _ = self.wake.read();
    }
}
