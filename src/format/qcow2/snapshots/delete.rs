//! Deleting a snapshot of a disk in use.
//!
//! Its references are dropped, and clusters that are left with one reference belong to the disk alone again.

use super::{references, set_dirty_bit};
use crate::block::{Error, SnapshotInfo, SnapshotKey};
use crate::cow::{Run, settle_journal};
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::layout::L1Entry;
use crate::format::qcow2::space::Change;
use crate::io::IoResult;

impl Qcow2 {
    pub(super) async fn delete_snapshot(
        &self,
        which: SnapshotKey<'_>,
    ) -> Result<SnapshotInfo, Error> {
        let failed = |errno| Error::os("Failed to remove snapshot from snapshot list", errno);
        let table = self.snapshots.shareable()?;
        let index = table.find(which).ok_or_else(super::not_found)?;
        let l1 = table.list[index].read_l1(&self.file(), &self.geometry).await?;
        self.check_own_table(&table, index)?;
        let not_freed = |errno| Error::os("Failed to free the cluster and L1 table", errno);
        references::check(self.metadata(), &self.space, (0..).zip(l1.iter().copied()))
            .await
            .map_err(not_freed)?;
        self.prepare_snapshots().await.map_err(failed)?;
        let mut list = table.list.clone();
        let snapshot = list.remove(index);
        self.begin_counting();
        let old = match settle_journal(self).await {
            Ok(()) => self.name_snapshots(&table, list, set_dirty_bit).await,
            Err(errno) => Err((false, errno)),
        };
        let old = old.map_err(|(is_named, errno)| {
            if !is_named {
                self.end_counting();
                self.mapping.tables().journal.close(false);
            }
            failed(errno)
        })?;
        let own_table = Run {
            first: snapshot.l1_table_offset >> self.geometry.cluster_bits,
            count: self.geometry.clusters(l1.len() as u64 * 8),
            is_fresh: false,
        };
        if let Err(errno) = self.take_back(&l1, &[old, own_table]).await {
            self.leave_to_repair("taking back the references of a deleted snapshot", errno);
            return Err(not_freed(errno));
        }
        Ok(snapshot.info())
    }

    /// Lowers the references of tables that nothing on disk names any more, durably, and frees
    /// `tables` themselves.
    pub(super) async fn take_back(&self, l1: &[L1Entry], tables: &[Run]) -> IoResult {
        let lowered = self.change_references(l1, Change::Lower, u64::MAX).await;
        lowered.map_err(|(_, errno)| errno)?;
        self.space.give_back(self.metadata(), tables).await;
        self.end_lowering().await
    }
}
