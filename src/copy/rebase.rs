//! Copying pieces of an image that is about to get another backing file.
//!
//! Whatever would read differently afterwards is written into the image itself.

use super::plan::Piece;
use super::zeroes::is_zero;
use super::{Disk, Part, Shared, Trouble};
use crate::block::{Node, Precision, SECTOR, Status, WriteFlags, ZeroFlags, extents};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::Arc;

/// A piece of which the image has nothing, and what both backing files show of it.
struct Comparison<'a> {
    shared: &'a Shared,
    piece: &'a Piece,
    image: &'a Arc<Node>,
    new: Option<&'a Arc<Node>>,
    /// What is read now, and behind that, from the length of a piece on, what would be read.
    memory: &'a mut AlignedBuf,
}

impl Shared {
    /// Writes what differs. `memory` is for two pieces.
    pub(super) async fn compare(
        &self,
        piece: &Piece,
        memory: &mut AlignedBuf,
    ) -> Result<(), Trouble> {
        let new = match &self.copy.part {
            Part::Rebased(new) => new.as_ref().map(Disk::node),
            _ => None,
        };
        let failed = Trouble::Read(piece.at, Errno::EIO);
        let (image, _, _) = self.copy.source_at(piece.at).ok_or(failed)?;
        Comparison { shared: self, piece, image: image.node(), new, memory }.run().await
    }
}

impl Comparison<'_> {
    async fn run(&mut self) -> Result<(), Trouble> {
        let (at, end) = (self.piece.at, self.piece.at + self.piece.len);
        let units = self.shared.copy.unit().map(|unit| {
            let last = if end == self.shared.copy.len() { end } else { end - end % unit };
            (unit, at.next_multiple_of(unit), last)
        });
        match units.filter(|(_, first, last)| first < last) {
            Some((unit, first, last)) => {
                self.copy_sectors(at, first).await?;
                self.copy_units(first, last, unit).await?;
                self.copy_sectors(last, end).await
            }
            None => self.copy_sectors(at, end).await,
        }
    }

    /// Writes the sectors that differ.
    async fn copy_sectors(&mut self, mut at: u64, end: u64) -> Result<(), Trouble> {
        while at < end {
            let (len, may_differ) = self.compare(at, end - at).await?;
            if may_differ {
                self.read(at, len).await?;
                // No sector is on both sides of the old file's end: what was read ends there.
                let is_past = at >= extents::backing(self.image).map_or(0, |old| old.len());
                for run in self.differing(len, SECTOR) {
                    let (place, kept) = (at + run.start as u64, self.kept(run));
                    let written = match is_past {
                        true => self.zero(place, &kept).await,
                        false => {
                            self.await_order().await;
                            self.shared.copy.target.write(place, &kept, WriteFlags::empty()).await
                        }
                    };
                    written.map_err(|errno| Trouble::Write(place, errno))?;
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Compresses the units that differ anywhere. The range is of whole units.
    async fn copy_units(&mut self, at: u64, end: u64, unit: u64) -> Result<(), Trouble> {
        let len = end - at;
        let (alike, may_differ) = self.compare(at, len).await?;
        if alike == len && !may_differ {
            return Ok(());
        }
        self.read(at, len).await?;
        for run in self.differing(len, unit) {
            let units: Vec<&[u8]> = self.memory[run.clone()].chunks(unit as usize).collect();
            let mut start = run.start;
            for alike in units.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                let len = alike.iter().map(|unit| unit.len()).sum::<usize>();
                let (place, kept) = (at + start as u64, self.kept(start..start + len));
                let written = match is_zero(alike[0]) {
                    true => self.zero(place, &kept).await,
                    false => {
                        self.await_order().await;
                        self.shared.copy.target.write_compressed(place, &kept).await
                    }
                };
                written.map_err(|errno| Trouble::Write(place, errno))?;
                start += len;
            }
        }
        Ok(())
    }

    /// A part of what is read now, to be written.
    fn kept(&self, part: Range<usize>) -> IoVec<'_> {
        self.memory.source().slice(part.start as u64, part.len() as u64)
    }

    async fn await_order(&self) {
        self.shared.await_order(self.piece).await;
    }

    /// For how many bytes the mappings tell the same, and whether contents have to be compared.
    async fn compare(&self, at: u64, left: u64) -> Result<(u64, bool), Trouble> {
        let failed = |errno| Trouble::Status(at, errno);
        let (len, is_zero) = reads_zero(self.image, at, left).await.map_err(failed)?;
        let Some(new) = self.new else { return Ok((len, !is_zero)) };
        let (len, is_zero_there) = reads_zero(new, at, len).await.map_err(failed)?;
        Ok((len, !(is_zero && is_zero_there)))
    }

    /// Reads what is shown now, and what would be shown: zeroes behind the new file's end.
    async fn read(&mut self, at: u64, len: u64) -> Result<(), Trouble> {
        let memory = self.memory.io_vec();
        self.shared.read(at, &memory.slice(0, len)).await?;
        let after = memory.slice(self.piece.len, len);
        let there = self.new.map_or(0, |new| new.len().saturating_sub(at)).min(len);
        after.slice(there, len - there).zero();
        match self.new {
            Some(new) if there > 0 => {
                let read = new.read(at, &after.slice(0, there)).await;
                read.map_err(|errno| Trouble::ReadNew(at, errno))
            }
            _ => Ok(()),
        }
    }

    /// The runs of whole `unit`s that differ among the first `len` bytes read, as places in the memory.
    fn differing(&self, len: u64, unit: u64) -> Vec<Range<usize>> {
        let [before, after] = [0, self.piece.len as usize]
            .map(|at| self.memory[at..][..len as usize].chunks(unit as usize));
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
    async fn zero(&self, at: u64, kept: &IoVec<'_>) -> IoResult {
        self.await_order().await;
        let target = &self.shared.copy.target;
        target.zero(at, kept.len(), ZeroFlags::empty()).await?;
        let mut done = 0;
        while done < kept.len() {
            let (place, left) = (at + done, kept.len() - done);
            let own = self.image.status(place, left, Precision::Allocation).await?;
            if !own.status.contains(Status::ALLOCATED) {
                target.write(place, &kept.slice(done, own.len), WriteFlags::empty()).await?;
            }
            done += own.len;
        }
        Ok(())
    }
}

/// For how many bytes a node's mapping tells the same, and whether these read as zeroes, as they do behind its end.
async fn reads_zero(node: &Arc<Node>, at: u64, len: u64) -> IoResult<(u64, bool)> {
    if at >= node.len() {
        return Ok((len, true));
    }
    let len = len.min(node.len() - at);
    let run = extents::query(node, at, len, Precision::Zeroes, None).await?;
    Ok((run.len, run.has(Status::ZERO)))
}
