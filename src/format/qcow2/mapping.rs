//! The mapping of guest clusters: the tables in memory, and the methods that [`crate::cow`] needs.

use super::layout::{BadEntry, Cluster, Geometry, L1Entry, L2Entry, MAX_L1_BYTES};
use super::overlap::Kinds;
use super::{Qcow2, compressed, corrupt};
use crate::block::{Access, Child, Precision, Status};
use crate::cow::{
    Compressed, Format, Found, Lock, LockGuard, Piece, TableCache, Tables, TopTable, Writable,
    read_packed, stored_status,
};
use crate::io::{Errno, IoResult, IoVec};

/// L1 entries that an image can have.
const MAX_L1_ENTRIES: u64 = MAX_L1_BYTES / 8;

/// The mapping of an open image: the L1 table, and what the layer has in memory of L2 tables.
pub struct ImageMapping {
    geometry: Geometry,
    l1: TopTable<L1Entry>,
    /// Held while an L1 entry changes.
    l1_lock: Lock<()>,
    tables: Tables<L2Entry>,
}

/// The turn to change the L1 table in memory.
pub struct L1Lock<'a> {
    l1: &'a TopTable<L1Entry>,
    _lock: LockGuard<'a, ()>,
}

impl ImageMapping {
    /// The mapping of an image that was just opened: `cache` bytes of L2 tables, in slices of `slice` bytes.
    ///
    /// # Errors
    /// There is not so much memory.
    pub fn new(
        geometry: Geometry,
        l1: &[L1Entry],
        cache: u64,
        slice: u64,
    ) -> IoResult<ImageMapping> {
        let entry = geometry.l2_entry_size();
        let cache = TableCache::new(cache, (slice / entry) as usize, entry as usize / 8)?;
        Ok(ImageMapping {
            geometry,
            l1: TopTable::new(MAX_L1_ENTRIES, l1),
            l1_lock: Lock::new(()),
            tables: Tables::new(geometry.shape(), cache),
        })
    }

    /// What the layer has in memory.
    pub fn tables(&self) -> &Tables<L2Entry> {
        &self.tables
    }

    /// How many entries the L1 table has.
    pub fn l1_entries(&self) -> u64 {
        self.l1.entries()
    }

    /// An L1 entry, or an empty one past the end.
    pub fn l1_at(&self, index: u64) -> L1Entry {
        self.l1.get(index)
    }

    /// The L1 entry of a guest offset.
    pub fn l1_of(&self, guest: u64) -> L1Entry {
        self.l1.get(self.geometry.l1_index(guest))
    }

    /// All L1 entries.
    pub fn l1(&self) -> impl Iterator<Item = L1Entry> {
        (0..self.l1.entries()).map(|index| self.l1.get(index))
    }

    /// Waits for the turn to change L1 entries.
    pub async fn lock_l1(&self) -> L1Lock<'_> {
        L1Lock { _lock: self.l1_lock.lock().await, l1: &self.l1 }
    }

    /// Shows another L1 table, which may be shorter: entries behind its end are empty. No request is in flight.
    pub fn show_l1(&self, l1: &[L1Entry]) {
        self.l1.grow(l1.len() as u64);
        for index in 0..self.l1.entries() {
            self.l1.set(index, l1.get(index as usize).copied().unwrap_or(L1Entry(0)));
        }
        self.tables.cache.forget(|_| true);
    }

    /// Takes the L1 table of an image that another process has written. No request is in flight.
    pub fn replace_l1(&self, l1: &[L1Entry]) {
        self.l1.replace(l1);
        self.tables.cache.forget(|_| true);
    }
}

impl L1Lock<'_> {
    /// Shows an entry to all readers.
    pub fn set(&self, index: u64, entry: L1Entry) {
        self.l1.set(index, entry);
    }

    /// Makes the table at least so long; new entries are empty.
    pub fn grow(&self, entries: u64) {
        self.l1.grow(entries);
    }
}

impl Format for Qcow2 {
    type Entry = L2Entry;
    type Bad = BadEntry;

    fn tables(&self) -> &Tables<L2Entry> {
        &self.mapping.tables
    }

    fn file_child(&self) -> &Child {
        self.nodes.file_child()
    }

    fn data_child(&self) -> (usize, &Child) {
        self.nodes.data_child()
    }

    fn backing_child(&self) -> Option<&Child> {
        self.nodes.backing_child()
    }

