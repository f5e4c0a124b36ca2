//! The NBD protocol as bytes: what both sides say to each other, without I/O.
//!
//! * This file: numbers of the protocol, and [`Malformed`].
//! * [`handshake`]: greetings, options and their replies. [`option`]: what options and their replies carry.
//! * [`request`]: headers of commands. [`reply`]: headers of replies, and what chunks carry.
//! * [`error`]: error numbers.
//!
//! All numbers are big-endian. Names of constants are those of the protocol document (proto.md) without their `NBD_`.
//! Nothing here allocates more than a small multiple of the bytes that it is given.

pub mod error;
mod fields;
pub mod handshake;
pub mod option;
pub mod reply;
pub mod request;

use bitflags::bitflags;
use std::fmt;

/// The port that IANA has assigned.
pub const PORT: u16 = 10809;

/// The longest name or message, in bytes.
pub const MAX_STRING: usize = 4096;
/// The longest option, and the longest reply to one, that is looked at, in bytes.
pub const MAX_OPTION: usize = 64 << 10;
/// The longest data of one request without an agreement on block sizes, in bytes.
pub const MAX_DATA: u32 = 32 << 20;
/// The least size that a server may demand is at most this, in bytes.
pub const MAX_MINIMUM_BLOCK: u32 = 64 << 10;
/// The preferred block size without an agreement, in bytes.
pub const PREFERRED_BLOCK: u32 = 4096;
/// Extents that one chunk of block status may have.
pub const MAX_EXTENTS: usize = 1 << 20;

bitflags! {
    /// What a server can do, as it says before options.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ServerFlags: u16 {
        const FIXED_NEWSTYLE = 1 << 0;
        /// It leaves out the 124 zeroes after an `EXPORT_NAME`, if the client asks for that.
        const NO_ZEROES = 1 << 1;
    }

    /// What a client takes up of it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        const FIXED_NEWSTYLE = 1 << 0;
        const NO_ZEROES = 1 << 1;
    }

    /// What an export is and can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ExportFlags: u16 {
        const HAS_FLAGS = 1 << 0;
        const READ_ONLY = 1 << 1;
        const SEND_FLUSH = 1 << 2;
        const SEND_FUA = 1 << 3;
        const ROTATIONAL = 1 << 4;
        const SEND_TRIM = 1 << 5;
        const SEND_WRITE_ZEROES = 1 << 6;
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers what was answered on all.
        const CAN_MULTI_CONN = 1 << 8;
        const SEND_RESIZE = 1 << 9;
        const SEND_CACHE = 1 << 10;
        const SEND_FAST_ZERO = 1 << 11;
        /// `BLOCK_STATUS` may name the contexts that are wanted.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// The flags of one command.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        const FUA = 1 << 0;
        /// Zeroes keep their space.
        const NO_HOLE = 1 << 1;
        /// The data of a read come in one chunk.
        const DF = 1 << 2;
        /// One extent of block status is enough.
        const REQ_ONE = 1 << 3;
        /// Zeroes are to fail rather than be written as data.
        const FAST_ZERO = 1 << 4;
        /// The length is that of the payload that follows, for extended headers.
        const PAYLOAD_LEN = 1 << 5;
    }

    /// The flags of one chunk of a reply.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// The last one of its reply.
        const DONE = 1 << 0;
    }

    /// What `base:allocation` says of an extent.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Allocation: u64 {
        const HOLE = 1 << 0;
        const ZERO = 1 << 1;
    }
}

/// The context of [`Allocation`].
pub const BASE_ALLOCATION: &str = "base:allocation";
/// QEMU's context of how deep in the backing chain data are; 0: nowhere.
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// QEMU's contexts of dirty bitmaps, before the bitmap's name. Bit 0 of an extent: dirty.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// How much the two sides have agreed on for requests and their replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Headers {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; replies of chunks, or simple ones where nothing is carried.
    Structured,
    /// Requests and chunks with lengths of 64 bits.
    Extended,
}

/// Bytes that are not what the protocol says; one line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(pub String);

impl Malformed {
    fn magic(what: &str, found: u64, wanted: u64) -> Malformed {
        Malformed(format!("{what} begins with {found:#x} and not with {wanted:#x}"))
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Malformed {}

/// A text for people, as long as it may be.
pub fn cut(text: &str) -> &str {
    let most = text.len().min(MAX_STRING);
    let at = (0..=most).rev().find(|&at| text.is_char_boundary(at));
    &text[..at.unwrap_or(0)]
}

#[cfg(test)]
mod random_tests;
