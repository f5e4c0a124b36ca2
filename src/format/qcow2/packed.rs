//! Compressed clusters on their way into the image: byte after byte, one behind the other, so that
//! they share host clusters and cross from one to the next.
//!
//! Each of them is one reference to every host cluster that it touches. References are counted ahead,
//! several at once and durably, before an entry can need them ([`super::order`]): a host cluster that
//! is being filled has those that entries are, and those that [`Packing`] holds. What it holds of a
//! cluster that is full is taken back with the next refill, or when the image is closed; after a crash
//! it is leaked.
//!
//! The bytes are *durable* before the entry that names them: what was there before is no stream.

use super::layout::{Cluster, L2Entry};
use super::{Qcow2, corrupt};
use crate::block::{Event, WriteFlags};
use crate::cow::{Allocator, LockGuard, Run, change_entries, pin};
use crate::io::{Errno, IoResult, IoVec};
use std::collections::VecDeque;

/// Host clusters that are begun at once, and the references that each is given: packed clusters are
/// a seventh of their size on average, or more.
const AHEAD: u64 = 16;
const REFERENCES: u64 = 8;

/// The host clusters that are being filled.
#[derive(Default)]
pub struct Packing {
    /// Where the next byte goes; in the first of `held`, if there is one.
    at: u64,
    /// Side by side. Each has a reference that is held as long as there is room in it.
    held: VecDeque<Held>,
    /// References to be taken back.
    surplus: Vec<Run>,
}

/// References to a host cluster that nothing names yet.
struct Held {
    cluster: u64,
    references: u64,
}

impl Packing {
    /// Where the last of them ends, in bytes.
    fn end(&self, bits: u32) -> u64 {
        self.held.back().map_or(self.at, |last| (last.cluster + 1) << bits)
    }

    /// Goes on at `at`: what is behind is full.
    fn advance(&mut self, at: u64, bits: u32) {
        self.at = at;
        while let Some(first) = self.held.front()
            && (first.cluster + 1) << bits <= at
        {
            let run = Run { first: first.cluster, count: 1, is_fresh: false };
            self.surplus.extend(std::iter::repeat_n(run, first.references as usize));
            self.held.pop_front();
        }
    }

    /// Where the last packed cluster ends if there is room behind it in its host cluster, else 0.
    pub fn filled_to(&self) -> u64 {
        if self.held.is_empty() { 0 } else { self.at }
    }

    /// Gives up everything: references to be taken back.
    pub fn drain(&mut self) -> Vec<Run> {
        for held in self.held.drain(..) {
            let run = Run { first: held.cluster, count: 1, is_fresh: false };
            self.surplus.extend(std::iter::repeat_n(run, held.references as usize));
        }
        std::mem::take(&mut self.surplus)
    }
}

impl Qcow2 {
    /// Stores packed clusters of the guest's clusters from `at` on.
    pub(super) async fn store_units(&self, at: u64, units: &[&[u8]]) -> IoResult {
        if self.geometry.external_data {
            return Err(Errno::ENOTSUP);
        }
        self.prepare_writing().await?;
        let bits = self.geometry.cluster_bits;
        let mut done = 0;
        while done < units.len() {
            let first = (at >> bits) + done as u64;
            // What one slice of entries maps.
            let most = self.mapping.tables().cache.entries() as u64
                - (first & (self.mapping.tables().cache.entries() as u64 - 1));
            let count = (units.len() - done).min(most as usize);
            self.store_in_slice(first, &units[done..done + count]).await?;
            done += count;
        }
        Ok(())
    }

    async fn store_in_slice(&self, first: u64, units: &[&[u8]]) -> IoResult {
        let guest = first << self.geometry.cluster_bits;
        let _range = self.mapping.tables().ranges.lock(first..first + units.len() as u64).await;
        let _visit = self.mapping.tables().visits.enter();
        self.ensure_own_table(guest).await?;
        let free = self.free_entries(guest, units.len()).await?;
        let (units, refused) = units.split_at(free);
        let mut done = 0;
        while done < units.len() {
            let (host, count) = self.place(&units[done..]).await?;
            let some = &units[done..done + count];
            let guest = guest + ((done as u64) << self.geometry.cluster_bits);
            // If it fails their references are leaked: an entry may name them.
            self.store_at(guest, host, some).await?;
            done += count;
        }
        // QEMU's answer, too.
        if refused.is_empty() { Ok(()) } else { Err(Errno::EIO) }
    }

