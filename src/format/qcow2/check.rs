//! Checking and repairing an image.
//!
//! Every reference to a cluster is counted: header, L1 and L2 tables, data, snapshots, bitmaps, the
//! refcount structures themselves. What the image has counted must be the same, and an entry of the
//! active tables must say that its cluster is its own exactly if that is so. Texts and counts are
//! those of `qemu-img check`.
//!
//! The order of a repair: refcounts first, durable, then the flags that rely on them. A new refcount
//! structure is written beside the old one, which is given back after the header names the new one.

mod leaked;
mod refcounts;
mod snapshots;
pub(super) mod unused;
mod walk;

use super::corrupt;
use super::extensions::Extension;
use super::header::{Autoclear, Header, Incompatible};
use super::header_cluster;
use super::layout::{Geometry, L1Entry, OFFSET_MASK};
use crate::block::{CheckReport, Error, Event, Fix, Node, WriteFlags};
use crate::cow::References;
use crate::io::{Errno, IoResult, IoVec};
pub(super) use leaked::are_leaked;
use refcounts::Refcounts;

/// Checks the image in `file`, with no other request in flight, and repairs what `fix` names.
///
/// Everything is read again. After a repair the header on disk may name other tables than before.
///
/// # Errors
/// The header makes no sense, I/O failed, or what was asked cannot be repaired.
pub async fn check(file: &Node, fix: Fix, say: &mut dyn FnMut(&str)) -> Result<CheckReport, Error> {
    let mut check = Check::new(file, read_header(file).await?, fix, say);
    check.report.total_clusters = check.geometry.clusters(check.header.size);
    check.run().await?;
    Ok(check.report)
}

/// Counts the references of a sound image again, in refcounts of `1 << order` bits; no other request is
/// in flight.
///
/// # Errors
/// The image is not sound, a cluster has more references than there is room for, or I/O failed; the
/// image is as it was then, but for clusters that may be leaked.
pub async fn set_refcount_width(file: &Node, order: u32) -> Result<(), Error> {
    let mut header = read_header(file).await?;
    header.refcount_order = order;
    let mut say = |line: &str| log::debug!("counting references again: {line}");
    let mut check = Check::new(file, header, Fix::All, &mut say);
    let geometry = check.geometry;
    let mut references = check.count_references().await?;
    if check.report.corruptions > 0 || check.report.check_errors > 0 {
        return Err(Error::new("The image is corrupt: repair it first, with 'check -r all'"));
    }
    let (bits, most) = (geometry.refcount_bits(), geometry.refcount_max());
    for cluster in 0..geometry.clusters(file.driver().len()) {
        let found = references.get(cluster);
        if found > most {
            return Err(Error::new(format!(
                "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {:#x} has a \
                 refcount of {found}",
                cluster << geometry.cluster_bits
            )));
        }
    }
    file.event(Event::ClusterAlloc).await;
    file.event(Event::RefblockAlloc).await;
    check.rebuild(&mut references).await?;
    // What the old structure took is free now.
    let references = check.count_references().await?;
    let mut refcounts = Refcounts::read(file, &check.header).await?;
    check.compare(&references, &mut refcounts, Fix::Leaks).await
}

/// The header as it is on disk.
async fn read_header(file: &Node) -> Result<Header, Error> {
    let mut head = [0; super::header::FIXED_LEN];
    read_or_zero(file, 0, &mut head).await.map_err(failed)?;
    let mut cluster = vec![0; 1 << Header::cluster_bits(&head)?];
    read_or_zero(file, 0, &mut cluster).await.map_err(failed)?;
    Header::parse(&cluster)
}

fn failed(errno: Errno) -> Error {
    Error::os("Check failed", errno)
}

/// Reads; what is past the end of the file is zeroes.
async fn read_or_zero(file: &Node, at: u64, into: &mut [u8]) -> IoResult {
    let there = file.len().saturating_sub(at).min(into.len() as u64) as usize;
    let (there, rest) = into.split_at_mut(there);
    rest.fill(0);
    match there.is_empty() {
        true => Ok(()),
        false => file.read(at, &IoVec::from_mut(there)).await,
    }
}

