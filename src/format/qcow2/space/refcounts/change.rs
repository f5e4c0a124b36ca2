//! Raising and lowering the counts of clusters that are in use.

use super::Refcounts;
use crate::block::Event;
use crate::cow::Run;
use crate::format::qcow2::corrupt;
use crate::format::qcow2::layout;
use crate::format::qcow2::space::Metadata;
use crate::io::{Errno, IoResult};

/// One reference more or one less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Raise,
    Lower,
}

impl Refcounts {
    /// Counts `more` references to clusters that have some, durably. The caller knows that there is
    /// room for so many.
    pub async fn raise(&mut self, image: Metadata<'_>, runs: &[Run], more: u64) -> IoResult {
        for cluster in runs.iter().flat_map(|run| run.first..run.first + run.count) {
            let count = self.get(image, cluster).await?;
            if count == 0 || count > self.geometry.refcount_max() - more {
                return Err(corrupt::bad_refcount(image, cluster));
            }
            self.set(image, cluster, count + more).await?;
        }
        self.write(image).await?;
        if self.is_lazy { Ok(()) } else { image.file().flush().await }
    }

    /// Lowers counts in the next block from `from` on, in memory: `lower` gets each cluster that is counted, and its
    /// count. Returns which block that was, and the clusters that are free now; none if there is no block.
    pub async fn lower_in_block(
        &mut self,
        image: Metadata<'_>,
        from: usize,
        lower: impl Fn(u64, u64) -> Option<u64>,
    ) -> IoResult<Option<(usize, Vec<u64>)>> {
        let Some(index) = (from..self.table.len()).find(|&index| self.table[index] != 0) else {
            return Ok(None);
        };
        if self.blocks.len() > self.keep {
            self.write(image).await?;
            self.evict();
        }
        let (order, per_block) =
            (self.geometry.refcount_order, self.geometry.refcount_block_entries());
        let first = index as u64 * per_block;
        let block = self.block(image, index).await?.ok_or(Errno::EIO)?;
        let lowered = (0..per_block).filter_map(|n| {
            let stored = layout::refcount(&block.bytes, order, n as usize);
            let count = if stored > 0 { lower(first + n, stored) } else { None };
            count.map(|count| (first + n, count))
        });
        let lowered: Vec<(u64, u64)> = lowered.collect();
        let mut free = Vec::new();
        for (cluster, count) in lowered {
            self.set(image, cluster, count).await?;
            if count == 0 {
                self.hint = self.hint.min(cluster);
                free.push(cluster);
            }
        }
        Ok(Some((index, free)))
    }

    /// Takes one reference of each cluster back. The caller has ensured that no entry names them any more, durably,
    /// and that nothing is under way to them. Gives the clusters that are free now.
    pub async fn release(&mut self, image: Metadata<'_>, runs: &[Run]) -> IoResult<Vec<u64>> {
        image.event(Event::ClusterFree).await;
        image.event(Event::RefblockAlloc).await;
        self.unreserve(image, runs).await
    }

    /// As [`Refcounts::release`], of what was counted ahead and not used, or whose end was told when the
    /// entries dropped it.
    pub async fn unreserve(&mut self, image: Metadata<'_>, runs: &[Run]) -> IoResult<Vec<u64>> {
        let mut free = Vec::new();
        for &run in runs {
            self.lower(image, run, &mut free).await?;
        }
        self.write(image).await?;
        Ok(free)
    }

    /// Takes one reference of each cluster of a run back, and writes only what does not stay in memory. `free` gets the
    /// clusters that are free now.
    pub async fn lower(&mut self, image: Metadata<'_>, run: Run, free: &mut Vec<u64>) -> IoResult {
        for cluster in run.first..run.first + run.count {
            let count = self.get(image, cluster).await?;
            if count == 0 {
                return Err(corrupt::bad_refcount(image, cluster));
            }
            self.set(image, cluster, count - 1).await?;
            if count == 1 {
                self.hint = self.hint.min(cluster);
                free.push(cluster);
            }
            if self.blocks.len() > self.keep {
                self.write(image).await?;
                self.evict();
            }
        }
        Ok(())
    }

    /// Changes the count of each cluster, one after the other, and writes what does not stay in
    /// memory. `free` gets the clusters that are free now.
    ///
    /// # Errors
    /// How many had been changed, and why the next one cannot be: EINVAL for a count that would be
    /// too large.
    pub async fn change(
        &mut self,
        image: Metadata<'_>,
        clusters: &[u64],
        change: Change,
        free: &mut Vec<u64>,
    ) -> Result<(), (u64, Errno)> {
        image.event(Event::RefblockAlloc).await;
        for (n, &cluster) in clusters.iter().enumerate() {
            self.change_one(image, cluster, change, free).await.map_err(|e| (n as u64, e))?;
        }
        Ok(())
    }

    async fn change_one(
        &mut self,
        image: Metadata<'_>,
        cluster: u64,
        change: Change,
        free: &mut Vec<u64>,
    ) -> IoResult {
        let (index, at) = self.place(cluster);
        let (order, max) = (self.geometry.refcount_order, self.geometry.refcount_max());
        if self.blocks.len() > self.keep && !self.blocks.contains_key(&index) {
            self.write(image).await?;
            self.evict();
        }
        let block = self.block(image, index).await?;
        let Some((block, count)) = block
            .map(|block| (layout::refcount(&block.bytes, order, at), block))
            .filter(|(count, _)| *count > 0)
            .map(|(count, block)| (block, count))
        else {
            return Err(corrupt::bad_refcount(image, cluster));
        };
        match change {
            Change::Raise if count == max => return Err(Errno::EINVAL),
            Change::Raise => block.set(order, at, count + 1),
            Change::Lower => block.set(order, at, count - 1),
        }
        self.touch(cluster, if change == Change::Raise { count + 1 } else { count - 1 });
        if change == Change::Lower && count == 1 {
            self.hint = self.hint.min(cluster);
            free.push(cluster);
        }
        Ok(())
    }
}
