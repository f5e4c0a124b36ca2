//! Checking an image, and repairing it (specification, "Consistency checking").
//!
//! Every table and every cluster of data is in the file behind the header, and is referred to once. A repair takes
//! away entries that lead to no cluster of the file; clusters that two entries name stay as they are, for nobody
//! knows whose they are. What nothing names at the end of the file is cut off. Counts are those of `qemu-img check`.

use super::header::{Features, Header, Layout};
use super::mapping::{UNALLOCATED, ZERO, entries};
use super::open::read_header;
use super::write::write_header;
use crate::block::{CheckReport, Error, Event, Fix, Node, WriteFlags};
use crate::cow::{Mark, References, Run, cut, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::collections::BTreeSet;

/// Bytes of a table that are read at once: tables have up to 1 GiB.
const MAX_PIECE: u64 = 1 << 20;
/// Runs of unnamed clusters that are remembered. A kill leaves fewer.
const MAX_RUNS: usize = 1 << 16;

/// Checks the image in `file`, with no other request in flight, and repairs it if `fix` names anything. An image
/// without mistakes that lose data needs no check any more, and then says so.
///
/// # Errors
/// The header makes no sense, or I/O failed.
pub async fn check(file: &Node, fix: Fix) -> Result<CheckReport, Error> {
    let repairs = fix != Fix::Nothing;
    let (mut check, header) = survey(file, repairs).await?;
    if repairs && check.report.corruptions == 0 {
        check.end_repair(header, Unnamed::Cut).await.map_err(repair_failed)?;
    }
    Ok(check.report)
}

/// Repairs an image that was not closed, as [`check`] does, but for what nothing names: memory that outlives a process may
/// name some of it. If the image says that there is no such memory, the end of the file is cut off. Returns the other
/// clusters that nothing names, too.
///
/// # Errors
/// As of [`check`].
pub async fn check_killed(file: &Node) -> Result<(CheckReport, Vec<Run>), Error> {
    let (mut check, header) = survey(file, true).await?;
    if check.report.corruptions == 0 {
        let nobody_comes = header.mark() == Some(Mark(0));
        check.end_repair(header, Unnamed::Kept).await.map_err(repair_failed)?;
        if nobody_comes {
            check.cut_unnamed().await;
        }
    }
    let unnamed = check.unnamed();
    Ok((check.report, unnamed))
}

/// Whether no table names any of these clusters. The image is sound.
///
/// # Errors
/// I/O failed.
pub async fn are_leaked(file: &Node, clusters: &BTreeSet<u64>) -> Result<bool, Error> {
    let (check, _) = survey(file, false).await?;
    Ok(clusters.iter().all(|&cluster| check.used.get(cluster) == 0))
}

/// Cuts off what nothing names at the end of the file. The image is sound, and nothing is in flight.
///
/// # Errors
/// I/O failed.
pub async fn cut_unnamed(file: &Node) -> Result<(), Error> {
    let (mut check, _) = survey(file, false).await?;
    check.cut_unnamed().await;
    Ok(())
}

fn repair_failed(errno: Errno) -> Error {
    Error::os("Repair failed", errno)
}

/// Looks at all tables, and takes away entries that lead nowhere if it `repairs`.
async fn survey(file: &Node, repairs: bool) -> Result<(Check<'_>, Header), Error> {
    let header = read_header(file).await?;
    let layout = header.layout();
    let mut check = Check {
        file,
        file_len: layout.whole_clusters(file.driver().len()),
        repairs,
        report: CheckReport {
            total_clusters: layout.geometry.clusters(header.size),
            ..CheckReport::default()
        },
        layout,
        used: References::default(),
        used_end: 0,
    };
    check.run(&header).await.map_err(|errno| Error::os("Check failed", errno))?;
    Ok((check, header))
}

/// What becomes of clusters at the end of the file that nothing names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unnamed {
    Cut,
    Kept,
}

/// The state of a check.
struct Check<'a> {
    file: &'a Node,
    layout: Layout,
    /// Of whole clusters, in bytes.
    file_len: u64,
    /// Whether entries are taken away that lead nowhere.
    repairs: bool,
    report: CheckReport,
    used: References,
    /// The end of the last cluster that is referred to.
    used_end: u64,
}

