//! The fast path: mappings of guest offsets to leaves, and the start of transfers there.

use crate::block::Node;
use crate::io::{Durable, Io, Op, Segments, Started, Token};
use std::sync::Arc;

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    /// A write that is durable when it completes: only to be answered with `Data` where the mapping
    /// itself is durable, and by a leaf that has [`Abilities::FUA`](super::Abilities::FUA).
    DurableWrite,
}

impl Access {
    /// The operation that does this from `offset` on, with the memory of `segments`.
    #[inline]
    pub fn op(self, offset: u64, segments: Segments) -> Op {
        match self {
            Access::Read => Op::Read { offset, segments },
            Access::Write => Op::Write { offset, segments, durable: Durable::No },
            Access::DurableWrite => Op::Write { offset, segments, durable: Durable::Yes },
        }
    }
}

/// Where the first `len` bytes of a range live.
pub struct Mapping<'a> {
    /// Bytes, from the start of the range; not zero, and never more than was asked.
    pub len: u64,
    pub target: Target<'a>,
}

pub enum Target<'a> {
    /// At `offset` of a leaf, unchanged. The caller may start the transfer on the leaf directly.
    Data { leaf: &'a dyn Leaf, offset: u64 },
    /// Nowhere: the bytes read as zeroes.
    Zero,
    /// Unknown without I/O, locks or allocation: take the slow path.
    Slow,
}

/// The node below that decides, or none if the driver itself does; and for how many bytes.
pub type Decider = (Option<Arc<Node>>, u64);

/// One node's answer to a read on the fast path.
pub enum ReadMapping<'a> {
    Here(Mapping<'a>),
    /// The given number of bytes are the backing file's, at the same offset.
    Below(&'a Node, u64),
}

impl Mapping<'_> {
    pub fn slow(len: u64) -> Self {
        Mapping { len, target: Target::Slow }
    }
}

/// The bottom of the graph on the fast path: starts a transfer and comes back at once.
pub trait Leaf: Send + Sync {
    /// Starts a read or a write ([`Access::op`]) that obeys the traits of the leaf's node, at an offset
    /// in the leaf's own space. It is done as a whole or fails. What else an [`Op`] may ask for, it need
    /// not do (ENOTSUP).
    ///
    /// The source of `token` is notified of the completion, unless the answer is `Started::Done`.
    ///
    /// # Safety
    /// The list of segments stays in place, and the memory mapped, until the completion.
    unsafe fn start(&self, io: &Io, op: Op, token: Token) -> Started;
}
