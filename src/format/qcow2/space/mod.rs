//! The space of an open image: host clusters, from allocation until they are free again.
//!
//! | file | it holds |
//! |---|---|
//! | `refcounts` | how often each cluster is referred to |
//! | `alloc` | reservations, and taking clusters out of them |
//! | `freed` | giving back what entries no longer name |
//! | `packed` | where compressed clusters are put |
//! | `take_back` | what a killed process has left counted and unused |
//! | `holes` | whether the file is likely to have holes |
//!
//! What it looks at besides its own comes with each call ([`Metadata`]).

mod alloc;
mod freed;
mod holes;
mod packed;
mod refcounts;
mod take_back;

pub use alloc::{Claim, Unnamed};
pub use refcounts::{Change, Refcounts};

use super::corrupt;
use super::layout::Geometry;
use super::metadata::Metadata;
use crate::block::{Node, SECTOR};
use crate::cow::{Freed, Lock, LockGuard, Run, cut};
use crate::io::{Errno, IoResult};
use alloc::Pool;
use holes::Holes;
use packed::Packing;
use std::sync::{Arc, Weak};
use take_back::TakingBack;

/// See the module's text. Locks that are held across waits are taken in the order of the fields.
pub struct Space {
    /// Held while compressed clusters are given their places.
    packing: Lock<Packing>,
    /// None when the image is read-only.
    counts: Option<Arc<Lock<Refcounts>>>,
    /// Reserved clusters.
    pool: Arc<Pool>,
    /// Clusters that entries no longer name.
    freed: Freed,
    holes: Holes,
    /// Whether a killed process has left clusters counted and unused.
    taking_back: TakingBack,
    /// The storage is notified of clusters that a killed process had taken.
    passes_discards: bool,
    /// Refcount blocks that are kept in memory, in bytes.
    cache_bytes: u64,
    geometry: Geometry,
    /// The node's, for what is logged.
    name: String,
}

impl Space {
    /// The space of an image that was just opened: without refcounts, of one that is not written.
    pub fn new(
        name: &str,
        geometry: Geometry,
        counts: Option<Refcounts>,
        cache_bytes: u64,
        passes_discards: bool,
    ) -> Space {
        Space {
            packing: Lock::new(Packing::default()),
            pool: counts.as_ref().map(Refcounts::pool).unwrap_or_default(),
            counts: counts.map(|counts| Arc::new(Lock::new(counts))),
            freed: Freed::default(),
            holes: Holes::default(),
            taking_back: TakingBack::default(),
            passes_discards,
            cache_bytes,
            geometry,
            name: name.to_owned(),
        }
    }

