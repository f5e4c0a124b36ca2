//! The abilities of a driver, and its limits on requests.

/// What a driver can do and what its requests must look like. Constant but for changes of the nodes below it, which
/// are made while nothing is in flight ([`crate::block::current_traits`]).
///
/// Alignments are in bytes: those of transfers powers of two, those of zero and discard requests
/// multiples of `request_align`. Limits are in bytes, multiples of the alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Of offset and length of every read and write. At most 2 MiB.
    pub request_align: u32,
    /// Of each memory segment's address; its length is a multiple of this or of `request_align`,
    /// whichever is less.
    pub buffer_align: u32,
    /// Most bytes in one read or write.
    pub max_transfer: u32,
    /// Most memory segments in one read or write.
    pub max_segments: u32,
    /// Of offset and length of a zero request. At least `request_align`.
    pub zero_align: u32,
    pub max_zero: u64,
    /// Of offset and length of a discard. At least `request_align`.
    pub discard_align: u32,
    pub max_discard: u64,
    /// The size and alignment that writes should have to be quick (a physical block, a cluster).
    pub optimal_io: u32,
    pub abilities: Abilities,
}

bitflags::bitflags! {
    /// What a driver does natively; what is missing here, the node does another way or refuses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Abilities: u32 {
        /// [`Driver::zero`](super::Driver::zero).
        const ZERO = 1;
        /// [`Driver::zero`](super::Driver::zero) gives the space back when asked to ([`ZeroFlags::UNMAP`](super::ZeroFlags::UNMAP)).
        const ZERO_UNMAP = 1 << 1;
        /// [`Driver::discard`](super::Driver::discard), and the node is configured to pass it on (`discard=unmap`).
        const DISCARD = 1 << 2;
        /// [`WriteFlags::FUA`](super::WriteFlags::FUA) without a flush of everything.
        const FUA = 1 << 3;
        /// A discarded range reads as zeroes.
        const DISCARD_ZEROES = 1 << 4;
        /// Nothing can be written.
        const READ_ONLY = 1 << 5;
        /// Writing or zeroing past the end makes it longer ([`WriteFlags::GROW`](super::WriteFlags::GROW)); what was skipped
        /// reads as zeroes. Its [`Driver::map`](super::Driver::map) answers `Slow` for a write past the end.
        const GROW = 1 << 6;
    }
}

impl Default for Traits {
    /// A driver without limits or abilities, with QEMU's bounds on one request.
    fn default() -> Traits {
        Traits {
            request_align: 1,
            buffer_align: 1,
            max_transfer: Traits::MAX_TRANSFER,
            max_segments: 1024,
            zero_align: 1,
            max_zero: Traits::MAX_TRANSFER as u64,
            discard_align: 1,
            max_discard: Traits::MAX_TRANSFER as u64,
            optimal_io: 0,
            abilities: Abilities::empty(),
        }
    }
}

impl Traits {
    /// The most that one request may transfer anywhere: 2 GiB less a 64 KiB page, what the kernel
    /// takes in one read (MAX_RW_COUNT), rounded so that any alignment fits.
    pub const MAX_TRANSFER: u32 = 0x7fe0_0000;
}

/// The most memory that one request takes in a driver itself, not counting what stands below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// The size in bytes of a unit: writes that begin or end inside one copy the rest of it through memory. 0: there
    /// is none.
    pub copy_unit: u32,
    /// What any request may take beside that, in bytes.
    pub other: u32,
    /// Writes go through a buffer, whole.
    pub copies_writes: bool,
}
