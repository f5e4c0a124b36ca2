//! The shape of a format's mapping tables, and what is in memory of one mapping.

use super::batch::Batches;
use super::in_place::AtRest;
use super::journal::Journal;
use super::suspects::Suspects;
use super::table_cache::{SliceNo, TableCache, TableEntry};
use super::write_state::Stopped;
use super::{Ranges, Visits};
use std::sync::Arc;

/// How guest offsets lead to table entries. A flat table counts as tables that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The logarithm of the cluster size.
    pub cluster_bits: u32,
    /// The logarithm of the entries of a table.
    pub table_bits: u32,
    /// Bytes of an entry on the disk.
    pub entry_bytes: u64,
}

impl Shape {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn offset_in_cluster(&self, guest: u64) -> u64 {
        guest & (self.cluster_size() - 1)
    }

    /// Guest bytes that one table maps.
    pub fn coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.table_bits)
    }

    /// Which table maps a guest offset: the index in the upper table, where there is one.
    pub fn table_index(&self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.table_bits)
    }

    /// The index of a guest offset's entry in its table.
    pub fn entry_index(&self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & ((1 << self.table_bits) - 1)
    }
}

/// What is in memory of one mapping: its cached tables, and which requests use and change it.
pub struct Tables<E> {
    pub shape: Shape,
    pub cache: Arc<TableCache<E>>,
    /// Requests that use host clusters they have looked up.
    pub visits: Visits,
    /// Guest clusters whose mapping is being changed.
    pub ranges: Ranges,
    /// Changes of entries on their way to the kernel.
    pub(super) batches: Batches<E>,
    /// Entries that were answered and wait until what they show is durable.
    pub journal: Journal<E>,
    /// Slices of which the disk may have another state than readers were shown.
    pub(super) suspects: Suspects,
    /// Whether the mapping may be changed.
    pub stopped: Stopped,
    /// Whether fast writes are allowed.
    pub at_rest: AtRest,
}

impl<E: TableEntry> Tables<E> {
    pub fn new(shape: Shape, cache: TableCache<E>) -> Tables<E> {
        Tables {
            shape,
            visits: Visits::default(),
            ranges: Ranges::default(),
            batches: Batches::default(),
            journal: Journal::new(cache.entries()),
            suspects: Suspects::default(),
            stopped: Stopped::default(),
            at_rest: AtRest::default(),
            cache: Arc::new(cache),
        }
    }

    /// The slice that has a guest offset's entry, and the entry's index there.
    pub fn slice_of(&self, guest: u64) -> (SliceNo, usize) {
        let cluster = guest >> self.shape.cluster_bits;
        let entries = self.cache.entries() as u64;
        (SliceNo(cluster >> entries.trailing_zeros()), (cluster & (entries - 1)) as usize)
    }

    /// The first guest offset of a slice.
    pub fn start_of(&self, slice: SliceNo) -> u64 {
        (slice.0 * self.cache.entries() as u64) << self.shape.cluster_bits
    }

    /// Bytes of a slice on the disk.
    pub fn slice_bytes(&self) -> u64 {
        self.cache.entries() as u64 * self.shape.entry_bytes
    }

    /// How far into its table the slice of a guest offset lies, in bytes.
    pub fn slice_in_table(&self, guest: u64) -> u64 {
        let first = self.shape.entry_index(guest) & !(self.cache.entries() as u64 - 1);
        first * self.shape.entry_bytes
    }
}
