//! Runs of adjacent clusters, for large tables and refcount blocks, and the last cluster in use.

use super::{Block, Claim, Metadata, Refcounts};
use crate::block::{Event, WriteFlags};
use crate::cow::Run;
use crate::format::qcow2::layout;
use crate::format::qcow2::overlap::Kinds;
use crate::io::{Errno, IoResult, IoVec};
use std::ops::Range;

impl Refcounts {
    /// Takes `count` free clusters side by side: counted, durably, and inside the file. They hold
    /// anything. The claim is for whoever puts metadata there, until it can be found.
    pub async fn reserve_run(&mut self, image: Metadata<'_>, count: u64) -> IoResult<(Run, Claim)> {
        image.event(Event::RefblockAlloc).await;
        self.write(image).await?;
        let Some(first) = self.find_run(image, count).await? else {
            let per_block = self.geometry.refcount_block_entries();
            let last = self.table.iter().rposition(|&block| block != 0);
            let at = last.map_or(0, |last| (last as u64 + 1) * per_block);
            return self.extend(image, at, count).await;
        };
        let run = self.run(image, first, count);
        let claim = self.pool.claim(vec![run]);
        image.check_reserved(&claim.runs).await?;
        let is_longer = first + count > self.geometry.clusters(image.file().len());
        image.grow_file((first + count) << self.geometry.cluster_bits).await?;
        let clusters: Vec<u64> = (first..first + count).collect();
        if let Err(errno) = self.count_reserved(image, &clusters, is_longer).await {
            for cluster in clusters {
                // They are in memory, or were not changed.
                let _ = self.set(image, cluster, 0).await;
            }
            return Err(errno);
        }
        Ok((run, claim))
    }

    /// The first of `count` free clusters side by side, as far as there are blocks.
    async fn find_run(&mut self, image: Metadata<'_>, count: u64) -> IoResult<Option<u64>> {
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcount_block_entries();
        let (from, mut first) = self.place(self.hint);
        let mut run = self.hint..self.hint;
        for index in from..self.table.len() {
            let start = index as u64 * per_block;
            if let Some(block) = self.block(image, index).await? {
                for n in first..per_block as usize {
                    if layout::refcount(&block.bytes, order, n) != 0 {
                        run = start + n as u64 + 1..start + n as u64 + 1;
                        continue;
                    }
                    run.end += 1;
                    if run.end - run.start == count {
                        return Ok(Some(run.start));
                    }
                }
            } else {
                run = start + per_block..start + per_block;
            }
            first = 0;
        }
        Ok(None)
    }

    /// Makes the blocks that count the clusters from `at` on, which has no block yet and nothing in
    /// use behind it, and themselves; behind them a longer table, if that is needed, and `more`
    /// clusters, which are taken, and claimed with all the others.
    pub(super) async fn extend(
        &mut self,
        image: Metadata<'_>,
        at: u64,
        more: u64,
    ) -> IoResult<(Run, Claim)> {
        let (index, inside) = self.place(at);
        let per_block = self.geometry.refcount_block_entries();
        let mut blocks = 1;
        let table_clusters = loop {
            let entries = index as u64 + blocks;
            let clusters = match entries > self.table.len() as u64 {
                true => {
                    self.geometry.clusters((self.table.len() as u64 * 3 / 2).max(entries + 1) * 8)
                }
                false => 0,
            };
            if inside as u64 + blocks + clusters + more <= blocks * per_block {
                break clusters;
            }
            blocks += 1;
        };
        if table_clusters << self.geometry.cluster_bits > layout::MAX_REFCOUNT_TABLE_BYTES {
            return Err(Errno(libc::EFBIG));
        }
        let event = match table_clusters {
            0 => Event::RefblockAllocWrite,
            _ => {
                image.event(Event::ReftableGrow).await;
                Event::RefblockAllocWriteBlocks
            }
        };
        let claim = self.make_blocks(image, (at, blocks, table_clusters + more), event).await?;
        image.overlaps.note(Kinds::REFCOUNT_BLOCK, at..at + blocks);
        let entries = (0..blocks).map(|n| (at + n) << self.geometry.cluster_bits).collect();
        let named = match table_clusters {
            0 => self.name_blocks(image, index, entries).await,
            clusters => self.move_table(image, index, entries, (at + blocks, clusters)).await,
        };
        if named.is_err() && self.table.get(index).is_none_or(|&entry| entry == 0) {
            // The clusters are free, and taken by the next attempt.
            image.overlaps.forget_at(Kinds::REFCOUNT_BLOCK, at..at + blocks);
        }
        named?;
        let first = at + blocks + table_clusters;
        Ok((Run { first, count: more, is_fresh: false }, claim))
    }

