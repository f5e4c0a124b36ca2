//! Guessing whether clusters are holes of the image's file, which read as zeroes.
//!
//! They are likely where entries were made ahead of the data (`preallocation=metadata`), or the file was made sparse.
//!
//! To ask the file about each cluster has its price, and in most images no cluster is a hole. So it is done where
//! the file has clearly less on its storage than there are clusters in use. QEMU draws the line at the same place,
//! and `map` shows holes where its does.

use super::{Metadata, Space};
use crate::cow::read_padded;
use crate::format::qcow2::layout;
use crate::io::{AlignedBuf, Errno, IoResult};
use std::sync::atomic::{AtomicU8, Ordering};

/// The status of that, found out once.
#[derive(Default)]
pub struct Holes(AtomicU8);

const NONE: u8 = 1;
const SOME: u8 = 2;

/// Bytes of the refcount table that are looked at together.
const TABLE_PART: u64 = 4096;

impl Space {
    /// Whether the file is likely to have holes where clusters are in use.
    pub async fn may_have_holes(&self, image: Metadata<'_>) -> bool {
        match self.holes.0.load(Ordering::Relaxed) {
            0 => {
                // What cannot be counted is no reason to fail: the answer without is right, too.
                let found = self.has_more_clusters_than_blocks(image).await.unwrap_or(false);
                self.holes.0.store(if found { SOME } else { NONE }, Ordering::Relaxed);
                found
            }
            known => known == SOME,
        }
    }

    async fn has_more_clusters_than_blocks(&self, image: Metadata<'_>) -> IoResult<bool> {
        let file = image.file();
        let stored = file.driver().image().ok_or(Errno::ENOTSUP)?;
        let stored = stored.allocated().await? >> self.geometry.cluster_bits;
        let many = (stored * 10 / 9).max(stored + 2);
        if self.geometry.clusters(file.len()) < many {
            return Ok(false);
        }
        Ok(self.clusters_in_use(image, many).await? >= many)
    }

    /// How many clusters of the file are counted as in use; not on when there are so `many`.
    async fn clusters_in_use(&self, image: Metadata<'_>, many: u64) -> IoResult<u64> {
        let (file, geometry) = (image.file(), &self.geometry);
        let header = image.header.now();
        let table_end = header.refcount_table_offset
            + (u64::from(header.refcount_table_clusters) << geometry.cluster_bits);
        let size = geometry.cluster_size() as usize;
        let memory = |size: usize| AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM);
        let (mut table, mut block) = (memory(TABLE_PART as usize)?, memory(size)?);
        let (mut at, mut used) = (header.refcount_table_offset, 0);
        while at < table_end && used < many {
            let part = TABLE_PART.min(table_end - at) as usize;
            read_padded(&file, at, &table.io_vec().slice(0, part as u64)).await?;
            for entry in table[..part].as_chunks::<8>().0 {
                let offset = u64::from_be_bytes(*entry);
                if offset == 0 || !geometry.is_cluster_start(offset) || offset >= file.len() {
                    continue;
                }
                read_padded(&file, offset, &block.io_vec()).await?;
                let counts = 0..1usize << geometry.refcount_block_bits();
                let order = geometry.refcount_order;
                used += counts.filter(|&n| layout::refcount(&block, order, n) != 0).count() as u64;
            }
            at += TABLE_PART;
        }
        Ok(used)
    }
}
