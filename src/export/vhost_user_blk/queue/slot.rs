//! Slots, the state of each request in flight.

use super::super::dirty_log::DirtyLog;
use super::super::memory::Memory;
use super::super::request::Kind;
use crate::io::epoch::Generation;
use crate::io::iovec;

#[derive(Default)]
pub(super) struct Slot {
    pub(super) busy: bool,
    /// It was held before.
    pub(super) again: bool,
    /// Looks of the watch since it was taken.
    pub(super) age: u8,
    /// For the recorder: when it was taken.
    pub(super) taken_at: u64,
    pub(super) kind: Option<Kind>,
    /// The chain's memory; for transfers, `data` of it is the data.
    pub(super) segments: Vec<libc::iovec>,
    /// Bytes that the device may read, the header included, and write, without the status.
    pub(super) readable: usize,
    pub(super) writable: usize,
    pub(super) data: (u32, u32),
    /// Bytes of data.
    pub(super) len: u32,
    pub(super) offset: u64,
    pub(super) status: Option<std::ptr::NonNull<u8>>,
    /// Of a request on the fast path.
    pub(super) generation: Option<Generation>,
}

impl Slot {
    /// Marks what the request has written to the guest's memory. How much of a failed read has
    /// landed is not known.
    #[cold]
    pub(super) fn mark(
        &self,
        log: &DirtyLog,
        memory: &Memory,
        status: std::ptr::NonNull<u8>,
        written: u32,
    ) {
        let data = || &self.segments[self.data.0 as usize..self.data.1 as usize];
        match self.kind {
            Some(Kind::In) => log.mark_segments(memory, data(), u64::MAX),
            Some(Kind::GetId) => log.mark_segments(memory, data(), written as u64),
            _ => {}
        }
        log.mark_segments(memory, &[iovec::iovec(status.as_ptr(), 1)], 1);
    }
}
