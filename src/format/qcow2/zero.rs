//! Zeroing and discarding: what the layer ([`crate::cow`]) asks of this format.

use super::Qcow2;
use super::layout::{BadEntry, Cluster, L2Entry};
use crate::block::{Abilities, ZeroFlags};
use crate::cow::{Empty, Release, Zeroing};
use crate::io::IoResult;
use std::ops::Range;

impl Zeroing for Qcow2 {
    fn disk_len(&self) -> u64 {
        self.size()
    }

    /// Version 2 cannot say that a cluster is zero.
    fn has_zero_entries(&self) -> bool {
        self.geometry.zero_flag
    }

    fn emptied(
        &self,
        old: L2Entry,
        guest: u64,
        inside: Range<u64>,
        kind: Empty,
    ) -> Result<(L2Entry, bool), BadEntry> {
        let cluster = self.geometry.decode(old)?;
        let own = old.is_copied() || self.geometry.external_data;
        if self.geometry.extended_l2 {
            let whole = self.end_of_cluster(guest);
            return Ok(self.emptied_extended(old, cluster, inside, (own, whole), kind));
        }
        let zero = match self.geometry.zero_flag && kind != Empty::Crop {
            true => L2Entry::zero(None, false),
            false => L2Entry::UNALLOCATED,
        };
        Ok(match (cluster, kind) {
            (Cluster::Unallocated, Empty::Discard) if self.nodes.backing_child().is_none() => {
                (old, false)
            }
            (Cluster::Unallocated | Cluster::Zero { host: None }, _) => (zero, false),
            // It keeps what it has.
            (Cluster::Zero { .. }, Empty::Zero) => (old, false),
            (Cluster::Zero { host: Some(_) }, _) if self.keeps(old, kind) => (old, false),
            (Cluster::Normal { host }, _)
                if own && (kind == Empty::Zero || self.keeps(old, kind)) =>
            {
                (L2Entry::zero(Some(host), true), false)
            }
            // Another file's cluster is always at the same place.
            (Cluster::Normal { .. } | Cluster::Zero { .. } | Cluster::Compressed(_), _) => {
                (zero, true)
            }
            (Cluster::Subclusters { .. }, _) => (old, false),
        })
    }

    /// What is beyond the end of the disk is always discarded in the storage.
    fn emptied_references(&self, entry: L2Entry, kind: Empty) -> Option<Release> {
        let run = self.geometry.clusters_of(entry)?;
        let is_beyond = matches!(kind, Empty::Crop | Empty::Cut);
        Some(Release { run, discard: is_beyond || self.settings.discards.guest })
    }

    fn kept_place(&self, old: L2Entry, new: L2Entry, kind: Empty) -> Option<u64> {
        let is_noted = self.settings.discards.guest && self.keeps(old, kind);
        is_noted.then(|| self.unused_place(new)).flatten()
    }

    async fn discard_kept(&self, hosts: &[u64]) -> IoResult {
        let file = self.file();
        if !file.traits().abilities.contains(Abilities::DISCARD_ZEROES) {
            // What is left of them must not be seen through an old entry.
            file.flush().await?;
        }
        let mut clusters: Vec<u64> =
            hosts.iter().map(|host| host >> self.geometry.cluster_bits).collect();
        clusters.sort_unstable();
        self.space.discard_clusters(self.metadata(), &clusters).await;
        Ok(())
    }

    /// A raw data file says itself what reads as zeroes.
    async fn before_emptying(&self, range: Range<u64>, kind: Empty) -> IoResult {
        if !self.settings.raw_data {
            return Ok(());
        }
        let flags = if kind == Empty::Zero { ZeroFlags::empty() } else { ZeroFlags::UNMAP };
        self.zero_data_file(range, flags).await
    }

    async fn after_emptying(&self, range: Range<u64>, kind: Empty) -> IoResult {
        if !self.geometry.external_data || self.settings.raw_data || !self.settings.discards.guest {
            return Ok(());
        }
        match kind {
            Empty::Zero | Empty::Crop => {}
            Empty::Unmap | Empty::Cut => self.give_back_data(range).await,
            Empty::Discard => {
                let data = self.data();
                let end = range.end.min(data.len());
                if range.start < end {
                    if !data.traits().abilities.contains(Abilities::DISCARD_ZEROES) {
                        // What is left of them must not be seen through an old entry.
                        self.file().flush().await?;
                    }
                    let _ = data.discard(range.start, end - range.start).await;
                }
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Gives back what an external data file has of a range that reads as zeroes, if that is quick. The old
    /// entry, which a crash may bring back, then shows zeroes, too.
    pub(super) async fn give_back_data(&self, range: Range<u64>) {
        let _ = self.zero_data_file(range, ZeroFlags::UNMAP | ZeroFlags::NO_FALLBACK).await;
    }

    async fn zero_data_file(&self, range: Range<u64>, flags: ZeroFlags) -> IoResult {
        let data = self.data();
        let end = range.end.min(data.len());
        if end <= range.start {
            return Ok(());
        }
        data.zero(range.start, end - range.start, flags).await
    }

    /// Whether a guest cluster keeps its host cluster although its contents do not matter.
    fn keeps(&self, old: L2Entry, kind: Empty) -> bool {
        self.settings.discards.keeps
            && matches!(kind, Empty::Discard | Empty::Unmap)
            && old.is_copied()
            && !self.geometry.external_data
    }

    /// The host cluster of an entry that shows nothing of its contents.
    fn unused_place(&self, entry: L2Entry) -> Option<u64> {
        match self.geometry.decode(entry).ok()? {
            Cluster::Zero { host } | Cluster::Subclusters { host, allocated: 0, .. } => host,
            _ => None,
        }
    }

    fn emptied_extended(
        &self,
        old: L2Entry,
        cluster: Cluster,
        inside: Range<u64>,
        (own, whole): (bool, u64),
        kind: Empty,
    ) -> (L2Entry, bool) {
        const ALL: u64 = u32::MAX as u64;
        let bitmap = if kind == Empty::Crop { 0 } else { ALL << 32 };
        let empty = L2Entry { word: 0, bitmap };
        let (host, allocated, zero) = match cluster {
            Cluster::Subclusters { host, allocated, zero } => (host, allocated as u64, zero as u64),
            // What is left of a compressed cluster cannot stay compressed: only whole ones get here.
            _ => return (empty, true),
        };
        if kind == Empty::Discard
            && host.is_none()
            && zero == 0
            && self.nodes.backing_child().is_none()
        {
            return (old, false);
        }
        if inside.start == 0 && inside.end >= whole {
            return match host {
                Some(host) if own && (kind == Empty::Zero || self.keeps(old, kind)) => {
                    (L2Entry::normal(host, true, ALL << 32), false)
                }
                Some(_) => (empty, true),
                None => (empty, false),
            };
        }
        let bits = self.geometry.subcluster_bits();
        let (first, end) = (inside.start >> bits, inside.end.div_ceil(1 << bits));
        let mask = ((1u64 << (end - first)) - 1) << first;
        (L2Entry { bitmap: allocated & !mask | (zero | mask) << 32, ..old }, false)
    }

    /// How many bytes of a guest cluster the disk has.
    fn end_of_cluster(&self, guest: u64) -> u64 {
        self.size().saturating_sub(guest).min(self.geometry.cluster_size())
    }
}
