//! Snapshot table entries that lack fields of version 3: found and filled in.
//!
//! The order of a repair: the new table and its refcounts, durable; one write of the header names it,
//! durable; then the old table is given back.

use super::refcounts::Refcounts;
use super::{Check, failed, write};
use crate::block::{Error, Fix};
use crate::format::qcow2::header_cluster;
use crate::format::qcow2::snapshots::Snapshot;

impl Check<'_> {
    /// Tells of incomplete entries. Gives how many of them this repair fills in.
    pub(super) async fn find_incomplete_snapshots(&mut self) -> Result<u64, Error> {
        // Version 2 has such entries since before there was more to record.
        if self.header.version < 3 {
            return Ok(0);
        }
        let table = self.read_snapshots().await?;
        let mut found = 0;
        for (index, snapshot) in table.list.iter().enumerate() {
            let text = format!(" snapshot table entry {index} is incomplete");
            match self.fix {
                _ if snapshot.is_complete() => {}
                Fix::All => {
                    self.say(format!("Repairing{text}"));
                    found += 1;
                }
                Fix::Nothing | Fix::Leaks => self.corruption(text),
            }
        }
        Ok(found)
    }

    /// Writes a table with complete entries, after all else has been repaired. Gives the refcounts then.
    pub(super) async fn complete_snapshots(&mut self) -> Result<Refcounts, Error> {
        let found = self.report;
        let old = self.read_snapshots().await?;
        let mut list = old.list;
        list.iter_mut().for_each(|snapshot| snapshot.complete(self.header.size));
        let bytes: Vec<u8> = list.iter().flat_map(Snapshot::encode).collect();
        let mut references = self.count_references().await?;
        let count = self.geometry.clusters(bytes.len() as u64);
        let first = references.first_free(self.first_to_take(), count);
        references.add(first, count)?;
        let mut refcounts = Refcounts::read(self.file, &self.header).await?;
        if !refcounts.cover(first..first + count) {
            self.rebuild(&mut references).await?;
            // What the old structure took is free now, and the place of the table is not.
            references = self.count_references().await?;
            references.add(first, count)?;
            refcounts = Refcounts::read(self.file, &self.header).await?;
            self.compare(&references, &mut refcounts, Fix::Leaks).await?;
        }
        self.report = found;
        let bits = self.geometry.cluster_bits;
        self.grow_file((first + count) << bits).await?;
        refcounts.set(self.file, first..first + count, 1).await?;
        write(self.file, first << bits, &bytes).await?;
        self.file.flush().await.map_err(failed)?;
        let gone = self.header.snapshots_offset >> bits;
        self.header.snapshots_offset = first << bits;
        header_cluster::write_fields(self.file, &self.header).await.map_err(failed)?;
        for cluster in gone..gone + self.geometry.clusters(old.bytes) {
            let left = references.get(cluster).saturating_sub(1);
            refcounts.set(self.file, cluster..cluster + 1, left).await?;
        }
        Ok(refcounts)
    }
}
