//! How an image maps a guest's clusters: one flat catalogue, an entry of 32 bits for each.
//!
//! Clusters have any number of sectors, and tables of the layer map powers of two. So the layer sees a disk on which each
//! cluster is followed by a gap up to the next power of two, and is asked for one cluster at a time ([`Stretch`]); where
//! clusters are powers of two there is no gap, and a request goes to the layer in one.

use super::Parallels;
use super::header::{self, Header};
use crate::block::{Access, Child};
use crate::cow::{Format, Found, Piece, Shape, TableCache, TableEntry, Tables};
use crate::io::{Errno, IoResult};
use std::sync::atomic::Ordering;

/// Entries that are read at once: 4 KiB.
const SLICE: u32 = 1024;

/// Where a cluster is in the file; zero: it is unallocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u32);

impl Entry {
    /// An entry out of its four bytes.
    pub fn parse(bytes: &[u8]) -> Entry {
        Entry(bytes.first_chunk().map_or(0, |entry| u32::from_le_bytes(*entry)))
    }
}

impl TableEntry for Entry {
    fn from_words(first: u64, _: u64) -> Entry {
        Entry(first as u32)
    }

    fn words(self) -> [u64; 2] {
        [self.0.into(), 0]
    }
}

/// How the disk's clusters lie on the disk that the layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Bytes of a cluster, and the logarithm of its bytes with the gap behind it.
    cluster: u64,
    pub bits: u32,
}

impl Stretch {
    pub fn new(header: &Header) -> Stretch {
        let cluster = header.cluster_size();
        Stretch { cluster, bits: cluster.next_power_of_two().ilog2() }
    }

    /// Whether there are gaps.
    pub fn has_gaps(self) -> bool {
        self.cluster != 1 << self.bits
    }

    /// What the layer is asked for first, of a range of the disk: an offset there, and bytes.
    pub fn first(self, at: u64, len: u64) -> (u64, u64) {
        if !self.has_gaps() {
            return (at, len);
        }
        let inside = at % self.cluster;
        (((at / self.cluster) << self.bits) + inside, len.min(self.cluster - inside))
    }
}

/// The mapping of an image that was just opened. The catalogue is kept as it is used, up to 32 MiB.
///
/// # Errors
/// There is not so much memory.
pub(super) fn tables(header: &Header) -> IoResult<Tables<Entry>> {
    // A word in memory for each entry.
    let all = u64::from(header.entries) * 8;
    let cache = TableCache::new(all.min(32 << 20), SLICE as usize, 1)?;
    // The flat catalogue counts as tables of one slice each.
    let cluster_bits = Stretch::new(header).bits;
    let shape = Shape { cluster_bits, table_bits: SLICE.ilog2(), entry_bytes: 4 };
    Ok(Tables::new(shape, cache))
}

/// An entry leads into the header or the catalogue.
#[derive(Clone, Copy, Debug)]
pub struct BeforeData;

impl Parallels {
    /// The first entry of the slice of a guest offset.
    fn first_of_slice(&self, guest: u64) -> u64 {
        self.mapping.shape.table_index(guest) * u64::from(SLICE)
    }
}

impl Format for Parallels {
    type Entry = Entry;
    type Bad = BeforeData;

    fn tables(&self) -> &Tables<Entry> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    fn backing_child(&self) -> Option<&Child> {
        self.children.get(1)
    }

    /// The disk may be longer than what the catalogue maps.
    fn has_table(&self, guest: u64) -> bool {
        self.first_of_slice(guest) < self.header.entries.into()
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        Ok(header::LEN as u64 + self.first_of_slice(guest) * self.mapping.shape.entry_bytes)
    }

    fn slice_len(&self, guest: u64) -> usize {
        let first = self.first_of_slice(guest);
        u64::from(self.header.entries).saturating_sub(first).min(SLICE.into()) as usize
    }

    fn parse(bytes: &[u8]) -> Entry {
        Entry::parse(bytes)
    }

    fn decode(&self, entry: Entry, at: u64, want: u64) -> Result<Piece, BeforeData> {
        let found = match entry.0 {
            0 => Found::Unallocated { host: None },
            _ => {
                let host = self.header.offset_of(entry.0).ok_or(BeforeData)?;
                // No cluster is shared.
                let host = host + self.mapping.shape.offset_in_cluster(at);
                Found::Data { host, exclusive: true }
            }
        };
        Ok(Piece { len: want, found })
    }

    fn bad_entry(&self, at: u64, entry: Entry, _: BeforeData, _: Access) -> Errno {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            let cluster = at >> self.mapping.shape.cluster_bits;
            log::error!(
                "{}: parallels: the catalogue's entry {cluster} ({:#x}) leads into the header or the catalogue",
                self.name,
                entry.0
            );
        }
        Errno::EIO
    }

    fn table_outside(&self, _: u64) -> Errno {
        Errno::EIO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_of_any_size_are_powers_of_two_for_the_layer() {
        let stretch = Stretch::new(&Header::for_new(1 << 20, 63 << 9).unwrap());
        assert!(stretch.has_gaps());
        assert_eq!(stretch.first(10, 99), (10, 99));
        assert_eq!(stretch.first((63 << 9) - 1, 99), ((63 << 9) - 1, 1));
        assert_eq!(stretch.first(63 << 9, 1 << 20), (1 << 15, 63 << 9));
        let stretch = Stretch::new(&Header::for_new(1 << 20, 1 << 16).unwrap());
        assert_eq!(stretch.first((1 << 16) - 1, 1 << 20), ((1 << 16) - 1, 1 << 20));
    }
}
