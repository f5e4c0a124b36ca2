//! Discards all data of an image, so that its backing file shows.
//!
//! It goes slice by slice, in the order of every change of the mapping ([`super::order`]): an entry that a
//! crash finds removed shows the backing file, which has the same contents by then. Empty tables are freed
//! last, and the file is cut to what is left.

use super::Qcow2;
use crate::block::Event;
use crate::cow::{Empty, Format, empty_clusters};
use crate::io::{Errno, IoResult};

impl Qcow2 {
    pub(super) async fn discard_all(&self) -> IoResult {
        if self.settings.raw_data {
            return Err(Errno::ENOTSUP);
        }
        self.prepare_writing().await?;
        self.event(Event::EmptyImagePrepare).await;
        let end = self.size().next_multiple_of(self.geometry.cluster_size());
        empty_clusters(self, 0..end, Empty::Crop).await?;
        self.flush_all().await?;
        if self.geometry.external_data {
            self.give_back_mapped(end).await;
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

    /// Gives back what an external data file has below guest offset `end` where there are L2 tables. No entry that a crash
    /// can bring back shows it.
    async fn give_back_mapped(&self, end: u64) {
        let coverage = self.geometry.l2_coverage();
        for start in (0..end).step_by(coverage as usize) {
            if self.has_table(start) {
                self.give_back_data(start..end.min(start + coverage)).await;
            }
        }
    }
}
