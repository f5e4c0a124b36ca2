//! The COPIED flags of the disk's entries, which follow from the reference counts.

use crate::block::WriteFlags;
use crate::cow::{change_entries, pin};
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::layout::{Cluster, L1Entry, L2Entry};
use crate::format::qcow2::mapping::L1Lock;
use crate::io::{IoResult, IoVec};

impl Qcow2 {
    /// Clears the COPIED flags of all entries of the disk, whose references have been raised. The
    /// caller has its mapping to himself.
    pub(super) async fn clear_copied(&self, l1: &[L1Entry]) -> IoResult {
        for (index, _) in l1.iter().enumerate().filter(|(_, entry)| entry.l2_table() != 0) {
            for guest in self.slices_of(index as u64) {
                let entries = self.slice_entries(guest).await?;
                if entries.iter().any(|entry| entry.is_copied()) {
                    let new: Vec<_> =
                        entries.iter().map(|entry| entry.with_copied(false)).collect();
                    change_entries(self, guest, &new).await?;
                }
            }
        }
        let own = |entry: &L1Entry| entry.is_copied();
        let (Some(first), Some(last)) = (l1.iter().position(own), l1.iter().rposition(own)) else {
            return Ok(());
        };
        let lock = self.mapping.lock_l1().await;
        self.write_l1(&lock, first, l1[first..=last].iter().map(|entry| entry.with_copied(false)))
            .await
    }

    /// Sets the COPIED flags of the disk's entries that have the only reference. Requests may be in
    /// flight, but what adds references is not.
    pub(super) async fn set_copied(&self) -> IoResult {
        let tables = u64::from(self.header.now().l1_size);
        for index in (0..tables).filter(|&index| self.mapping.l1_at(index).l2_table() != 0) {
            let first = index * self.geometry.l2_entries();
            let _range =
                self.mapping.tables().ranges.lock(first..first + self.geometry.l2_entries()).await;
            self.set_copied_below(index).await?;
        }
        Ok(())
    }

    /// As [`Qcow2::set_copied`], of what one L1 entry names. The caller has the range of its guest
    /// clusters.
    pub(super) async fn set_copied_below(&self, index: u64) -> IoResult {
        let entry = self.mapping.l1_at(index);
        if entry.l2_table() == 0 || !self.is_sole(entry.l2_table()).await? {
            // What a table with several references names has several, too.
            return Ok(());
        }
        for guest in self.slices_of(index) {
            self.set_copied_in_slice(guest).await?;
        }
        let lock = self.mapping.lock_l1().await;
        match entry.is_copied() {
            true => Ok(()),
            false => {
                self.write_l1(&lock, index as usize, [entry.with_copied(true)].into_iter()).await
            }
        }
    }

    async fn set_copied_in_slice(&self, guest: u64) -> IoResult {
        let mut entries = self.slice_entries(guest).await?;
        let mut is_changed = false;
        for entry in entries.iter_mut().filter(|entry| !entry.is_copied()) {
            let host = match self.geometry.decode(*entry) {
                Ok(Cluster::Normal { host } | Cluster::Zero { host: Some(host) }) => host,
                Ok(Cluster::Subclusters { host: Some(host), .. }) => host,
                _ => continue,
            };
            if self.is_sole(host).await? {
                *entry = entry.with_copied(true);
                is_changed = true;
            }
        }
        if is_changed { change_entries(self, guest, &entries).await } else { Ok(()) }
    }

    /// Whether a host cluster has one reference.
    async fn is_sole(&self, host: u64) -> IoResult<bool> {
        let cluster = host >> self.geometry.cluster_bits;
        Ok(self.space.references(self.metadata(), cluster).await? == 1)
    }

    /// Guest offsets of the slices of an L2 table.
    fn slices_of(&self, index: u64) -> impl Iterator<Item = u64> + use<> {
        let start = index * self.geometry.l2_coverage();
        let step = (self.mapping.tables().cache.entries() as u64) << self.geometry.cluster_bits;
        let slices = self.geometry.l2_coverage() / step;
        (0..slices).map(move |n| start + n * step)
    }

    async fn slice_entries(&self, guest: u64) -> IoResult<Vec<L2Entry>> {
        let pinned = pin(self, guest).await?;
        Ok((0..self.mapping.tables().cache.entries()).map(|index| pinned.get(index)).collect())
    }

    /// Writes entries of the disk's L1 table from `first` on, and shows them.
    async fn write_l1(
        &self,
        lock: &L1Lock<'_>,
        first: usize,
        entries: impl Iterator<Item = L1Entry> + Clone,
    ) -> IoResult {
        let place = self.header.now().l1_table_offset + first as u64 * 8;
        let bytes: Vec<u8> = entries.clone().flat_map(|entry| entry.0.to_be_bytes()).collect();
        self.file().write(place, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        for (n, entry) in entries.enumerate() {
            lock.set((first + n) as u64, entry);
        }
        Ok(())
    }
}
