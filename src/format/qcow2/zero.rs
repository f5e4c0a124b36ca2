//! Zeroing and discarding: changes of the mapping, and zeroes written where a mapping cannot tell
//! them.

use super::freed::Release;
use super::layout::{Cluster, L2Entry};
use super::{Qcow2, corrupt};
use crate::block::{Abilities, Precision, Status, ZeroFlags, extents};
use crate::cow::{Found, lookup, pin};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::ops::Range;

/// Zeroes that are written at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// What a range is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Zeroes; the host clusters are kept.
    Zero,
    /// Zeroes; the host clusters are given back.
    Unmap,
    /// Zeroes where the disk will end; the host clusters are given back whatever is asked for.
    Cut,
    /// Nothing that matters.
    Discard,
    /// Beyond the end of the disk, or soon to be: nothing at all.
    Crop,
}

impl Qcow2 {
    pub(super) async fn zero_range(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.prepare_writing().await?;
        let kind = if flags.contains(ZeroFlags::UNMAP) { Kind::Unmap } else { Kind::Zero };
        let may_write = !flags.contains(ZeroFlags::NO_FALLBACK);
        let unit = self.geometry.subcluster_size();
        let end = at + len;
        let mut at = at;
        while at < end {
            let start = at / unit * unit;
            // Past the end of the disk there is nothing to keep.
            let unit_end = (start + unit).min(self.size().max(end));
            if start < at || end < unit_end {
                let stop = end.min(unit_end);
                self.zero_part(at..stop, start..unit_end, kind, may_write).await?;
                at = stop;
                continue;
            }
            let whole = if end >= self.size() { end } else { end / unit * unit };
            at = self.zero_units(at..whole, kind, may_write).await?;
        }
        Ok(())
    }

    /// A part of a (sub)cluster: all of it, if the rest reads as zeroes anyway; none of it, if version 2
    /// shows zeroes there already.
    async fn zero_part(
        &self,
        part: Range<u64>,
        unit: Range<u64>,
        kind: Kind,
        may_write: bool,
    ) -> IoResult {
        if self.geometry.zero_flag {
            let cluster = part.start >> self.geometry.cluster_bits;
            let _range = self.mapping.ranges.lock(cluster..cluster + 1).await;
            let _visit = self.mapping.visits.enter();
            if self.shows_zeroes(unit.start..part.start).await?
                && self.shows_zeroes(part.end..unit.end).await?
            {
                return self.empty_units(unit, kind).await;
            }
        } else {
            let _visit = self.mapping.visits.enter();
            if self.reads_zero(part.clone()).await? {
                return Ok(());
            }
        }
        if may_write { self.write_zeroes(part).await } else { Err(Errno::ENOTSUP) }
    }

