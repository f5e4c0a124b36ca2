//! Creating a snapshot of a disk in use.
//!
//! New writes wait until those in flight have ended and the references are counted.

use super::{Snapshot, Table};
use crate::block::{Error, Event, NewSnapshot, SnapshotInfo, WriteFlags};
use crate::cow::{RangeGuard, Run, without_fast_writes};
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::layout::{L1Entry, MAX_SNAPSHOTS};
use crate::format::qcow2::space::Change;
use crate::format::qcow2::space::Claim;
use crate::io::{Errno, IoResult, IoVec};
use crate::options::bytes;
use std::sync::atomic::Ordering;

/// The longest name, in bytes; what is longer is cut off, as in QEMU.
const NAME_LIMIT: usize = 255;

/// Nothing is written over and no mapping changes, until this is dropped.
struct WritesStopped<'a> {
    image: &'a Qcow2,
    _all: RangeGuard<'a>,
}

impl Drop for WritesStopped<'_> {
    fn drop(&mut self) {
        self.image.snapshots.are_writes_stopped.store(false, Ordering::SeqCst);
    }
}

impl Qcow2 {
    pub(super) async fn create_snapshot(
        &self,
        new: NewSnapshot<'_>,
    ) -> Result<SnapshotInfo, Error> {
        let failed = |errno| Error::os("the snapshot could not be made", errno);
        let table = self.snapshots.shareable()?;
        if table.list.len() >= MAX_SNAPSHOTS as usize {
            return Err(failed(Errno(libc::EFBIG)));
        }
        self.prepare_snapshots().await.map_err(failed)?;
        let _stopped = self.stop_writes().await;
        // All that was answered is on disk as readers see it.
        self.flush_all().await.map_err(failed)?;
        let l1 = self.metadata().active_l1();
        self.event(Event::ClusterAlloc).await;
        let (copy, _claim) = self.take_l1(l1.len()).await.map_err(failed)?;
        let snapshot = Snapshot {
            l1_table_offset: copy.first << self.geometry.cluster_bits,
            l1_size: l1.len() as u32,
            id: table.next_id(),
            name: bytes::bytes_of(new.name).iter().copied().take(NAME_LIMIT).collect(),
            seconds: new.date.as_secs() as u32,
            nanoseconds: new.date.subsec_nanos(),
            vm_clock: 0,
            vm_state_size: 0,
            extra: Snapshot::extra(0, self.size(), new.icount),
        };
        let info = snapshot.info();
        let mut list = table.list.clone();
        list.push(snapshot);
        match self.share_and_name(&l1, copy, &table, list).await {
            Ok(old) => {
                self.space.give_back(self.metadata(), &[old]).await;
                Ok(info)
            }
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Waits for all writes under way, and keeps others waiting.
    async fn stop_writes(&self) -> WritesStopped<'_> {
        // Allocations, zeroes and discards.
        let all = self.mapping.tables().ranges.lock(0..u64::MAX).await;
        let stopped = WritesStopped { image: self, _all: all };
        // What is written over, on the fast path and on the slow path.
        without_fast_writes(self, || {
            self.snapshots.are_writes_stopped.store(true, Ordering::SeqCst)
        })
        .await;
        self.mapping.tables().visits.older().await;
        stopped
    }

    /// Makes the disk share all that it has with the new snapshot, the last of `list`, whose L1 table
    /// is to be at `copy`; the clusters of the old snapshot table. Undone if it fails, unless the
    /// table may already be there.
    async fn share_and_name(
        &self,
        l1: &[L1Entry],
        copy: Run,
        table: &Table,
        list: Vec<Snapshot>,
    ) -> IoResult<Run> {
        let raised = match self.share(l1, copy).await {
            Ok(()) => match self.name_snapshots(table, list, |header| self.settled(header)).await {
                Ok(old) => {
                    self.mapping.tables().journal.close(false);
                    return Ok(old);
                }
                // From now on it is there: who opens the image finds one state or the other.
                Err((true, errno)) => return Err(errno),
                Err((false, errno)) => (u64::MAX, errno),
            },
            Err(raised) => raised,
        };
        let (raised, errno) = raised;
        if let Err(errno) = self.unshare(l1, raised).await {
            self.leave_to_repair("taking back a snapshot that could not be made", errno);
        }
        self.space.give_back(self.metadata(), &[copy]).await;
        Err(errno)
    }

    /// Raises all references of the disk, and makes none of its clusters its own.
    ///
    /// # Errors
    /// How many references were raised, and what was not possible.
    async fn share(&self, l1: &[L1Entry], copy: Run) -> Result<(), (u64, Errno)> {
        self.mark_dirty().await.map_err(|errno| (0, errno))?;
        self.change_references(l1, Change::Raise, u64::MAX).await?;
        let all = |errno| (u64::MAX, errno);
        self.space.write(self.metadata()).await.map_err(all)?;
        self.clear_copied(l1).await.map_err(all)?;
        let bytes: Vec<u8> =
            l1.iter().flat_map(|entry| entry.with_copied(false).0.to_be_bytes()).collect();
        if !bytes.is_empty() {
            let place = copy.first << self.geometry.cluster_bits;
            let bytes = IoVec::from_ref(&bytes);
            self.file().write(place, &bytes, WriteFlags::empty()).await.map_err(all)?;
        }
        Ok(())
    }

    /// Takes back the first `raised` references, and gives the disk its own clusters again.
    async fn unshare(&self, l1: &[L1Entry], raised: u64) -> IoResult {
        let lowered = self.change_references(l1, Change::Lower, raised).await;
        lowered.map_err(|(_, errno)| errno)?;
        // The caller has the whole mapping to himself.
        for index in 0..l1.len() as u64 {
            self.set_copied_below(index).await?;
        }
        self.settle().await
    }

    /// Clusters for an L1 table of this many entries.
    pub(super) async fn take_l1(&self, entries: usize) -> IoResult<(Run, Claim)> {
        self.space.take_run(self.metadata(), self.geometry.clusters(entries as u64 * 8)).await
    }
}
