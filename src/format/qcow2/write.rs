//! Writing: over what is there, or into clusters that are made for it.
//!
//! A write to clusters that nobody else refers to goes where a fast one goes. Any other takes the
//! range of its guest clusters, writes the data with what must be copied or zeroed around it, and
//! only then changes the mapping; the order is that of [`super::order`]. Different clusters are
//! written in parallel.

use super::Qcow2;
use super::alloc::{Run, Taken};
use super::corrupt::{self, bad_entry_to_write};
use super::freed::Release;
use super::journal::Kept;
use super::layout::{Cluster, L2Entry};
use super::overlap::Kinds;
use crate::block::{Event, WriteFlags};
use crate::cow::{Found, find, lookup, pin, read_range};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use smallvec::{SmallVec, smallvec};
use std::ops::Range;

/// What a guest cluster needs before it can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nothing: the bytes may be written over.
    Nothing,
    /// A host cluster.
    Cluster,
    /// It has this one, parts of which hold nothing of the guest's.
    Fill { host: u64 },
}

/// A part of a write that one change of the mapping makes visible: guest clusters side by side, in
/// host clusters side by side.
struct Part {
    /// Of the first guest cluster.
    start: u64,
    /// Of the data.
    data: Range<u64>,
    /// The entries now.
    old: Entries,
}

/// What the host clusters of a write show beside the data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copied {
    /// The same as before the write, durably.
    Nothing,
    /// Bytes that were written with it.
    Something,
}

/// Most writes change one.
type Entries = SmallVec<[L2Entry; 2]>;

impl Qcow2 {
    pub(super) async fn write_range(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        self.prepare_writing().await?;
        let mut done = 0;
        while done < from.len() {
            let rest = from.slice(done, from.len() - done);
            done += match self.overwrite(at + done, &rest).await? {
                0 => self.write_new(at + done, &rest).await?,
                n => n,
            };
        }
        Ok(())
    }

    /// Writes as much from the start on as needs no change of the mapping; how much that was.
    async fn overwrite(&self, at: u64, from: &IoVec<'_>) -> IoResult<u64> {
        let _visit = self.mapping.visits.enter();
        if self.snapshots.is_frozen() {
            return Ok(0);
        }
        let found = find(self, at, from.len()).await?;
        let piece = found.map_err(|(entry, error)| bad_entry_to_write(self, at, entry, error))?;
        let Found::Data { host, exclusive: true } = piece.found else { return Ok(0) };
        self.write_data(host, &from.slice(0, piece.len)).await?;
        Ok(piece.len)
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        let data = self.data();
        if self.overlaps.is_met() {
            self.check_write(host, from.len(), Kinds::empty())?;
        }
        let end = host + from.len();
        if end > data.len() {
            // A data file that was never that long; or the file ends inside its last cluster.
            let most = data.len().next_multiple_of(self.geometry.cluster_size());
            match self.geometry.external_data {
                true => self.grow(&data, end.max(self.size())).await?,
                false if end <= most => self.grow(&data, most).await?,
                false => return Err(corrupt::data_outside(self, "Data cluster", host)),
            }
        }
        self.event(Event::WriteAio).await;
        data.write(host, from, WriteFlags::empty()).await
    }

    /// Writes from the start on what one change of the mapping makes visible; how much that was.
    async fn write_new(&self, at: u64, from: &IoVec<'_>) -> IoResult<u64> {
        let bits = self.geometry.cluster_bits;
        let first = at >> bits;
        // What one slice of entries maps.
        let entries = self.mapping.cache.entries() as u64;
        let last = ((at + from.len() - 1) >> bits).min(first | (entries - 1));
        let len = from.len().min(((last + 1) << bits) - at);
        let _range = self.mapping.ranges.lock(first..last + 1).await;
        let _visit = self.mapping.visits.enter();
        self.ensure_table(at).await?;
        let (need, old) = self.needs(first, last).await?;
        let start = first << bits;
        let end = (start + ((old.len() as u64) << bits)).min(at + len);
        let part = Part { start, data: at..end, old };
        let written = match need {
            // Somebody was faster.
            Need::Nothing => return Ok(0),
            Need::Cluster => self.write_to_new(part, from).await?,
            Need::Fill { host } => {
                let from = from.slice(0, end - at);
                self.write_and_map(&part, host, false, &from).await?;
                end - at
            }
        };
        Ok(written)
    }

