//! Giving back host clusters that entries no longer name ([`crate::cow::Freed`]): the refcounts are lowered, and what
//! becomes free is given back to the storage.

use super::Qcow2;
use super::refcounts::Refcounts;
use crate::block::Event;
use crate::cow::Release;

impl Qcow2 {
    /// Notes that entries, handed to the kernel and shown to readers, no longer name these clusters.
    pub(super) async fn free(&self, releases: &[Release]) {
        if releases.is_empty() {
            return;
        }
        self.event(Event::ClusterFree).await;
        self.event(Event::RefblockAlloc).await;
        if self.space.freed.push(releases) {
            // Whether it succeeds matters to the guest's own flush alone.
            let _ = self.flush_all().await;
        }
    }

    /// Frees the clusters that no request can use any more, without waiting for others.
    pub(super) async fn reap(&self, refcounts: &mut Refcounts) {
        loop {
            let members = self.data().members();
            let Some(releases) =
                self.space.freed.pop_unused(&self.mapping.tables().visits, &members)
            else {
                return;
            };
            self.lower(refcounts, releases).await;
        }
    }

    /// Takes back the references of a batch, in the order of the clusters: each refcount block is read and written once,
    /// and clusters side by side are discarded together.
    async fn lower(&self, refcounts: &mut Refcounts, mut releases: Vec<Release>) {
        releases.sort_unstable_by_key(|release| release.run.first);
        let mut to_discard = Vec::new();
        for release in releases {
            let others = to_discard.len();
            if let Err(errno) = refcounts.lower(self, release.run, &mut to_discard).await {
                // The others are freed; this one is leaked at worst.
                log::debug!("{}: freeing clusters: {errno}", self.name);
            }
            if !release.discard {
                to_discard.truncate(others);
            }
        }
        match refcounts.write(self).await {
            Ok(()) => self.discard_clusters(&to_discard).await,
            // What was not written is written with the next change of the refcounts.
            Err(errno) => log::debug!("{}: freeing clusters: {errno}", self.name),
        }
    }

    /// Advises the storage that clusters are free. They are ours alone: the refcounts are locked.
    pub(super) async fn discard_clusters(&self, clusters: &[u64]) {
        let bits = self.geometry.cluster_bits;
        let file = self.file();
        for run in clusters.chunk_by(|a, b| a + 1 == *b) {
            let _ = file.discard(run[0] << bits, (run.len() as u64) << bits).await;
        }
    }
}