    /// How many guest clusters from `guest` on have nothing that would be overwritten.
    async fn free_entries(&self, guest: u64, most: usize) -> IoResult<usize> {
        let pinned = pin(self, guest).await?;
        let (_, index) = self.mapping.tables().slice_of(guest);
        for n in 0..most {
            let entry = pinned.get(index + n);
            let cluster = self.geometry.decode(entry);
            let at = guest + ((n as u64) << self.geometry.cluster_bits);
            match cluster
                .map_err(|error| corrupt::bad_entry_to_write(self.metadata(), at, entry, error))?
            {
                Cluster::Unallocated
                | Cluster::Zero { host: None }
                | Cluster::Subclusters { host: None, .. } => {}
                _ => return Ok(n),
            }
        }
        Ok(most)
    }

    /// Writes what lies side by side at `host`, durably, and the entries that name it.
    async fn store_at(&self, guest: u64, host: u64, units: &[&[u8]]) -> IoResult {
        let mut entries: Vec<L2Entry> = Vec::with_capacity(units.len());
        let mut at = host;
        for unit in units {
            let entry = self.geometry.encode_compressed(at, unit.len() as u64);
            entries.push(entry.ok_or(Errno(libc::EFBIG))?);
            at += unit.len() as u64;
        }
        let parts: Vec<IoVec<'_>> = units.iter().map(|unit| IoVec::from_ref(unit)).collect();
        let parts: Vec<&IoVec<'_>> = parts.iter().collect();
        let file = self.file();
        file.event(Event::WriteCompressed).await;
        file.write(host, &IoVec::concat(&parts), WriteFlags::empty()).await?;
        file.flush().await?;
        self.event(Event::L2UpdateCompressed).await;
        change_entries(self, guest, &entries).await
    }

    /// A place for as many units as there is one for side by side, at least one, counted; how many.
    async fn place(&self, units: &[&[u8]]) -> IoResult<(u64, usize)> {
        let bits = self.geometry.cluster_bits;
        self.event(Event::ClusterAllocBytes).await;
        let mut packing = self.space.packing.lock().await;
        let first = units[0].len() as u64;
        self.make_room(&mut packing, first).await?;
        let host = packing.at;
        let mut count = 0;
        for unit in units {
            let end = packing.at + unit.len() as u64;
            if end > packing.end(bits) {
                break;
            }
            let last = ((end - 1) >> bits) + 1 - (packing.at >> bits);
            let is_last = self.refer(&mut packing, last as usize).await?;
            packing.advance(end, bits);
            count += 1;
            if is_last {
                // No reference is left to hold what else there is room for.
                let next = packing.at.next_multiple_of(1 << bits);
                packing.advance(next, bits);
                break;
            }
        }
        Ok((host, count))
    }

    /// Sees to it that there are `len` bytes side by side.
    async fn make_room(&self, packing: &mut LockGuard<'_, Packing>, len: u64) -> IoResult {
        let bits = self.geometry.cluster_bits;
        while packing.end(bits) - packing.at < len {
            let taken = self.take(AHEAD).await?;
            let run = taken.run;
            // Whatever comes of it, they may have several references from now on.
            taken.keep();
            let references = REFERENCES.min(self.geometry.refcount_max());
            let surplus = std::mem::take(&mut packing.surplus);
            self.count_ahead(&[run], references - 1, surplus).await?;
            if run.first << bits != packing.end(bits) {
                let rest = packing.drain();
                packing.surplus = rest;
                packing.at = run.first << bits;
            }
            let held =
                (run.first..run.first + run.count).map(|cluster| Held { cluster, references });
            packing.held.extend(held);
        }
        Ok(())
    }

    /// Takes a reference to each of the first `count` clusters. Whether the last of them, where there
    /// may be room left, has no more.
    async fn refer(&self, packing: &mut LockGuard<'_, Packing>, count: usize) -> IoResult<bool> {
        let most = self.geometry.refcount_max();
        for n in 0..count {
            let Held { cluster, references } = packing.held[n];
            if references > 1 {
                continue;
            }
            let run = Run { first: cluster, count: 1, is_fresh: false };
            let counted = self.refcounts().await?.get(self, cluster).await?;
            let more = most.saturating_sub(counted).min(counted.max(REFERENCES));
            if more > 0 {
                self.count_ahead(&[run], more, Vec::new()).await?;
                packing.held[n].references += more;
            }
        }
        for held in packing.held.iter_mut().take(count) {
            held.references -= 1;
        }
        Ok(packing.held[count - 1].references == 0)
    }

    /// Counts `more` references to each cluster of `runs`, durably, and takes back `surplus`.
    async fn count_ahead(&self, runs: &[Run], more: u64, surplus: Vec<Run>) -> IoResult {
        let mut refcounts = self.refcounts().await?;
        if !surplus.is_empty() {
            refcounts.unreserve(self, &surplus).await?;
        }
        refcounts.raise(self, runs, more).await
    }
}
