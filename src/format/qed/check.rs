//! Checking an image (specification, "Consistency checking").
//!
//! Every table and every cluster of data lies in the file behind the header, and is referred to once. Counts
//! are those of `qemu-img check`.

use super::header::Header;
use super::mapping::{UNALLOCATED, ZERO, entries};
use super::open::read_header;
use crate::block::{CheckReport, Error, Event, Node};
use crate::cow::{References, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult};

/// Bytes of a table that are read at once: tables have up to 1 GiB.
const MAX_PIECE: u64 = 1 << 20;

/// Checks the image in `file`, with no other request in flight.
///
/// # Errors
/// The header makes no sense, or I/O failed.
pub async fn check(file: &Node) -> Result<CheckReport, Error> {
    let header = read_header(file).await?;
    let mut check = Check {
        file,
        file_len: header.whole_clusters(file.driver().len()),
        report: CheckReport {
            total_clusters: header.geometry.clusters(header.size),
            ..CheckReport::default()
        },
        header,
        used: References::default(),
    };
    check.run().await.map_err(|errno| Error::os("Check failed", errno))?;
    Ok(check.report)
}

/// A check on its way.
struct Check<'a> {
    file: &'a Node,
    header: Header,
    /// In bytes.
    file_len: u64,
    report: CheckReport,
    used: References,
}

impl Check<'_> {
    async fn run(&mut self) -> IoResult {
        let tables = u64::from(self.header.geometry.table_clusters);
        let l1 = self.header.l1_offset;
        self.refer(0, u64::from(self.header.header_clusters))?;
        self.refer(l1, tables)?;
        for at in self.pieces_of(l1) {
            for entry in self.read(at).await? {
                if entry == UNALLOCATED {
                    continue;
                }
                if !self.header.has_room_for_table(entry, self.file_len) {
                    self.report.corruptions += 1;
                    continue;
                }
                // What two entries name is looked at once.
                if self.refer(entry, tables)? {
                    self.check_l2(entry).await?;
                }
            }
        }
        self.count_leaks();
        Ok(())
    }

    async fn check_l2(&mut self, table: u64) -> IoResult {
        let mut last = None;
        for at in self.pieces_of(table) {
            for entry in self.read(at).await? {
                if matches!(entry, UNALLOCATED | ZERO) {
                    continue;
                }
                self.report.allocated_clusters += 1;
                let follows = last.is_none_or(|last: u64| {
                    last.checked_add(self.header.geometry.cluster_size()) == Some(entry)
                });
                self.report.fragmented_clusters += u64::from(!follows);
                last = Some(entry);
                if !self.header.has_room_for_data(entry, self.file_len) {
                    self.report.corruptions += 1;
                    continue;
                }
                self.refer(entry, 1)?;
            }
        }
        Ok(())
    }

    /// Where the pieces of a table begin that are read at once.
    fn pieces_of(&self, table: u64) -> impl Iterator<Item = u64> + use<> {
        let len = self.header.geometry.table_size();
        (table..table + len).step_by(self.piece_len())
    }

    /// In bytes.
    fn piece_len(&self) -> usize {
        self.header.geometry.table_size().min(MAX_PIECE) as usize
    }

    /// Notes one more reference to clusters that lie side by side. False if any of them had one.
    fn refer(&mut self, offset: u64, clusters: u64) -> IoResult<bool> {
        let first = offset >> self.header.geometry.cluster_bits;
        let twice = (first..first + clusters).filter(|&cluster| self.used.get(cluster) > 0).count();
        self.report.corruptions += twice as u64;
        self.used.add(first, clusters).map_err(|_| Errno::ENOMEM)?;
        Ok(twice == 0)
    }

    /// Clusters that nothing refers to, up to the end of the file.
    fn count_leaks(&mut self) {
        let end = self.header.geometry.clusters(self.file_len);
        let (mut at, mut used) = (0, 0);
        while let Some(cluster) = self.used.next_page(at).filter(|&cluster| cluster < end) {
            at = self.used.page_end(cluster).min(end);
            used += (cluster..at).filter(|&cluster| self.used.get(cluster) > 0).count() as u64;
        }
        self.report.leaks = end - used;
    }

    /// The entries of a piece of a table.
    async fn read(&self, at: u64) -> Result<Vec<u64>, Errno> {
        let mut bytes = AlignedBuf::new(self.piece_len(), 4096).ok_or(Errno::ENOMEM)?;
        self.file.event(Event::L2Load).await;
        read_padded(self.file, at, &bytes.io_vec()).await?;
        Ok(entries(&bytes[..self.piece_len()]).collect())
    }
}
