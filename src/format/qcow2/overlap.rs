//! Overlap checks, which keep writes from overwriting metadata of another kind.
//!
//! What is looked at costs the fast path nothing. An entry comes into the cache of L2 tables only
//! through [`Metadata::check_slice`], and a cluster into use only through [`Metadata::check_reserved`]:
//!
//! * An entry that names a cluster where metadata is, or that is reserved, or that is past the end of the file, ends
//!   the fast path for writes, for the whole image; from then on each write is looked at before it reaches the file.
//!   Reading continues.
//! * What is reserved is neither metadata nor named by an entry in the cache. So metadata that is made later is where
//!   no cached entry points.
//! * Clusters on their way from the refcounts to a table are claimed ([`super::space::Claim`]) from
//!   before the file grows for them and the cache is looked through, until they are reserved, or until it
//!   is known what they hold. A slice is looked at when it can be found in the cache
//!   ([`TableCache`](crate::cow::TableCache)): whichever comes second sees the other.
//!
//! Tables are looked at where they are written ([`Metadata::check_write`]).
//!
//! The status of the places of metadata is kept by cluster, and is a hint: before an image is called corrupt, the
//! tables in memory are asked whether it is still so.

use super::corrupt;
use super::extensions::Extension;
use super::header::Header;
use super::layout::{L1Entry, L2Entry};
use super::metadata::Metadata;
use super::metadata_map::MetadataMap;
use crate::cow::Run;
use crate::io::IoResult;
use crate::io::sync::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

bitflags::bitflags! {
    /// Kinds of metadata, in the order in which they are asked for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Kinds: u16 {
        const MAIN_HEADER = 1;
        const ACTIVE_L1 = 1 << 1;
        const ACTIVE_L2 = 1 << 2;
        const REFCOUNT_TABLE = 1 << 3;
        const REFCOUNT_BLOCK = 1 << 4;
        const SNAPSHOT_TABLE = 1 << 5;
        const INACTIVE_L1 = 1 << 6;
        const INACTIVE_L2 = 1 << 7;
        const BITMAP_DIRECTORY = 1 << 8;

        /// Those whose places the header tells.
        const CONSTANT = Self::MAIN_HEADER.bits() | Self::ACTIVE_L1.bits()
            | Self::REFCOUNT_TABLE.bits() | Self::SNAPSHOT_TABLE.bits()
            | Self::BITMAP_DIRECTORY.bits();
        /// And those whose places are in memory.
        const CACHED = Self::CONSTANT.bits() | Self::ACTIVE_L2.bits()
            | Self::REFCOUNT_BLOCK.bits() | Self::INACTIVE_L1.bits();
    }
}

impl Kinds {
    /// As QEMU's messages call the first of them.
    pub fn name(self) -> &'static str {
        match self.iter().next() {
            Some(Kinds::MAIN_HEADER) => "qcow2_header",
            Some(Kinds::ACTIVE_L1) => "active L1 table",
            Some(Kinds::ACTIVE_L2) => "active L2 table",
            Some(Kinds::REFCOUNT_TABLE) => "refcount table",
            Some(Kinds::REFCOUNT_BLOCK) => "refcount block",
            Some(Kinds::SNAPSHOT_TABLE) => "snapshot table",
            Some(Kinds::INACTIVE_L1) => "inactive L1 table",
            Some(Kinds::INACTIVE_L2) => "inactive L2 table",
            _ => "bitmap directory",
        }
    }
}

/// What is looked for, and where it may be.
pub struct Overlaps {
    /// None in an image that is not written.
    kinds: Kinds,
    map: Mutex<MetadataMap>,
    /// An entry was seen that writes must not follow.
    has_bad_entry: AtomicBool,
}

impl Overlaps {
    pub fn new(kinds: Kinds) -> Overlaps {
        Overlaps { kinds, map: Mutex::default(), has_bad_entry: AtomicBool::new(false) }
    }

    pub fn checks(&self, kind: Kinds) -> bool {
        self.kinds.contains(kind)
    }

    /// Whether an entry points at metadata. Each write is checked on its own then.
    pub fn has_bad_entry(&self) -> bool {
        self.has_bad_entry.load(Ordering::Acquire)
    }

    /// Metadata is there, or is about to be.
    pub fn note(&self, kind: Kinds, clusters: Range<u64>) {
        self.note_all(kind, std::iter::once(clusters));
    }

    fn note_all(&self, kind: Kinds, places: impl Iterator<Item = Range<u64>>) {
        if self.checks(kind) {
            self.map.lock().add(kind, places);
        }
    }

