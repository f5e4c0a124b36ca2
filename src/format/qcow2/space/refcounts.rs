//! Reference counts of host clusters: the table, the blocks that are in memory, and how both grow.
//!
//! Used by one at a time ([`crate::cow::Lock`]); what is in memory counts, and what of it has not
//! reached the file is written before anything else is done. The orders are those of
//! [`order`](crate::format::qcow2::order). `change` raises and lowers
//! counts, `run` finds adjacent clusters.

mod change;
mod run;

pub use change::Change;

use super::Metadata;
use super::alloc::{Claim, Pool};
use super::take_back::Search;
use crate::block::{Event, Node, WriteFlags};
use crate::cow::{Run, read_padded};
use crate::format::qcow2::corrupt;
use crate::format::qcow2::layout::{self, Geometry};
use crate::format::qcow2::overlap::Kinds;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

pub struct Refcounts {
    geometry: Geometry,
    /// Lazy: they need not be durable before what they count is used.
    is_lazy: bool,
    /// Of requests to the file, in bytes.
    align: u64,
    /// Where clusters are claimed on their way out of here.
    pool: Arc<Pool>,
    /// Where each block is, in bytes; 0 where there is none.
    table: Vec<u64>,
    /// Entries of the table that have not reached the file, or may not have.
    unwritten: Range<usize>,
    blocks: BTreeMap<usize, Block>,
    /// How many blocks are kept.
    keep: usize,
    clock: u64,
    /// When [`Refcounts::forget_unused`] was last called.
    cleaned: u64,
    /// No cluster below is free.
    hint: u64,
    /// Counts have changed.
    is_touched: bool,
    /// What a killed process has left counted and unused is looked for.
    pub search: Option<Box<Search>>,
}

struct Block {
    bytes: Vec<u8>,
    /// What has not reached the file, in bytes of the block.
    dirty: Option<Range<usize>>,
    used: u64,
}