    /// Puts new blocks, which are durable, into the table where it is.
    async fn name_blocks(
        &mut self,
        image: Metadata<'_>,
        index: usize,
        entries: Vec<u64>,
    ) -> IoResult {
        let named = index..index + entries.len();
        self.table[named.clone()].copy_from_slice(&entries);
        self.unwritten = match self.unwritten.is_empty() {
            true => named,
            false => self.unwritten.start.min(named.start)..self.unwritten.end.max(named.end),
        };
        image.event(Event::RefblockAllocHookup).await;
        self.write_entries(image).await?;
        image.file().flush().await
    }

    /// Hands to the kernel the entries of the table that may not have reached it: what they name
    /// would not count.
    pub(super) async fn write_entries(&mut self, image: Metadata<'_>) -> IoResult {
        let Range { start, end } = self.unwritten;
        if start == end {
            return Ok(());
        }
        let place = image.header.now().refcount_table_offset + start as u64 * 8;
        let bytes: Vec<u8> =
            self.table[start..end].iter().flat_map(|entry| entry.to_be_bytes()).collect();
        image.file().write(place, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        self.unwritten = 0..0;
        Ok(())
    }

    /// Moves the table to a larger place, `clusters` at `first`, with new blocks in it.
    async fn move_table(
        &mut self,
        image: Metadata<'_>,
        index: usize,
        entries: Vec<u64>,
        (first, clusters): (u64, u64),
    ) -> IoResult {
        let bits = self.geometry.cluster_bits;
        let old_len = self.table.len();
        let mut table = self.table.clone();
        table.resize((clusters << bits) as usize / 8, 0);
        table[index..index + entries.len()].copy_from_slice(&entries);
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let offset = first << bits;
        let file = image.file();
        image.event(Event::RefblockAllocWriteTable).await;
        file.write(offset, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        file.flush().await?;
        image.event(Event::RefblockAllocSwitchTable).await;
        let mut header = image.lock_header().await;
        let mut new = header.clone();
        let old = new.refcount_table_offset;
        new.refcount_table_offset = offset;
        new.refcount_table_clusters = clusters as u32;
        let written = header.write(new).await;
        drop(header);
        // If that has failed the disk may have either table: the new one is used from now on, and
        // the old one stays as it is.
        self.table = table;
        self.unwritten = 0..0;
        written?;
        let freed = Run {
            first: old >> bits,
            count: self.geometry.clusters(old_len as u64 * 8),
            is_fresh: false,
        };
        self.release(image, &[freed]).await.map(drop)
    }

    /// The cluster behind the last one in use, of those below `end`.
    pub async fn end_of_use(&mut self, image: Metadata<'_>, mut end: u64) -> IoResult<u64> {
        let order = self.geometry.refcount_order;
        while end > 0 {
            let (index, at) = self.place(end - 1);
            let first = end - 1 - at as u64;
            let block = self.block(image, index).await?;
            let in_use = |block: &mut Block| {
                (0..=at).rev().find(|&n| layout::refcount(&block.bytes, order, n) != 0)
            };
            if let Some(last) = block.and_then(in_use) {
                return Ok(first + last as u64 + 1);
            }
            end = first;
        }
        Ok(0)
    }
}
