//! Checking and repairing an image, with the messages and counts of `qemu-img check`.
//!
//! Each cluster that the catalogue names is in the file and has one owner, and the file ends with the last of them,
//! or with the extension.
//!
//! A repair takes away entries that lead outside, gives the second owner of a cluster a copy of it, durably, before its
//! entry names the copy, drops an extension that makes no sense, and cuts off what nothing names at the end of the file.

use super::catalogue::for_each_named;
use super::extension::{self, Extension};
use super::header::{self, Header};
use super::open::{read_header, write_state};
use crate::block::{CheckReport, Error, Fix, Node, SECTOR, WriteFlags};
use crate::cow::{cut, lengthen, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

/// Bytes that are copied at once.
const CHUNK: u64 = 1 << 20;

/// Checks the image in `file`, with no other request in flight, and repairs what `fix` says, telling `say` what is found.
///
/// # Errors
/// The header makes no sense, or I/O failed.
pub async fn check(file: &Node, fix: Fix, say: &mut dyn FnMut(&str)) -> Result<CheckReport, Error> {
    let header = read_header(file).await?;
    let end = header.data_start();
    let report = CheckReport { total_clusters: header.entries.into(), ..CheckReport::default() };
    let mut check = Check { file, header, fix, say, report, end, knows_end: true };
    check.run().await.map_err(|errno| Error::os("Check failed", errno))?;
    check.report.image_end_offset = check.end;
    Ok(check.report)
}

/// A check on its way.
struct Check<'a> {
    file: &'a Node,
    header: Header,
    fix: Fix,
    say: &'a mut dyn FnMut(&str),
    report: CheckReport,
    /// Where the last cluster ends, in bytes.
    end: u64,
    /// No cluster lies behind it.
    knows_end: bool,
}

