//! The mapping of a sparse extent: a grain directory in memory, and grain tables.
//!
//! Offsets of the guest count from the beginning of the extent.

use super::layout::{Kind, Layout, Packing};
use super::shared::Shared;
use crate::block::{Access, Child, SECTOR};
use crate::cow::{
    Compressed, FileEnd, Format, Found, Lock, Piece, Shape, TableCache, TableEntry, Tables,
    TopEntry, TopTable,
};
use crate::io::{Errno, IoResult, IoVec};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Bytes of grain tables that are read at once.
const SLICE: u64 = 4096;

/// An entry of the grain directory as it is stored; 0 names no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableAt(pub u64);

/// An entry of a grain table as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grain(pub u64);

impl Grain {
    /// It reads as zeroes, in extents whose header says so.
    pub const ZERO: Grain = Grain(1);
}

/// An entry that leads to no place where a grain can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEntry;

impl TopEntry for TableAt {
    fn from_word(word: u64) -> TableAt {
        TableAt(word)
    }

    fn word(self) -> u64 {
        self.0
    }
}

impl TableEntry for Grain {
    fn from_words(first: u64, _: u64) -> Grain {
        Grain(first)
    }

    fn words(self) -> [u64; 2] {
        [self.0, 0]
    }
}

/// An open sparse extent.
pub struct Sparse {
    pub shared: Arc<Shared>,
    /// Its number among the extents of the disk, and the child that it is in.
    pub number: usize,
    pub child: usize,
    /// Where it begins in the disk.
    pub start: u64,
    pub layout: Layout,
    pub directory: TopTable<TableAt>,
    /// The copy of the directory, if there is one.
    pub copies: Option<TopTable<TableAt>>,
    /// Held while an entry of the directory changes.
    pub lock: Lock<()>,
    pub mapping: Tables<Grain>,
    pub space: FileEnd,
    /// What the file had when the image was opened, as `space` counts: a killed process may have left some of it that
    /// nothing names. Zero when that has been looked for.
    pub end_at_opening: AtomicU64,
    /// The file may be written.
    pub is_ready: AtomicBool,
}

/// A number as it is stored, in four bytes or eight.
pub fn stored_number(bytes: &[u8]) -> u64 {
    let long = bytes.first_chunk().map(|entry| u64::from_le_bytes(*entry));
    let short = || bytes.first_chunk().map(|entry| u64::from(u32::from_le_bytes(*entry)));
    long.or_else(short).unwrap_or(0)
}

/// The mapping of an extent that was just opened, of whose tables at most so many bytes are kept.
///
/// # Errors
/// There is not so much memory.
pub fn tables(layout: &Layout, most: u64) -> IoResult<Tables<Grain>> {
    let shape = Shape {
        cluster_bits: layout.grain_bits,
        table_bits: layout.table_bits,
        entry_bytes: layout.entry_bytes(),
    };
    let grains = layout.capacity.div_ceil(layout.grain_size());
    let slice = SLICE.min(layout.table_bytes()) / shape.entry_bytes;
    Ok(Tables::new(shape, TableCache::new(most.min(grains * 8).max(1), slice as usize, 1)?))
}

impl Format for Sparse {
    type Entry = Grain;
    type Bad = BadEntry;