    pub(super) async fn write_zeroes(&self, range: Range<u64>) -> IoResult {
        let most = (range.end - range.start).min(CHUNK);
        let zeroes = AlignedBuf::new(most as usize, 4096).ok_or(Errno::ENOMEM)?;
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(most);
            let part = zeroes.source().slice(0, n);
            Box::pin(self.write_range(at, &part)).await?;
            at += n;
        }
        Ok(())
    }

    /// Whole (sub)clusters, up to the end of a slice at most; where that is.
    async fn zero_units(&self, range: Range<u64>, kind: Kind, may_write: bool) -> IoResult<u64> {
        let bits = self.geometry.cluster_bits;
        let first = range.start >> bits;
        let last = ((range.end - 1) >> bits).min(first | (self.mapping.cache.entries() as u64 - 1));
        let mut range = range.start..range.end.min((last + 1) << bits);
        if self.geometry.zero_flag {
            let size = self.geometry.cluster_size();
            let is_partial = |range: &Range<u64>| {
                !range.start.is_multiple_of(size)
                    || !range.end.is_multiple_of(size) && range.end < self.size()
            };
            if is_partial(&range) && first < last {
                // Whole clusters by themselves, and parts of clusters by themselves.
                let cut = if range.start.is_multiple_of(size) { last } else { first + 1 };
                range.end = cut << bits;
            }
            let last = (range.end - 1) >> bits;
            let locked = self.mapping.ranges.lock(first..last + 1).await;
            let _visit = self.mapping.visits.enter();
            if is_partial(&range) {
                let piece = lookup(self, range.start, range.end - range.start).await?;
                if matches!(piece.found, Found::Compressed(_)) {
                    drop(locked);
                    return match may_write {
                        true => self.write_zeroes(range.clone()).await.map(|()| range.end),
                        false => Err(Errno::ENOTSUP),
                    };
                }
            }
            self.empty_units(range.clone(), kind).await?;
            return Ok(range.end);
        }
        // Version 2 cannot say that a cluster is zero.
        let is_zero = {
            let _visit = self.mapping.visits.enter();
            let end = range.end.min(range.start + self.geometry.cluster_size());
            let is_zero = self.reads_zero(range.start..end).await?;
            (is_zero, end)
        };
        match is_zero {
            (true, end) => Ok(end),
            (false, _) if !may_write => Err(Errno::ENOTSUP),
            (false, end) => {
                self.write_zeroes(range.start..end).await?;
                Ok(end)
            }
        }
    }

    /// Whole (sub)clusters of one slice, whose range the caller holds, and what an external data file has
    /// of them.
    async fn empty_units(&self, range: Range<u64>, kind: Kind) -> IoResult {
        if self.has_raw_data {
            // It says itself what reads as zeroes.
            let flags = if kind == Kind::Zero { ZeroFlags::empty() } else { ZeroFlags::UNMAP };
            self.zero_data_file(range.clone(), flags).await?;
        }
        self.change_slice(range.clone(), kind).await?;
        if self.geometry.external_data && !self.has_raw_data && self.passes_discards {
            match kind {
                Kind::Zero | Kind::Crop => {}
                Kind::Unmap | Kind::Cut => self.give_back_data(range).await,
                Kind::Discard => {
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
        }
        Ok(())
    }

    /// Gives back what an external data file has of a range that reads as zeroes, if that is quick. The old
    /// entry, which a crash may bring back, shows zeroes then, too.
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

    /// Whether a range reads as zeroes, as far as that can be told without reading. What a backing file's
    /// storage says of holes counts for this moment only.
    async fn shows_zeroes(&self, guest: Range<u64>) -> IoResult<bool> {
        let mut at = guest.start;
        while at < guest.end {
            let piece = lookup(self, at, guest.end - at).await?;
            let mut len = piece.len;
            let below = self.backing().filter(|backing| at < backing.len());
            let is_zero = match (piece.found, below) {
                (Found::Zero { .. }, _) | (Found::Unallocated { .. }, None) => true,
                (Found::Unallocated { .. }, Some(below)) => {
                    let there = len.min(below.len() - at);
                    let run = extents::look(&below, at, there, Precision::Zeroes, None).await?;
                    len = run.len;
                    run.has(Status::ZERO)
                }
                _ => false,
            };
            if !is_zero {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }

    pub(super) async fn discard_range(&self, at: u64, len: u64) -> IoResult {
        self.prepare_writing().await?;
        let size = self.geometry.cluster_size();
        let end = at + len;
        // The last cluster ends with the disk.
        let end = if end >= self.size() { end.next_multiple_of(size) } else { end / size * size };
        let mut at = at.next_multiple_of(size);
        // Version 2 cannot say that a cluster is empty: the backing file would show.
        if !self.geometry.zero_flag && self.backing.is_some() {
            return Err(Errno::ENOTSUP);
        }
        while at < end {
            let bits = self.geometry.cluster_bits;
            let first = at >> bits;
            let last = ((end - 1) >> bits).min(first | (self.mapping.cache.entries() as u64 - 1));
            let stop = (last + 1) << bits;
            let _range = self.mapping.ranges.lock(first..last + 1).await;
            let _visit = self.mapping.visits.enter();
            let index = self.geometry.l1_index(at);
            if self.backing.is_none() && self.l1.get(index).l2_table() == 0 {
                // Nothing is there.
                at = stop.max(((index + 1) * self.geometry.l2_coverage()).min(end) / size * size);
                continue;
            }
            self.empty_units(at..stop, Kind::Discard).await?;
            at = stop;
        }
        Ok(())
    }

    /// Changes the mapping of whole (sub)clusters of one slice, whose range the caller holds.
    pub(super) async fn change_slice(&self, range: Range<u64>, kind: Kind) -> IoResult {
        let bits = self.geometry.cluster_bits;
        self.ensure_table(range.start).await?;
        let (first, last) = (range.start >> bits, (range.end - 1) >> bits);
        let (mut entries, mut releases) = (Vec::new(), Vec::new());
        let (mut is_changed, mut kept) = (false, Vec::new());
        {
            let pinned = pin(self, range.start).await?;
            let (_, index) = self.mapping.slice_of(range.start);
            for n in 0..=last - first {
                let old = pinned.get(index + n as usize);
                let guest = (first + n) << bits;
                let inside = range.start.max(guest) - guest..(range.end - guest).min(1 << bits);
                let (new, frees) = self.emptied(old, guest, inside, kind)?;
                is_changed |= new != old;
                entries.push(new);
                if frees {
                    releases.extend(self.release_if_any(old));
                } else if new != old && self.keeps(old, kind) {
                    kept.extend(self.unused_place(new));
                }
            }
        }
        if !is_changed {
            return Ok(());
        }
        self.change_entries(first << bits, &entries).await?;
        self.free(&releases).await;
        if self.passes_discards && !kept.is_empty() {
            self.discard_kept(&kept).await?;
        }
        Ok(())
    }

    /// Whether a host cluster stays the guest's although he has no use for what is in it.
    fn keeps(&self, old: L2Entry, kind: Kind) -> bool {
        self.keeps_discarded
            && matches!(kind, Kind::Discard | Kind::Unmap)
            && old.is_copied()
            && !self.geometry.external_data
    }

    /// The host cluster of an entry that shows nothing of what is in it.
    fn unused_place(&self, entry: L2Entry) -> Option<u64> {
        match self.geometry.decode(entry).ok()? {
            Cluster::Zero { host } | Cluster::Subclusters { host, allocated: 0, .. } => host,
            _ => None,
        }
    }

    /// Advises the storage of clusters that stay the guest's, whose range the caller holds: nothing is
    /// written to them meanwhile.
    async fn discard_kept(&self, hosts: &[u64]) -> IoResult {
        let file = self.file();
        if !file.traits().abilities.contains(Abilities::DISCARD_ZEROES) {
            // What is left of them must not be seen through an old entry.
            file.flush().await?;
        }
        let clusters: Vec<u64> =
            hosts.iter().map(|host| host >> self.geometry.cluster_bits).collect();
        self.discard_clusters(&clusters).await;
        Ok(())
    }

    fn release_if_any(&self, old: L2Entry) -> Option<Release> {
        self.releases_of(old, self.passes_discards)
    }

    /// What an entry becomes when `inside` (bytes of the cluster) is emptied, and whether that drops
    /// its host cluster.
    fn emptied(
        &self,
        old: L2Entry,
        guest: u64,
        inside: Range<u64>,
        kind: Kind,
    ) -> IoResult<(L2Entry, bool)> {
        let cluster = self.geometry.decode(old);
        let cluster =
            cluster.map_err(|error| corrupt::bad_entry_to_write(self, guest, old, error))?;
        let own = old.is_copied() || self.geometry.external_data;
        let whole = self.end_of_cluster(guest);
        if self.geometry.extended_l2 {
            return Ok(self.emptied_extended(old, cluster, inside, (own, whole), kind));
        }
        let zero = match self.geometry.zero_flag && kind != Kind::Crop {
            true => L2Entry::zero(None, false),
            false => L2Entry::UNALLOCATED,
        };
        Ok(match (cluster, kind) {
            (Cluster::Unallocated, Kind::Discard) if self.backing.is_none() => (old, false),
            (Cluster::Unallocated | Cluster::Zero { host: None }, _) => (zero, false),
            // It keeps what it has.
            (Cluster::Zero { .. }, Kind::Zero) => (old, false),
            (Cluster::Zero { host: Some(_) }, _) if self.keeps(old, kind) => (old, false),
            (Cluster::Normal { host }, _)
                if own && (kind == Kind::Zero || self.keeps(old, kind)) =>
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

    fn emptied_extended(
        &self,
        old: L2Entry,
        cluster: Cluster,
        inside: Range<u64>,
        (own, whole): (bool, u64),
        kind: Kind,
    ) -> (L2Entry, bool) {
        const ALL: u64 = u32::MAX as u64;
        let bitmap = if kind == Kind::Crop { 0 } else { ALL << 32 };
        let empty = L2Entry { word: 0, bitmap };
        let (host, allocated, zero) = match cluster {
            Cluster::Subclusters { host, allocated, zero } => (host, allocated as u64, zero as u64),
            // What is left of a compressed cluster cannot stay compressed: only whole ones get here.
            _ => return (empty, true),
        };
        if kind == Kind::Discard && host.is_none() && zero == 0 && self.backing.is_none() {
            return (old, false);
        }
        if inside.start == 0 && inside.end >= whole {
            return match host {
                Some(host) if own && (kind == Kind::Zero || self.keeps(old, kind)) => {
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
