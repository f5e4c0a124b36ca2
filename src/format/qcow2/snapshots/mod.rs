//! Internal snapshots: states of the disk that share clusters with it.
//!
//! A snapshot is an L1 table of its own, named by an entry of the snapshot table; all that its tables
//! name has one reference more. What has more than one reference is never written over: the disk's
//! entries have lost their COPIED flags. The orders are those of [`super::order`].
//!
//! | file | it holds |
//! |---|---|
//! | `entry`, `table` | the snapshot table: its entries, reading it, a new one in its place |
//! | `references`, `flags` | the references of all that an L1 table names, and the flags that follow |
//! | `create` | making one, while writes wait |
//! | `delete` | deleting one, while requests go on |
//! | `revert` | turning the disk back to one, and showing one |

mod create;
mod delete;
mod entry;
mod flags;
pub(super) mod references;
mod revert;
mod table;

pub use entry::{MAX_ENTRY, Snapshot};
pub use table::Table;

use super::Qcow2;
use super::header::{Header, Incompatible};
use super::layout::{Geometry, L1Entry};
use super::space::Change;
use super::unclosed::promised;
use crate::block::{Error, LocalFuture, NewSnapshot, Node, SnapshotInfo, SnapshotKey, Snapshots};
use crate::cow::{Run, check_sound, read_padded, settle_journal};
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Errno, IoResult};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an open image knows of its snapshots.
pub struct ImageSnapshots {
    /// Or why it cannot be read.
    table: Mutex<Result<Table, Error>>,
    /// The disk's data is in another file, which snapshots cannot share.
    external_data: bool,
    /// One is being made: nothing is written over, and no mapping changes.
    are_writes_stopped: AtomicBool,
    /// References are being counted again, or that was given up.
    is_counting: AtomicBool,
    /// It has failed halfway.
    is_wrong: AtomicBool,
}

impl ImageSnapshots {
    pub fn new(table: Result<Table, Error>, external_data: bool) -> ImageSnapshots {
        ImageSnapshots {
            table: Mutex::new(table),
            external_data,
            are_writes_stopped: AtomicBool::new(false),
            is_counting: AtomicBool::new(false),
            is_wrong: AtomicBool::new(false),
        }
    }

    /// Takes what an image has that somebody else has written.
    pub fn replace(&self, table: Result<Table, Error>) {
        *self.table.lock() = table;
        self.is_counting.store(false, Ordering::SeqCst);
        self.is_wrong.store(false, Ordering::SeqCst);
    }

    pub fn are_writes_stopped(&self) -> bool {
        self.are_writes_stopped.load(Ordering::SeqCst)
    }

    /// Refcounts may be wrong: the dirty bit stays until somebody repairs them.
    pub fn needs_repair(&self) -> bool {
        self.is_counting.load(Ordering::SeqCst) || self.is_wrong.load(Ordering::SeqCst)
    }

    /// Of the table on disk, if it can be read.
    pub fn table_bytes(&self) -> Option<u64> {
        self.table.lock().as_ref().ok().map(|table| table.bytes)
    }

    fn table(&self) -> Result<Table, Error> {
        self.table.lock().clone()
    }

    /// The snapshots. What is in another file cannot be shared.
    pub fn shareable(&self) -> Result<Table, Error> {
        match self.external_data {
            true => Err(Error::os("the image has an external data file", Errno::ENOTSUP)),
            false => self.table(),
        }
    }

    /// Refuses what goes by the snapshots if their table cannot be read.
    pub fn check(&self) -> Result<(), Error> {
        self.table().map(drop)
    }
}

impl Snapshot {
    /// Reads its L1 table.
    pub async fn read_l1(&self, file: &Node, geometry: &Geometry) -> Result<Vec<L1Entry>, Error> {
        if !self.has_sane_l1_size() {
            let error = Error::new("Snapshot L1 table too large");
            return Err(error.with_errno(Errno(libc::EFBIG)));
        }
        let (offset, len) = (self.l1_table_offset, self.l1_size as usize * 8);
        // The file may end in its last cluster.
        let end = file.len().next_multiple_of(geometry.cluster_size());
        let is_there = len == 0 || offset.checked_add(len as u64).is_some_and(|last| last <= end);
        if !geometry.is_cluster_start(offset) || !is_there {
            return Err(invalid_l1_offset());
        }
        let failed = |errno| Error::os("Could not read the snapshot's L1 table", errno);
        let mut bytes = AlignedBuf::new(len, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
        if len > 0 {
            read_padded(file, offset, &bytes.io_vec()).await.map_err(failed)?;
        }
        let word = |bytes: &[u8]| bytes.iter().fold(0u64, |word, &b| word << 8 | u64::from(b));
        Ok(bytes[..len].chunks_exact(8).map(|bytes| L1Entry(word(bytes))).collect())
    }
}

impl Qcow2 {
    /// Refuses to free what a snapshot's own L1 table takes if something else is there, too.
    fn check_own_table(&self, table: &Table, index: usize) -> Result<(), Error> {
        let header = self.header.now();
        let place = |start: u64, entries: u32| start..start + u64::from(entries) * 8;
        let places = table.list.iter().map(|other| place(other.l1_table_offset, other.l1_size));
        let own = place(table.list[index].l1_table_offset, table.list[index].l1_size);
        let others = places.enumerate().filter(|(other, _)| *other != index);
        let active = place(header.l1_table_offset, header.l1_size);
        let snapshots = header.snapshots_offset..header.snapshots_offset + table.bytes;
        let mut all = others.map(|(_, place)| place).chain([active, snapshots]);
        let clashes =
            |other: Range<u64>| own.start < other.end && other.start < own.end && !own.is_empty();
        match all.any(clashes) {
            true => Err(invalid_l1_offset()),
            false => Ok(()),
        }
    }

