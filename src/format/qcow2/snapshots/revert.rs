//! Reverting the disk to a snapshot, permanently or to read it once.

use super::{Snapshot, references, set_dirty_bit};
use crate::block::{BitmapStore, Error, SECTOR, SnapshotKey, WriteFlags};
use crate::cow::Run;
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::layout::{L1Entry, MAX_L1_BYTES};
use crate::format::qcow2::space::Change;
use crate::io::{Errno, IoResult, IoVec};
use std::sync::atomic::Ordering;

impl Qcow2 {
    pub(super) async fn apply_snapshot(&self, which: SnapshotKey<'_>) -> Result<(), Error> {
        let failed = |errno| Error::os("the snapshot could not be applied", errno);
        let table = self.snapshots.shareable()?;
        // They do not follow what the disk becomes.
        if !self.bitmaps().all().is_empty() {
            return Err(Error::new("Device has active dirty bitmaps"));
        }
        let index = table.find(which).ok_or_else(super::not_found)?;
        let snapshot = &table.list[index];
        let entries = snapshot.read_l1(&self.file(), &self.geometry).await?;
        let size = snapshot.disk_size().unwrap_or(self.size());
        let invalid = |text: &str| Err(Error::new(text).with_errno(Errno::EINVAL));
        if size > i64::MAX as u64 {
            return invalid("Image size cannot be negative");
        }
        if !size.is_multiple_of(SECTOR) {
            return invalid("The new size must be a multiple of 512");
        }
        let l1 = self.l1_for(&entries, size).ok_or_else(|| failed(Errno(libc::EFBIG)))?;
        references::check(self.metadata(), &self.space, (0..).zip(entries.iter().copied()))
            .await
            .map_err(failed)?;
        self.prepare_snapshots().await.map_err(failed)?;
        self.prepare_writing().await.map_err(failed)?;
        // What the tables say is on disk.
        self.flush_all().await.map_err(failed)?;
        let mine = self.metadata().active_l1();
        let old = match self.share_and_switch(&entries, &l1, size).await {
            Ok(old) => old,
            Err(errno) => return Err(failed(errno)),
        };
        if let Err(errno) = self.take_back(&mine, &[old]).await {
            // The disk is what was asked for.
            self.leave_to_repair("taking back the references of the disk as it was", errno);
        }
        Ok(())
    }

    /// A snapshot's L1 table as one of a disk of `size` bytes; none if there can be no such disk.
    fn l1_for(&self, entries: &[L1Entry], size: u64) -> Option<Vec<L1Entry>> {
        let needed = self.geometry.l1_entries_for(size).max(entries.len() as u64).max(1);
        if needed * 8 > MAX_L1_BYTES {
            return None;
        }
        let mut l1: Vec<_> = entries.iter().map(|entry| entry.with_copied(false)).collect();
        l1.resize(needed as usize, L1Entry(0));
        Some(l1)
    }

    /// Raises the snapshot's references and makes `l1` the disk's table; the clusters of the old one.
    /// Undone if it fails, unless the header may already name the new one.
    async fn share_and_switch(
        &self,
        entries: &[L1Entry],
        l1: &[L1Entry],
        size: u64,
    ) -> IoResult<Run> {
        self.mark_dirty().await?;
        let (place, _claim) = match self.take_l1(l1.len()).await {
            Ok(taken) => taken,
            Err(errno) => {
                self.settle().await?;
                return Err(errno);
            }
        };
        match self.share_snapshot(entries, l1, place).await {
            Ok(()) => self.switch_to(l1, place, size).await,
            Err((raised, errno)) => {
                let lowered = self.change_references(entries, Change::Lower, raised).await;
                let lowered = lowered.map_err(|(_, errno)| errno);
                self.space.give_back(self.metadata(), &[place]).await;
                let settled = match lowered {
                    Ok(()) => self.settle().await,
                    failed => failed,
                };
                if let Err(errno) = settled {
                    self.leave_to_repair("taking back what could not be applied", errno);
                }
                Err(errno)
            }
        }
    }

    /// Raises what the snapshot refers to, and writes the new table, all of it durably.
    async fn share_snapshot(
        &self,
        entries: &[L1Entry],
        l1: &[L1Entry],
        place: Run,
    ) -> Result<(), (u64, Errno)> {
        self.change_references(entries, Change::Raise, u64::MAX).await?;
        let all = |errno| (u64::MAX, errno);
        self.space.write(self.metadata()).await.map_err(all)?;
        references::clear_stale_flags(self.metadata(), entries).await.map_err(all)?;
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let at = place.first << self.geometry.cluster_bits;
        let bytes = IoVec::from_ref(&bytes);
        self.file().write(at, &bytes, WriteFlags::empty()).await.map_err(all)?;
        self.file().flush().await.map_err(all)
    }

    /// Names the new table in the header, and shows it. The clusters of the old one.
    async fn switch_to(&self, l1: &[L1Entry], place: Run, size: u64) -> IoResult<Run> {
        let bits = self.geometry.cluster_bits;
        let mut header = self.metadata().lock_header().await;
        let mut new = header.clone();
        new.l1_table_offset = place.first << bits;
        new.l1_size = l1.len() as u32;
        new.size = size;
        set_dirty_bit(&mut new);
        let old = Run {
            first: header.l1_table_offset >> bits,
            count: self.geometry.clusters(u64::from(header.l1_size) * 8),
            is_fresh: false,
        };
        let written = header.write(new).await;
        // Also if that has failed: the disk may have either.
        self.size.store(size, Ordering::Relaxed);
        self.show_l1(l1);
        written.map(|()| old)
    }

    /// Shows a table in place of the disk's. No request is in flight.
    fn show_l1(&self, l1: &[L1Entry]) {
        self.mapping.show_l1(l1);
        self.metadata().note_l2_tables();
    }

    pub(super) async fn load_snapshot(&self, which: SnapshotKey<'_>) -> Result<(), Error> {
        if self.settings.is_writable {
            return Err(Error::new("Device is not readonly"));
        }
        let table = self.snapshots.shareable()?;
        let index = table.find(which).ok_or_else(super::not_found)?;
        let snapshot: &Snapshot = &table.list[index];
        let l1 = snapshot.read_l1(&self.file(), &self.geometry).await?;
        self.show_l1(&l1);
        Ok(())
    }
}
