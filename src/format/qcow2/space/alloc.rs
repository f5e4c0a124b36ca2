//! Allocation of host clusters from a reservation, which is refilled from the refcounts.
//!
//! Reserved clusters are counted already, durably, so that taking one is a matter of memory. The more was taken, the
//! more is reserved at once: a reservation costs a flush, and a crash leaks what is left of it. The task that takes
//! the first cluster of the second half reserves more before it continues, while the others have what is left.
//! Closing gives back what is left.

use super::refcounts::Refcounts;
use super::{Metadata, Space};
use crate::block::Event;
use crate::cow::Run;
use crate::io::IoResult;
use crate::io::sync::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Reservations, in clusters and in bytes.
const LEAST: u64 = 16;
const MOST_CLUSTERS: u64 = 4096;
const MOST_BYTES: u64 = 128 << 20;

/// What is reserved.
#[derive(Default)]
pub struct Pool(Mutex<Reserved>);

#[derive(Default)]
struct Reserved {
    runs: VecDeque<Run>,
    /// What is in flight here, or from here to a table.
    claimed: Vec<Run>,
    /// Clusters that have been taken since the image was opened.
    taken: u64,
    /// When `taken` comes here, half of the last reservation is used.
    half_at: Option<u64>,
}

/// Clusters that no entry may name, as if they were reserved, while this is there.
pub struct Claim {
    pool: Arc<Pool>,
    pub runs: Vec<Run>,
}

/// Clusters that nothing names: they go back to what is reserved unless they are kept.
pub struct Unnamed<'a> {
    pool: &'a Pool,
    run: Run,
}

impl Unnamed<'_> {
    pub fn run(&self) -> Run {
        self.run
    }

    /// Something names them from now on, or may name them, or another owner puts them back.
    pub fn keep(mut self) -> Run {
        let run = self.run;
        self.run.count = 0;
        run
    }
}

impl Drop for Unnamed<'_> {
    fn drop(&mut self) {
        if self.run.count > 0 {
            self.pool.put_back(self.run);
        }
    }
}

impl Pool {
    fn put_back(&self, run: Run) {
        self.0.lock().runs.push_back(Run { is_fresh: false, ..run });
    }

    pub fn claim(self: &Arc<Pool>, runs: Vec<Run>) -> Claim {
        self.0.lock().claimed.extend_from_slice(&runs);
        Claim { pool: self.clone(), runs }
    }

    /// All that is left.
    pub fn drain(&self) -> Vec<Run> {
        self.0.lock().runs.drain(..).collect()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let claimed = &mut self.pool.0.lock().claimed;
        for run in &self.runs {
            let index = claimed.iter().position(|one| one == run);
            index.map(|index| claimed.swap_remove(index));
        }
    }
}

impl Reserved {
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

    /// Whether one of these clusters is reserved or claimed; they are sorted if that has to be looked for.
    fn reserves(&self, clusters: &mut [u64]) -> bool {
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
}

impl Space {
    /// Takes up to `most` host clusters side by side, at least one: counted, durably, and inside the file.
    pub async fn take(&self, image: Metadata<'_>, most: u64) -> IoResult<Unnamed<'_>> {
        self.take_by(image, |reserved| Some(self.hold(reserved.take(most)?))).await
    }

    /// Takes back clusters that were taken and that no entry names or may name.
    pub fn put_back(&self, run: Run) {
        self.pool.put_back(run);
    }

    /// Clusters that were taken, to go back to what is reserved unless they are kept.
    pub fn hold(&self, run: Run) -> Unnamed<'_> {
        Unnamed { pool: &self.pool, run }
    }

    /// Whether one of these clusters is reserved or claimed. The order of `clusters` may change.
    pub fn reserves(&self, clusters: &mut [u64]) -> bool {
        self.pool.0.lock().reserves(clusters)
    }

    /// One host cluster, claimed.
    pub async fn take_for_table(&self, image: Metadata<'_>) -> IoResult<(Unnamed<'_>, Claim)> {
        self.take_by(image, |reserved| {
            let run = reserved.take(1)?;
            reserved.claimed.push(run);
            Some((self.hold(run), Claim { pool: self.pool.clone(), runs: vec![run] }))
        })
        .await
    }

    /// What `take` gets of what is reserved. It gets something unless there is nothing.
    async fn take_by<T>(
        &self,
        image: Metadata<'_>,
        take: impl Fn(&mut Reserved) -> Option<T>,
    ) -> IoResult<T> {
        image.event(Event::ClusterAlloc).await;
        loop {
            let (taken, is_half_used) = {
                let mut reserved = self.pool.0.lock();
                (take(&mut reserved), reserved.is_half_used())
            };
            if let Some(taken) = taken {
                if is_half_used && let Some(mut counts) = self.try_counts() {
                    // If it fails there is something left, and the task that finds nothing is told.
                    let _ = self.reserve_more(image, &mut counts).await;
                }
                return Ok(taken);
            }
            let mut counts = self.counts().await?;
            // Another task may have refilled it.
            if self.pool.0.lock().runs.is_empty() {
                self.reserve_more(image, &mut counts).await?;
            }
        }
    }

    /// Adds to what is reserved.
    async fn reserve_more(&self, image: Metadata<'_>, counts: &mut Refcounts) -> IoResult {
        let taken = self.pool.0.lock().taken;
        self.reap(image, counts).await;
        self.take_back_some(image, counts).await;
        let limit = (MOST_BYTES >> self.geometry.cluster_bits).clamp(LEAST, MOST_CLUSTERS);
        let claim = counts.reserve(image, taken.clamp(LEAST, limit)).await?;
        self.pool.0.lock().add(&claim.runs);
        Ok(())
    }

    /// `count` host clusters side by side, or none, counted and inside the file. They hold anything, and are
    /// leaked if they are neither named nor given back ([`Space::release`]). The
    /// claim is for the task that puts metadata there, until it can be found.
    pub async fn take_run(&self, image: Metadata<'_>, count: u64) -> IoResult<(Run, Claim)> {
        if count == 0 {
            return Ok((Run { first: 0, count, is_fresh: false }, self.pool.claim(Vec::new())));
        }
        // Behind what is reserved they would keep the file from being cut there when it is closed.
        let taken = {
            let mut reserved = self.pool.0.lock();
            reserved.take_run(count).inspect(|run| reserved.claimed.push(*run))
        };
        if let Some(run) = taken {
            return Ok((run, Claim { pool: self.pool.clone(), runs: vec![run] }));
        }
        let mut counts = self.counts().await?;
        self.reap(image, &mut counts).await;
        counts.reserve_run(image, count).await
    }

    /// As [`Space::take_run`], but nothing of what is reserved.
    pub async fn reserve_run(&self, image: Metadata<'_>, count: u64) -> IoResult<(Run, Claim)> {
        self.counts().await?.reserve_run(image, count).await
    }
}
