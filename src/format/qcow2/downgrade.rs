//! Removing what version 2 cannot store, before an image is downgraded.
//!
//! That is zero clusters, clusters compressed by anything but zlib, and snapshots of a disk of another size.
//!
//! All of this is looked for before anything changes. A zero cluster becomes unallocated, or data where a
//! backing file would show. The disk's own tables change as by a guest's writes. A table that snapshots
//! alone have is changed where it is: its new clusters are durable, with as many references as the table has,
//! before its entries name them; what its entries named before is given back when these are durable.

use super::Qcow2;
use super::header::Compression;
use super::layout::{Cluster, L1Entry, L2Entry};
use super::snapshots::references;
use crate::block::{Error, WriteFlags};
use crate::cow::{Allocator, Empty, Found, Run, empty_clusters, lookup, write_zeroes};
use crate::io::{Errno, IoResult, IoVec};
use std::collections::BTreeMap;

fn not_expanded(errno: Errno) -> Error {
    Error::os("Failed to turn zero into data clusters", errno)
}

impl Qcow2 {
    /// Refuses what an image of version 2 with a disk of `size` bytes cannot have.
    pub(super) async fn check_downgrade(&self, size: u64) -> Result<(), Error> {
        if self.header.now().nb_snapshots > 0 {
            let table = self.snapshots.shareable()?;
            let mut snapshots = table.list.iter();
            if !snapshots.all(|snapshot| snapshot.fits_version_2(size)) {
                return Err(Error::new("Internal snapshots prevent downgrade of image"));
            }
        }
        // What the tables say is on disk.
        self.flush_all().await.map_err(not_expanded)?;
        let mut tables = self.snapshots_l2().await?;
        references::check(self.metadata(), &self.space, tables.values().copied())
            .await
            .map_err(not_expanded)?;
        let may_be_unreadable = self.settings.compression != Compression::Zlib;
        if may_be_unreadable {
            let active = (0u64..).zip(self.metadata().active_l1());
            tables.extend(active.map(|(index, entry)| (entry.l2_table(), (index, entry))));
        }
        tables.remove(&0);
        for &(index, entry) in tables.values() {
            let entries = self.metadata().stored_l2(index, entry).await.map_err(not_expanded)?;
            if may_be_unreadable && entries.iter().any(|entry| entry.is_compressed()) {
                let kind = self.settings.compression.name();
                return Err(Error::new(format!(
                    "Cannot downgrade an image with {kind} compression type and existing \
                     compressed clusters"
                )));
            }
        }
        Ok(())
    }

    /// The L2 tables of all snapshots, by their place, with an entry that names each.
    async fn snapshots_l2(&self) -> Result<BTreeMap<u64, (u64, L1Entry)>, Error> {
        let mut tables = BTreeMap::new();
        if self.header.now().nb_snapshots == 0 {
            return Ok(tables);
        }
        for snapshot in &self.snapshots.shareable()?.list {
            let l1 = snapshot.read_l1(&self.file(), &self.geometry).await;
            let l1 = l1.map_err(|error| error.at("Failed to turn zero into data clusters"))?;
            let named = (0u64..).zip(l1).filter(|(_, entry)| entry.l2_table() != 0);
            tables.extend(named.map(|(index, entry)| (entry.l2_table(), (index, entry))));
        }
        Ok(tables)
    }

    /// Leaves no zero cluster, neither to the disk nor to a snapshot.
    pub(super) async fn expand_zeroes(&self) -> Result<(), Error> {
        self.expand_disk().await.map_err(not_expanded)?;
        let tables = self.snapshots_l2().await?;
        if tables.is_empty() {
            return Ok(());
        }
        // From here on the disk shares no table that has zero clusters, also on disk.
        self.flush_all().await.map_err(not_expanded)?;
        let mut old = Vec::new();
        for &(index, entry) in tables.values() {
            old.extend(self.expand_table(index, entry).await.map_err(not_expanded)?);
        }
        match old.is_empty() {
            true => Ok(()),
            false => self.drop_references(&old).await.map_err(not_expanded),
        }
    }

    async fn expand_disk(&self) -> IoResult {
        self.prepare_writing().await?;
        self.unmap(self.size(), Empty::Crop).await?;
        let cluster = self.geometry.cluster_size();
        let end = self.size();
        let mut at = 0;
        while at < end {
            let piece = {
                let _visit = self.mapping.tables().visits.enter();
                lookup(self, at, end - at).await?
            };
            let stop = at + piece.len;
            if matches!(piece.found, Found::Zero { .. }) {
                match self.backing().is_some() {
                    true => write_zeroes(self, at..stop).await?,
                    false => {
                        let stop = stop.next_multiple_of(cluster);
                        empty_clusters(self, at..stop, Empty::Crop).await?;
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// Leaves no zero cluster to a table of snapshots, durably. Gives what its entries no longer refer to, as
    /// often as they did.
    async fn expand_table(&self, index: u64, entry: L1Entry) -> IoResult<Vec<Run>> {
        let table = entry.l2_table();
        let mut entries = self.metadata().stored_l2(index, entry).await?;
        let mut old = Vec::new();
        let mut zeroes = Vec::new();
        for entry in &mut entries {
            if let Ok(Cluster::Zero { host }) = self.geometry.decode(*entry) {
                old.extend(host.map(|host| self.geometry.run_of(host)));
                zeroes.push(entry);
            }
        }
        if zeroes.is_empty() {
            return Ok(old);
        }
        let references =
            self.space.references(self.metadata(), self.geometry.run_of(table).first).await?;
        let hosts = match self.backing().is_some() {
            true => self.zeroed_clusters(zeroes.len() as u64, references).await?,
            false => Vec::new(),
        };
        for (n, entry) in zeroes.into_iter().enumerate() {
            let normal = |&host: &u64| L2Entry::normal(host, false, 0);
            *entry = hosts.get(n).map_or(L2Entry::UNALLOCATED, normal);
        }
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.word.to_be_bytes()).collect();
        let file = self.file();
        file.write(table, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        file.flush().await?;
        Ok((0..references).flat_map(|_| old.iter().copied()).collect())
    }

    /// Host offsets of clusters that hold zeroes and have this many references, all of it durable.
    async fn zeroed_clusters(&self, count: u64, references: u64) -> IoResult<Vec<u64>> {
        let bits = self.geometry.cluster_bits;
        let (zeroes, file) = (vec![0; 1 << bits], self.file());
        let mut runs = Vec::new();
        let mut left = count;
        while left > 0 {
            let taken = self.take(left).await?;
            let run = taken.run;
            // What fails from here on leaks them.
            taken.keep();
            for cluster in run.first..run.first + run.count {
                let zeroes = IoVec::from_ref(&zeroes);
                file.write(cluster << bits, &zeroes, WriteFlags::empty()).await?;
            }
            left -= run.count;
            runs.push(run);
        }
        if references > 1 {
            self.space.raise(self.metadata(), &runs, references - 1).await?;
        }
        file.flush().await?;
        let clusters = runs.iter().flat_map(|run| run.first..run.first + run.count);
        Ok(clusters.map(|cluster| cluster << bits).collect())
    }
}
