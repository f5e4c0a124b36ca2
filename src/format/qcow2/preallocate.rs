//! Preallocation of clusters that have not been written yet.
//!
//! The order is that of any allocation ([`super::order`]): clusters are counted before they are named,
//! and what they show is durable before that, unless they showed the same before.

use super::Qcow2;
use super::layout::{Cluster, L2Entry};
use crate::block::{Preallocation, WriteFlags, ZeroFlags};
use crate::cow::{Allocator, change_entries, ensure_table, pin, write_zeroes};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::ops::Range;

/// Zeroes that are written at once, in bytes.
const CHUNK: u64 = 1 << 20;

impl Qcow2 {
    /// As [`Qcow2::preallocate`], for the cluster that the disk ends in: `tail` is what becomes part of the disk, and
    /// reads as zeroes. Before it the backing file may show, and continues doing so.
    pub(super) async fn preallocate_tail(
        &self,
        tail: Range<u64>,
        mode: Preallocation,
        hides: bool,
    ) -> IoResult {
        if tail.is_empty() {
            return Ok(());
        }
        let cluster = tail.start >> self.geometry.cluster_bits;
        let start = cluster << self.geometry.cluster_bits;
        let shows = self.shows_backing(start..tail.end);
        if self.geometry.extended_l2 || !shows {
            // Subclusters continue showing what they show when the cluster gets its place.
            return self.preallocate(tail, mode, hides).await;
        }
        let has_place = {
            let _visit = self.mapping.tables().visits.enter();
            ensure_table(self, start).await?;
            self.without_place(cluster..cluster + 1).await?.is_empty()
        };
        // Writing copies what the backing file has of the cluster.
        if has_place { Ok(()) } else { write_zeroes(self, tail).await }
    }

    /// Gives every guest cluster of the range that has none a host cluster that reads as zeroes.
    /// `hides`: the backing file would show if it did not.
    pub(super) async fn preallocate(
        &self,
        guest: Range<u64>,
        mode: Preallocation,
        hides: bool,
    ) -> IoResult {
        let bits = self.geometry.cluster_bits;
        let per_slice = self.mapping.tables().cache.entries() as u64;
        let (mut cluster, end) = (guest.start >> bits, self.geometry.clusters(guest.end));
        while cluster < end {
            let stop = (cluster / per_slice + 1) * per_slice;
            cluster = self.preallocate_some(cluster..stop.min(end), mode, hides).await?;
        }
        Ok(())
    }

    /// The first clusters of a part of a slice, as many as have their places side by side; where they
    /// end.
    async fn preallocate_some(
        &self,
        clusters: Range<u64>,
        mode: Preallocation,
        hides: bool,
    ) -> IoResult<u64> {
        let bits = self.geometry.cluster_bits;
        let start = clusters.start << bits;
        let _range = self.mapping.tables().ranges.lock(clusters.clone()).await;
        let _visit = self.mapping.tables().visits.enter();
        ensure_table(self, start).await?;
        let old = self.without_place(clusters.clone()).await?;
        if old.is_empty() {
            return Ok(clusters.start + 1);
        }
        let len = (old.len() as u64) << bits;
        let (host, count, is_fresh, taken) = match self.geometry.external_data {
            true => {
                self.nodes.grow(&self.data(), start + len).await?;
                (start, old.len() as u64, false, None)
            }
            false => {
                let taken = self.take(old.len() as u64).await?;
                (taken.host(), taken.run.count, taken.run.is_fresh, Some(taken))
            }
        };
        let entries = self.fill(&old[..count as usize], host, (mode, hides, is_fresh)).await?;
        if let Some(taken) = taken {
            // Whether handing over fails or not, an entry may name them.
            taken.keep();
        }
        change_entries(self, start, &entries).await?;
        Ok(clusters.start + count)
    }

    /// The entries from the first on that have no host clusters.
    async fn without_place(&self, clusters: Range<u64>) -> IoResult<Vec<L2Entry>> {
        let start = clusters.start << self.geometry.cluster_bits;
        let pinned = pin(self, start).await?;
        let (_, index) = self.mapping.tables().slice_of(start);
        let entries = (0..clusters.end - clusters.start).map(|n| pinned.get(index + n as usize));
        let is_free = |entry: &L2Entry| {
            matches!(
                self.geometry.decode(*entry),
                Ok(Cluster::Unallocated
                    | Cluster::Zero { host: None }
                    | Cluster::Subclusters { host: None, .. })
            )
        };
        Ok(entries.take_while(is_free).collect())
    }

    /// Makes host clusters what `mode` asks for, and the entries that name them.
    async fn fill(
        &self,
        old: &[L2Entry],
        host: u64,
        (mode, hides, is_fresh): (Preallocation, bool, bool),
    ) -> IoResult<Vec<L2Entry>> {
        const ALLOCATED: u64 = u32::MAX as u64;
        let size = self.geometry.cluster_size();
        let len = old.len() as u64 * size;
        let is_marked = mode == Preallocation::Metadata
            && !self.geometry.external_data
            && self.geometry.zero_flag
            && (hides || !is_fresh);
        if mode != Preallocation::Metadata || !is_fresh && !is_marked {
            self.fill_with_zeroes(host, len, mode).await?;
            self.data().flush().await?;
        }
        let written = mode != Preallocation::Metadata;
        let entry = |(n, old): (usize, &L2Entry)| {
            let host = host + n as u64 * size;
            match (self.geometry.extended_l2, is_marked) {
                // What was zeroed to hide the backing file is there now. What the other bits say stays true.
                (true, _) if hides && written => {
                    L2Entry::normal(host, true, old.bitmap >> 32 | old.bitmap & ALLOCATED)
                }
                (true, _) => L2Entry::normal(host, true, old.bitmap),
                (false, true) => L2Entry::zero(Some(host), true),
                (false, false) => L2Entry::normal(host, true, 0),
            }
        };
        Ok(old.iter().enumerate().map(entry).collect())
    }

    async fn fill_with_zeroes(&self, host: u64, len: u64, mode: Preallocation) -> IoResult {
        let data = self.data();
        let len = len.min(data.len().saturating_sub(host));
        if mode != Preallocation::Full {
            let gives_back = mode == Preallocation::Metadata;
            let flags = if gives_back { ZeroFlags::UNMAP } else { ZeroFlags::empty() };
            return data.zero(host, len, flags).await;
        }
        let zeroes = AlignedBuf::new(len.min(CHUNK) as usize, 4096).ok_or(Errno::ENOMEM)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK);
            let part = zeroes.source().slice(0, n);
            data.write(host + done, &part, WriteFlags::empty()).await?;
            done += n;
        }
        Ok(())
    }
}