impl Check<'_> {
    async fn run(&mut self) -> IoResult {
        if self.header.state.is_in_use() {
            self.corrupt("image was not closed correctly");
        }
        // Copies are made behind its clusters.
        let extension = extension::read(self.file, &self.header).await;
        if let Ok(Some(extension)) = &extension {
            let ends = extension.places.iter().map(|at| at + self.header.cluster_size());
            self.end = ends.fold(self.end, u64::max);
            self.knows_end = !extension.has_unknown;
        }
        let mut named = Vec::new();
        let see = |index: u32, entry: u32| named.push((index, entry));
        for_each_named(self.file, &self.header, see).await?;
        let named = self.check_places(named).await?;
        let owned = self.check_owners(named).await?;
        self.check_extension(extension, &owned).await?;
        if self.fix != Fix::Nothing {
            self.file.flush().await?;
        }
        self.check_end().await;
        if self.fix == Fix::All && self.header.state.is_in_use() && self.report.corruptions == 0 {
            write_state(self.file, &self.header, &self.header.state.written(false)).await?;
        }
        match self.fix {
            Fix::Nothing => Ok(()),
            _ => self.file.flush().await,
        }
    }

    /// Counts a mistake. Returns whether it is to be repaired.
    fn corrupt(&mut self, what: &str) -> bool {
        let repairs = self.fix == Fix::All;
        let count = match repairs {
            true => &mut self.report.corruptions_fixed,
            false => &mut self.report.corruptions,
        };
        *count += 1;
        self.say(repairs, what);
        repairs
    }

    fn say(&mut self, repairs: bool, what: &str) {
        let word = if repairs { "Repairing" } else { "ERROR" };
        (self.say)(&format!("{word} {what}"));
    }

    async fn set_entry(&self, index: u32, entry: u32) -> IoResult {
        let at = header::LEN as u64 + u64::from(index) * 4;
        let bytes = entry.to_le_bytes();
        self.file.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await
    }

    /// Looks whether clusters lie in the file: returns the places of those that do, with the entries that name them.
    async fn check_places(&mut self, named: Vec<(u32, u32)>) -> IoResult<Vec<(u64, u32)>> {
        let (cluster, file_len) = (self.header.cluster_size(), self.file.driver().len());
        let mut places = Vec::with_capacity(named.len());
        let mut last = None;
        for (index, entry) in named {
            let place = self.header.offset_of(entry);
            let inside = place.filter(|&place| place < file_len);
            if inside.is_none() && self.corrupt(&format!("cluster {index} is outside image")) {
                self.set_entry(index, 0).await?;
                continue;
            }
            self.report.allocated_clusters += 1;
            let Some(place) = place else { continue };
            // As QEMU counts: of neighbours on the disk.
            let follows = last.is_none_or(|(before, last): (u32, u64)| {
                before + 1 != index || place == last + cluster
            });
            self.report.fragmented_clusters += u64::from(!follows);
            last = Some((index, place));
            self.end = self.end.max(place + cluster);
            places.extend(inside.map(|place| (place, index)));
        }
        Ok(places)
    }

    /// Looks whether clusters have one owner each; returns where they are, in order.
    async fn check_owners(&mut self, mut places: Vec<(u64, u32)>) -> IoResult<Vec<u64>> {
        places.sort_unstable();
        let mut owned = Vec::with_capacity(places.len());
        let mut free_from = 0;
        for (place, index) in places {
            let is_shared = place < free_from;
            if is_shared && self.corrupt(&format!("duplicate offset in BAT entry {index}")) {
                self.copy(place, index).await?;
                continue;
            }
            free_from = free_from.max(place + self.header.cluster_size());
            owned.push(place);
        }
        Ok(owned)
    }

    /// Looks whether the extension makes sense, and its clusters hold nothing else.
    async fn check_extension(
        &mut self,
        extension: Result<Option<Extension>, Error>,
        owned: &[u64],
    ) -> IoResult {
        let cluster = self.header.cluster_size();
        let is_owned = |&at: &u64| {
            let after = owned.partition_point(|&place| place + cluster <= at);
            owned.get(after).is_some_and(|&place| place < at + cluster)
        };
        let wrong = match extension {
            Ok(Some(extension)) if extension.places.iter().any(is_owned) => {
                "its clusters hold data of the disk".to_owned()
            }
            Ok(_) => return Ok(()),
            Err(error) => match error.errno() {
                Some(errno) => return Err(errno),
                None => error.to_string(),
            },
        };
        self.knows_end = self.corrupt(&format!("Format Extension: {wrong}"));
        if self.knows_end {
            self.header.state.extension = 0;
            write_state(self.file, &self.header, &self.header.state).await?;
        }
        Ok(())
    }

    /// Gives an entry a copy of the cluster that it names.
    async fn copy(&mut self, from: u64, index: u32) -> IoResult {
        let place = self.header.place_of(self.header.clusters_before(self.end));
        let (cluster, end) = (self.header.cluster_size(), place + self.header.cluster_size());
        if self.header.clusters_before(end) > self.header.most_clusters() {
            return Err(Errno::ENOSPC);
        }
        if self.file.driver().len() < end {
            lengthen(self.file, end).await?;
        }
        let mut buffer = AlignedBuf::new(cluster.min(CHUNK) as usize, 4096).ok_or(Errno::ENOMEM)?;
        for at in (0..cluster).step_by(CHUNK as usize) {
            let len = (cluster - at).min(CHUNK);
            read_padded(self.file, from + at, &buffer.io_vec().slice(0, len)).await?;
            let bytes = buffer.source().slice(0, len);
            self.file.write(place + at, &bytes, WriteFlags::empty()).await?;
        }
        self.file.flush().await?;
        self.end = end;
        self.set_entry(index, self.header.entry_at(place)).await
    }

    /// Looks whether the file ends where it should. Where an extension is that makes no sense is not known.
    async fn check_end(&mut self) {
        // As QEMU counts: in whole sectors.
        let file_end = self.file.driver().len().next_multiple_of(SECTOR);
        let lost = file_end.saturating_sub(self.end);
        if lost == 0 || !self.knows_end {
            return;
        }
        let clusters = lost.div_ceil(self.header.cluster_size());
        let repairs = self.fix != Fix::Nothing;
        self.say(repairs, &format!("space leaked at the end of the image {lost}"));
        match repairs && cut(self.file, self.end).await {
            true => self.report.leaks_fixed += clusters,
            false => self.report.leaks += clusters,
        }
    }
}
