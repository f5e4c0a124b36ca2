//! Discards all data of an image, so that its backing file shows.
//!
//! It goes cluster by cluster, in the order of every change of the mapping ([`super::order`]): an entry that a
//! crash finds removed shows the backing file, which has the same contents by then. Empty tables are freed
//! last, and the file is cut to what is left.

use super::Qcow2;
use super::layout::L2Entry;
use crate::block::Event;
use crate::cow::{Empty, Release, change_entries, ensure_table, pin};
use crate::io::{Errno, IoResult};

impl Qcow2 {
    pub(super) async fn discard_all(&self) -> IoResult {
        if self.settings.raw_data {
            return Err(Errno::ENOTSUP);
        }
        self.prepare_writing().await?;
        self.event(Event::EmptyImagePrepare).await;
        let bits = self.geometry.cluster_bits;
        let end = self.geometry.clusters(self.size());
        let entries = self.mapping.tables().cache.entries() as u64;
        let mut first = 0;
        let mut discarded = Vec::new();
        while first < end {
            let guest = first << bits;
            let index = self.geometry.l1_index(guest);
            if self.mapping.l1_at(index).l2_table() == 0 {
                first = (index + 1) * self.geometry.l2_entries();
                continue;
            }
            let stop = end.min((first | (entries - 1)) + 1);
            if self.discard_clusters_of(first, stop).await? && self.geometry.external_data {
                discarded.push(guest..stop << bits);
            }
            first = stop;
        }
        self.flush_all().await?;
        // No entry that a crash can bring back shows these parts of an external data file.
        for range in discarded {
            self.give_back_data(range).await;
        }
        // The state of a virtual machine behind the end of the disk goes with it.
        self.unmap(self.size(), Empty::Crop).await?;
        self.flush_all().await?;
        self.event(Event::L1Update).await;
        self.shrink_l1(0).await?;
        // The refcounts change in place: no table replaces the old one.
        self.event(Event::RefblockAlloc).await;
        self.event(Event::ReftableUpdate).await;
        self.cut_to_use().await
    }

    /// Removes the entries of guest clusters of one slice, whose L2 table exists. Returns whether any were set.
    async fn discard_clusters_of(&self, first: u64, stop: u64) -> IoResult<bool> {
        let guest = first << self.geometry.cluster_bits;
        let _range = self.mapping.tables().ranges.lock(first..stop).await;
        let _visit = self.mapping.tables().visits.enter();
        ensure_table(self, guest).await?;
        let mut releases = Vec::new();
        let mut is_changed = false;
        {
            let pinned = pin(self, guest).await?;
            let (_, index) = self.mapping.tables().slice_of(guest);
            for n in 0..(stop - first) as usize {
                let old = pinned.get(index + n);
                is_changed |= old != L2Entry::UNALLOCATED;
                let run = self.geometry.clusters_of(old);
                releases.extend(run.map(|run| Release { run, discard: true }));
            }
        }
        if is_changed {
            let empty = vec![L2Entry::UNALLOCATED; (stop - first) as usize];
            change_entries(self, guest, &empty).await?;
            self.free(&releases).await;
        }
        Ok(is_changed)
    }
}
