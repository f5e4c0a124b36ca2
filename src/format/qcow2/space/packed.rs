//! Allocation for compressed clusters, which are packed back to back and share host clusters.
//!
//! Each of them is one reference to every host cluster that it touches. References are counted ahead,
//! several at once and durably, before an entry can need them ([`order`](crate::format::qcow2::order)): a host cluster that
//! is being filled has those that entries are, and those that [`Packing`] holds. What it holds of a
//! cluster that is full is taken back with the next refill, or when the image is closed; after a crash
//! it is leaked.
//!
//! The bytes are *durable* before the entry that names them: what was there before is no stream.

use super::{Metadata, Space};
use crate::cow::Run;
use crate::io::IoResult;
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

impl Space {
    /// A place for as many units as there is one for side by side, at least one, counted; how many.
    pub async fn place(&self, image: Metadata<'_>, units: &[&[u8]]) -> IoResult<(u64, usize)> {
        let bits = self.geometry.cluster_bits;
        let mut packing = self.packing.lock().await;
        let first = units[0].len() as u64;
        self.make_room(image, &mut packing, first).await?;
        let host = packing.at;
        let mut count = 0;
        for unit in units {
            let end = packing.at + unit.len() as u64;
            if end > packing.end(bits) {
                break;
            }
            let last = ((end - 1) >> bits) + 1 - (packing.at >> bits);
            let is_last = self.refer(image, &mut packing, last as usize).await?;
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
    async fn make_room(&self, image: Metadata<'_>, packing: &mut Packing, len: u64) -> IoResult {
        let bits = self.geometry.cluster_bits;
        while packing.end(bits) - packing.at < len {
            // Whatever comes of it, they may have several references from now on.
            let run = self.take(image, AHEAD).await?.keep();
            let references = REFERENCES.min(self.geometry.refcount_max());
            let surplus = std::mem::take(&mut packing.surplus);
            self.count_ahead(image, &[run], references - 1, surplus).await?;
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
    async fn refer(
        &self,
        image: Metadata<'_>,
        packing: &mut Packing,
        count: usize,
    ) -> IoResult<bool> {
        let most = self.geometry.refcount_max();
        for n in 0..count {
            let Held { cluster, references } = packing.held[n];
            if references > 1 {
                continue;
            }
            let run = Run { first: cluster, count: 1, is_fresh: false };
            let counted = self.references(image, cluster).await?;
            let more = most.saturating_sub(counted).min(counted.max(REFERENCES));
            if more > 0 {
                self.count_ahead(image, &[run], more, Vec::new()).await?;
                packing.held[n].references += more;
            }
        }
        for held in packing.held.iter_mut().take(count) {
            held.references -= 1;
        }
        Ok(packing.held[count - 1].references == 0)
    }

    /// Counts `more` references to each cluster of `runs`, durably, and takes back `surplus`.
    async fn count_ahead(
        &self,
        image: Metadata<'_>,
        runs: &[Run],
        more: u64,
        surplus: Vec<Run>,
    ) -> IoResult {
        let mut counts = self.counts().await?;
        if !surplus.is_empty() {
            counts.unreserve(image, &surplus).await?;
        }
        counts.raise(image, runs, more).await
    }
}
