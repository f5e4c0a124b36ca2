//! How an image maps a guest's clusters (specification, "Tables").

use super::Qed;
use super::header::Geometry;
use crate::block::{Access, Child};
use crate::cow::{Format, Found, Piece, Shape, TableCache, TableEntry, Tables, TopEntry};
use crate::io::{Errno, IoResult};
use std::sync::atomic::Ordering;

/// Bytes of L2 tables that are read at once.
const SLICE: u64 = 4096;
/// Bytes of L2 tables that are kept.
const CACHE: u64 = 32 << 20;

/// The offset of a table, or nothing.
pub(super) const UNALLOCATED: u64 = 0;
/// What an L2 entry says of a cluster that reads as zeroes.
pub(super) const ZERO: u64 = 1;

/// The offset of an L2 table in the file, or [`UNALLOCATED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

/// The offset of a cluster in the file, [`UNALLOCATED`] or [`ZERO`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry(pub u64);

/// An entry that is no offset of a cluster in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEntry;

impl TopEntry for L1Entry {
    fn from_word(word: u64) -> L1Entry {
        L1Entry(word)
    }

    fn word(self) -> u64 {
        self.0
    }
}

impl TableEntry for L2Entry {
    fn from_words(first: u64, _: u64) -> L2Entry {
        L2Entry(first)
    }

    fn words(self) -> [u64; 2] {
        [self.0, 0]
    }
}

/// Little-endian entries of a table.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).filter_map(|entry| entry.first_chunk()).map(|e| u64::from_le_bytes(*e))
}

/// Entries of an L1 table that a disk of any size needs at most.
pub(super) fn most_l1_entries(geometry: &Geometry) -> u64 {
    geometry.l1_entries(i64::MAX as u64).min(geometry.table_entries())
}

/// The mapping of an image that was just opened, of a disk of `size` bytes.
///
/// # Errors
/// There is not so much memory.
pub(super) fn tables(geometry: &Geometry, size: u64) -> IoResult<Tables<L2Entry>> {
    let shape = Shape {
        cluster_bits: geometry.cluster_bits,
        table_bits: geometry.table_entries().ilog2(),
        entry_bytes: 8,
    };
    let all = geometry.clusters(size) * shape.entry_bytes;
    let cache = TableCache::new(CACHE.min(all), (SLICE / shape.entry_bytes) as usize, 1)?;
    Ok(Tables::new(shape, cache))
}

impl Format for Qed {
    type Entry = L2Entry;
    type Bad = BadEntry;

    fn tables(&self) -> &Tables<L2Entry> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    fn backing_child(&self) -> Option<&Child> {
        self.children.get(1)
    }

    fn has_table(&self, guest: u64) -> bool {
        self.l1.get(self.mapping.shape.table_index(guest)) != L1Entry(UNALLOCATED)
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let L1Entry(table) = self.l1.get(self.mapping.shape.table_index(guest));
        match self.layout.has_room_for_table(table, self.file_len()) {
            true => Ok(table + self.mapping.slice_in_table(guest)),
            false => Err(self.bad_place(guest, "L2 table", table)),
        }
    }

    fn parse(bytes: &[u8]) -> L2Entry {
        L2Entry(bytes.first_chunk().map_or(UNALLOCATED, |entry| u64::from_le_bytes(*entry)))
    }

    fn decode(&self, entry: L2Entry, at: u64, want: u64) -> Result<Piece, BadEntry> {
        let found = match self.cluster_of(entry)? {
            None if entry.0 == ZERO => Found::Zero { host: None },
            None => Found::Unallocated { host: None },
            Some(host) => {
                // No cluster is ever shared.
                let host = host + self.mapping.shape.offset_in_cluster(at);
                Found::Data { host, exclusive: true }
            }
        };
        Ok(Piece { len: want, found })
    }

    fn bad_entry(&self, at: u64, entry: L2Entry, _: BadEntry, _: Access) -> Errno {
        self.bad_place(at, "cluster", entry.0)
    }

    fn table_outside(&self, offset: u64) -> Errno {
        self.report(format_args!("the L2 table at {offset:#x} is past the end of the file"));
        Errno::EINVAL
    }
}

impl Qed {
    /// Where the cluster of an entry is in the file, if it has one.
    pub(super) fn cluster_of(&self, entry: L2Entry) -> Result<Option<u64>, BadEntry> {
        match entry.0 {
            UNALLOCATED | ZERO => Ok(None),
            host if self.layout.has_room_for_data(host, self.file_len()) => Ok(Some(host)),
            _ => Err(BadEntry),
        }
    }

    /// Reports what an entry names at guest offset `at`. The request fails as QEMU fails it.
    fn bad_place(&self, at: u64, what: &str, place: u64) -> Errno {
        let len = self.file_len();
        self.report(format_args!(
            "the {what} of guest offset {at:#x} is said to be at {place:#x} of a file of {len:#x} bytes"
        ));
        Errno::EINVAL
    }

    /// Logs the first thing in the tables that makes no sense: a guest must not fill the log.
    fn report(&self, what: std::fmt::Arguments<'_>) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            log::info!("{}: qed: {what}; check the image", self.name);
        }
    }
}
