//! Finding every reference to a cluster: a walk over all tables that reports invalid entries.

use super::{Check, failed, read_or_zero, read_words, write};
use crate::block::{Error, Fix, Preallocation};
use crate::cow::References;
use crate::format::qcow2::bitmaps;
use crate::format::qcow2::extensions::Extension;
use crate::format::qcow2::header::Autoclear;
use crate::format::qcow2::header_cluster;
use crate::format::qcow2::layout;
use crate::format::qcow2::layout::{Cluster, L1Entry, L2Entry, OFFSET_MASK, REFTABLE_OFFSET_MASK};
use crate::format::qcow2::snapshots::{Snapshot, Table};
use crate::io::Errno;
use std::ops::Range;

/// Bits 9 to 55 and the flags: what a standard entry may have.
const STANDARD: u64 = OFFSET_MASK | 1 << 63 | 1 << 62 | 1;

/// L2 tables that are collected to be read later: 64 MiB of memory.
const MOST_PUT_OFF: usize = 1 << 22;

impl Check<'_> {
    /// Counts all references, and the clusters of the disk.
    pub(super) async fn count_references(&mut self) -> Result<References, Error> {
        let mut references = References::default();
        let refs = &mut references;
        self.beyond = References::default();
        self.report.allocated_clusters = 0;
        self.report.compressed_clusters = 0;
        self.report.fragmented_clusters = 0;
        let snapshots = self.read_snapshots().await?;
        self.refer(refs, 0, self.geometry.cluster_size())?;
        let (l1, l1_size) = (self.header.l1_table_offset, self.header.l1_size);
        self.count_l1(refs, l1, l1_size, true).await?;
        for snapshot in &snapshots.list {
            self.count_snapshot(refs, snapshot).await?;
        }
        if !snapshots.list.is_empty() {
            self.refer(refs, self.header.snapshots_offset, snapshots.bytes)?;
        }
        let extensions = std::mem::take(&mut self.header.extensions);
        for extension in &extensions {
            match extension {
                Extension::Encryption(at) => self.refer(refs, at.offset, at.len)?,
                Extension::Bitmaps(at) if self.header.autoclear.contains(Autoclear::BITMAPS) => {
                    self.count_bitmaps(refs, at).await?;
                }
                _ => {}
            }
        }
        self.header.extensions = extensions;
        self.is_incomplete = self.report.corruptions > 0;
        self.count_refcounts(refs).await?;
        Ok(references)
    }

    /// References to all clusters that have a byte of a region.
    fn refer(&mut self, refs: &mut References, offset: u64, len: u64) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let file_len = self.file.driver().len();
        let beyond = offset.saturating_add(len).saturating_sub(file_len);
        if beyond >= self.geometry.cluster_size() {
            self.corruption(format!(
                ": counting reference for region exceeding the end of the file by one cluster or \
                 more: offset {offset:#x} size {len:#x}"
            ));
            return self.refer_beyond(offset, len);
        }
        let bits = self.geometry.cluster_bits;
        let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
        refs.add(first, last - first + 1)
    }

    /// Notes which clusters behind the end of the file a region has.
    fn refer_beyond(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        let bits = self.geometry.cluster_bits;
        let end = self.geometry.clusters(self.file.driver().len());
        let first = (offset >> bits).max(end);
        let last = (offset.saturating_add(len - 1) >> bits).min(end + 2 * self.near() - 1);
        if first <= last { self.beyond.add(first, last - first + 1) } else { Ok(()) }
    }

    /// More clusters than a new refcount structure has.
    fn near(&self) -> u64 {
        let clusters = self.geometry.clusters(self.file.driver().len());
        let blocks = 2 * (clusters / self.geometry.refcount_block_entries()) + 64;
        blocks + self.geometry.clusters(8 * blocks)
    }

    async fn count_l1(
        &mut self,
        refs: &mut References,
        offset: u64,
        size: u32,
        is_active: bool,
    ) -> Result<(), Error> {
        let bytes = size as u64 * 8;
        let before = self.report.corruptions;
        self.refer(refs, offset, bytes)?;
        if size == 0 || self.report.corruptions > before {
            return Ok(());
        }
        let table = read_words(self.file, offset, size as usize).await?;
        for word in table {
            let entry = L1Entry(word);
            let l2 = entry.l2_table();
            if entry.has_reserved_bits() {
                self.corruption(format!(" found L1 entry with reserved bits set: {word:x}"));
            }
            if l2 == 0 {
                continue;
            }
            self.refer(refs, l2, self.geometry.cluster_size())?;
            if !self.geometry.is_cluster_start(l2) {
                self.corruption(format!(
                    " l2_offset={l2:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
            }
            self.note_flagged(l2, is_active)?;
            if l2 < self.file.driver().len() {
                match &mut self.put_off {
                    Some(tables) if tables.len() < MOST_PUT_OFF => tables.push((l2, is_active)),
                    Some(_) => {
                        return Err(Error::new("Check failed: there are too many L2 tables"));
                    }
                    None => self.count_l2(refs, l2, is_active).await?,
                }
            }
        }
        Ok(())
    }

    /// Notes that an entry names a cluster, and has a flag for being the only one.
    fn note_flagged(&mut self, host: u64, is_active: bool) -> Result<(), Error> {
        match &mut self.flagged {
            Some(flagged) if is_active => flagged.add(host >> self.geometry.cluster_bits, 1),
            _ => Ok(()),
        }
    }

    pub(super) async fn count_l2(
        &mut self,
        refs: &mut References,
        table: u64,
        is_active: bool,
    ) -> Result<(), Error> {
        let words = self.geometry.cluster_size() as usize / 8;
        let entries = read_words(self.file, table, words).await?;
        let step = self.geometry.l2_entry_size() as usize / 8;
        // Where the next cluster is, if it follows its predecessor.
        let mut next = 0;
        for (index, entry) in entries.chunks_exact(step).enumerate() {
            let entry = L2Entry { word: entry[0], bitmap: entry.get(1).map_or(0, |&bits| bits) };
            if entry == L2Entry::UNALLOCATED {
                continue;
            }
            if entry.is_compressed() {
                self.count_compressed(refs, entry, index, is_active)?;
                continue;
            }
            let at = table + (index * step) as u64 * 8;
            if let Some(host) = self.count_standard(refs, entry, at).await?
                && is_active
            {
                self.report.allocated_clusters += 1;
                if next != 0 && host != next {
                    self.report.fragmented_clusters += 1;
                }
                next = host + self.geometry.cluster_size();
                self.note_flagged(host, is_active)?;
            }
        }
        Ok(())
    }

    fn count_compressed(
        &mut self,
        refs: &mut References,
        entry: L2Entry,
        index: usize,
        is_active: bool,
    ) -> Result<(), Error> {
        let word = entry.word;
        let Ok(Cluster::Compressed(found)) = self.geometry.decode(entry) else { return Ok(()) };
        if entry.is_copied() {
            self.corruption(format!(
                ": coffset={:#x}: copied flag must never be set for compressed clusters",
                found.host
            ));
        }
        if self.geometry.external_data {
            self.corruption(format!(" compressed cluster {index} with data file, entry={word:#x}"));
            return Ok(());
        }
        if entry.bitmap != 0 {
            self.corruption(format!(
                " compressed cluster {index} with non-zero subcluster allocation bitmap, \
                 entry={word:#x}"
            ));
            return Ok(());
        }
        self.refer(refs, found.host, found.len)?;
        if is_active {
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            self.report.fragmented_clusters += 1;
        }
        Ok(())
    }

    /// The host cluster of a standard entry, if it has one that counts as allocated.
    async fn count_standard(
        &mut self,
        refs: &mut References,
        entry: L2Entry,
        at: u64,
    ) -> Result<Option<u64>, Error> {
        let word = entry.word;
        let zero_flag = word & 1 != 0;
        if word & !STANDARD != 0 {
            self.corruption(format!(" found l2 entry with reserved bits set: {word:x}"));
        }
        let host = word & OFFSET_MASK;
        let is_allocated = host != 0 || self.geometry.external_data && entry.is_copied();
        let (allocated, zero) = (entry.bitmap as u32, (entry.bitmap >> 32) as u32);
        if allocated & zero != 0 || allocated != 0 && !is_allocated {
            self.corruption(match is_allocated {
                true => format!(
                    " offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap"
                ),
                false => ": Unallocated cluster has non-zero subcluster allocation map".to_owned(),
            });
        }
        if !is_allocated {
            return Ok(None);
        }
        if !self.geometry.is_cluster_start(host) {
            let kind = if zero_flag { "Preallocated" } else { "Data" };
            let text = format!(
                "offset={host:x}: {kind} cluster is not properly aligned; L2 entry corrupted."
            );
            // What reads as zeroes does not need its cluster.
            if zero_flag && self.fix == Fix::All && !self.geometry.extended_l2 {
                self.say(format!("Repairing {text}"));
                let zero = L2Entry::zero(None, false).word;
                write(self.file, at, &zero.to_be_bytes()).await?;
                self.report.corruptions_fixed += 1;
                return Ok(None);
            }
            self.corruption(format!(" {text}"));
        }
        if !self.geometry.external_data {
            self.refer(refs, host, self.geometry.cluster_size())?;
        }
        Ok(Some(host))
    }

    // ---- Snapshots and bitmaps

    /// The snapshots, and how many bytes their table has.
    pub(super) async fn read_snapshots(&self) -> Result<Table, Error> {
        Table::read(self.file, &self.header).await.map_err(|error| {
            match error.errno() {
                // What only a repair could do something about.
                Some(Errno(libc::EFBIG)) | None => {
                    Error::new(format!("ERROR failed to read the snapshot table: {error}"))
                }
                Some(errno) => failed(errno),
            }
        })
    }

    async fn count_snapshot(
        &mut self,
        refs: &mut References,
        snapshot: &Snapshot,
    ) -> Result<(), Error> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).escape_debug().to_string();
        let name = format!(" snapshot {} ({})", text(&snapshot.id), text(&snapshot.name));
        let (offset, size) = (snapshot.l1_table_offset, snapshot.l1_size);
        if !self.geometry.is_cluster_start(offset) {
            self.corruption(format!(
                "{name} l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table \
                 entry corrupted"
            ));
            return Ok(());
        }
        if !snapshot.has_sane_l1_size() {
            self.corruption(format!(
                "{name} l1_size={size:#x}: L1 table is too large; snapshot table entry corrupted"
            ));
            return Ok(());
        }
        self.count_l1(refs, offset, size, false).await
    }

    async fn count_bitmaps(
        &mut self,
        refs: &mut References,
        at: &crate::format::qcow2::extensions::BitmapsPointer,
    ) -> Result<(), Error> {
        self.refer(refs, at.directory_offset, at.directory_size)?;
        let mut directory = vec![0; at.directory_size as usize];
        read_or_zero(self.file, at.directory_offset, &mut directory).await.map_err(failed)?;
        let bitmaps = bitmaps::parse_directory(&directory, at.nb_bitmaps, &self.geometry)?;
        for bitmap in bitmaps {
            let len = bitmap.table_size as u64 * 8;
            let before = self.report.corruptions;
            self.refer(refs, bitmap.table_offset, len)?;
            if self.report.corruptions > before {
                continue;
            }
            let table = read_words(self.file, bitmap.table_offset, bitmap.table_size as usize);
            for entry in table.await? {
                let host = entry & OFFSET_MASK;
                let reserved = !(OFFSET_MASK | if host == 0 { 1 } else { 0 });
                if entry & reserved != 0 || !self.geometry.is_cluster_start(host) {
                    self.corruption(format!(" bitmap table entry {entry:x} is not valid"));
                } else if host != 0 {
                    self.refer(refs, host, self.geometry.cluster_size())?;
                }
            }
        }
        Ok(())
    }

    // ---- The refcounts themselves

    async fn count_refcounts(&mut self, refs: &mut References) -> Result<(), Error> {
        let len = (self.header.refcount_table_clusters as u64) << self.geometry.cluster_bits;
        self.refer(refs, self.header.refcount_table_offset, len)?;
        let words = len as usize / 8;
        let table = read_words(self.file, self.header.refcount_table_offset, words).await?;
        let file_clusters = self.geometry.clusters(self.file.driver().len());
        for (index, entry) in table.into_iter().enumerate() {
            if entry == 0 {
                continue;
            }
            let offset = entry & REFTABLE_OFFSET_MASK;
            let cluster = offset >> self.geometry.cluster_bits;
            if entry & !REFTABLE_OFFSET_MASK != 0 {
                self.corruption(format!(" refcount table entry {index} has reserved bits set"));
                self.must_rebuild = true;
            } else if !self.geometry.is_cluster_start(offset) {
                self.corruption(format!(
                    " refcount block {index} is not cluster aligned; refcount table entry corrupted"
                ));
                self.must_rebuild = true;
            } else if cluster >= file_clusters {
                self.corruption(format!(" refcount block {index} is outside image"));
                self.must_rebuild |= self.fix == Fix::All;
            } else {
                self.refer(refs, offset, self.geometry.cluster_size())?;
                let found = refs.get(cluster);
                if found != 1 {
                    self.corruption(format!(" refcount block {index} refcount={found}"));
                    self.must_rebuild = true;
                }
            }
        }
        Ok(())
    }

    /// The first cluster that a repair may take, if nothing refers to it. Where references may be missing,
    /// nothing that was ever in use is taken, and nothing closely behind the end of the file that an entry
    /// leads to: a guest could write to what is put there.
    pub(super) fn first_to_take(&self) -> u64 {
        let unused = match (self.is_incomplete, self.report.check_errors > 0) {
            (false, _) => 0,
            (true, false) => self.geometry.clusters(self.report.image_end_offset),
            (true, true) => self.geometry.clusters(self.file.driver().len()),
        };
        let named = self.closely_behind().rev().find(|&cluster| self.beyond.get(cluster) != 0);
        unused.max(named.map_or(0, |last| last + 1))
    }

    /// The clusters behind the end of the file that a repair passes over where entries lead to them.
    fn closely_behind(&self) -> Range<u64> {
        let end = self.geometry.clusters(self.file.driver().len());
        end..end + self.near()
    }

    /// Counts the references to clusters closely behind the end of the file, which is about to grow: they
    /// become clusters of zeroes.
    fn take_in_beyond(&self, refs: &mut References) -> Result<(), Error> {
        for cluster in self.closely_behind() {
            (0..self.beyond.get(cluster)).try_for_each(|_| refs.add(cluster, 1))?;
        }
        Ok(())
    }

    /// Makes the file at least so long.
    pub(super) async fn grow_file(&self, end: u64) -> Result<(), Error> {
        if end <= self.file.driver().len() {
            return Ok(());
        }
        let image = self.file.driver().image();
        let image = image
            .ok_or_else(|| Error::new("Check failed: the file cannot take what the repair adds"))?;
        image.grow(end, Preallocation::Off).await.map_err(|e| e.at("Check failed"))
    }

    /// Writes a new refcount structure where nothing is, and turns the header to it.
    pub(super) async fn rebuild(&mut self, refs: &mut References) -> Result<(), Error> {
        let geometry = self.geometry;
        let per_block = geometry.refcount_block_entries();
        let bits = geometry.cluster_bits;
        // The blocks by what they count. Each may need another one for itself.
        let mut blocks = std::collections::BTreeMap::new();
        let mut free = self.first_to_take();
        self.take_in_beyond(refs)?;
        let (table, table_clusters) = loop {
            let mut cluster = 0;
            while let Some(index) = refs.next_page(cluster).map(|cluster| cluster / per_block) {
                // A page may count nothing but what this block is for; then the block is not.
                cluster = (index + 1) * per_block;
                let used = (index * per_block..cluster).any(|cluster| refs.get(cluster) != 0);
                if used && !blocks.contains_key(&index) {
                    free = refs.first_free(free, 1);
                    refs.add(free, 1)?;
                    blocks.insert(index, free);
                    cluster = cluster.min(free / per_block * per_block);
                }
            }
            let entries = blocks.last_key_value().map_or(0, |(&last, _)| last + 1);
            let clusters = geometry.clusters(entries * 8).max(1);
            let start = refs.first_free(free, clusters);
            let last = (start + clusters - 1) / per_block;
            let covered = (start / per_block..=last).all(|index| blocks.contains_key(&index));
            if covered {
                refs.add(start, clusters)?;
                break (start, clusters);
            }
            // Blocks for the table's own clusters come first; then there is another place for it.
            for index in start / per_block..=last {
                if let std::collections::btree_map::Entry::Vacant(vacant) = blocks.entry(index) {
                    free = refs.first_free(free, 1);
                    refs.add(free, 1)?;
                    vacant.insert(free);
                }
            }
        };
        if table_clusters << bits > layout::MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new("Check failed: the refcount table would be too large"));
        }
        let taken = blocks.values().copied().chain(table..table + table_clusters);
        let last = taken.clone().max().unwrap_or(0);
        if taken.clone().any(|cluster| self.beyond.get(cluster) != 0) {
            return Err(Error::new(
                "Check failed: the image refers to clusters where its refcounts would be rebuilt",
            ));
        }
        self.grow_file((last + 1) << bits).await?;
        let mut entries = vec![0; (table_clusters << bits) as usize];
        let mut block = vec![0; geometry.cluster_size() as usize];
        for (&index, &at) in &blocks {
            for i in 0..per_block {
                // More references than the width can tell are not to be repaired so.
                let found = refs.get(index * per_block + i);
                if found > geometry.refcount_max() {
                    return Err(Error::new(
                        "Check failed: a cluster has more references than its refcount can tell",
                    ));
                }
                layout::set_refcount(&mut block, geometry.refcount_order, i as usize, found);
            }
            write(self.file, at << bits, &block).await?;
            entries[index as usize * 8..][..8].copy_from_slice(&(at << bits).to_be_bytes());
        }
        write(self.file, table << bits, &entries).await?;
        self.file.flush().await.map_err(failed)?;
        self.header.refcount_table_offset = table << bits;
        self.header.refcount_table_clusters = table_clusters as u32;
        header_cluster::write_fields(self.file, &self.header).await.map_err(failed)
    }
}