/// Big-endian words at `at`.
async fn read_words(file: &Node, at: u64, n: usize) -> Result<Vec<u64>, Error> {
    let mut bytes = vec![0; n * 8];
    read_or_zero(file, at, &mut bytes).await.map_err(failed)?;
    let words = bytes.chunks_exact(8);
    Ok(words.map(|word| word.iter().fold(0, |all, &byte| all << 8 | byte as u64)).collect())
}

async fn write(file: &Node, at: u64, bytes: &[u8]) -> Result<(), Error> {
    file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await.map_err(failed)
}

/// The state of a check.
struct Check<'a> {
    file: &'a Node,
    header: Header,
    geometry: Geometry,
    fix: Fix,
    say: &'a mut dyn FnMut(&str),
    report: CheckReport,
    /// The refcount structure cannot be repaired where it is.
    must_rebuild: bool,
    /// Tables made no sense, so there may be references that were not found.
    is_incomplete: bool,
    /// References to clusters behind the end of the file, as far as a repair may take clusters there.
    beyond: References,
    has_reported_corruption: bool,
    /// Collects what entries name whose flag tells that they are the only ones ([`unused`]).
    flagged: Option<References>,
    /// Collects L2 tables instead of reading them: where they are, and whether the disk has them now.
    put_off: Option<Vec<(u64, bool)>>,
}

impl<'a> Check<'a> {
    fn new(file: &'a Node, header: Header, fix: Fix, say: &'a mut dyn FnMut(&str)) -> Check<'a> {
        let geometry = header.geometry();
        let report = CheckReport::default();
        Check {
            file,
            header,
            geometry,
            fix,
            say,
            report,
            must_rebuild: false,
            is_incomplete: false,
            beyond: References::default(),
            has_reported_corruption: false,
            flagged: None,
            put_off: None,
        }
    }
}

