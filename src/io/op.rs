//! Operations: the one type for requests to a leaf, work in flight on a worker, and entries of a ring.
//!
//! A descriptor and a number that names the caller travel beside it: a leaf knows its own descriptor,
//! and each layer has a number of its own kind.

use super::{Errno, IoVec};

/// The receiver of a completion: a [`Source`](super::Source) of the worker, and a number of the source's own
/// choosing.
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

/// One operation on a file descriptor, or on a leaf of the block graph.
///
/// A worker's reads and writes are whole or they fail: it asks again for what a short transfer left, and fills what
/// is past the end of the file with zeroes. A ring carries out an operation once, and may do a part of it.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Reads from `offset` bytes on.
    Read { offset: u64, segments: Segments },
    /// Writes from `offset` bytes on.
    Write { offset: u64, segments: Segments, durable: Durable },
    /// fdatasync.
    Fsync,
    /// fallocate with this mode, in bytes.
    Fallocate { mode: i32, offset: u64, len: u64 },
    /// Sends on a socket: all of it or a part, which the completion tells. Without SIGPIPE.
    Send { segments: Segments },
    /// Receives from a socket what is there, once there is something; nothing at the end of the stream.
    Receive { segments: Segments },
    /// Completes when the descriptor has, or gets, one of these events (poll(2)), and tells which. `many`:
    /// whenever it gets one, again and again.
    Poll { events: u32, many: bool },
    /// Cancels the operation that carries this user data, if it still can be: that completes with
    /// ECANCELED then.
    Cancel(u64),
}

impl Op {
    /// Completes when the descriptor is, or becomes, readable.
    pub const POLL_ONCE: Op = Op::Poll { events: libc::POLLIN as u32, many: false };
    /// Completes whenever the descriptor becomes readable.
    pub const POLL_MANY: Op = Op::Poll { events: libc::POLLIN as u32, many: true };

    /// Whether it waits for another party, perhaps forever, and can be cancelled at any time.
    pub(super) fn waits(&self) -> bool {
        matches!(self, Op::Send { .. } | Op::Receive { .. } | Op::Poll { .. })
    }
}

/// Whether a write is durable when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// The data is on stable storage at the completion (RWF_DSYNC).
    Yes,
    No,
}

/// A borrowed list of memory segments whose lifetime the starter of the operation guards.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    base: *const libc::iovec,
    count: usize,
    len: u64,
}

impl Segments {
    /// Takes the list by address; it has `len` bytes. The starter keeps the list in place, and the memory
    /// that it names mapped, until the operation has completed.
    pub fn new(list: &[libc::iovec], len: u64) -> Segments {
        debug_assert_eq!(list.iter().map(|segment| segment.iov_len as u64).sum::<u64>(), len);
        Segments { base: list.as_ptr(), count: list.len(), len }
    }

    /// The bytes of all segments together.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks for an empty transfer")]
    pub fn len(self) -> u64 {
        self.len
    }

    /// # Safety
    /// The list must still be in place.
    pub unsafe fn as_slice<'a>(self) -> &'a [libc::iovec] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.base, self.count) }
    }
}

impl From<&IoVec<'_>> for Segments {
    fn from(list: &IoVec<'_>) -> Segments {
        Segments::new(list.as_raw(), list.len())
    }
}

/// What starting an operation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// The token's source is notified of the completion.
    Pending,
    /// It is done already; the source will not be notified of it.
    Done(Result<(), Errno>),
}
