//! Checking a dynamic image: its footers, and the entries of its table.
//!
//! Both footers are whole, and each entry of the table leads to a block of its own, inside the file and apart from
//! metadata. Space that no entry names is lost.

use super::Vpc;
use super::footer;
use super::mapping::Entry;
use super::space::for_each_entry;
use crate::block::{CheckReport, Error, SECTOR};
use crate::cow::file;
use crate::io::{Errno, IoResult};

/// Most blocks that are compared with each other: 256 MiB of memory.
const MOST_BLOCKS: usize = 64 << 20;

impl Vpc {
    /// Checks the image, with no other request in flight, telling `say` what is found.
    ///
    /// # Errors
    /// I/O failed.
    pub(super) async fn check_image(
        &self,
        say: &mut dyn FnMut(&str),
    ) -> Result<CheckReport, Error> {
        let mut report = CheckReport::default();
        let found = footer::read(&file(self)).await?;
        let footers =
            [(found.head_is_whole, "at the head"), (found.tail_is_whole, "at the end of the file")];
        for (is_whole, place) in footers {
            if !is_whole {
                report.corruptions += 1;
                say(&format!("ERROR: VHD footer {place} is damaged"));
            }
        }
        let used = self.used_blocks(&mut report, say).await;
        let mut used = used.map_err(|errno| Error::os("Check failed", errno))?;
        used.sort_unstable();
        self.check_overlaps(&used, &mut report, say);
        self.find_leaks(&used, &mut report, say);
        Ok(report)
    }

    /// The sectors of the bitmaps of all blocks that are in places where blocks can be.
    async fn used_blocks(
        &self,
        report: &mut CheckReport,
        say: &mut dyn FnMut(&str),
    ) -> IoResult<Vec<u32>> {
        let mut used = Vec::new();
        let see = |index: u64, entry: Entry| {
            let Some(bitmap) = entry.bitmap() else { return Ok(()) };
            match self.place(entry) {
                Ok(_) if used.len() == MOST_BLOCKS => return Err(Errno::ENOMEM),
                // It fits: an entry has 32 bits.
                Ok(_) => used.push((bitmap / SECTOR) as u32),
                Err(_) => {
                    report.corruptions += 1;
                    let len = self.file_len();
                    say(&format!(
                        "ERROR: VHD BAT entry {index} offset {bitmap:#x} is over metadata or past the end of file ({len:#x})"
                    ));
                }
            }
            Ok(())
        };
        for_each_entry(&file(self), &self.header, see).await?;
        Ok(used)
    }

    fn check_overlaps(&self, used: &[u32], report: &mut CheckReport, say: &mut dyn FnMut(&str)) {
        for pair in used.windows(2) {
            let [first, second] = [pair[0], pair[1]].map(|sector| u64::from(sector) * SECTOR);
            if first + self.header.unit_len() > second {
                report.corruptions += 1;
                say(&format!("ERROR: VHD blocks at {first:#x} and {second:#x} overlap"));
            }
        }
    }

    /// Counts whole blocks that would fit between those that are used.
    fn find_leaks(&self, used: &[u32], report: &mut CheckReport, say: &mut dyn FnMut(&str)) {
        let mut end = self.clear_from;
        let file_end = self.file_len().saturating_sub(footer::LEN as u64);
        let starts = used.iter().map(|&sector| u64::from(sector) * SECTOR);
        for start in starts.chain([file_end]) {
            let leaked = start.saturating_sub(end) / self.header.unit_len();
            if leaked > 0 {
                report.leaks += leaked;
                say(&format!("Leaked {leaked} blocks of the file at {end:#x}"));
            }
            end = end.max(start + self.header.unit_len());
        }
    }
}