impl Check<'_> {
    async fn run(&mut self, header: &Header) -> IoResult {
        let tables = u64::from(self.layout.geometry.table_clusters);
        self.refer(0, u64::from(header.header_clusters))?;
        self.refer(header.l1_offset, tables)?;
        for at in self.pieces_of(header.l1_offset) {
            let mut piece = self.read(at).await?;
            let mut has_changed = false;
            for entry in &mut piece {
                if *entry == UNALLOCATED {
                    continue;
                }
                if !self.layout.has_room_for_table(*entry, self.file_len) {
                    has_changed |= self.bad_entry(entry);
                    continue;
                }
                // What two entries name is looked at once.
                if self.refer(*entry, tables)? {
                    self.check_l2(*entry).await?;
                }
            }
            if has_changed {
                self.write(at, &piece).await?;
            }
        }
        self.count_leaks();
        Ok(())
    }

    async fn check_l2(&mut self, table: u64) -> IoResult {
        let mut last = None;
        for at in self.pieces_of(table) {
            let mut piece = self.read(at).await?;
            let mut has_changed = false;
            for entry in &mut piece {
                if matches!(*entry, UNALLOCATED | ZERO) {
                    continue;
                }
                self.report.allocated_clusters += 1;
                let follows = last.is_none_or(|last: u64| {
                    last.checked_add(self.layout.geometry.cluster_size()) == Some(*entry)
                });
                self.report.fragmented_clusters += u64::from(!follows);
                last = Some(*entry);
                if !self.layout.has_room_for_data(*entry, self.file_len) {
                    has_changed |= self.bad_entry(entry);
                    continue;
                }
                self.refer(*entry, 1)?;
            }
            if has_changed {
                self.write(at, &piece).await?;
            }
        }
        Ok(())
    }

    /// Counts an entry that leads nowhere, and takes it away in a repair. Returns whether it has changed.
    fn bad_entry(&mut self, entry: &mut u64) -> bool {
        match self.repairs {
            true => {
                *entry = UNALLOCATED;
                self.report.corruptions_fixed += 1;
            }
            false => self.report.corruptions += 1,
        }
        self.repairs
    }

    /// Takes back that the image needs a check; nothing is wrong that loses data.
    async fn end_repair(&mut self, header: Header, unnamed: Unnamed) -> IoResult {
        // What was repaired is durable before the file becomes shorter and the image says that it is sound.
        self.file.flush().await?;
        let mark = match unnamed {
            Unnamed::Cut => {
                self.cut_unnamed().await;
                None
            }
            Unnamed::Kept => header.mark(),
        };
        let features = header.features - Features::NEED_CHECK;
        let new = Header { features, ..header.clone() }.with_mark(mark);
        if new != header { write_header(self.file, &new).await } else { Ok(()) }
    }

    /// Cuts off what nothing names at the end of the file.
    async fn cut_unnamed(&mut self) {
        let unused = self.clusters() - self.used_end;
        let len = self.used_end << self.layout.geometry.cluster_bits;
        if unused > 0 && cut(self.file, len).await {
            self.file_len = len;
            self.report.leaks -= unused;
            self.report.leaks_fixed += unused;
        }
    }

    /// Where the pieces of a table begin that are read at once.
    fn pieces_of(&self, table: u64) -> impl Iterator<Item = u64> + use<> {
        let len = self.layout.geometry.table_size();
        (table..table + len).step_by(self.piece_len())
    }

    /// In bytes.
    fn piece_len(&self) -> usize {
        self.layout.geometry.table_size().min(MAX_PIECE) as usize
    }

    /// Notes one more reference to clusters that lie side by side. False if any of them had one.
    fn refer(&mut self, offset: u64, clusters: u64) -> IoResult<bool> {
        let first = offset >> self.layout.geometry.cluster_bits;
        let twice = (first..first + clusters).filter(|&cluster| self.used.get(cluster) > 0).count();
        self.report.corruptions += twice as u64;
        self.used.add(first, clusters).map_err(|_| Errno::ENOMEM)?;
        Ok(twice == 0)
    }

    /// Clusters that nothing refers to, up to the end of the file: so many runs at most.
    fn unnamed(&self) -> Vec<Run> {
        let end = self.clusters();
        let (mut at, mut first) = (0, 0);
        let mut runs = Vec::new();
        let mut add = |first: u64, end: u64| {
            if first < end && runs.len() < MAX_RUNS {
                runs.push(Run { first, count: end - first, is_fresh: false });
            }
        };
        while let Some(cluster) = self.used.next_page(at).filter(|&cluster| cluster < end) {
            at = self.used.page_end(cluster).min(end);
            for used in (cluster..at).filter(|&cluster| self.used.get(cluster) > 0) {
                add(first, used);
                first = used + 1;
            }
        }
        add(first, end);
        runs
    }

    /// Counts the clusters that nothing refers to, up to the end of the file, and finds the end of those that are
    /// referred to.
    fn count_leaks(&mut self) {
        let end = self.clusters();
        let (mut at, mut used) = (0, 0);
        while let Some(cluster) = self.used.next_page(at).filter(|&cluster| cluster < end) {
            at = self.used.page_end(cluster).min(end);
            for cluster in (cluster..at).filter(|&cluster| self.used.get(cluster) > 0) {
                used += 1;
                self.used_end = cluster + 1;
            }
        }
        self.report.leaks = end - used;
    }

    /// Clusters that the file has.
    fn clusters(&self) -> u64 {
        self.file_len >> self.layout.geometry.cluster_bits
    }

    /// The entries of a piece of a table.
    async fn read(&self, at: u64) -> Result<Vec<u64>, Errno> {
        let mut bytes = AlignedBuf::new(self.piece_len(), 4096).ok_or(Errno::ENOMEM)?;
        self.file.event(Event::L2Load).await;
        read_padded(self.file, at, &bytes.io_vec()).await?;
        Ok(entries(&bytes[..self.piece_len()]).collect())
    }

    async fn write(&self, at: u64, entries: &[u64]) -> IoResult {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.file.event(Event::L2Update).await;
        self.file.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await
    }
}