    /// What the first of the guest clusters needs, and the entries of all behind it that need the
    /// same, if that is new clusters.
    async fn needs(&self, first: u64, last: u64) -> IoResult<(Need, Entries)> {
        let bits = self.geometry.cluster_bits;
        let pinned = pin(self, first << bits).await?;
        let (_, index) = self.mapping.slice_of(first << bits);
        let mut old = Entries::new();
        let mut need = Need::Nothing;
        for n in 0..=last - first {
            let entry = pinned.get(index + n as usize);
            let guest = (first + n) << bits;
            let cluster = self.geometry.decode(entry);
            let cluster = cluster.map_err(|error| bad_entry_to_write(self, guest, entry, error))?;
            let this = self.need_of(entry, cluster);
            match (n, this) {
                (0, Need::Cluster) => {}
                (0, Need::Fill { .. }) => return Ok((this, smallvec![entry])),
                (0, Need::Nothing) => return Ok((this, old)),
                (_, Need::Cluster) => {}
                _ => break,
            }
            need = this;
            old.push(entry);
        }
        Ok((need, old))
    }

    fn need_of(&self, entry: L2Entry, cluster: Cluster) -> Need {
        let own = entry.is_copied() || self.geometry.external_data;
        match cluster {
            Cluster::Normal { .. } if own => Need::Nothing,
            Cluster::Zero { host: Some(host) } if own => Need::Fill { host },
            Cluster::Subclusters { host: Some(_), allocated: u32::MAX, .. } if own => Need::Nothing,
            Cluster::Subclusters { host: Some(host), .. } if own => Need::Fill { host },
            _ => Need::Cluster,
        }
    }

    /// Writes to host clusters that are taken now, as many as there are side by side; how many bytes
    /// of the data that was.
    async fn write_to_new(&self, mut part: Part, from: &IoVec<'_>) -> IoResult<u64> {
        let bits = self.geometry.cluster_bits;
        if self.geometry.external_data {
            let from = from.slice(0, part.data.end - part.data.start);
            self.write_and_map(&part, part.start, false, &from).await?;
            return Ok(from.len());
        }
        let taken = self.take(part.old.len() as u64).await?;
        part.old.truncate(taken.run.count as usize);
        part.data.end = part.data.end.min(part.start + (taken.run.count << bits));
        let from = from.slice(0, part.data.end - part.data.start);
        let is_fresh = taken.run.is_fresh;
        let copied = self.write_around(&part, taken.host(), is_fresh, &from).await?;
        self.map_part(&part, taken.host(), Some(taken), copied).await?;
        Ok(from.len())
    }

    async fn write_and_map(
        &self,
        part: &Part,
        host: u64,
        is_fresh: bool,
        from: &IoVec<'_>,
    ) -> IoResult {
        let copied = self.write_around(part, host, is_fresh, from).await?;
        self.map_part(part, host, None, copied).await
    }

    /// Writes the data, and around it what the new mapping will show.
    async fn write_around(
        &self,
        part: &Part,
        host: u64,
        is_fresh: bool,
        from: &IoVec<'_>,
    ) -> IoResult<Copied> {
        let shown = self.shown(part);
        let was_zero = is_fresh && self.reads_zero(shown.clone()).await?;
        if was_zero && shown != part.data {
            // What was reserved past the end of the file reads as zeroes already.
            self.event(Event::ClusterAllocSpace).await;
        }
        let head = match was_zero {
            true => None,
            false => self.copy_of(shown.start..part.data.start).await?,
        };
        let tail = match was_zero {
            true => None,
            false => self.copy_of(part.data.end..shown.end).await?,
        };
        if head.is_some() || tail.is_some() {
            self.event(Event::CowWrite).await;
        }
        let [before, after] =
            [&head, &tail].map(|copy| copy.as_ref().map_or(IoVec::empty(), AlignedBuf::source));
        let start = part.data.start - before.len();
        let all = IoVec::concat(&[&before, from, &after]);
        self.write_data(host + (start - part.start), &all).await?;
        let is_more = self.copy_apart(part, host, &shown).await?;
        Ok(if was_zero && !is_more { Copied::Nothing } else { Copied::Something })
    }