    fn tables(&self) -> &Tables<Grain> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.shared.children[self.child]
    }

    fn data_child(&self) -> (usize, &Child) {
        (self.child, self.file_child())
    }

    fn backing_child(&self) -> Option<&Child> {
        self.shared.backing_child()
    }

    fn backing_start(&self) -> u64 {
        self.start
    }

    fn has_table(&self, guest: u64) -> bool {
        self.directory.get(self.mapping.shape.table_index(guest)) != TableAt(0)
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let entry = self.directory.get(self.mapping.shape.table_index(guest));
        match self.place_of_table(entry) {
            Some(table) => Ok(table + self.mapping.slice_in_table(guest)),
            None => Err(self.bad_place(guest, "grain table", entry.0)),
        }
    }

    fn parse(bytes: &[u8]) -> Grain {
        Grain(stored_number(bytes))
    }

    fn decode(&self, entry: Grain, at: u64, want: u64) -> Result<Piece, BadEntry> {
        let found = match self.place_of_grain(entry)? {
            Stored::Absent => Found::Unallocated { host: None },
            Stored::Zero => Found::Zero { host: None },
            Stored::At(host) if self.layout.packing != Packing::No => {
                Found::Compressed(Compressed { host, len: self.packed_limit() })
            }
            Stored::At(host) => Found::Data {
                host: host + self.mapping.shape.offset_in_cluster(at),
                exclusive: self.is_inside(host),
            },
        };
        Ok(Piece { len: want, found })
    }

    fn bad_entry(&self, at: u64, entry: Grain, _: BadEntry, _: Access) -> Errno {
        self.bad_place(at, "grain", entry.0)
    }

    fn table_outside(&self, offset: u64) -> Errno {
        let extent = self.number;
        self.shared.report(format_args!(
            "the grain table at {offset:#x} of extent {extent} is past the end of its file"
        ));
        Errno::EIO
    }

    async fn read_compressed(&self, at: u64, place: Compressed, into: &IoVec<'_>) -> IoResult {
        self.read_packed(at, place, into).await
    }
}

/// What an entry says of its grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    Absent,
    Zero,
    /// At this offset of the file.
    At(u64),
}

/// What the upper bits of the entries of a seSparse extent say.
mod se {
    pub const TABLE: u64 = 1 << 28;
    pub const UNMAPPED: u64 = 1;
    pub const ZERO: u64 = 2;
    pub const STORED: u64 = 3;
}

impl Sparse {
    /// Where a grain table is in the file; none where none can be.
    pub fn place_of_table(&self, TableAt(entry): TableAt) -> Option<u64> {
        let place = match self.layout.kind {
            Kind::Hosted | Kind::Cowd => entry * SECTOR,
            Kind::SeSparse if entry >> 32 != se::TABLE => return None,
            Kind::SeSparse => {
                let offset = (entry & u64::from(u32::MAX)) * self.layout.table_bytes();
                self.layout.se.tables.checked_add(offset)?
            }
        };
        let end = place.checked_add(self.layout.table_bytes())?;
        (place >= SECTOR && i64::try_from(end).is_ok()).then_some(place)
    }

    pub fn place_of_grain(&self, Grain(entry): Grain) -> Result<Stored, BadEntry> {
        let host = match self.layout.kind {
            _ if entry == 0 => return Ok(Stored::Absent),
            Kind::Hosted if entry == 1 && self.layout.has_zero_grains => return Ok(Stored::Zero),
            Kind::Hosted | Kind::Cowd => entry * SECTOR,
            Kind::SeSparse => match entry >> 60 {
                se::UNMAPPED | se::ZERO => return Ok(Stored::Zero),
                se::STORED => {
                    let low = entry >> 48 & 0xfff;
                    let number = low | (entry & 0xffff_ffff_ffff) << 12;
                    let place = number.checked_mul(self.layout.grain_size());
                    let place = place.and_then(|place| place.checked_add(self.layout.se.grains));
                    place.ok_or(BadEntry)?
                }
                _ => return Err(BadEntry),
            },
        };
        let end = host.checked_add(self.layout.grain_size());
        let can_be =
            host >= self.layout.data_start && end.is_some_and(|end| i64::try_from(end).is_ok());
        if can_be { Ok(Stored::At(host)) } else { Err(BadEntry) }
    }

    /// Whether the grain at an offset lies in the file. What lies behind it, in images that were not closed, reads as
    /// zeroes, and may be given to another grain: it is not written in place.
    pub fn is_inside(&self, host: u64) -> bool {
        host + self.layout.grain_size() <= self.file_len()
    }

    /// Bytes that are the guest's.
    pub fn len(&self) -> u64 {
        self.layout.capacity
    }

    /// Reports what an entry names at an offset of the extent.
    fn bad_place(&self, at: u64, what: &str, entry: u64) -> Errno {
        self.shared.report(format_args!(
            "the entry {entry:#x} of the {what} at offset {at:#x} of extent {} leads to no place where one can be",
            self.number
        ));
        Errno::EIO
    }
}
