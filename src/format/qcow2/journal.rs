//! What the journal of entries that wait ([`crate::cow`]) asks of this format.

use super::layout::{Cluster, L2Entry};
use super::{Qcow2, check};
use crate::block::{Error, Journaled, LocalFuture, Survivor};
use crate::cow::{
    Claimed, Journaling, Owned, Recovering, TwoLevels, forget_records, settle_journal, take_over,
};
use crate::io::IoResult;
use std::sync::Arc;

impl Journaling for Qcow2 {
    /// With lazy refcounts, or after a failed snapshot, the next opening of the image counts all references again.
    /// (While they are counted, the journal is closed.)
    fn may_keep(&self) -> bool {
        !self.settings.lazy_refcounts && !self.snapshots.needs_repair()
    }

    fn refers_to_nothing(&self, entry: L2Entry) -> bool {
        matches!(
            self.geometry.decode(entry),
            Ok(Cluster::Unallocated
                | Cluster::Zero { host: None }
                | Cluster::Subclusters { host: None, .. })
        )
    }

    /// More subclusters, or the data of a cluster that was kept for it. Each says that no other entry refers to the
    /// cluster.
    fn shows_more(&self, old: L2Entry, new: L2Entry) -> bool {
        if !old.is_copied() || !new.is_copied() {
            return false;
        }
        match (self.geometry.decode(old), self.geometry.decode(new)) {
            (Ok(Cluster::Zero { host: Some(before) }), Ok(Cluster::Normal { host })) => {
                before == host
            }
            (
                Ok(Cluster::Subclusters { host: Some(before), allocated: few, .. }),
                Ok(Cluster::Subclusters { host: Some(host), allocated, .. }),
            ) => before == host && few & !allocated == 0,
            _ => false,
        }
    }
}

impl Recovering for Qcow2 {
    fn name(&self) -> &str {
        &self.settings.name
    }

    fn is_writable(&self) -> bool {
        self.settings.is_writable
    }

    fn guest_clusters(&self) -> u64 {
        self.geometry.clusters(self.size())
    }

    fn has_own_table(&self, guest: u64) -> bool {
        TwoLevels::has_own_table(self, guest)
    }

    fn owned(&self, guest: u64, entry: L2Entry) -> Option<Owned> {
        let host = match self.geometry.decode(entry) {
            Ok(Cluster::Normal { host } | Cluster::Subclusters { host: Some(host), .. }) => host,
            _ => return None,
        };
        // In an external data file each guest cluster has its place.
        if self.geometry.external_data {
            return (host == guest).then_some(Owned::Fixed);
        }
        entry.is_copied().then_some(Owned::Cluster(host >> self.geometry.cluster_bits))
    }

    /// The mark tells that nothing has given the clusters to others since. Then entries of the tables that records are
    /// about are looked at, and of others none.
    async fn are_leaked(&self, claimed: &Claimed) -> Result<bool, Error> {
        let hosts = &claimed.hosts;
        let reserved = self.space.reserves(&mut hosts.iter().copied().collect::<Vec<_>>());
        let is_untouched = self.unclosed.is_of(claimed.opening);
        let table = |&guest: &u64| self.mapping.l1_of(guest).l2_table();
        let tables = is_untouched.then(|| claimed.guests.iter().map(table).collect());
        let leaked = check::are_leaked(&self.file(), hosts, tables).await?;
        Ok(leaked && !reserved)
    }

    fn expect_entries(&self) {
        self.unclosed.expect_entries();
    }

    async fn begin_keeping(&self, was_in_use: bool) {
        self.begin_to_keep(was_in_use).await;
    }
}

impl Journaled for Qcow2 {
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(take_over(self, memory))
    }

    fn forget(&self, memory: &dyn Survivor) -> usize {
        forget_records(memory)
    }

    fn detach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            let settled = settle_journal(self).await;
            self.mapping.tables().journal.let_go(&memory);
            settled
        })
    }
}