    /// What has to be on disk before the snapshots change. The disk does not, so that bitmaps stay
    /// true.
    async fn prepare_snapshots(&self) -> IoResult {
        if !self.settings.is_writable {
            return Err(Errno::EPERM);
        }
        check_sound(self).await?;
        self.metadata().change_header(|header| header.autoclear = promised(header)).await
    }

    /// One reference more, or one less, to each thing that an L1 table names ([`references::change`]).
    async fn change_references(
        &self,
        l1: &[L1Entry],
        change: Change,
        most: u64,
    ) -> Result<(), (u64, Errno)> {
        let own = (self.metadata(), &self.space);
        references::change(own, l1, change, most, self.settings.discards.snapshot).await
    }

    // ---- The dirty bit

    /// Marks the refcounts as possibly wrong, durably, before references are counted again.
    async fn mark_dirty(&self) -> IoResult {
        self.begin_counting();
        settle_journal(self).await?;
        self.metadata().change_header(set_dirty_bit).await
    }

    /// Makes the refcounts durable, and says that they are right again.
    async fn settle(&self) -> IoResult {
        self.space.write(self.metadata()).await?;
        self.metadata().change_header(|header| self.settled(header)).await?;
        self.mapping.tables().journal.close(false);
        Ok(())
    }

    /// Takes one reference of each cluster back; no entry on disk has it any more.
    pub(super) async fn drop_references(&self, runs: &[Run]) -> IoResult {
        self.mark_dirty().await?;
        self.space.release(self.metadata(), runs).await?;
        self.end_lowering().await
    }

    /// Writes lowered references, and then what follows from them.
    async fn end_lowering(&self) -> IoResult {
        self.space.write(self.metadata()).await?;
        self.set_copied().await?;
        self.settle().await
    }

    fn settled(&self, header: &mut Header) {
        self.end_counting();
        // With lazy refcounts they are right when the image is closed, after guests' writes.
        let lazy = self.settings.lazy_refcounts && self.life.is_prepared();
        if !lazy && !self.snapshots.needs_repair() {
            header.incompatible -= Incompatible::DIRTY;
        }
    }

    /// What waits in the journal is to be settled before the header says so; and the journal stays closed
    /// until the header says otherwise.
    fn begin_counting(&self) {
        self.snapshots.is_counting.store(true, Ordering::SeqCst);
        self.mapping.tables().journal.close(true);
    }

    fn end_counting(&self) {
        self.snapshots.is_counting.store(false, Ordering::SeqCst);
    }

    /// Counting again has failed in such a way that it stays wrong.
    fn leave_to_repair(&self, what: &str, errno: Errno) {
        self.snapshots.is_wrong.store(true, Ordering::SeqCst);
        log::error!(
            "{}: qcow2: {what}: {errno}; clusters are leaked until the image is repaired, which closing \
             it does, or opening it again",
            self.settings.name
        );
    }
}

/// Sets the dirty bit in the header. Version 2 has none.
fn set_dirty_bit(header: &mut Header) {
    if header.version >= 3 {
        header.incompatible |= Incompatible::DIRTY;
    }
}

fn invalid_l1_offset() -> Error {
    Error::new("Snapshot L1 table offset invalid").with_errno(Errno::EINVAL)
}

fn not_found() -> Error {
    Error::os("Can't find snapshot", Errno(libc::ENOENT))
}

impl Snapshots for Qcow2 {
    fn list(&self) -> Result<Vec<SnapshotInfo>, Error> {
        Ok(self.snapshots.shareable()?.list.iter().map(Snapshot::info).collect())
    }

    fn create<'a>(&'a self, new: NewSnapshot<'a>) -> LocalFuture<'a, Result<SnapshotInfo, Error>> {
        Box::pin(async move { self.marked(self.create_snapshot(new).await).await })
    }

    fn apply<'a>(&'a self, which: SnapshotKey<'a>) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(async move { self.marked(self.apply_snapshot(which).await).await })
    }

    fn delete<'a>(
        &'a self,
        which: SnapshotKey<'a>,
    ) -> LocalFuture<'a, Result<SnapshotInfo, Error>> {
        Box::pin(async move { self.marked(self.delete_snapshot(which).await).await })
    }

    fn load<'a>(&'a self, which: SnapshotKey<'a>) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(self.load_snapshot(which))
    }
}
