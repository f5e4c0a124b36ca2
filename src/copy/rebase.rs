//! Standing an image on another backing file: what would be read differently is copied into the image
//! first, and is durable before the header names the new file.

use super::Disk;
use super::zeroes::is_zero;
use crate::block::extents;
use crate::block::{Node, Precision, SECTOR, Status, WriteFlags, ZeroFlags};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::Arc;

/// What is compared at once, in bytes.
const CHUNK: u64 = 2 << 20;

/// Why an image was not rebased.
pub enum Trouble {
    /// Of the image's mapping, or of the new backing file's.
    Status(Errno),
    ReadOld(Errno),
    ReadNew(Errno),
    Write(Errno),
    Memory,
}

/// Copies what differs between what an image stands on and `new`, both possibly shorter than it, or
/// nothing at all. `progress` is called after each step, with the number of steps that it counts for and their total.
/// `compress`: whole compression units of the image, whose driver must be able to, are stored compressed.
pub async fn make_own(
    image: &Disk,
    new: Option<&Disk>,
    compress: bool,
    progress: impl Fn(u64, u64),
) -> Result<(), Trouble> {
    let memory = || AlignedBuf::new(CHUNK as usize, 4096).ok_or(Trouble::Memory);
    let mut work = Work {
        image,
        old: extents::backing(image.node()),
        new: new.map(|new| new.node().clone()),
        unit: image.node().compression_unit().filter(|_| compress),
        before: memory()?,
        after: memory()?,
    };
    let len = image.len();
    let mut at = 0;
    while at < len {
        let own = image.node().status(at, len - at, Precision::Allocation).await;
        let own = own.map_err(Trouble::Status)?;
        if own.status.contains(Status::ALLOCATED) {
            at += own.len;
            continue;
        }
        let end = at + own.len;
        while at < end {
            // As QEMU tells it: in steps of one size, and none where the image has its own.
            let step = CHUNK.min(end - at);
            work.copy(at, at + step).await?;
            progress(1, len / len.min(CHUNK));
            at += step;
        }
    }
    match image.node().flush().await {
        Ok(()) => Ok(()),
        Err(errno) => Err(Trouble::Write(errno)),
    }
}

struct Work<'a> {
    image: &'a Disk,
    old: Option<Arc<Node>>,
    new: Option<Arc<Node>>,
    /// What is compressed as one, in bytes; none to compress nothing.
    unit: Option<u64>,
    /// What the old and the new file show.
    before: AlignedBuf,
    after: AlignedBuf,
}