    /// Copies what has to move of the first and of the last cluster and does not lie beside what else
    /// is `shown`; whether there is such.
    async fn copy_apart(&self, part: &Part, host: u64, shown: &Range<u64>) -> IoResult<bool> {
        let unit = self.geometry.subcluster_size();
        let (first, last) = self.outer(part);
        let end = shown.end.next_multiple_of(self.geometry.cluster_size());
        let mut is_more = false;
        for (old, range) in [(first, part.start..shown.start), (last, shown.end..end)] {
            let mut at = range.start / unit * unit;
            while at < range.end {
                let start = at;
                while at < range.end && self.moves(old, at) {
                    at += unit;
                }
                if let Some(copy) = self.copy_of(start..at).await? {
                    self.event(Event::CowWrite).await;
                    self.write_data(host + (start - part.start), &copy.source()).await?;
                    is_more = true;
                }
                at += unit;
            }
        }
        Ok(is_more)
    }

    /// The guest bytes that the new mapping shows from the host clusters: the data, rounded out to
    /// what entries can tell apart.
    fn shown(&self, part: &Part) -> Range<u64> {
        let unit = self.geometry.subcluster_size();
        let Range { mut start, mut end } = part.data;
        let (first, last) = self.outer(part);
        if !self.is_own_subcluster(first, start) {
            start = start / unit * unit;
        }
        if !self.is_own_subcluster(last, end - 1) {
            end = end.next_multiple_of(unit);
        }
        // What has to move and lies beside it goes with it.
        while start > part.start && self.moves(first, start - 1) {
            start -= unit;
        }
        while self.geometry.offset_in_cluster(end) > 0 && self.moves(last, end) {
            end += unit;
        }
        start..end
    }

    /// The first and the last of the old entries that the data is for.
    fn outer(&self, part: &Part) -> (L2Entry, L2Entry) {
        let cluster = |guest: u64| (guest - part.start) >> self.geometry.cluster_bits;
        let Range { start, end } = part.data;
        (part.old[cluster(start) as usize], part.old[cluster(end - 1) as usize])
    }

    /// Whether what a subcluster holds has to move if something else of its cluster does, because the
    /// old place does not stay: what is compressed, and what is allocated in a cluster of others.
    fn moves(&self, old: L2Entry, guest: u64) -> bool {
        match self.geometry.decode(old) {
            Ok(Cluster::Subclusters { host: Some(_), allocated, .. }) => {
                allocated >> self.geometry.subcluster_index(guest) & 1 == 1
                    && self.need_of_entry(old) == Need::Cluster
            }
            Ok(Cluster::Compressed(_)) => true,
            _ => false,
        }
    }

    fn need_of_entry(&self, entry: L2Entry) -> Need {
        self.geometry.decode(entry).map_or(Need::Cluster, |cluster| self.need_of(entry, cluster))
    }

    /// Whether the byte is in a subcluster that the entry shows and may show on: fast writes may be
    /// under way beside the data.
    fn is_own_subcluster(&self, entry: L2Entry, guest: u64) -> bool {
        match self.geometry.decode(entry) {
            Ok(Cluster::Subclusters { allocated, .. }) => {
                self.need_of_entry(entry) != Need::Cluster
                    && allocated >> self.geometry.subcluster_index(guest) & 1 == 1
            }
            _ => false,
        }
    }

    /// The guest's bytes as they are, and zeroes past the end of the disk.
    async fn copy_of(&self, guest: Range<u64>) -> IoResult<Option<AlignedBuf>> {
        if guest.is_empty() {
            return Ok(None);
        }
        let len = guest.end - guest.start;
        let mut copy = AlignedBuf::for_overwriting(len as usize, 4096).ok_or(Errno::ENOMEM)?;
        let there = match guest.start >= self.state_start() {
            true => len,
            false => self.size().saturating_sub(guest.start).min(len),
        };
        if there > 0 {
            self.event(Event::CowRead).await;
            let into = copy.io_vec().slice(0, there);
            Box::pin(read_range(self, guest.start, &into)).await?;
        }
        copy[there as usize..].fill(0);
        Ok(Some(copy))
    }

