//! How an image maps a guest's clusters: what the layer of tables ([`crate::cow`]) asks of this format to find
//! and read them.

use super::layout::{BadEntry, Cluster, Geometry, L1Entry, L2Entry, MAX_L1_BYTES};
use super::overlap::Kinds;
use super::{Qcow2, corrupt};
use crate::block::{Access, Child, Event, Node, Precision, Status};
use crate::cow;
use crate::cow::{
    Compressed, Format, Found, Piece, SliceNo, TableCache, Tables, TopTable, Writable, announce,
};
use crate::io::{Errno, IoResult, IoVec};
use std::sync::Arc;

/// L1 entries that an image can have.
const MAX_L1_ENTRIES: u64 = MAX_L1_BYTES / 8;

/// The L1 table in memory, with these entries.
pub(super) fn l1_table(entries: &[L1Entry]) -> TopTable<L1Entry> {
    TopTable::new(MAX_L1_ENTRIES, entries)
}

/// The mapping of an image that was just opened: `cache` bytes of L2 tables, in slices of `slice` bytes.
///
/// # Errors
/// There is not so much memory.
pub(super) fn tables(geometry: &Geometry, cache: u64, slice: u64) -> IoResult<Tables<L2Entry>> {
    let entry = geometry.l2_entry_size();
    let cache = TableCache::new(cache, (slice / entry) as usize, entry as usize / 8)?;
    Ok(Tables::new(geometry.shape(), cache))
}

impl Format for Qcow2 {
    type Entry = L2Entry;
    type Bad = BadEntry;

    fn tables(&self) -> &Tables<L2Entry> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    fn data_child(&self) -> (usize, &Child) {
        (self.data, &self.children[self.data])
    }

    fn backing_child(&self) -> Option<&Child> {
        self.backing.map(|index| &self.children[index])
    }

    /// The backing file is the guest's disk, without the state of a virtual machine behind it.
    fn backing_end(&self) -> u64 {
        self.state_start()
    }

    fn has_table(&self, guest: u64) -> bool {
        self.l1.get(self.geometry.l1_index(guest)).l2_table() != 0
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let entry = self.l1.get(self.geometry.l1_index(guest));
        let table = entry.l2_table();
        if entry.has_reserved_bits() || table == 0 || !self.geometry.is_cluster_start(table) {
            return Err(corrupt::bad_l1(self, guest, entry));
        }
        Ok(table + self.mapping.slice_in_table(guest))
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

    fn overlay(&self, slice: SliceNo, entries: &mut [L2Entry]) {
        self.mapping.journal.show(slice, entries);
    }

    fn examine(&self, entries: &[L2Entry]) {
        self.check_slice(entries);
    }

    fn bad_entry(&self, at: u64, entry: L2Entry, bad: BadEntry, access: Access) -> Errno {
        match access {
            Access::Read => corrupt::bad_entry(self, at, entry, bad),
            _ => corrupt::bad_entry_to_write(self, at, entry, bad),
        }
    }

    fn table_outside(&self, offset: u64) -> Errno {
        corrupt::outside(self, "L2 table", offset)
    }

    async fn read_compressed(&self, at: u64, place: Compressed, into: &IoVec<'_>) -> IoResult {
        self.unpack_range(at, place, into).await
    }

    async fn data_status(
        &self,
        host: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<(u64, Status)> {
        self.status_of_data(host, len, precision).await
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
        self.settle_header().await?;
        if self.corruption.is_fatal() {
            self.mark_corrupt().await;
            return Err(Errno::EIO);
        }
        Ok(())
    }

    fn check_table_write(&self, offset: u64, len: u64) -> IoResult {
        self.check_write(offset, len, Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2)
    }
}

impl Qcow2 {
    /// Tells debugging filters below what is about to be done to the image.
    pub(super) async fn event(&self, event: Event) {
        announce(self, event).await;
    }

    pub(super) fn file(&self) -> Arc<Node> {
        cow::file(self)
    }

    /// The node that holds the guest's data.
    pub(super) fn data(&self) -> Arc<Node> {
        cow::data(self)
    }

    pub(super) fn backing(&self) -> Option<Arc<Node>> {
        cow::backing(self)
    }
}