    /// The backing file is the guest's disk, without the state of a virtual machine behind it.
    fn backing_end(&self) -> u64 {
        self.state_start()
    }

    fn has_table(&self, guest: u64) -> bool {
        self.mapping.l1_of(guest).l2_table() != 0
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let entry = self.mapping.l1_of(guest);
        let table = entry.l2_table();
        if entry.has_reserved_bits() || table == 0 || !self.geometry.is_cluster_start(table) {
            return Err(corrupt::bad_l1(self.metadata(), guest, entry));
        }
        Ok(table + self.mapping.tables.slice_in_table(guest))
    }

    fn parse(bytes: &[u8]) -> L2Entry {
        L2Entry::parse(bytes)
    }

    fn decode(&self, entry: L2Entry, at: u64, want: u64) -> Result<Piece, BadEntry> {
        let cluster = self.geometry.decode(entry)?;
        let inside = self.geometry.offset_in_cluster(at);
        // In an external data file nothing is ever shared.
        let exclusive = entry.is_copied() || self.geometry.external_data;
        let found = match cluster {
            Cluster::Unallocated => Found::Unallocated { host: None },
            Cluster::Zero { host } => Found::Zero { host: host.map(|host| host + inside) },
            Cluster::Normal { host } => Found::Data { host: host + inside, exclusive },
            Cluster::Compressed(place) => Found::Compressed(place),
            Cluster::Subclusters { host, allocated, zero } => {
                let first = self.geometry.subcluster_index(at);
                let kind = |n: u64| (allocated >> n & 1, zero >> n & 1);
                let count = (first..32).take_while(|&n| kind(n) == kind(first)).count() as u64;
                let end = (first + count) << self.geometry.subcluster_bits();
                let place = host.map(|host| host + inside);
                let found = match (kind(first), place) {
                    ((1, _), Some(host)) => Found::Data { host, exclusive },
                    ((_, 1), host) => Found::Zero { host },
                    (_, host) => Found::Unallocated { host },
                };
                return Ok(Piece { len: want.min(end - inside), found });
            }
        };
        Ok(Piece { len: want, found })
    }

    fn examine(&self, entries: &[L2Entry]) {
        self.metadata().check_slice(entries, |hosts| self.space.reserves(hosts));
    }

    fn bad_entry(&self, at: u64, entry: L2Entry, bad: BadEntry, access: Access) -> Errno {
        match access {
            Access::Read => corrupt::bad_entry(self.metadata(), at, entry, bad),
            _ => corrupt::bad_entry_to_write(self.metadata(), at, entry, bad),
        }
    }

    fn table_outside(&self, offset: u64) -> Errno {
        corrupt::outside(self.metadata(), "L2 table", offset)
    }

    async fn read_compressed(&self, at: u64, place: Compressed, into: &IoVec<'_>) -> IoResult {
        if place.host >= self.file().len() || self.geometry.external_data {
            return Err(corrupt::data_outside(self.metadata(), "Compressed cluster", place.host));
        }
        let (kind, host) = (self.settings.compression, place.host);
        let name = self.corruption.name().to_owned();
        let unpack = move |stored: &[u8], len: usize| {
            compressed::unpack(kind, stored, len).inspect_err(|_| {
                // A guest can ask as often as it likes.
                log::debug!(
                    "{name}: the compressed cluster of guest offset {at:#x}, at {host:#x}, cannot be \
                     unpacked"
                );
            })
        };
        read_packed(self, &self.unpacking, at, place, into, unpack).await
    }

    async fn data_status(
        &self,
        host: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<(u64, Status)> {
        if precision == Precision::Allocation || !self.space.may_have_holes(self.metadata()).await {
            return Ok((len, Status::DATA | Status::ALLOCATED));
        }
        stored_status(&self.nodes.data(), host, len, precision).await
    }
}

impl Writable for Qcow2 {
    fn store(entry: L2Entry, bytes: &mut [u8]) {
        entry.store(bytes);
    }

    async fn prepare(&self) -> IoResult {
        self.prepare_writing().await
    }

    async fn check_intact(&self) -> IoResult {
        self.metadata().settle_header().await?;
        if self.corruption.is_fatal() {
            self.metadata().mark_corrupt().await;
            return Err(Errno::EIO);
        }
        Ok(())
    }

    fn check_table_write(&self, offset: u64, len: u64) -> IoResult {
        self.metadata().check_write(offset, len, Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2)
    }
}