    /// Nothing is known of a kind any more.
    pub fn forget(&self, kind: Kinds) {
        self.map.lock().remove(kind);
    }

    /// Nothing of a kind is in these clusters.
    pub fn forget_at(&self, kind: Kinds, clusters: Range<u64>) {
        let mut places = self.map.lock();
        clusters.for_each(|cluster| places.remove_at(cluster, kind));
    }

    /// What may be in these clusters, but for `own`.
    fn find_conflict(&self, mut clusters: Range<u64>, own: Kinds) -> Option<(u64, Kinds)> {
        let places = self.map.lock();
        clusters.find_map(|cluster| {
            let kinds = places.at(cluster) - own;
            (!kinds.is_empty()).then_some((cluster, kinds))
        })
    }
}

impl Metadata<'_> {
    /// The clusters that some bytes of the file touch.
    fn clusters_of(self, offset: u64, len: u64) -> Range<u64> {
        let bits = self.geometry.cluster_bits;
        offset >> bits..(offset.saturating_add(len)).div_ceil(1 << bits)
    }

    // ---- What is known

    /// Notes all tables that are known from the start, but for refcount blocks, and again where all of them may be others.
    pub(super) async fn note_metadata(self) {
        if self.overlaps.kinds.is_empty() {
            return;
        }
        self.note_header(&self.header.now());
        self.note_l2_tables();
        self.note_snapshots().await;
    }

    /// Notes all refcount blocks, at these places, in bytes.
    pub(super) fn note_blocks(self, blocks: impl Iterator<Item = u64>) {
        self.overlaps.forget(Kinds::REFCOUNT_BLOCK);
        for block in blocks {
            self.overlaps.note(Kinds::REFCOUNT_BLOCK, self.clusters_of(block, 1));
        }
    }

    pub(super) fn note_header(self, header: &Header) {
        for (kind, offset, len) in self.fixed_tables(header) {
            self.overlaps.note(kind, self.clusters_of(offset, len));
        }
    }

    pub(super) fn note_l2_tables(self) {
        if !self.overlaps.checks(Kinds::ACTIVE_L2) {
            return;
        }
        for table in self.mapping.l1().map(L1Entry::l2_table) {
            if table != 0 {
                self.overlaps.note(Kinds::ACTIVE_L2, self.clusters_of(table, 1));
            }
        }
    }

    /// The tables of snapshots. Those that cannot be read are left out.
    pub(super) async fn note_snapshots(self) {
        let Ok(table) = self.snapshots.shareable() else { return };
        let places = table
            .list
            .iter()
            .map(|one| self.clusters_of(one.l1_table_offset, u64::from(one.l1_size) * 8));
        self.overlaps.note_all(Kinds::INACTIVE_L1, places);
        // Freed ones could not be distinguished from those in use.
        self.overlaps.forget(Kinds::INACTIVE_L2);
        if self.overlaps.checks(Kinds::INACTIVE_L2) {
            for snapshot in &table.list {
                for entry in snapshot.read_l1(&self.file(), self.geometry).await.unwrap_or_default()
                {
                    let table = entry.l2_table();
                    if table != 0 {
                        self.overlaps.note(Kinds::INACTIVE_L2, self.clusters_of(table, 1));
                    }
                }
            }
        }
    }

    /// Tables whose place the header tells: what, where, how many bytes.
    fn fixed_tables(self, header: &Header) -> Vec<(Kinds, u64, u64)> {
        let cluster = self.geometry.cluster_size();
        let refcounts = u64::from(header.refcount_table_clusters) * cluster;
        let mut tables = vec![
            (Kinds::MAIN_HEADER, 0, cluster),
            (Kinds::ACTIVE_L1, header.l1_table_offset, u64::from(header.l1_size) * 8),
            (Kinds::REFCOUNT_TABLE, header.refcount_table_offset, refcounts),
        ];
        if header.nb_snapshots > 0 {
            let bytes = self.snapshots.table_bytes().unwrap_or(1);
            tables.push((Kinds::SNAPSHOT_TABLE, header.snapshots_offset, bytes));
        }
        for extension in &header.extensions {
            if let Extension::Bitmaps(at) = extension {
                tables.push((Kinds::BITMAP_DIRECTORY, at.directory_offset, at.directory_size));
            }
        }
        tables
    }

    /// Whether a table of this kind is in a cluster, as far as memory tells now.
    fn is_there(self, kind: Kinds, cluster: u64) -> bool {
        let covers = |offset, len| self.clusters_of(offset, len).contains(&cluster);
        match kind {
            Kinds::ACTIVE_L2 => {
                let offset = cluster << self.geometry.cluster_bits;
                self.mapping.l1().any(|entry| entry.l2_table() == offset)
            }
            Kinds::INACTIVE_L1 => self.snapshots.shareable().is_ok_and(|table| {
                let mut all = table.list.iter();
                all.any(|one| covers(one.l1_table_offset, u64::from(one.l1_size) * 8))
            }),
            // They stay where they are, and are forgotten when they go.
            Kinds::REFCOUNT_BLOCK | Kinds::INACTIVE_L2 => true,
            _ => {
                let mut all = self.fixed_tables(&self.header.now()).into_iter();
                all.any(|(one, offset, len)| one == kind && covers(offset, len))
            }
        }
    }

    /// The first kind of metadata that is in one of these clusters, but for `own`.
    fn metadata_in(self, clusters: Range<u64>, own: Kinds) -> Option<Kinds> {
        while let Some((cluster, kinds)) = self.overlaps.find_conflict(clusters.clone(), own) {
            for kind in kinds.iter() {
                if self.is_there(kind, cluster) {
                    return Some(kind);
                }
                self.overlaps.forget_at(kind, cluster..cluster + 1);
            }
        }
        None
    }

    // ---- Checks

    /// Refuses to write `len` bytes at `offset` of the file over metadata that is not of the kinds
    /// `own`.
    pub(super) fn check_write(self, offset: u64, len: u64, own: Kinds) -> IoResult {
        match self.metadata_in(self.clusters_of(offset, len), own) {
            Some(kind) => Err(corrupt::overlaps(self, offset, len, kind)),
            None => Ok(()),
        }
    }

    /// Looks at the entries of a slice, before one of them can be followed.
    /// `reserves`: whether one of these clusters is reserved or claimed.
    pub(super) fn check_slice(
        self,
        entries: &[L2Entry],
        reserves: impl FnOnce(&mut [u64]) -> bool,
    ) {
        let is_off = self.overlaps.kinds.is_empty();
        if is_off || self.geometry.external_data || self.overlaps.has_bad_entry() {
            return;
        }
        // First the file's end, then what is claimed, then what metadata is: in the order in which
        // clusters go from one to the next.
        let end = self.geometry.clusters(self.file().len());
        let mut hosts: Vec<u64> = self.hosts(entries).collect();
        let hits = |hosts: &[u64]| {
            let places = self.overlaps.map.lock();
            hosts.iter().copied().filter(|&host| !places.at(host).is_empty()).collect::<Vec<_>>()
        };
        let has_bad_entry = hosts.iter().any(|&host| host >= end)
            || reserves(&mut hosts)
            || hits(&hosts)
                .into_iter()
                .any(|host| self.metadata_in(host..host + 1, Kinds::empty()).is_some());
        if has_bad_entry {
            self.overlaps.has_bad_entry.store(true, Ordering::Release);
        }
    }

    /// The clusters of the file that entries name as their own.
    fn hosts(self, entries: &[L2Entry]) -> impl Iterator<Item = u64> {
        let places = entries.iter().filter_map(move |entry| entry.place(self.geometry));
        places.map(move |host| host >> self.geometry.cluster_bits)
    }

    /// Refuses to take clusters into use that count no reference but are metadata, or are named by an
    /// entry in memory. They are claimed.
    pub(super) async fn check_reserved(self, runs: &[Run]) -> IoResult {
        let bits = self.geometry.cluster_bits;
        for run in runs {
            let clusters = run.first..run.first + run.count;
            // An entry that names it names nothing.
            let kind = match clusters.start {
                0 => Some(Kinds::MAIN_HEADER),
                _ => self.metadata_in(clusters, Kinds::empty()),
            };
            if let Some(kind) = kind {
                let size = self.geometry.cluster_size();
                return Err(corrupt::overlaps(self, run.first << bits, run.count * size, kind));
            }
        }
        // What is past the end of the file is named by no entry in the cache.
        let mut reused: Vec<_> = runs.iter().filter(|run| !run.is_fresh).collect();
        if self.overlaps.kinds.is_empty() || reused.is_empty() || self.geometry.external_data {
            return Ok(());
        }
        reused.sort_unstable_by_key(|run| run.first);
        let is_reserved = |host: u64| {
            let next = reused.partition_point(|run| run.first <= host);
            next > 0 && host < reused[next - 1].first + reused[next - 1].count
        };
        let named = self
            .mapping
            .tables()
            .cache
            .find_slice(|entries| self.hosts(entries).find(|&host| is_reserved(host)));
        match named.await {
            Some(cluster) => Err(corrupt::in_use(self, cluster)),
            None => Ok(()),
        }
    }
}
