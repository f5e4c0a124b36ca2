//! What a worker can be asked to do: the operations on file descriptors, and whom to tell.

use super::{Errno, IoVec};
use std::os::fd::RawFd;

/// Who is told that an operation is done: a [`Source`](super::Source) of the worker, and a number of
/// the source's own choosing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    pub source: super::SourceId,
    pub tag: u32,
}

impl Token {
    /// The token as one number.
    pub fn to_bits(self) -> u64 {
        u64::from(self.source.0) << 32 | u64::from(self.tag)
    }

    /// The way back of [`Token::to_bits`].
    pub fn from_bits(bits: u64) -> Token {
        Token { source: super::SourceId((bits >> 32) as u32), tag: bits as u32 }
    }
}

/// One operation on a file descriptor.
///
/// Transfers are whole or they fail: the worker resubmits what a short transfer left, and fills what
/// lies past the end of the file with zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub fd: RawFd,
    pub kind: OpKind,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

#[derive(Clone, Copy, Debug)]
pub enum OpKind {
    /// The segments must stay mapped, and the list itself in place, until the completion.
    Read(Segments),
    /// `durable`: the data is on stable storage at the completion (RWF_DSYNC).
    Write(Segments, Durable),
    /// fdatasync.
    Fsync,
    /// fallocate with this mode.
    Fallocate(i32),
}

/// Whether a write is durable when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    Yes,
    No,
}

/// A borrowed list of segments whose lifetime the starter of the operation guards.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    pub(super) base: *const libc::iovec,
    pub(super) count: usize,
}

impl Segments {
    /// Takes the list by address. The starter keeps it in place until the operation has completed.
    pub fn new(list: &[libc::iovec]) -> Segments {
        Segments { base: list.as_ptr(), count: list.len() }
    }

    /// # Safety
    /// The list must still be in place.
    pub(super) unsafe fn as_slice<'a>(self) -> &'a [libc::iovec] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.base, self.count) }
    }
}

impl Op {
    pub fn read(fd: RawFd, offset: u64, into: &IoVec<'_>) -> Op {
        Op { fd, kind: OpKind::Read(Segments::new(into.as_raw())), offset, len: into.len() }
    }

    pub fn write(fd: RawFd, offset: u64, from: &IoVec<'_>, durable: Durable) -> Op {
        let kind = OpKind::Write(Segments::new(from.as_raw()), durable);
        Op { fd, kind, offset, len: from.len() }
    }

    pub fn fsync(fd: RawFd) -> Op {
        Op { fd, kind: OpKind::Fsync, offset: 0, len: 0 }
    }

    pub fn fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> Op {
        Op { fd, kind: OpKind::Fallocate(mode), offset, len }
    }
}

/// What starting an operation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// The token's source hears of the completion.
    Pending,
    /// It is done already; the source will not hear of it.
    Done(Result<(), Errno>),
}
