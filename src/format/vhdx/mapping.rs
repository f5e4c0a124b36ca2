//! The mapping of blocks: the block allocation table ([MS-VHDX] 2.5).
//!
//! It is a flat table with an entry of 64 bits for each block, and one for a sector bitmap behind those of each
//! chunk.

use super::Vhdx;
use super::bytes::MIB;
use super::metadata::Geometry;
use crate::block::{Access, Child, Precision, Status};
use crate::cow::{
    Format, Found, Piece, Shape, TableCache, TableEntry, Tables, data, stored_status,
};
use crate::io::{Errno, IoResult};
use std::sync::atomic::Ordering;

/// Bytes of entries that are kept in memory at most, of 8 bytes for each block.
const CACHE: u64 = 32 << 20;
/// Entries that are read at once at most: 4 KiB.
const SLICE: u64 = 512;
pub const ENTRY_BYTES: u64 = 8;

/// An entry of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

/// What the lowest bits of an entry say of its block.
pub mod state {
    pub const NOT_PRESENT: u64 = 0;
    pub const UNDEFINED: u64 = 1;
    pub const ZERO: u64 = 2;
    pub const UNMAPPED: u64 = 3;
    /// Unmapped in version 0.95 of the specification.
    pub const UNMAPPED_OLD: u64 = 5;
    pub const PRESENT: u64 = 6;
    pub const PARTIAL: u64 = 7;
}

impl Entry {
    /// The block lies at this offset, whole MiB.
    pub fn present(host: u64) -> Entry {
        Entry(host | state::PRESENT)
    }

    pub fn state(self) -> u64 {
        self.0 & 7
    }

    /// Where the block is in the file, in bytes.
    pub fn host(self) -> u64 {
        self.0 & !(MIB - 1)
    }
}

impl TableEntry for Entry {
    fn from_words(first: u64, _: u64) -> Entry {
        Entry(first)
    }

    fn words(self) -> [u64; 2] {
        [self.0, 0]
    }
}

/// Why an entry makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    /// The state is reserved, or none of this kind of image.
    State,
    /// The block is past the end of the file, or over metadata.
    Place,
}

/// The mapping of an image that was just opened.
///
/// # Errors
/// There is not so much memory.
pub fn tables(geometry: &Geometry) -> IoResult<Tables<Entry>> {
    // A chunk counts as a table.
    let shape = Shape {
        cluster_bits: geometry.block_bits,
        table_bits: geometry.chunk_bits(),
        entry_bytes: ENTRY_BYTES,
    };
    let slice = SLICE.min(1 << geometry.chunk_bits());
    let all = geometry.blocks() * ENTRY_BYTES;
    Ok(Tables::new(shape, TableCache::new(all.min(CACHE), slice as usize, 1)?))
}

impl Format for Vhdx {
    type Entry = Entry;
    type Bad = BadEntry;

    fn tables(&self) -> &Tables<Entry> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    fn backing_child(&self) -> Option<&Child> {
        self.children.get(1)
    }

    fn has_table(&self, _: u64) -> bool {
        true
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let first = self.geometry().entry_of(self.first_of_slice(guest));
        Ok(self.regions.bat.offset + first * ENTRY_BYTES)
    }

    fn slice_len(&self, guest: u64) -> usize {
        let left = self.geometry().blocks().saturating_sub(self.first_of_slice(guest));
        left.min(self.mapping.cache.entries() as u64) as usize
    }

    fn parse(bytes: &[u8]) -> Entry {
        Entry(super::bytes::u64_at(bytes, 0))
    }

    fn decode(&self, entry: Entry, at: u64, want: u64) -> Result<Piece, BadEntry> {
        let found = match entry.state() {
            state::NOT_PRESENT => Found::Unallocated { host: None },
            state::UNDEFINED | state::ZERO | state::UNMAPPED | state::UNMAPPED_OLD => {
                Found::Zero { host: None }
            }
            state::PRESENT => {
                let host = self.check_place(entry)? + self.mapping.shape.offset_in_cluster(at);
                // No block is shared.
                Found::Data { host, exclusive: true }
            }
            state::PARTIAL if self.geometry().has_parent => {
                let inside = self.mapping.shape.offset_in_cluster(at);
                Found::Mixed { host: self.check_place(entry)? + inside }
            }
            _ => return Err(BadEntry::State),
        };
        Ok(Piece { len: want, found })
    }

    async fn sort_out(&self, at: u64, want: u64, host: u64) -> IoResult<Piece> {
        self.sort_out_partial(at, want, host).await
    }

    fn bad_entry(&self, at: u64, entry: Entry, bad: BadEntry, _: Access) -> Errno {
        let (state, host) = (entry.state(), entry.host());
        match bad {
            BadEntry::State => {
                self.report(format_args!("the block of guest offset {at:#x} has the state {state}"));
            }
            BadEntry::Place => self.report(format_args!(
                "the block of guest offset {at:#x} is said to be at {host:#x} of a file of {:#x} bytes",
                self.file_len()
            )),
        }
        Errno::EIO
    }

    fn table_outside(&self, offset: u64) -> Errno {
        self.report(format_args!(
            "the block allocation table at {offset:#x} is past the end of the file"
        ));
        Errno::EIO
    }

    /// The blocks of a fixed image are there before they are written, and may be holes.
    async fn data_status(
        &self,
        host: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<(u64, Status)> {
        match self.metadata.is_fixed && precision != Precision::Allocation {
            true => stored_status(&data(self), host, len, precision).await,
            false => Ok((len, Status::DATA | Status::ALLOCATED)),
        }
    }
}

impl Vhdx {
    /// The first block of the slice that has a guest offset's entry.
    fn first_of_slice(&self, guest: u64) -> u64 {
        let entries = self.mapping.cache.entries() as u64;
        (guest >> self.geometry().block_bits) & !(entries - 1)
    }

    /// Where the block of a present entry is, if that can be.
    pub(super) fn check_place(&self, entry: Entry) -> Result<u64, BadEntry> {
        let (host, len) = (entry.host(), self.geometry().block_size());
        match self.layout.has_room(host, len, self.file_len()) {
            true => Ok(host),
            false => Err(BadEntry::Place),
        }
    }

    /// Where the file ends, as far as entries may lead, in bytes. No lock.
    pub(super) fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    /// Logs the first thing in the tables that makes no sense: a guest must not fill the log.
    pub(super) fn report(&self, what: std::fmt::Arguments<'_>) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            log::info!("{}: vhdx: {what}; check the image", self.name);
        }
    }
}