impl Work<'_> {
    /// Copies what differs from `at` to `end`, a chunk at most of which the image has nothing.
    async fn copy(&mut self, at: u64, end: u64) -> Result<(), Trouble> {
        let units = self.unit.map(|unit| {
            let last = if end == self.image.len() { end } else { end - end % unit };
            (at.next_multiple_of(unit), last)
        });
        match units.filter(|(first, last)| first < last) {
            Some((first, last)) => {
                self.copy_sectors(at, first).await?;
                self.copy_units(first, last).await?;
                self.copy_sectors(last, end).await
            }
            None => self.copy_sectors(at, end).await,
        }
    }

    /// Writes the sectors that differ.
    async fn copy_sectors(&mut self, mut at: u64, end: u64) -> Result<(), Trouble> {
        while at < end {
            let (n, may_differ) = self.look(at, end - at).await?;
            if may_differ {
                self.read_both(at, n).await?;
                // No sector lies on both sides of the old file's end: what was read ends there.
                let is_past = self.old.as_ref().is_none_or(|old| at >= old.len());
                for run in self.differing(n, SECTOR) {
                    let (place, kept) = (at + run.start as u64, &self.before[run]);
                    let written = match is_past {
                        true => self.zero(place, kept).await,
                        false => {
                            let flags = WriteFlags::empty();
                            self.image.write(place, &IoVec::from_ref(kept), flags).await
                        }
                    };
                    written.map_err(Trouble::Write)?;
                }
            }
            at += n;
        }
        Ok(())
    }

    /// Compresses the units that differ anywhere. The range is of whole units.
    async fn copy_units(&mut self, at: u64, end: u64) -> Result<(), Trouble> {
        let (n, may_differ) = self.look(at, end - at).await?;
        if n == end - at && !may_differ {
            return Ok(());
        }
        self.read_both(at, end - at).await?;
        let unit = self.unit.unwrap_or(SECTOR);
        for run in self.differing(end - at, unit) {
            let units: Vec<&[u8]> = self.before[run.clone()].chunks(unit as usize).collect();
            let mut start = run.start;
            for alike in units.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                let len = alike.iter().map(|unit| unit.len()).sum::<usize>();
                let (place, kept) = (at + start as u64, &self.before[start..start + len]);
                let written = match is_zero(alike[0]) {
                    true => self.zero(place, kept).await,
                    false => self.image.write_compressed(place, &IoVec::from_ref(kept)).await,
                };
                written.map_err(Trouble::Write)?;
                start += len;
            }
        }
        Ok(())
    }

    /// For how many bytes the mappings tell the same, and whether contents have to be compared.
    async fn look(&self, at: u64, left: u64) -> Result<(u64, bool), Trouble> {
        let mut len = left;
        let mut are_zero = true;
        for node in [&self.old, &self.new] {
            let (there, zero) =
                reads_zero(node.as_ref(), at, len).await.map_err(Trouble::Status)?;
            len = there;
            are_zero &= zero;
        }
        Ok((len, !are_zero))
    }

    async fn read_both(&mut self, at: u64, len: u64) -> Result<(), Trouble> {
        let (before, after) = (&mut self.before[..len as usize], &mut self.after[..len as usize]);
        read(self.old.as_ref(), at, before).await.map_err(Trouble::ReadOld)?;
        read(self.new.as_ref(), at, after).await.map_err(Trouble::ReadNew)
    }

    /// The runs of whole `unit`s that differ among the first `len` bytes read, as places in the buffers.
    fn differing(&self, len: u64, unit: u64) -> Vec<Range<usize>> {
        let [before, after] =
            [&self.before, &self.after].map(|read| read[..len as usize].chunks(unit as usize));
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut start = 0;
        for (before, after) in before.zip(after) {
            let end = start + before.len();
            if before != after {
                match runs.last_mut().filter(|run| run.end == start) {
                    Some(run) => run.end = end,
                    None => runs.push(start..end),
                }
            }
            start = end;
        }
        runs
    }

    /// Zeroes what `kept` is of, all zeroes. Where the old file shows zeroes too, an image may leave it at that
    /// (version 2 of qcow2): there they are written, because the new file may show something else.
    async fn zero(&self, at: u64, kept: &[u8]) -> IoResult {
        self.image.zero(at, kept.len() as u64, ZeroFlags::empty()).await?;
        let mut done = 0;
        while done < kept.len() {
            let (place, left) = (at + done as u64, (kept.len() - done) as u64);
            let own = self.image.node().status(place, left, Precision::Allocation).await?;
            let part = &kept[done..done + own.len as usize];
            if !own.status.contains(Status::ALLOCATED) {
                self.image.write(place, &IoVec::from_ref(part), WriteFlags::empty()).await?;
            }
            done += part.len();
        }
        Ok(())
    }
}

async fn reads_zero(node: Option<&Arc<Node>>, at: u64, len: u64) -> IoResult<(u64, bool)> {
    match node {
        Some(node) if at < node.len() => {
            let len = len.min(node.len() - at);
            let run = extents::look(node, at, len, Precision::Zeroes, None).await?;
            Ok((run.len, run.has(Status::ZERO)))
        }
        _ => Ok((len, true)),
    }
}

/// Reads what a backing file shows, zeroes past its end.
async fn read(node: Option<&Arc<Node>>, at: u64, bytes: &mut [u8]) -> IoResult {
    let there = node.map_or(0, |node| node.len().saturating_sub(at)).min(bytes.len() as u64);
    let (first, rest) = bytes.split_at_mut(there as usize);
    rest.fill(0);
    match node {
        Some(node) if there > 0 => node.read(at, &IoVec::from_mut(first)).await,
        _ => Ok(()),
    }
}
