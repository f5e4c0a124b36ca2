//! What the journal of entries that wait ([`crate::cow`]) asks of this format.
//!
//! Entries wait for images that are one sparse extent. Nothing counts grains, so those that only the front end's memory
//! names look unused when the image of a killed daemon is opened. They stay until that memory has come: new grains come from
//! behind the end that the file had then.

use super::Vmdk;
use super::check::for_each_place;
use super::layout::Packing;
use super::sparse::{Grain, Sparse, Stored};
use crate::block::{Error, Journaled, LocalFuture, Survivor};
use crate::cow::{
    Claimed, Format, Journaling, Owned, Recovering, Run, Writable, forget_records, settle_journal,
    take_over,
};
use crate::io::IoResult;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Journaling for Sparse {
    fn refers_to_nothing(&self, entry: Grain) -> bool {
        matches!(self.place_of_grain(entry), Ok(Stored::Absent | Stored::Zero))
    }
}

impl Recovering for Sparse {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn is_writable(&self) -> bool {
        self.shared.is_writable
    }

    fn guest_clusters(&self) -> u64 {
        self.len().div_ceil(self.layout.grain_size())
    }

    /// No table is ever shared.
    fn has_own_table(&self, guest: u64) -> bool {
        self.has_table(guest)
    }

    /// Grains that are made here lie at multiples of their size.
    fn owned(&self, _: u64, entry: Grain) -> Option<Owned> {
        match self.place_of_grain(entry) {
            Ok(Stored::At(host))
                if host.is_multiple_of(self.layout.grain_size()) && self.is_inside(host) =>
            {
                Some(Owned::Cluster(host >> self.layout.grain_bits))
            }
            _ => None,
        }
    }

    async fn are_leaked(&self, claimed: &Claimed) -> Result<bool, Error> {
        let hosts = &claimed.hosts;
        if self.space.has_free(hosts.iter().copied()) {
            return Ok(false);
        }
        let bits = self.layout.grain_bits;
        let mut are_leaked = true;
        let looked = for_each_place(self, |place| {
            let named = place.start >> bits..=(place.end - 1) >> bits;
            are_leaked &= hosts.range(named).next().is_none();
        });
        looked.await.map_err(|errno| Error::os("Could not read the grain tables", errno))?;
        Ok(are_leaked)
    }

    async fn begin_keeping(&self, was_in_use: bool) {
        if was_in_use && self.prepare().await.is_ok() {
            self.reuse_end().await;
        }
    }
}

impl Journaled for Sparse {
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(take_over(self, memory))
    }

    fn forget(&self, memory: &dyn Survivor) -> usize {
        forget_records(memory)
    }

    fn detach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            let settled = settle_journal(self).await;
            self.mapping.journal.let_go(&memory);
            settled
        })
    }
}

impl Sparse {
    /// Takes back what a killed process has left at the end of the file, but for what its memory named, which is in the
    /// tables by now. Where the tables cannot be read, it stays.
    async fn reuse_end(&self) {
        let end = self.end_at_opening.swap(0, Ordering::AcqRel);
        if end == 0 {
            return;
        }
        let mut used = 0;
        match for_each_place(self, |place| used = used.max(place.end)).await {
            Ok(()) => {
                let first = used.div_ceil(self.space_unit());
                if first < end {
                    self.space.put_back(Run { first, count: end - first, is_fresh: false });
                }
            }
            Err(errno) => {
                log::warn!("{}: vmdk: unused grains stay: {errno}", self.shared.name);
            }
        }
    }
}

impl Vmdk {
    /// The extent whose entries may wait, if there is one.
    pub(super) fn journaled_extent(&self) -> Option<&Sparse> {
        let [part] = &self.parts[..] else { return None };
        match &part.extent {
            super::Extent::Sparse(sparse) if sparse.layout.packing == Packing::No => Some(sparse),
            _ => None,
        }
    }
}
