//! Flags of requests, and the status of ranges.

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct WriteFlags: u32 {
        /// Durable at completion, the mapping of the bytes included.
        const FUA = 1;
        /// The bytes reach past the end, which moves. Set by the node, whatever its callers say.
        const GROW = 1 << 1;
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ZeroFlags: u32 {
        /// The space may be given back (deallocated).
        const UNMAP = 1;
        /// Fail with ENOTSUP rather than write out zeroes: only a quick way is wanted.
        const NO_FALLBACK = 1 << 1;
        /// Durable at completion.
        const FUA = 1 << 2;
        /// As [`WriteFlags::GROW`].
        const GROW = 1 << 3;
    }

    /// The status of a range ([`Driver::status`](super::Driver::status)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Status: u32 {
        /// The bytes are stored somewhere, and must be read to be known.
        const DATA = 1;
        /// The bytes read as zeroes.
        const ZERO = 1 << 1;
        /// This node decides what is read, not its backing file.
        const ALLOCATED = 1 << 2;
        /// Stored compressed: the offset is of no use to a reader.
        const COMPRESSED = 1 << 3;
    }
}

/// The status of the first `len` bytes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not zero, at most what was asked.
    pub len: u64,
    pub status: Status,
    /// Where the bytes are kept: the driver's child, and the offset in it. For a protocol, its own
    /// offset and no child.
    pub place: Option<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into [`Driver::children`](super::Driver::children); `None` for the node itself.
    pub child: Option<usize>,
    /// Bytes.
    pub offset: u64,
}

/// How much a status request may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Find out which parts read as zeroes, even if the file system has to be asked.
    Zeroes,
    /// Only tell whether this node or its backing file decides; data that is really a hole may be
    /// called data.
    Allocation,
}
