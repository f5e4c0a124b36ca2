//! Host clusters that entries no longer name, on their way to being free.
//!
//! First the entries that dropped them are made durable, by the guest's flush or one of our own;
//! then whoever may still have I/O under way to them is waited for, without holding anybody up; then
//! the refcounts are lowered, and what is free is given back to the storage.

use super::Qcow2;
use super::alloc::Run;
use super::refcounts::Refcounts;
use crate::block::Event;
use crate::io::IoResult;
use crate::io::epoch::Grace;
use crate::io::sync::Mutex;
use std::collections::VecDeque;

/// So many clusters wait for the guest's next flush, before we flush ourselves.
const WAITING_LIMIT: u64 = 2048;

#[derive(Default)]
pub struct Freed {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whose entries have been handed to the kernel.
    dropped: Vec<Release>,
    clusters: u64,
    /// Whose entries are durable, oldest first.
    durable: VecDeque<Batch>,
}

/// One reference less to each of these.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    pub run: Run,
    /// What becomes free is given back to the storage.
    pub discard: bool,
}

/// What a flush makes durable.
pub struct Batch {
    releases: Vec<Release>,
    /// Older visits and older fast requests may use the clusters.
    moment: u64,
    grace: Grace,
}

impl Freed {
    /// Whether so much has collected that it should be flushed.
    fn push(&self, releases: &[Release]) -> bool {
        let mut state = self.state.lock();
        state.dropped.extend_from_slice(releases);
        state.clusters += releases.iter().map(|release| release.run.count).sum::<u64>();
        state.clusters > WAITING_LIMIT
    }

    /// Nothing is to be freed any more.
    pub fn forget(&self) {
        *self.state.lock() = State::default();
    }
}

impl Qcow2 {
    /// Books that entries, handed to the kernel and shown to readers, name these no more.
    pub(super) async fn free(&self, releases: &[Release]) {
        if releases.is_empty() {
            return;
        }
        self.event(Event::ClusterFree).await;
        self.event(Event::RefblockAlloc).await;
        if self.freed.push(releases) {
            // Whether it succeeds matters to the guest's own flush alone.
            let _ = self.flush_all().await;
        }
    }

    /// Before a flush: what it makes durable.
    pub(super) fn begin_flush(&self) -> Option<Batch> {
        let mut state = self.freed.state.lock();
        state.clusters = 0;
        let releases = std::mem::take(&mut state.dropped);
        if releases.is_empty() {
            return None;
        }
        drop(state);
        Some(Batch { releases, moment: self.mapping.visits.moment(), grace: Grace::begin() })
    }

    /// After it.
    pub(super) fn end_flush(&self, batch: Option<Batch>, result: IoResult) {
        let Some(batch) = batch else { return };
        let mut state = self.freed.state.lock();
        match result {
            Ok(()) => state.durable.push_back(batch),
            Err(_) => state.dropped.extend(batch.releases),
        }
    }

    /// Frees what nothing can be under way to any more. Does not wait for what is.
    pub(super) async fn reap(&self, refcounts: &mut Refcounts) {
        loop {
            let members = self.data().members();
            let batch = {
                let mut state = self.freed.state.lock();
                let passed = |batch: &Batch| {
                    self.mapping.visits.passed(batch.moment) && batch.grace.has_passed(&members)
                };
                if !state.durable.front().is_some_and(passed) {
                    return;
                }
                state.durable.pop_front()
            };
            let Some(batch) = batch else { return };
            for release in batch.releases {
                match refcounts.unreserve(self, &[release.run]).await {
                    Ok(free) if release.discard => self.discard_clusters(&free).await,
                    Ok(_) => {}
                    // They are leaked at worst.
                    Err(errno) => log::debug!("{}: freeing clusters: {errno}", self.name),
                }
            }
        }
    }

    pub(super) fn has_freed(&self) -> bool {
        !self.freed.state.lock().durable.is_empty()
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
