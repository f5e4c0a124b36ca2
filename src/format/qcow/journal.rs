//! What the journal of entries that wait ([`crate::cow`]) asks of this format.
//!
//! Nothing counts clusters, and nothing needs to: the file is longer, durably, before a cluster behind its old end is used,
//! and a next opening takes new clusters from behind the end that it finds. So what only the front end's memory names is
//! not given away before that memory has come.

use super::Qcow;
use super::entries::{L1Entry, L2Entry};
use super::header::Cluster;
use crate::block::{Error, Journaled, LocalFuture, Survivor};
use crate::cow::{
    Claimed, Format, Journaling, Owned, Recovering, TwoLevels, file, forget_records, read_padded,
    settle_journal, take_over,
};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

impl Journaling for Qcow {
    fn refers_to_nothing(&self, entry: L2Entry) -> bool {
        self.geometry.decode(entry) == Cluster::Unallocated
    }
}

impl Recovering for Qcow {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn guest_clusters(&self) -> u64 {
        self.geometry.clusters(self.size)
    }

    fn has_own_table(&self, guest: u64) -> bool {
        TwoLevels::has_own_table(self, guest)
    }

    fn owned(&self, _: u64, entry: L2Entry) -> Option<Owned> {
        match self.geometry.decode(entry) {
            Cluster::Normal { host }
                if host >= self.l1_end
                    && host.is_multiple_of(self.geometry.cluster_size())
                    && self.is_inside(host) =>
            {
                Some(Owned::Cluster(host >> self.geometry.cluster_bits))
            }
            _ => None,
        }
    }

    async fn are_leaked(&self, claimed: &Claimed) -> Result<bool, Error> {
        let hosts = &claimed.hosts;
        if self.has_free(hosts) {
            return Ok(false);
        }
        let named = self.names_one_of(hosts).await;
        Ok(!named.map_err(|errno| Error::os("Could not read the L2 tables", errno))?)
    }
}

impl Journaled for Qcow {
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

impl Qcow {
    /// Whether a table on the disk, the header or an entry refers to one of these clusters of the file.
    async fn names_one_of(&self, hosts: &BTreeSet<u64>) -> IoResult<bool> {
        let bits = self.geometry.cluster_bits;
        let has = |bytes: Range<u64>| {
            let last = bytes.end.saturating_sub(1) >> bits;
            !bytes.is_empty() && hosts.range(bytes.start >> bits..=last).next().is_some()
        };
        let name = self.header.lock().await.backing_place();
        if has(0..self.l1_end) || has(name) {
            return Ok(true);
        }
        let table_size = self.geometry.table_size();
        let mut bytes = AlignedBuf::new(table_size as usize, 4096).ok_or(Errno::ENOMEM)?;
        for index in 0..self.l1.entries() {
            let L1Entry(table) = self.l1.get(index);
            if table == 0 {
                continue;
            }
            let end = table.checked_add(table_size).ok_or(Errno::EIO)?;
            if has(table..end) {
                return Ok(true);
            }
            read_padded(&file(self), table, &bytes.io_vec().slice(0, table_size)).await?;
            for entry in bytes[..table_size as usize].chunks_exact(8) {
                let (host, len) = match self.geometry.decode(<Qcow as Format>::parse(entry)) {
                    Cluster::Unallocated => continue,
                    Cluster::Normal { host } => (host, self.geometry.cluster_size()),
                    Cluster::Compressed(place) => (place.host, place.len),
                };
                if has(host..host.saturating_add(len)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