impl Check<'_> {
    fn say(&mut self, text: String) {
        (self.say)(&text);
    }

    /// A mistake that stays.
    fn corruption(&mut self, text: String) {
        self.report.corruptions += 1;
        self.say(format!("ERROR{text}"));
    }

    async fn run(&mut self) -> Result<(), Error> {
        if self.fix != Fix::Nothing {
            self.drop_stale_bitmaps().await?;
        }
        let incomplete = self.find_incomplete_snapshots().await?;
        let mut references = self.count_references().await?;
        let counted = self.report;
        let mut refcounts = Refcounts::read(self.file, &self.header).await?;
        self.compare(&references, &mut refcounts, Fix::Nothing).await?;
        if self.must_rebuild && self.fix != Fix::Nothing {
            if self.fix == Fix::Leaks {
                self.say("ERROR need to rebuild refcount structures".into());
                return Err(failed(Errno::EIO));
            }
            self.say("Rebuilding refcount structure".into());
            let found = self.report;
            self.rebuild(&mut references).await?;
            // What the old structure took is free now.
            self.must_rebuild = false;
            self.report = CheckReport::default();
            let references = self.count_references().await?;
            let counted = self.report.corruptions;
            refcounts = Refcounts::read(self.file, &self.header).await?;
            self.compare(&references, &mut refcounts, Fix::Leaks).await?;
            if self.must_rebuild {
                self.say("ERROR rebuilt refcount structure is still broken".into());
            }
            let left = self.report;
            self.report = CheckReport {
                corruptions: left.corruptions,
                leaks: left.leaks,
                check_errors: left.check_errors,
                corruptions_fixed: found.corruptions_fixed
                    + found.corruptions.saturating_sub(counted),
                leaks_fixed: found.leaks_fixed + found.leaks,
                image_end_offset: left.image_end_offset,
                ..found
            };
        } else if self.fix != Fix::Nothing
            && (self.report.leaks, self.report.corruptions) != (counted.leaks, counted.corruptions)
        {
            self.report = counted;
            self.compare(&references, &mut refcounts, self.fix).await?;
        }
        drop(references);
        if self.report.check_errors > 0 {
            return Ok(());
        }
        if incomplete > 0 {
            refcounts = self.complete_snapshots().await?;
            self.report.corruptions_fixed += incomplete;
        }
        self.check_copied(&mut refcounts).await?;
        self.mark_clean().await
    }

    /// Bitmaps that somebody did not keep up with are gone: before their clusters are given back,
    /// the header must no longer name them.
    async fn drop_stale_bitmaps(&mut self) -> Result<(), Error> {
        let is_bitmaps = |extension: &Extension| matches!(extension, Extension::Bitmaps(_));
        if self.header.autoclear.contains(Autoclear::BITMAPS)
            || !self.header.extensions.iter().any(is_bitmaps)
        {
            return Ok(());
        }
        let new = header_cluster::with_bitmaps(&self.header, None);
        self.header = header_cluster::rewrite(self.file, &self.header, new).await?;
        Ok(())
    }

    /// Compares what is counted in the image with what there is, and repairs what `fix` names.
    async fn compare(
        &mut self,
        references: &References,
        refcounts: &mut Refcounts,
        fix: Fix,
    ) -> Result<(), Error> {
        let end = self.geometry.clusters(self.file.driver().len());
        // A region may end in the cluster behind the file.
        let end = if references.get(end) > 0 { end + 1 } else { end };
        let per_block = self.geometry.refcount_block_entries();
        // The header is always there.
        self.report.image_end_offset =
            self.report.image_end_offset.max(self.geometry.cluster_size());
        let mut next = 0;
        while let Some(index) = refcounts.next_in_use(next, references, per_block) {
            next = index + 1;
            let first = index * per_block;
            if first >= end {
                break;
            }
            let last = (first + per_block).min(end);
            if !refcounts.load(self.file, index).await? {
                self.report_unaligned_block(index, refcounts.entry(index)).await?;
                for cluster in first..last {
                    self.report.check_errors += 1;
                    self.say(format!(
                        "Can't get refcount for cluster {cluster}: Input/output error"
                    ));
                }
                self.must_rebuild = true;
                continue;
            }
            for cluster in first..last {
                let stored = refcounts.loaded(cluster % per_block);
                let found = references.get(cluster);
                if stored != 0 || found != 0 {
                    let end = (cluster + 1) << self.geometry.cluster_bits;
                    self.report.image_end_offset = self.report.image_end_offset.max(end);
                }
                if stored != found {
                    self.differ(cluster, stored, found, fix, refcounts);
                }
            }
            refcounts.store(self.file).await?;
        }
        if fix != Fix::Nothing {
            self.file.flush().await.map_err(failed)?;
        }
        Ok(())
    }

    /// Tells once that a block cannot be where the table says. A repair marks the image before it continues, so that
    /// nobody allocates in what it leaves if it ends early.
    async fn report_unaligned_block(&mut self, index: u64, offset: u64) -> Result<(), Error> {
        if std::mem::replace(&mut self.has_reported_corruption, true) {
            return Ok(());
        }
        let message = corrupt::unaligned_refcount_block(index as usize, offset);
        let is_repair = self.fix != Fix::Nothing;
        self.say(corrupt::line(is_repair, &message));
        // Version 2 cannot say it.
        if is_repair && self.header.version >= 3 {
            self.header.incompatible |= Incompatible::CORRUPT;
            header_cluster::write_fields(self.file, &self.header).await.map_err(failed)?;
        }
        Ok(())
    }

    /// One cluster is counted `stored` times and has `found` references.
    fn differ(
        &mut self,
        cluster: u64,
        stored: u64,
        found: u64,
        fix: Fix,
        refcounts: &mut Refcounts,
    ) {
        let is_leak = stored > found;
        self.must_rebuild |= stored == 0;
        // A count that is not there may stand in for a whole block.
        let may_fix = found <= self.geometry.refcount_max()
            && match is_leak {
                true => fix != Fix::Nothing,
                false => fix == Fix::All && stored != 0,
            };
        let what = match (may_fix, is_leak) {
            (true, _) => "Repairing",
            (false, true) => "Leaked",
            (false, false) => "ERROR",
        };
        self.say(format!("{what} cluster {cluster} refcount={stored} reference={found}"));
        if may_fix {
            refcounts.set_loaded(cluster % self.geometry.refcount_block_entries(), found);
        }
        let counter = match (may_fix, is_leak) {
            (true, true) => &mut self.report.leaks_fixed,
            (true, false) => &mut self.report.corruptions_fixed,
            (false, true) => &mut self.report.leaks,
            (false, false) => &mut self.report.corruptions,
        };
        *counter += 1;
    }

    /// Whether the flag "refcount is one" of all entries of the active tables is right.
    async fn check_copied(&mut self, refcounts: &mut Refcounts) -> Result<(), Error> {
        // Where anything else is wrong, only who wants all repaired wants this.
        let clean = self.report.corruptions == 0 && self.report.leaks == 0;
        let repair = self.fix == Fix::All || self.fix == Fix::Leaks && clean;
        let what = if repair { "Repairing" } else { "ERROR" };
        let (file, geometry, header) = (self.file, self.geometry, self.header.clone());
        let n = header.l1_size as usize;
        let mut l1 = read_words(file, header.l1_table_offset, n).await?;
        let words = geometry.cluster_size() as usize / 8;
        let step = geometry.l2_entry_size() as usize / 8;
        for (index, word) in l1.iter_mut().enumerate() {
            let entry = L1Entry(*word);
            let table = entry.l2_table();
            if table == 0 {
                continue;
            }
            if let Some(refcount) = refcounts.get(file, table).await?
                && (refcount == 1) != entry.is_copied()
            {
                self.say(format!(
                    "{what} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={:x} \
                     refcount={refcount}",
                    entry.0
                ));
                if repair {
                    *word ^= 1 << 63;
                    let at = header.l1_table_offset + index as u64 * 8;
                    write(file, at, &word.to_be_bytes()).await?;
                }
                self.count_copied(repair);
            }
            if table >= file.driver().len() || !geometry.is_cluster_start(table) {
                continue;
            }
            let l2 = read_words(file, table, words).await?;
            for (i, &word) in l2.iter().enumerate().step_by(step) {
                let host = word & OFFSET_MASK;
                let is_standard = word & 1 << 62 == 0;
                if !is_standard || host == 0 || geometry.external_data {
                    continue;
                }
                let Some(refcount) = refcounts.get(file, host).await? else { continue };
                if (refcount == 1) == (word >> 63 == 1) {
                    continue;
                }
                self.say(format!(
                    "{what} OFLAG_COPIED data cluster: l2_entry={word:x} refcount={refcount}"
                ));
                if repair {
                    let word = word ^ 1 << 63;
                    write(file, table + i as u64 * 8, &word.to_be_bytes()).await?;
                }
                self.count_copied(repair);
            }
        }
        Ok(())
    }

    fn count_copied(&mut self, repaired: bool) {
        match repaired {
            true => self.report.corruptions_fixed += 1,
            false => self.report.corruptions += 1,
        }
    }

    /// An image without mistakes is neither dirty nor corrupt.
    async fn mark_clean(&mut self) -> Result<(), Error> {
        let bad = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.fix == Fix::Nothing {
            return Ok(());
        }
        self.file.flush().await.map_err(failed)?;
        if self.report.corruptions == 0 && self.header.incompatible.intersects(bad) {
            self.header.incompatible -= bad;
            header_cluster::write_fields(self.file, &self.header).await.map_err(failed)?;
        }
        Ok(())
    }
}