    /// Whether the mapping alone tells that a range reads as zeroes.
    pub(super) async fn reads_zero(&self, guest: Range<u64>) -> IoResult<bool> {
        let mut at = guest.start;
        while at < guest.end {
            let piece = lookup(self, at, guest.end - at).await?;
            let is_zero = match piece.found {
                Found::Zero { .. } => true,
                Found::Unallocated { .. } => {
                    self.backing().is_none_or(|backing| backing.len() <= at)
                }
                _ => false,
            };
            if !is_zero {
                return Ok(false);
            }
            at += piece.len;
        }
        Ok(true)
    }

    /// Makes the host clusters those of the guest, and frees what was there. What was copied to them is
    /// durable before the disk has it.
    async fn map_part(
        &self,
        part: &Part,
        host: u64,
        taken: Option<Taken<'_>>,
        copied: Copied,
    ) -> IoResult {
        let size = self.geometry.cluster_size();
        let shown = self.shown(part);
        let entries: Entries = part
            .old
            .iter()
            .enumerate()
            .map(|(n, &old)| {
                let guest = part.start + n as u64 * size;
                let inside = shown.start.max(guest) - guest..shown.end.min(guest + size) - guest;
                self.entry_showing(old, host + n as u64 * size, inside)
            })
            .collect();
        let is_new = taken.is_some();
        let is_copied = copied == Copied::Something;
        let kept = self.keep_entries(part.start, &part.old, &entries, is_copied).await?;
        if kept != Kept::No {
            if let Some(taken) = taken {
                taken.keep();
            }
            if kept == Kept::HalfFull {
                // The others have the second half meanwhile. If it fails, the next flush tells.
                let _ = self.settle_journal().await;
            }
            return Ok(());
        }
        if is_copied {
            self.data().flush().await?;
        }
        if let Some(taken) = taken {
            // Whether handing over fails or not, an entry may name them.
            taken.keep();
        }
        self.change_entries(part.start, &entries).await?;
        if is_new {
            let releases: Vec<_> = part
                .old
                .iter()
                .flat_map(|&old| self.releases_of(old, self.passes_other_discards))
                .collect();
            self.free(&releases).await;
        }
        Ok(())
    }

    /// The entry of a cluster at `host` that shows what `old` did, and `inside` (in bytes) as data.
    fn entry_showing(&self, old: L2Entry, host: u64, inside: Range<u64>) -> L2Entry {
        if !self.geometry.extended_l2 {
            return L2Entry::normal(host, true, 0);
        }
        let bits = self.geometry.subcluster_bits();
        let (first, end) = (inside.start >> bits, inside.end.div_ceil(1 << bits));
        let mask = ((1u64 << (end - first)) - 1) << first;
        let (allocated, zero) = match self.geometry.decode(old) {
            Ok(Cluster::Subclusters { allocated, zero, .. }) => (allocated as u64, zero as u64),
            _ => (0, 0),
        };
        L2Entry::normal(host, true, allocated | mask | (zero & !mask) << 32)
    }

    /// The references that an entry has.
    pub(super) fn releases_of(&self, entry: L2Entry, discard: bool) -> Option<Release> {
        if self.geometry.external_data {
            return None;
        }
        let run = match self.geometry.decode(entry).ok()? {
            Cluster::Normal { host } | Cluster::Zero { host: Some(host) } => self.run_of(host),
            Cluster::Subclusters { host: Some(host), .. } => self.run_of(host),
            Cluster::Compressed(place) => {
                let bits = self.geometry.cluster_bits;
                let first = place.host >> bits;
                let last = (place.host + place.len - 1) >> bits;
                Run { first, count: last + 1 - first, is_fresh: false }
            }
            _ => return None,
        };
        Some(Release { run, discard })
    }

    /// The one cluster at a host offset.
    pub(super) fn run_of(&self, host: u64) -> Run {
        Run { first: host >> self.geometry.cluster_bits, count: 1, is_fresh: false }
    }
}
