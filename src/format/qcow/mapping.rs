//! How an image maps a guest's clusters: two levels of tables with big-endian entries of 64 bits.

use super::Qcow;
use super::entries::{BadEntry, L1Entry, L2Entry};
use super::header::{Cluster, Geometry};
use crate::block::{Access, Child, SECTOR};
use crate::cow::{Compressed, Format, Found, Piece, Shape, TableCache, Tables, read_packed};
use crate::format::deflate;
use crate::io::{Errno, IoResult, IoVec};
use std::sync::atomic::Ordering;

/// Bytes of L2 tables that are read at once.
const SLICE: u64 = 4096;
/// Bytes of L2 tables that are kept.
const CACHE: u64 = 32 << 20;

/// The mapping of an image that was just opened, of a disk of `size` bytes.
///
/// # Errors
/// There is not so much memory.
pub(super) fn tables(geometry: &Geometry, size: u64) -> IoResult<Tables<L2Entry>> {
    let shape = Shape {
        cluster_bits: geometry.cluster_bits,
        table_bits: geometry.table_bits,
        entry_bytes: 8,
    };
    let all = geometry.clusters(size) * shape.entry_bytes;
    let slice = SLICE.min(geometry.table_size());
    let cache = TableCache::new(CACHE.min(all), (slice / shape.entry_bytes) as usize, 1)?;
    Ok(Tables::new(shape, cache))
}

impl Format for Qcow {
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
        self.l1.get(self.mapping.shape.table_index(guest)) != L1Entry(0)
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let L1Entry(table) = self.l1.get(self.mapping.shape.table_index(guest));
        let end = table.checked_add(self.geometry.table_size());
        match end.is_some_and(|end| table >= self.l1_end && i64::try_from(end).is_ok()) {
            true => Ok(table + self.mapping.slice_in_table(guest)),
            false => Err(self.bad_place(guest, "L2 table", table)),
        }
    }

    fn parse(bytes: &[u8]) -> L2Entry {
        L2Entry(bytes.first_chunk().map_or(0, |entry| u64::from_be_bytes(*entry)))
    }

    fn decode(&self, entry: L2Entry, at: u64, want: u64) -> Result<Piece, BadEntry> {
        let found = match self.geometry.decode(entry) {
            Cluster::Unallocated => Found::Unallocated { host: None },
            Cluster::Compressed(place) => Found::Compressed(place),
            Cluster::Normal { host } if self.may_be_data(host) => {
                let inside = self.mapping.shape.offset_in_cluster(at);
                Found::Data { host: host + inside, exclusive: self.is_inside(host) }
            }
            Cluster::Normal { .. } => return Err(BadEntry),
        };
        Ok(Piece { len: want, found })
    }

    fn bad_entry(&self, at: u64, entry: L2Entry, _: BadEntry, _: Access) -> Errno {
        self.bad_place(at, "cluster", entry.0)
    }

    fn table_outside(&self, offset: u64) -> Errno {
        self.report(format_args!("the L2 table at {offset:#x} is past the end of the file"));
        Errno::EIO
    }

    async fn read_compressed(&self, at: u64, place: Compressed, into: &IoVec<'_>) -> IoResult {
        if place.host < self.l1_end || place.len == 0 {
            return Err(self.bad_place(at, "compressed cluster", place.host));
        }
        let read = read_packed(self, &self.unpacking, at, place, into, deflate::unpack).await;
        read.inspect_err(|_| {
            self.report(format_args!(
                "the compressed cluster of guest offset {at:#x}, at {:#x}, cannot be unpacked",
                place.host
            ));
        })
    }
}

impl Qcow {
    /// Whether a cluster of data can begin at an offset: behind the L1 table, at a sector.
    fn may_be_data(&self, host: u64) -> bool {
        let end = host.checked_add(self.geometry.cluster_size());
        host >= self.l1_end
            && host.is_multiple_of(SECTOR)
            && end.is_some_and(|end| i64::try_from(end).is_ok())
    }

    /// Whether the cluster at an offset lies in the file. What lies behind it, in images that were not closed, reads as
    /// zeroes, and may be given to another cluster: it is not written in place.
    pub(super) fn is_inside(&self, host: u64) -> bool {
        host + self.geometry.cluster_size() <= self.file_len()
    }

    /// Reports what an entry names at guest offset `at`.
    fn bad_place(&self, at: u64, what: &str, place: u64) -> Errno {
        self.report(format_args!(
            "the {what} of guest offset {at:#x} is said to be at {place:#x}, where none can be"
        ));
        Errno::EIO
    }

    /// Logs the first thing in the tables that makes no sense: a guest must not fill the log.
    fn report(&self, what: std::fmt::Arguments<'_>) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            log::info!("{}: qcow: {what}", self.name);
        }
    }
}
