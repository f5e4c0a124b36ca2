//! What the journal of entries that wait ([`crate::cow`]) asks of this format.
//!
//! Nothing counts clusters, so those that only the front end's memory names look free when the image of a killed daemon
//! is opened ([`super::unnamed`]). They stay until that memory has come, or until an image that was written meanwhile is
//! closed: new clusters come from behind them.

use super::mapping::{L2Entry, UNALLOCATED, ZERO};
use super::write::write_header;
use super::{Qed, check};
use crate::block::{Error, Journaled, LocalFuture, Survivor};
use crate::cow::{
    Claimed, Journaling, Owned, Recovering, TwoLevels, Writable, file, forget_records,
    settle_journal, take_over,
};
use crate::io::IoResult;
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

    async fn are_leaked(&self, claimed: &Claimed) -> Result<bool, Error> {
        if self.space.has_free(claimed.hosts.iter().copied()) {
            return Ok(false);
        }
        match self.unnamed.claim(&claimed.hosts) {
            Some(are_unnamed) => Ok(are_unnamed),
            None => check::are_leaked(&file(self), &claimed.hosts).await,
        }
    }

    fn expect_entries(&self) {
        self.unclosed.expect_entries();
    }

    async fn begin_keeping(&self, was_in_use: bool) {
        self.unclosed.begin_keeping(was_in_use);
        let mut header = self.header.lock().await;
        if self.is_marked.load(Ordering::Acquire) {
            let new = header.clone().with_mark(Some(self.in_use()));
            match write_header(&file(self), &new).await {
                Ok(()) => *header = new,
                // Before the next allocation it is marked again.
                Err(_) => self.is_marked.store(false, Ordering::Release),
            }
        }
        drop(header);
        if was_in_use {
            // What is due is used again. If it fails, so does the next write.
            let _ = self.prepare().await;
        }
    }
}

impl Journaled for Qed {
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let words = memory.words();
            let is_used = words.iter().any(|word| word.load(Ordering::Acquire) != 0);
            if is_used && self.is_writable {
                // Entries may come that name the end of the file.
                self.expect_entries();
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
