//! Checking an image, and repairing it (specification, "Consistency checking").
//!
//! Every table and every cluster of data lies in the file behind the header, and is referred to once. A repair takes
//! away entries that lead to no cluster of the file; clusters that two entries name stay as they are, for nobody
//! knows whose they are. What nothing names at the end of the file is cut off. Counts are those of `qemu-img check`.

use super::header::{Features, Header, Layout};
use super::mapping::{UNALLOCATED, ZERO, entries};
use super::open::read_header;
use super::write::write_header;
use crate::block::{CheckReport, Error, Event, Fix, Node, WriteFlags};
use crate::cow::{References, cut, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

/// Bytes of a table that are read at once: tables have up to 1 GiB.
const MAX_PIECE: u64 = 1 << 20;

/// Checks the image in `file`, with no other request in flight, and repairs it if `fix` names anything. An image
/// without mistakes that lose data needs no check any more, and then says so.
///
/// # Errors
/// The header makes no sense, or I/O failed.
pub async fn check(file: &Node, fix: Fix) -> Result<CheckReport, Error> {
    let header = read_header(file).await?;
    let layout = header.layout();
    let mut check = Check {
        file,
        file_len: layout.whole_clusters(file.driver().len()),
        repairs: fix != Fix::Nothing,
        report: CheckReport {
            total_clusters: layout.geometry.clusters(header.size),
            ..CheckReport::default()
        },
        layout,
        used: References::default(),
        used_end: 0,
    };
    check.run(&header).await.map_err(|errno| Error::os("Check failed", errno))?;
    if check.repairs {
        check.end_repair(header).await.map_err(|errno| Error::os("Repair failed", errno))?;
    }
    Ok(check.report)
}

/// A check on its way.
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

    /// Cuts off what nothing names at the end of the file, and takes back that the image needs a check, if nothing is
    /// wrong that loses data.
    async fn end_repair(&mut self, header: Header) -> IoResult {
        if self.report.corruptions > 0 {
            return Ok(());
        }
        // What was repaired is durable before the file becomes shorter and the image says that it is sound.
        self.file.flush().await?;
        let unused = self.clusters() - self.used_end;
        let len = self.used_end << self.layout.geometry.cluster_bits;
        if unused > 0 && cut(self.file, len).await {
            self.report.leaks -= unused;
            self.report.leaks_fixed += unused;
        }
        if header.features.contains(Features::NEED_CHECK) {
            let features = header.features - Features::NEED_CHECK;
            write_header(self.file, &Header { features, ..header }).await?;
        }
        Ok(())
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
