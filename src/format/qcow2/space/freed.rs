//! Freeing host clusters that entries no longer name ([`crate::cow::Freed`]).
//!
//! The refcounts are lowered, and free clusters are discarded in the storage.

use super::refcounts::Refcounts;
use super::{Metadata, Space};
use crate::block::Event;
use crate::cow::{FreedBatch, Release};
use crate::io::IoResult;

impl Space {
    /// Notes that entries, handed to the kernel and shown to readers, no longer name these clusters. Returns whether so
    /// many have collected that the image should be flushed.
    pub async fn free(&self, image: Metadata<'_>, releases: &[Release]) -> bool {
        if releases.is_empty() {
            return false;
        }
        image.event(Event::ClusterFree).await;
        image.event(Event::RefblockAlloc).await;
        self.freed.push(releases)
    }

    /// Called before a flush: what it makes durable.
    pub fn begin_flush(&self, image: Metadata<'_>) -> Option<FreedBatch> {
        self.freed.begin_flush(&image.mapping.tables().visits)
    }

    /// Called after it, with its result: frees what can be freed now.
    pub async fn end_flush(
        &self,
        image: Metadata<'_>,
        batch: Option<FreedBatch>,
        result: IoResult,
    ) -> IoResult {
        self.freed.end_flush(batch, result);
        result?;
        // A task that uses the refcounts does it, or the next flush: this one waits for nobody.
        if self.freed.has_durable()
            && let Some(mut counts) = self.try_counts()
        {
            self.reap(image, &mut counts).await;
        }
        self.take_back_if_idle(image).await;
        Ok(())
    }

    /// Frees the clusters that no request can use any more, without waiting for others.
    pub(super) async fn reap(&self, image: Metadata<'_>, counts: &mut Refcounts) {
        loop {
            let members = image.nodes.data().members();
            let visits = &image.mapping.tables().visits;
            let Some(releases) = self.freed.pop_unused(visits, &members) else {
                return;
            };
            self.lower(image, counts, releases).await;
        }
    }

    /// Takes back the references of a batch, in the order of the clusters: each refcount block is read and written once,
    /// and clusters side by side are discarded together.
    async fn lower(&self, image: Metadata<'_>, counts: &mut Refcounts, mut releases: Vec<Release>) {
        releases.sort_unstable_by_key(|release| release.run.first);
        let mut to_discard = Vec::new();
        for release in releases {
            let others = to_discard.len();
            if let Err(errno) = counts.lower(image, release.run, &mut to_discard).await {
                // The others are freed; this one is leaked at worst.
                log::debug!("{}: freeing clusters: {errno}", self.name);
            }
            if !release.discard {
                to_discard.truncate(others);
            }
        }
        match counts.write(image).await {
            Ok(()) => self.discard_clusters(image, &to_discard).await,
            // What was not written is written with the next change of the refcounts.
            Err(errno) => log::debug!("{}: freeing clusters: {errno}", self.name),
        }
    }

    /// Advises the storage that clusters are free. No other task uses them: the refcounts are locked, or an entry keeps
    /// them.
    pub async fn discard_clusters(&self, image: Metadata<'_>, clusters: &[u64]) {
        let bits = self.geometry.cluster_bits;
        let file = image.file();
        for run in clusters.chunk_by(|a, b| a + 1 == *b) {
            let _ = file.discard(run[0] << bits, (run.len() as u64) << bits).await;
        }
    }
}
