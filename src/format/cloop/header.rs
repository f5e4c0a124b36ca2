//! The header of a cloop image, version 2.0.
//!
//! A script of 128 bytes, which mounts the image, comes first; then the size and the number of the blocks, big-
//! endian; then the offset of each block and the end of the last.

use crate::block::{Error, SECTOR};

/// How a script begins: what follows differs between programs that made one.
const SCRIPT: &[u8] = b"#!/bin/sh\n#V2.0 Format\n";
/// Where the fields are.
pub const FIELDS_AT: u64 = 128;
pub const FIELDS_LEN: usize = 8;
/// Where the offsets are.
pub const OFFSETS_AT: u64 = FIELDS_AT + FIELDS_LEN as u64;

/// Bytes of a block at most.
const MAX_BLOCK: u32 = 64 << 20;
/// Bytes of a packed block at most.
const MAX_PACKED: u64 = 2 * MAX_BLOCK as u64;
/// Bytes of all offsets at most: 512 GiB in blocks of 64 KiB.
const MAX_OFFSETS: u64 = 64 << 20;

/// The fields, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub block_size: u32,
    pub blocks: u32,
}

impl Header {
    /// Whether a file that begins so is meant to be an image of this format.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(SCRIPT)
    }

    /// Reads the fields. `file_len`: of the file, in bytes.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn parse(bytes: &[u8; FIELDS_LEN], file_len: u64) -> Result<Header, Error> {
        let u32_at = |at: usize| u32::from_be_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
        let (block_size, blocks) = (u32_at(0), u32_at(4));
        let refused = |text: String| Err(Error::new(text));
        if block_size == 0 {
            return refused("block_size cannot be zero".to_owned());
        }
        if !u64::from(block_size).is_multiple_of(SECTOR) {
            return refused(format!("block_size {block_size} must be a multiple of 512"));
        }
        if block_size > MAX_BLOCK {
            return refused(format!("block_size {block_size} must be 64 MB or less"));
        }
        let header = Header { block_size, blocks };
        if header.offsets_len() > MAX_OFFSETS {
            return refused(
                "image requires too many offsets, try increasing block size".to_owned(),
            );
        }
        let end = OFFSETS_AT + header.offsets_len();
        if end > file_len {
            return refused(format!(
                "the offsets of {blocks} blocks end at {end:#x}, past the end of the file ({file_len:#x})"
            ));
        }
        Ok(header)
    }

    /// Bytes of the offsets.
    pub fn offsets_len(&self) -> u64 {
        (u64::from(self.blocks) + 1) * 8
    }

    /// The length of the disk, in bytes.
    pub fn size(&self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_size)
    }

    /// Checks where blocks begin and end.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_offsets(offsets: &[u64]) -> Result<(), Error> {
        for (index, pair) in (1..).zip(offsets.windows(2)) {
            let what = match pair[1].checked_sub(pair[0]) {
                None => "offsets not monotonically increasing",
                Some(len) if len > MAX_PACKED => "invalid compressed block size",
                Some(_) => continue,
            };
            return Err(Error::new(format!("{what} at index {index}, image file is corrupt")));
        }
        Ok(())
    }
}
