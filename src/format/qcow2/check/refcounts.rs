//! The stored refcounts: the table in memory, and one block at a time.

use super::{failed, read_or_zero, read_words, write};
use crate::block::{Error, Event, Node};
use crate::cow::References;
use crate::format::qcow2::header::Header;
use crate::format::qcow2::layout::{self, Geometry, REFTABLE_OFFSET_MASK};
use std::ops::Range;

/// See the module's text.
pub(super) struct Refcounts {
    geometry: Geometry,
    table: Vec<u64>,
    block: Vec<u8>,
    /// Which block is loaded, and whether there is one that can be read.
    loaded: Option<(u64, bool)>,
    is_changed: bool,
}

impl Refcounts {
    pub async fn read(file: &Node, header: &Header) -> Result<Refcounts, Error> {
        let geometry = header.geometry();
        let bytes = (header.refcount_table_clusters as usize) << header.cluster_bits;
        let mut table = read_words(file, header.refcount_table_offset, bytes / 8).await?;
        let used = table.iter().rposition(|&entry| entry != 0).map_or(0, |last| last + 1);
        table.truncate(used);
        let block = vec![0; 1 << header.cluster_bits];
        Ok(Refcounts { geometry, table, block, loaded: None, is_changed: false })
    }

    /// The first block from `from` on that is there, or counts a cluster that is referred to.
    pub fn next_in_use(&self, from: u64, references: &References, per_block: u64) -> Option<u64> {
        let rest = self.table.get(from as usize..).unwrap_or_default();
        let there = rest.iter().position(|&entry| entry != 0).map(|at| from + at as u64);
        let wanted = references.next_page(from * per_block).map(|cluster| cluster / per_block);
        match (there, wanted) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Loads a block; one that is not there counts nothing. False if it cannot be.
    pub async fn load(&mut self, file: &Node, index: u64) -> Result<bool, Error> {
        if let Some((loaded, good)) = self.loaded
            && loaded == index
        {
            return Ok(good);
        }
        let offset = self.entry(index);
        let good = self.geometry.is_cluster_start(offset);
        if good && offset != 0 {
            file.event(Event::RefblockLoad).await;
        }
        match offset {
            0 => self.block.fill(0),
            _ if good => read_or_zero(file, offset, &mut self.block).await.map_err(failed)?,
            _ => {}
        }
        self.loaded = Some((index, good));
        Ok(good)
    }

    /// Where the table says that a block is.
    pub fn entry(&self, index: u64) -> u64 {
        self.table.get(index as usize).map_or(0, |entry| entry & REFTABLE_OFFSET_MASK)
    }

    /// Whether there is a block for each of these clusters.
    pub fn cover(&self, clusters: Range<u64>) -> bool {
        let bits = self.geometry.refcount_block_bits();
        let mut blocks = clusters.start >> bits..((clusters.end - 1) >> bits) + 1;
        blocks.all(|index| self.table.get(index as usize).is_some_and(|&entry| entry != 0))
    }

    /// Sets the refcounts of clusters whose blocks are there, durably.
    pub async fn set(
        &mut self,
        file: &Node,
        clusters: Range<u64>,
        count: u64,
    ) -> Result<(), Error> {
        let per_block = self.geometry.refcount_block_entries();
        for cluster in clusters {
            if self.load(file, cluster / per_block).await? {
                self.set_loaded(cluster % per_block, count);
                self.store(file).await?;
            }
        }
        file.flush().await.map_err(failed)
    }

    /// Of the block that is loaded.
    pub fn loaded(&self, at: u64) -> u64 {
        layout::refcount(&self.block, self.geometry.refcount_order, at as usize)
    }

    pub fn set_loaded(&mut self, at: u64, value: u64) {
        layout::set_refcount(&mut self.block, self.geometry.refcount_order, at as usize, value);
        self.is_changed = true;
    }

    /// Writes the block that is loaded, if it was changed.
    pub async fn store(&mut self, file: &Node) -> Result<(), Error> {
        if let Some((index, true)) = self.loaded
            && std::mem::take(&mut self.is_changed)
        {
            let offset = self.table[index as usize] & REFTABLE_OFFSET_MASK;
            write(file, offset, &self.block).await?;
        }
        Ok(())
    }

    /// The refcount of the cluster at a host offset; none if its block cannot be read.
    pub async fn get(&mut self, file: &Node, host: u64) -> Result<Option<u64>, Error> {
        let good = self.load(file, self.geometry.refcount_table_index(host)).await?;
        Ok(good.then(|| self.loaded(self.geometry.refcount_block_index(host))))
    }
}