impl Refcounts {
    /// Reads the table: `clusters` of it at `offset`.
    pub async fn load(
        file: &Node,
        geometry: Geometry,
        (offset, clusters): (u64, u32),
        cache_bytes: u64,
        is_lazy: bool,
    ) -> IoResult<Refcounts> {
        let len = u64::from(clusters) << geometry.cluster_bits;
        if offset >= file.len() {
            return Err(Errno::EIO);
        }
        let mut bytes = AlignedBuf::new(len as usize, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(file, offset, &bytes.io_vec()).await?;
        let entry = |word: &[u8]| word.iter().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
        Ok(Refcounts {
            geometry,
            is_lazy,
            align: file.traits().request_align.into(),
            pool: Arc::default(),
            table: bytes.chunks_exact(8).map(entry).collect(),
            unwritten: 0..0,
            blocks: BTreeMap::new(),
            keep: (cache_bytes / geometry.cluster_size()).max(2) as usize,
            clock: 0,
            cleaned: 0,
            hint: 0,
            is_touched: false,
            search: None,
        })
    }

    /// As [`Refcounts::load`], of an image that somebody else has written.
    pub async fn reread(&mut self, file: &Node, place: (u64, u32), cache_bytes: u64) -> IoResult {
        let read = Refcounts::load(file, self.geometry, place, cache_bytes, self.is_lazy).await?;
        *self = Refcounts { pool: self.pool.clone(), ..read };
        Ok(())
    }

    /// Where clusters are claimed on their way out of here.
    pub fn pool(&self) -> Arc<Pool> {
        self.pool.clone()
    }

    /// Where the blocks are that the table names, in bytes.
    pub fn blocks_named(&self) -> impl Iterator<Item = u64> {
        self.table.iter().copied().filter(|&block| block != 0)
    }

    /// Whether all blocks that the table names can be where it says.
    pub fn check_table(&self, image: Metadata<'_>) -> IoResult {
        (0..self.table.len()).try_for_each(|index| self.block_offset(image, index).map(drop))
    }

    fn place(&self, cluster: u64) -> (usize, usize) {
        let bits = self.geometry.refcount_block_bits();
        ((cluster >> bits) as usize, (cluster & ((1 << bits) - 1)) as usize)
    }

    /// The block's own place; none where there is no block.
    fn block_offset(&self, image: Metadata<'_>, index: usize) -> IoResult<Option<u64>> {
        match self.table.get(index) {
            None | Some(0) => Ok(None),
            Some(&entry) => {
                let offset = entry & layout::REFTABLE_OFFSET_MASK;
                if offset != entry || !self.geometry.is_cluster_start(offset) {
                    return Err(corrupt::bad_refcount_table(image, index, entry));
                }
                Ok(Some(offset))
            }
        }
    }

    async fn block(&mut self, image: Metadata<'_>, index: usize) -> IoResult<Option<&mut Block>> {
        let Some(offset) = self.block_offset(image, index)? else { return Ok(None) };
        self.clock += 1;
        if !self.blocks.contains_key(&index) {
            self.evict();
            let file = image.file();
            if offset >= file.len() {
                return Err(corrupt::outside(image, "Refcount block", offset));
            }
            let size = self.geometry.cluster_size() as usize;
            let mut bytes = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
            image.event(Event::RefblockLoad).await;
            read_padded(&file, offset, &bytes.io_vec()).await?;
            let block = Block { bytes: bytes.to_vec(), dirty: None, used: 0 };
            self.blocks.insert(index, block);
        }
        let clock = self.clock;
        let block = self.blocks.get_mut(&index);
        Ok(block.map(|block| block.used_at(clock)))
    }

    /// Makes room for one block more.
    fn evict(&mut self) {
        while self.blocks.len() >= self.keep {
            let clean = self.blocks.iter().filter(|(_, block)| block.dirty.is_none());
            let Some((&oldest, _)) = clean.min_by_key(|(_, block)| block.used) else { return };
            self.blocks.remove(&oldest);
        }
    }

    /// Forgets blocks that were not used since this was last called, and are as in the file.
    pub fn forget_unused(&mut self) {
        let since = std::mem::replace(&mut self.cleaned, self.clock);
        self.blocks.retain(|_, block| block.dirty.is_some() || block.used > since);
    }

    pub async fn get(&mut self, image: Metadata<'_>, cluster: u64) -> IoResult<u64> {
        let (index, at) = self.place(cluster);
        let order = self.geometry.refcount_order;
        let block = self.block(image, index).await?;
        Ok(block.map_or(0, |block| layout::refcount(&block.bytes, order, at)))
    }

    /// Sets a refcount whose block is there, in memory.
    async fn set(&mut self, image: Metadata<'_>, cluster: u64, value: u64) -> IoResult {
        let (index, at) = self.place(cluster);
        let order = self.geometry.refcount_order;
        let block = self.block(image, index).await?.ok_or(Errno::EIO)?;
        block.set(order, at, value);
        self.touch(cluster, value);
        Ok(())
    }

    /// Notes that the count of a cluster has changed.
    fn touch(&mut self, cluster: u64, count: u64) {
        self.is_touched = true;
        if let Some(search) = &mut self.search {
            search.touch(cluster, count);
        }
    }

    /// Whether the refcounts are right when the image is closed, and need not be before.
    pub fn is_lazy(&self) -> bool {
        self.is_lazy
    }

    /// Whether no count has changed since the refcounts were loaded.
    pub fn is_untouched(&self) -> bool {
        !self.is_touched
    }

    /// Hands to the kernel what has changed.
    pub async fn write(&mut self, image: Metadata<'_>) -> IoResult {
        image.settle_header().await?;
        self.write_entries(image).await?;
        let dirty: Vec<usize> = self
            .blocks
            .iter()
            .filter_map(|(&index, block)| block.dirty.is_some().then_some(index))
            .collect();
        let align = self.align as usize;
        for index in dirty {
            let Some(offset) = self.block_offset(image, index)? else { continue };
            let Some(block) = self.blocks.get_mut(&index) else { continue };
            let Some(range) = block.dirty.clone() else { continue };
            let len = block.bytes.len();
            let range = range.start / align * align..range.end.next_multiple_of(align).min(len);
            let bytes = IoVec::from_ref(&block.bytes[range.clone()]);
            let at = offset + range.start as u64;
            image.check_write(at, bytes.len(), Kinds::REFCOUNT_BLOCK)?;
            image.event(Event::RefblockUpdatePart).await;
            image.file().write(at, &bytes, WriteFlags::empty()).await?;
            block.dirty = None;
        }
        Ok(())
    }

    /// Takes up to `want` free clusters, at least one, in order: counted, durably, and inside the
    /// file.
    pub async fn reserve(&mut self, image: Metadata<'_>, want: u64) -> IoResult<Claim> {
        image.event(Event::RefblockAlloc).await;
        self.write(image).await?;
        let end = self.geometry.clusters(image.file().len());
        let mut runs = self.find(image, want, end).await?;
        let _found = self.pool.claim(runs.clone());
        self.fit(image, &mut runs, end).await?;
        let claim = self.pool.claim(runs);
        image.check_reserved(&claim.runs).await?;
        let runs = claim.runs.iter();
        let clusters: Vec<u64> = runs.flat_map(|run| run.first..run.first + run.count).collect();
        let is_longer = claim.runs.iter().any(|run| run.is_fresh);
        let result = self.count_reserved(image, &clusters, is_longer).await;
        if let Err(errno) = result {
            for &cluster in &clusters {
                // They are in memory, or were not changed.
                let _ = self.set(image, cluster, 0).await;
            }
            return Err(errno);
        }
        self.hint = clusters.last().map_or(0, |last| last + 1);
        Ok(claim)
    }

    /// Makes the file long enough for all runs, or cuts off what does not fit into the storage.
    ///
    /// # Errors
    /// Why the file cannot grow by a single cluster.
    async fn fit(&self, image: Metadata<'_>, runs: &mut Vec<Run>, end: u64) -> IoResult {
        let mut refused = Errno::ENOSPC;
        while let Some(last) = runs.last_mut() {
            let stop = last.first + last.count;
            if stop <= end {
                return Ok(());
            }
            match image.grow_file(stop << self.geometry.cluster_bits).await {
                Ok(()) => return Ok(()),
                Err(errno) => refused = errno,
            }
            last.count /= 2;
            if last.count == 0 {
                runs.pop();
            }
        }
        Err(refused)
    }

    /// `is_longer`: the file has become longer for them.
    async fn count_reserved(
        &mut self,
        image: Metadata<'_>,
        clusters: &[u64],
        is_longer: bool,
    ) -> IoResult {
        for &cluster in clusters {
            self.set(image, cluster, 1).await?;
        }
        self.write(image).await?;
        // A table past the end of the file could not be repaired.
        if self.is_lazy && !is_longer { Ok(()) } else { image.file().flush().await }
    }

    /// Free clusters from the hint on. Those from `end` on are past the end of the file, so that
    /// they read as zeroes once the file is longer.
    async fn find(&mut self, image: Metadata<'_>, want: u64, end: u64) -> IoResult<Vec<Run>> {
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcount_block_entries();
        let mut runs: Vec<Run> = Vec::new();
        let (mut at, mut found) = (self.hint, 0);
        while found < want {
            let (index, first) = self.place(at);
            if self.block_offset(image, index)?.is_none() {
                if found > 0 {
                    break;
                }
                self.extend(image, at, 0).await?;
                // Nothing was free below.
                self.hint = at;
                continue;
            }
            let Some(block) = self.block(image, index).await? else { continue };
            for n in first..per_block as usize {
                if found == want {
                    break;
                }
                if layout::refcount(&block.bytes, order, n) != 0 {
                    continue;
                }
                let cluster = index as u64 * per_block + n as u64;
                let is_fresh = cluster >= end;
                match runs.last_mut() {
                    Some(run) if run.first + run.count == cluster && run.is_fresh == is_fresh => {
                        run.count += 1;
                    }
                    _ => runs.push(Run { first: cluster, count: 1, is_fresh }),
                }
                found += 1;
            }
            at = (index as u64 + 1) * per_block;
            if found == 0 {
                self.hint = at;
            }
        }
        Ok(runs)
    }

    /// Writes `blocks` new blocks from cluster `at` on, which count themselves and `more` clusters
    /// behind them, durably. They are in memory then, but not in the table. `event` names their write.
    async fn make_blocks(
        &mut self,
        image: Metadata<'_>,
        (at, blocks, more): (u64, u64, u64),
        event: Event,
    ) -> IoResult<Claim> {
        let used = at..at + blocks + more;
        let claim = self.pool.claim(vec![self.run(image, at, blocks + more)]);
        image.check_reserved(&claim.runs).await?;
        image.grow_file(used.end << self.geometry.cluster_bits).await?;
        image.event(event).await;
        used.clone().for_each(|cluster| self.touch(cluster, 1));
        let (first, _) = self.place(at);
        let size = self.geometry.cluster_size() as usize;
        let file = image.file();
        for n in 0..blocks {
            let index = first + n as usize;
            let mut block = Block { bytes: vec![0; size], dirty: None, used: self.clock };
            for cluster in used.clone().filter(|&cluster| self.place(cluster).0 == index) {
                let (_, entry) = self.place(cluster);
                layout::set_refcount(&mut block.bytes, self.geometry.refcount_order, entry, 1);
            }
            let offset = (at + n) << self.geometry.cluster_bits;
            file.write(offset, &IoVec::from_ref(&block.bytes), WriteFlags::empty()).await?;
            self.blocks.insert(index, block);
        }
        let flushed = file.flush().await;
        if flushed.is_err() {
            for n in 0..blocks {
                self.blocks.remove(&(first + n as usize));
            }
        }
        flushed?;
        Ok(claim)
    }

    /// Free clusters: fresh, if all are past the end of the file.
    fn run(&self, image: Metadata<'_>, first: u64, count: u64) -> Run {
        let end = self.geometry.clusters(image.file().len());
        Run { first, count, is_fresh: first >= end }
    }
}

impl Block {
    fn used_at(&mut self, clock: u64) -> &mut Block {
        self.used = clock;
        self
    }

    fn set(&mut self, order: u32, index: usize, value: u64) {
        layout::set_refcount(&mut self.bytes, order, index, value);
        let bits = index << order;
        let (start, end) = (bits / 8, (bits + (1 << order)).div_ceil(8));
        self.dirty = Some(match self.dirty.take() {
            Some(dirty) => dirty.start.min(start)..dirty.end.max(end),
            None => start..end,
        });
    }
}
