//! Virtqueues in the guest's memory, as their device sees them.
//!
//! A queue is generic over the layout of its ring: each layout is a type of its own, and no call of the data path
//! is dynamic.

pub mod split;

pub use split::SplitRing;

use super::dirty_log::DirtyLog;
use super::inflight::Region;
use super::memory::Memory;
use std::sync::Arc;

/// Entries at most, of a ring or an indirect table; QEMU's limit too.
pub const MAX_SIZE: u16 = 1024;

/// A ring in use. A chain is known by its head, a number below the ring's size.
pub trait Ring: Sized + Send + 'static {
    /// A place in the ring.
    type Index: Copy + Send + 'static;

    /// Where chains in flight are tracked.
    type Tracker: Tracking<Index = Self::Index>;

    /// A ring at these addresses. `size` is a power of two up to [`MAX_SIZE`]; `base` is where to take the next
    /// chain. Goes on handing back where the guest sees it end.
    ///
    /// # Errors
    /// It cannot be there.
    fn new(
        memory: &Arc<Memory>,
        size: u16,
        at: Addresses,
        base: Self::Index,
        event_index: bool,
    ) -> Result<Self, String>;

    /// Where the next chain is taken.
    fn next_available(&self) -> Self::Index;

    /// What the guest sees handed back ends here.
    fn published(&self) -> Self::Index;

    /// Our stores to the ring are marked at this guest address from now on, or no more. Those
    /// of the past may not have been: all of it is marked at the beginning.
    fn set_log(&mut self, log: Option<(Arc<DirtyLog>, u64)>);

    /// Continues after this many chains that were taken and not returned: the guest has made available what it sees
    /// handed back, then these, and then what is to be taken next.
    fn go_on_behind(&mut self, in_flight: u16);

    /// Whether the guest has made something available. Cheap, for spinning.
    fn has_work(&self) -> bool;

    /// How many chains the guest has made available.
    ///
    /// # Errors
    /// The guest breaks the rules, as with all that follows.
    fn available(&self) -> Result<u16, Broken>;

    /// Takes the next chain's head. `available` must have told of one.
    fn pop(&mut self) -> Result<u16, Broken>;

    /// Gathers a chain's memory: first what the device reads, then what it writes. Returns how many
    /// of the segments are the former.
    fn gather(
        &self,
        memory: &Memory,
        head: u16,
        list: &mut Vec<libc::iovec>,
    ) -> Result<usize, Broken>;

    /// Hands a chain back, `written` bytes of it written. The guest sees it after `publish`.
    fn push(&mut self, head: u16, written: u32);

    /// Makes all that was pushed visible.
    fn publish(&mut self);

    /// Whether the guest wants a notification of what was published since the last call.
    fn must_call(&mut self) -> bool;

    /// Asks for a kick at the next chain. False if one is there already.
    fn want_kick(&mut self) -> bool;

    /// Says that no kicks are needed.
    fn no_kick(&mut self);
}

/// One queue's requests in flight, written down where the next daemon finds them.
pub trait Tracking: Sized + Send + 'static {
    /// A place in the ring.
    type Index;

    /// Takes up the tracking of a queue whose ring has `ring_size` entries and has handed back up to
    /// `published`.
    ///
    /// # Errors
    /// The memory contradicts itself or the ring.
    fn recover(
        region: &Arc<Region>,
        queue: usize,
        ring_size: u16,
        published: Self::Index,
    ) -> Result<Self, String>;

    /// How many chains are still to be taken again.
    fn to_replay(&self) -> u16;

    /// The next chain to be taken again, in the order in which they were taken first. It is marked.
    fn replay(&mut self) -> Option<u16>;

    /// A chain was taken. Before its I/O begins.
    fn mark(&mut self, head: u16);

    /// A chain was handed back. Before the guest sees it.
    fn link(&mut self, head: u16);

    /// All that was linked is shown to the guest, up to here.
    fn settle(&mut self, published: Self::Index);
}

/// Where the three parts of a ring are, in the front end's address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// Why a queue must be stopped: what the guest did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The available index is further ahead than the ring is long.
    AvailableIndex {
        next: u16,
        index: u16,
    },
    Head(u16),
    /// A head that is still in flight was made available again.
    Busy(u16),
    Next {
        head: u16,
        next: u16,
    },
    /// More descriptors than the ring has, so there is a loop.
    TooLong {
        head: u16,
    },
    Address {
        head: u16,
        addr: u64,
        len: u32,
    },
    Indirect {
        head: u16,
        addr: u64,
        len: u32,
    },
    /// A part that the device reads comes after one that it writes.
    Order {
        head: u16,
    },
    /// No room for the status byte, or less than a header.
    Layout {
        head: u16,
    },
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Broken::AvailableIndex { next, index } => {
                write!(f, "available index {index} is out of range (next is {next})")
            }
            Broken::Head(head) => write!(f, "descriptor index {head} is outside the ring"),
            Broken::Busy(head) => write!(f, "descriptor {head} is in flight already"),
            Broken::Next { head, next } => {
                write!(f, "chain {head}: next descriptor {next} is outside the table")
            }
            Broken::TooLong { head } => write!(f, "chain {head}: looped or too long"),
            Broken::Address { head, addr, len } => {
                write!(f, "chain {head}: {len} bytes at {addr:#x} are not in the guest's memory")
            }
            Broken::Indirect { head, addr, len } => {
                write!(f, "chain {head}: bad indirect table of {len} bytes at {addr:#x}")
            }
            Broken::Order { head } => write!(f, "chain {head}: readable part after a writable one"),
            Broken::Layout { head } => write!(f, "chain {head}: too short for a block request"),
        }
    }
}
