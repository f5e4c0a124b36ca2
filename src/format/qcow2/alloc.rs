//! Host clusters for what is new: taken from a reservation, which is refilled from the refcounts.
//!
//! What is reserved is counted already, durably, so that taking a cluster is a matter of memory. The
//! more was taken, the more is reserved at once: a reservation costs a flush, and a crash leaks what
//! is left of it. Whoever takes the first cluster of the second half reserves more before he goes on,
//! while the others have what is left. Closing gives back what is left.

use super::Qcow2;
use super::refcounts::Refcounts;
use crate::block::Event;
use crate::cow::{Allocator, Lock, Release, Run, Taken};
use crate::io::IoResult;
use std::collections::VecDeque;

/// Reservations, in clusters and in bytes.
const LEAST: u64 = 16;
const MOST_CLUSTERS: u64 = 4096;
const MOST_BYTES: u64 = 128 << 20;

/// What is reserved.
#[derive(Default)]
pub struct Pool {
    runs: VecDeque<Run>,
    /// What is on its way here, or from here to a table.
    claimed: Vec<Run>,
    /// Clusters that have been taken since the image was opened.
    taken: u64,
    /// When `taken` comes here, half of the last reservation is used.
    half_at: Option<u64>,
}

/// Clusters that no entry may name, as if they were reserved, for as long as this is there.
pub struct Claim<'a> {
    image: &'a Qcow2,
    pub runs: Vec<Run>,
}

impl Pool {
    fn take(&mut self, most: u64) -> Option<Run> {
        let front = self.runs.front_mut()?;
        let count = front.count.min(most);
        let run = Run { count, ..*front };
        front.first += count;
        front.count -= count;
        if front.count == 0 {
            self.runs.pop_front();
        }
        self.taken += count;
        Some(run)
    }

    /// What was reserved now; half of what is there lasts until it is time for more.
    fn add(&mut self, runs: &[Run]) {
        self.runs.extend(runs);
        let left: u64 = self.runs.iter().map(|run| run.count).sum();
        self.half_at = Some(self.taken + left / 2);
    }

    /// Whether somebody should reserve more although there is something left: it is said once.
    fn is_half_used(&mut self) -> bool {
        self.half_at.take_if(|at| self.taken >= *at).is_some() && !self.runs.is_empty()
    }

    /// Exactly `count`, side by side.
    fn take_run(&mut self, count: u64) -> Option<Run> {
        let index = self.runs.iter().position(|run| run.count >= count)?;
        let found = &mut self.runs[index];
        let run = Run { count, ..*found };
        found.first += count;
        found.count -= count;
        if found.count == 0 {
            self.runs.remove(index);
        }
        self.taken += count;
        Some(run)
    }

    /// All that is left.
    pub fn drain(&mut self) -> Vec<Run> {
        self.runs.drain(..).collect()
    }

    /// Whether one of these clusters is reserved or claimed; they are sorted if that has to be looked for.
    pub fn reserves(&self, clusters: &mut [u64]) -> bool {
        let low = clusters.iter().copied().min().unwrap_or(u64::MAX);
        let high = clusters.iter().copied().max().unwrap_or(0);
        let is_near = |run: &&Run| run.first <= high && low < run.first + run.count;
        let all = || self.runs.iter().chain(&self.claimed);
        if !all().any(|run| is_near(&run)) {
            return false;
        }
        clusters.sort_unstable();
        all().filter(is_near).any(|run| {
            let next = clusters.partition_point(|&cluster| cluster < run.first);
            clusters.get(next).is_some_and(|&cluster| cluster < run.first + run.count)
        })
    }

    pub fn put_back(&mut self, run: Run) {
        self.runs.push_back(run);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut pool = self.image.space.pool.lock();
        for run in &self.runs {
            let index = pool.claimed.iter().position(|claimed| claimed == run);
            index.map(|index| pool.claimed.swap_remove(index));
        }
    }
}

impl Allocator for Qcow2 {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Qcow2>> {
        self.take_by(|pool| Some(self.hold(pool.take(most)?))).await
    }

    fn put_back(&self, run: Run) {
        self.space.pool.lock().put_back(run);
    }

    async fn release(&self, releases: &[Release]) {
        self.free(releases).await;
    }
}

impl Qcow2 {
    pub(super) fn claim(&self, runs: Vec<Run>) -> Claim<'_> {
        self.space.pool.lock().claimed.extend_from_slice(&runs);
        Claim { image: self, runs }
    }

    /// One host cluster, claimed.
    pub(super) async fn take_for_table(&self) -> IoResult<(Taken<'_, Qcow2>, Claim<'_>)> {
        self.take_by(|pool| {
            let run = pool.take(1)?;
            pool.claimed.push(run);
            Some((self.hold(run), Claim { image: self, runs: vec![run] }))
        })
        .await
    }

    /// What `take` gets of what is reserved. It gets something unless there is nothing.
    async fn take_by<T>(&self, take: impl Fn(&mut Pool) -> Option<T>) -> IoResult<T> {
        self.event(Event::ClusterAlloc).await;
        loop {
            let (taken, is_half_used) = {
                let mut pool = self.space.pool.lock();
                (take(&mut pool), pool.is_half_used())
            };
            if let Some(taken) = taken {
                if is_half_used
                    && let Some(mut refcounts) =
                        self.space.counts.as_deref().and_then(Lock::try_lock)
                {
                    // If it fails there is something left, and whoever finds nothing will be told.
                    let _ = self.reserve_more(&mut refcounts).await;
                }
                return Ok(taken);
            }
            let mut refcounts = self.refcounts().await?;
            // Somebody else may have refilled it.
            if self.space.pool.lock().runs.is_empty() {
                self.reserve_more(&mut refcounts).await?;
            }
        }
    }

    /// Adds to what is reserved.
    async fn reserve_more(&self, refcounts: &mut Refcounts) -> IoResult {
        let taken = self.space.pool.lock().taken;
        self.reap(refcounts).await;
        self.take_back_some(refcounts).await;
        let limit = (MOST_BYTES >> self.geometry.cluster_bits).clamp(LEAST, MOST_CLUSTERS);
        let claim = refcounts.reserve(self, taken.clamp(LEAST, limit)).await?;
        self.space.pool.lock().add(&claim.runs);
        Ok(())
    }

    /// Clusters that were taken in another way, and go back to what is reserved if they are not kept.
    pub(super) fn hold(&self, run: Run) -> Taken<'_, Qcow2> {
        Taken::new(self, run, run.offset(self.geometry.cluster_bits))
    }

    /// `count` host clusters side by side, or none, counted and inside the file. They hold anything, and are
    /// leaked if they are neither named nor given back ([`super::refcounts::Refcounts::release`]). The
    /// claim is for whoever puts metadata there, until it can be found.
    pub(super) async fn take_run(&self, count: u64) -> IoResult<(Run, Claim<'_>)> {
        if count == 0 {
            return Ok((Run { first: 0, count, is_fresh: false }, self.claim(Vec::new())));
        }
        // Behind what is reserved they would keep the file from being cut there when it is closed.
        let reserved = {
            let mut pool = self.space.pool.lock();
            pool.take_run(count).inspect(|run| pool.claimed.push(*run))
        };
        if let Some(run) = reserved {
            return Ok((run, Claim { image: self, runs: vec![run] }));
        }
        let mut refcounts = self.refcounts().await?;
        self.reap(&mut refcounts).await;
        refcounts.reserve_run(self, count).await
    }
}
