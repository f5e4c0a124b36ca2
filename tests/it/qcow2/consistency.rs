//! A check of an image's metadata by its bytes, simple and strict.
//!
//! Every reference is counted, and what is marked as referred to once is so. Clusters may leak.

use std::collections::BTreeMap;
use vublk::format::qcow2::bitmaps;
use vublk::format::qcow2::extensions::Extension;
use vublk::format::qcow2::header::{Autoclear, Header};
use vublk::format::qcow2::layout::{self, Cluster, Geometry, L1Entry, L2Entry};
use vublk::format::qcow2::snapshots::Snapshot;

struct Check<'a> {
    bytes: &'a [u8],
    geometry: Geometry,
    /// By cluster.
    references: BTreeMap<u64, u64>,
    /// Those of compressed clusters, which share theirs.
    packed: BTreeMap<u64, u64>,
    table: Vec<u64>,
}

/// What is wrong, if something is. With snapshots, clusters may have more than one reference.
pub fn check(bytes: &[u8], has_snapshots: bool) -> Result<(), String> {
    let bits = Header::cluster_bits(bytes.first_chunk().ok_or("too short")?);
    let bits = bits.map_err(|error| error.to_string())?;
    let mut head = bytes[..(1 << bits).min(bytes.len())].to_vec();
    head.resize(1 << bits, 0);
    let header = Header::parse(&head).map_err(|error| error.to_string())?;
    let mut check = Check {
        bytes,
        geometry: header.geometry(),
        references: BTreeMap::new(),
        packed: BTreeMap::new(),
        table: Vec::new(),
    };
    let size = check.geometry.cluster_size();
    check.refer(0, size);
    let table_len = u64::from(header.refcount_table_clusters) * size;
    check.refer(header.refcount_table_offset, table_len);
    check.table = check.words(header.refcount_table_offset, table_len / 8);
    for block in check.table.clone().into_iter().filter(|&block| block != 0) {
        if !block.is_multiple_of(size) {
            return Err(format!("a refcount block at {block:#x}"));
        }
        check.refer(block, size);
    }
    check.refer(header.l1_table_offset, header.l1_size as u64 * 8);
    let mut copied = Vec::new();
    for word in check.words(header.l1_table_offset, header.l1_size.into()) {
        let entry = L1Entry(word);
        let table = entry.l2_table();
        if table == 0 {
            continue;
        }
        if entry.has_reserved_bits() || !table.is_multiple_of(size) {
            return Err(format!("an L1 entry {word:#x}"));
        }
        check.refer(table, size);
        copied.push((table, entry.is_copied()));
        check.l2_table(table, &mut copied)?;
    }
    check.bitmaps(&header)?;
    check.snapshots(&header)?;
    for (&cluster, &references) in &check.references {
        let count = check.refcount(cluster);
        if count < references {
            return Err(format!("cluster {cluster:#x}: {references} references, refcount {count}"));
        }
        let is_shared = check.packed.get(&cluster) == Some(&references);
        if references > 1 && count == references && !has_snapshots && !is_shared {
            return Err(format!("cluster {cluster:#x}: {references} references"));
        }
    }
    for (host, is_copied) in copied {
        let count = check.refcount(host / size);
        if is_copied != (count == 1) {
            return Err(format!("cluster at {host:#x}: COPIED is {is_copied}, refcount {count}"));
        }
    }
    Ok(())
}