    async fn counts(&self) -> IoResult<LockGuard<'_, Refcounts>> {
        match &self.counts {
            Some(counts) => Ok(counts.lock().await),
            None => Err(Errno::EPERM),
        }
    }

    /// The refcounts, if no other task uses them now.
    fn try_counts(&self) -> Option<LockGuard<'_, Refcounts>> {
        self.counts.as_deref().and_then(Lock::try_lock)
    }

    // ---- References

    /// How often a cluster is referred to.
    pub async fn references(&self, image: Metadata<'_>, cluster: u64) -> IoResult<u64> {
        self.counts().await?.get(image, cluster).await
    }

    /// Refuses clusters of which one is not counted, although something refers to it.
    pub async fn check_counted(&self, image: Metadata<'_>, clusters: &[u64]) -> IoResult {
        let mut counts = self.counts().await?;
        for &cluster in clusters {
            if counts.get(image, cluster).await? == 0 {
                return Err(corrupt::bad_refcount(image, cluster));
            }
        }
        Ok(())
    }

    /// Whether all blocks that the refcount table names can be where it says.
    pub async fn check_table(&self, image: Metadata<'_>) -> IoResult {
        self.counts().await?.check_table(image)
    }

    /// One reference more, or one less, to each of these clusters; `discard`: the storage is notified of clusters
    /// that become free. Changed refcounts are in memory then ([`Space::write`]).
    ///
    /// # Errors
    /// How many had been changed, and why the next one cannot be: EINVAL for a count that would be
    /// too large.
    pub async fn change(
        &self,
        image: Metadata<'_>,
        clusters: &[u64],
        change: Change,
        discard: bool,
    ) -> Result<(), (u64, Errno)> {
        let none = |errno| (0, errno);
        let mut counts = self.counts().await.map_err(none)?;
        let mut free = Vec::new();
        let changed = counts.change(image, clusters, change, &mut free).await;
        if !free.is_empty() {
            counts.write(image).await.map_err(none)?;
            if discard {
                free.sort_unstable();
                self.discard_clusters(image, &free).await;
            }
        }
        changed
    }

    /// Counts `more` references to clusters that have some, durably. The caller knows that there is
    /// room for so many.
    pub async fn raise(&self, image: Metadata<'_>, runs: &[Run], more: u64) -> IoResult {
        self.counts().await?.raise(image, runs, more).await
    }

    /// Takes one reference of each cluster back: no entry names them any more, durably, and nothing is under way to them.
    pub async fn release(&self, image: Metadata<'_>, runs: &[Run]) -> IoResult {
        self.counts().await?.release(image, runs).await.map(drop)
    }

    /// As [`Space::release`]. What fails is leaked.
    pub async fn give_back(&self, image: Metadata<'_>, runs: &[Run]) {
        if let Err(errno) = self.release(image, runs).await {
            log::debug!("{}: giving back clusters of tables: {errno}", self.name);
        }
    }

    /// Makes all refcounts durable.
    pub async fn write(&self, image: Metadata<'_>) -> IoResult {
        self.counts().await?.write(image).await?;
        image.file().flush().await
    }

    /// Notes where the refcount blocks are.
    pub async fn note_blocks(&self, image: Metadata<'_>) {
        if let Some(counts) = &self.counts {
            image.note_blocks(counts.lock().await.blocks_named());
        }
    }

    // ---- The life of an image

    /// Reads the refcounts of an image that another process has written: a table of this many clusters at an offset.
    pub async fn reread(&self, file: &Node, table: (u64, u32)) -> IoResult {
        match &self.counts {
            Some(counts) => counts.lock().await.reread(file, table, self.cache_bytes).await,
            None => Ok(()),
        }
    }

    /// Forgets what was going to be used and what was going to be given back: it is another process's by now, or leaked.
    pub fn forget(&self) {
        self.pool.drain();
        self.freed.forget();
    }

    /// What gives back the memory of refcount blocks that were not used since it was last called, as long as the image
    /// is open.
    pub fn cleaner(&self) -> impl Fn() + Send + use<> {
        let counts = self.counts.as_ref().map(Arc::downgrade);
        move || {
            // A task that holds them uses them.
            if let Some(counts) = counts.as_ref().and_then(Weak::upgrade)
                && let Some(mut counts) = counts.try_lock()
            {
                counts.forget_unused();
            }
        }
    }

    /// Gives back all that is reserved, and takes what it held off the end of the file.
    pub async fn close(&self, image: Metadata<'_>) -> IoResult {
        let (packed_end, packing) = {
            let mut packing = self.packing.lock().await;
            (packing.filled_to(), packing.drain())
        };
        let mut counts = self.counts().await?;
        self.reap(image, &mut counts).await;
        let free = counts.unreserve(image, &packing).await?;
        let mut unused = self.pool.drain();
        counts.unreserve(image, &unused).await?;
        unused.extend(free.iter().map(|&first| Run { first, count: 1, is_fresh: true }));
        let used = match self.take_back_all(image, &mut counts).await {
            true => {
                let end = self.geometry.clusters(image.file().len());
                counts.end_of_use(image, end).await.ok()
            }
            false => None,
        };
        self.cut_file(image, &unused, packed_end, used).await;
        Ok(())
    }

    /// Takes off the end of the file what was reserved there and is free again, and what is behind the cluster
    /// `used`; of a last cluster that holds compressed ones only what is behind `packed_end`.
    async fn cut_file(
        &self,
        image: Metadata<'_>,
        unused: &[Run],
        packed_end: u64,
        used: Option<u64>,
    ) {
        let bits = self.geometry.cluster_bits;
        let file = image.file();
        let len = file.driver().len();
        let mut end = self.geometry.clusters(len);
        let mut unused = unused.to_vec();
        unused.sort_by_key(|run| std::cmp::Reverse(run.first));
        for run in unused {
            if run.is_fresh && run.first + run.count == end {
                end = run.first;
            }
        }
        end = end.min(used.unwrap_or(end));
        let packed_end = packed_end.next_multiple_of(SECTOR);
        let new = match packed_end.div_ceil(1 << bits) == end {
            true => packed_end,
            false => end << bits,
        };
        cut(&file, new).await;
    }

    /// Gives back what is reserved and what is free by now, and cuts the file behind the last cluster in use.
    pub async fn cut_to_use(&self, image: Metadata<'_>) -> IoResult {
        let mut counts = self.counts().await?;
        self.reap(image, &mut counts).await;
        let unused = self.pool.drain();
        counts.unreserve(image, &unused).await?;
        let file = image.file();
        let end = self.geometry.clusters(file.driver().len());
        let used = counts.end_of_use(image, end).await?;
        // A longer file does no harm, and a device keeps its length.
        cut(&file, used << self.geometry.cluster_bits).await;
        Ok(())
    }
}
