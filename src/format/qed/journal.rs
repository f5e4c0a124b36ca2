//! What the journal of entries that wait ([`crate::cow`]) asks of this format.
//!
//! Nothing counts clusters, so those that only the front end's memory names look free when the image of a killed daemon
//! is opened. They stay until that memory has come, or until an image that was written meanwhile is closed: new clusters
//! come from behind them.

use super::mapping::{L2Entry, UNALLOCATED, ZERO};
use super::{Qed, check};
use crate::block::{Error, Journaled, LocalFuture, Survivor};
use crate::cow::{
    Journaling, Owned, Recovering, TwoLevels, file, forget_records, settle_journal, take_over,
};
use crate::io::IoResult;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Journaling for Qed {
    fn refers_to_nothing(&self, entry: L2Entry) -> bool {
        matches!(entry, L2Entry(UNALLOCATED | ZERO))
    }
}

impl Recovering for Qed {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn guest_clusters(&self) -> u64 {
        self.geometry().clusters(self.size())
    }

    /// No table is ever shared.
    fn has_own_table(&self, guest: u64) -> bool {
        TwoLevels::has_own_table(self, guest)
    }

    fn owned(&self, _: u64, entry: L2Entry) -> Option<Owned> {
        let host = self.cluster_of(entry).ok()??;
        Some(Owned::Cluster(host >> self.geometry().cluster_bits))
    }

    async fn are_leaked(&self, hosts: &BTreeSet<u64>) -> Result<bool, Error> {
        if self.space.has_free(hosts.iter().copied()) {
            return Ok(false);
        }
        check::are_leaked(&file(self), hosts).await
    }

    async fn take_back(&self) {
        self.reuse_leaked().await;
    }
}

impl Journaled for Qed {
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let words = memory.words();
            let is_used = words.iter().any(|word| word.load(Ordering::Acquire) != 0);
            if is_used && self.is_writable {
                // Entries may come that name the end of the file.
                let failed = |errno| Error::os("Could not mark the image", errno);
                self.mark().await.map_err(failed)?;
            }
            take_over(self, memory).await
        })
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

impl Qed {
    /// Takes back what a killed process has left, but for what its memory named, which is in the tables by now. Where the
    /// tables cannot be read, it stays.
    async fn reuse_leaked(&self) {
        let end = self.repaired.swap(0, Ordering::AcqRel);
        if end == 0 {
            return;
        }
        match check::unnamed(&file(self), end).await {
            Ok(runs) => runs.into_iter().for_each(|run| self.space.put_back(run)),
            Err(error) => log::warn!("{}: qed: unused clusters stay: {error}", self.name),
        }
    }
}