impl Check<'_> {
    /// What is past the end is zero.
    fn words(&self, at: u64, count: u64) -> Vec<u64> {
        let byte = |n: u64| u64::from(self.bytes.get(n as usize).copied().unwrap_or(0));
        (0..count).map(|n| (0..8).fold(0, |word, b| word << 8 | byte(at + n * 8 + b))).collect()
    }

    /// What snapshots refer to.
    fn snapshots(&mut self, header: &Header) -> Result<(), String> {
        let mut at = header.snapshots_offset as usize;
        for n in 0..header.nb_snapshots {
            let bytes = self.bytes.get(at..).unwrap_or_default();
            let (snapshot, len) = Snapshot::parse(bytes).ok_or(format!("snapshot {n}"))?;
            at += len;
            self.refer(snapshot.l1_table_offset, snapshot.l1_size as u64 * 8);
            for word in self.words(snapshot.l1_table_offset, snapshot.l1_size.into()) {
                let table = L1Entry(word).l2_table();
                if table != 0 {
                    self.refer(table, self.geometry.cluster_size());
                    // Flags mean nothing here.
                    self.l2_table(table, &mut Vec::new())?;
                }
            }
        }
        self.refer(header.snapshots_offset, at as u64 - header.snapshots_offset);
        Ok(())
    }

    fn refer(&mut self, at: u64, len: u64) {
        let size = self.geometry.cluster_size();
        for cluster in at / size..(at + len).div_ceil(size) {
            *self.references.entry(cluster).or_default() += 1;
        }
    }

    /// Those that the header vouches for.
    fn bitmaps(&mut self, header: &Header) -> Result<(), String> {
        let pointer = header.extensions.iter().find_map(|extension| match extension {
            Extension::Bitmaps(pointer) => Some(pointer),
            _ => None,
        });
        let Some(at) = pointer.filter(|_| header.autoclear.contains(Autoclear::BITMAPS)) else {
            return Ok(());
        };
        self.refer(at.directory_offset, at.directory_size);
        let end = (at.directory_offset + at.directory_size) as usize;
        let directory = self.bytes.get(at.directory_offset as usize..end);
        let directory = directory.ok_or("a directory of bitmaps past the end")?;
        let all = bitmaps::parse_directory(directory, at.nb_bitmaps, &self.geometry);
        let size = self.geometry.cluster_size();
        for bitmap in all.map_err(|error| error.to_string())? {
            self.refer(bitmap.table_offset, u64::from(bitmap.table_size) * 8);
            for entry in self.words(bitmap.table_offset, bitmap.table_size.into()) {
                match entry {
                    0 | 1 => {}
                    _ if entry.is_multiple_of(size) => self.refer(entry, size),
                    _ => return Err(format!("a bitmap table entry {entry:#x}")),
                }
            }
        }
        Ok(())
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let per_block = self.geometry.refcount_block_entries();
        let block = self.table.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return 0;
        }
        let size = self.geometry.cluster_size() as usize;
        let mut bytes = self.bytes[(block as usize).min(self.bytes.len())..].to_vec();
        bytes.resize(size, 0);
        let index = (cluster % per_block) as usize;
        layout::refcount(&bytes, self.geometry.refcount_order, index)
    }

    fn l2_table(&mut self, table: u64, copied: &mut Vec<(u64, bool)>) -> Result<(), String> {
        let size = self.geometry.cluster_size();
        let width = self.geometry.l2_entry_size() / 8;
        for entry in self.words(table, size / 8).chunks(width as usize) {
            let entry = L2Entry { word: entry[0], bitmap: entry.get(1).copied().unwrap_or(0) };
            let cluster = self.geometry.decode(entry);
            let cluster = cluster.map_err(|error| format!("{entry:x?}: {error:?}"))?;
            let host = match cluster {
                Cluster::Normal { host } => host,
                Cluster::Zero { host: Some(host) } => host,
                Cluster::Subclusters { host: Some(host), .. } => host,
                Cluster::Compressed(place) => {
                    self.refer(place.host, place.len);
                    for cluster in place.host / size..(place.host + place.len).div_ceil(size) {
                        *self.packed.entry(cluster).or_default() += 1;
                    }
                    continue;
                }
                _ => continue,
            };
            match self.geometry.external_data {
                // Nothing counts the clusters of another file, and none is shared.
                true if entry.is_copied() => {}
                true => return Err(format!("{entry:x?}: COPIED is clear")),
                false => {
                    self.refer(host, size);
                    copied.push((host, entry.is_copied()));
                }
            }
        }
        Ok(())
    }
}
