//! Guest memory for drivers whose devices access it directly.
//!
//! The code that maps a guest's memory admits it to the nodes that the guest's requests go to ([`Node::admit`]). It
//! is an offer: a driver serves requests on memory that was not admitted, or not yet, all the same, by copying.

use super::{Error, Node};
use std::any::Any;
use std::ptr::NonNull;

/// Mapped memory, shared with a guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestRegion {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length, for others to use under the promise that `new` was given.
unsafe impl Send for GuestRegion {}
// SAFETY: as above.
unsafe impl Sync for GuestRegion {}

impl GuestRegion {
    /// # Safety
    /// The memory stays mapped, readable and writable, until every [`Admission`] of it is dropped.
    pub unsafe fn new(base: *mut u8, len: usize) -> Option<GuestRegion> {
        Some(GuestRegion { base: NonNull::new(base)?, len })
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Memory that a device may reach until this is dropped, which blocks until it reaches it no more. The caller that
/// drops it has ensured that no request in flight names the memory.
pub type Admission = Box<dyn Any + Send + Sync>;

/// Of a driver whose device reaches memory itself.
pub trait DeviceMemory: Send + Sync {
    /// Lets the device reach a guest's memory: at once, soon, or in part.
    fn admit(&self, region: GuestRegion) -> Result<Admission, Error>;
}

impl Node {
    /// Admits a guest's memory to everything below the node. What a driver cannot do is told in the log, and costs
    /// copies.
    pub fn admit(&self, region: GuestRegion) -> Vec<Admission> {
        self.ask_all(|node| node.admit_own(region))
    }

    fn admit_own(&self, region: GuestRegion) -> Option<Admission> {
        let admitted = self.driver().memory()?.admit(region);
        admitted.inspect_err(|error| log::warn!("{}: {error}: data is copied", self.name())).ok()
    }
}
