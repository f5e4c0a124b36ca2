//! Comparing the contents of two disks.
//!
//! Ranges that read as zeroes in both are not read. The rest of a longer disk must read as zeroes.

use super::Progress;
use crate::block::extents::{self, Run};
use crate::block::{Precision, SECTOR, Status};
use crate::copy::Disk;
use crate::copy::zeroes::is_zero;
use crate::io::{AlignedBuf, Errno, IoVec};

/// Bytes that are read of each disk at a time.
const CHUNK: u64 = 2 << 20;

/// What a comparison came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Identical,
    /// Strict only.
    SizesDiffer,
    /// Strict only: one stores what the other does not, at this offset.
    StatusDiffers(u64),
    /// The first sector that differs, as an offset in bytes.
    ContentsDiffer(u64),
}

/// What came in the way.
#[derive(Debug)]
pub enum Trouble {
    /// Which disk (0 or 1), where, and why.
    Status(usize, u64, Errno),
    Read(usize, u64, Errno),
    Memory,
}

/// Compares two disks. `mismatch` is called if their lengths differ, once nothing but that can decide.
pub async fn compare(
    disks: [&Disk; 2],
    strict: bool,
    progress: &Progress,
    mismatch: impl FnOnce(),
) -> Result<Verdict, Trouble> {
    progress.set(0.0);
    let (short, long) = (disks[0].len().min(disks[1].len()), disks[0].len().max(disks[1].len()));
    if short != long && strict {
        return Ok(Verdict::SizesDiffer);
    }
    let mut buffers = Vec::new();
    for _ in 0..2 {
        buffers.push(AlignedBuf::new(CHUNK as usize, 4096).ok_or(Trouble::Memory)?);
    }
    let mut at = 0;
    while at < short {
        let a = next_run(disks, 0, at, short - at).await?;
        let b = next_run(disks, 1, at, short - at).await?;
        if strict && a.status != b.status {
            return Ok(Verdict::StatusDiffers(at));
        }
        let mut len = a.len.min(b.len);
        let stored = [a.has(Status::ALLOCATED), b.has(Status::ALLOCATED)];
        if a.has(Status::ZERO) && b.has(Status::ZERO) || stored == [false; 2] {
            // Nothing to look at.
        } else if stored == [true; 2] {
            len = len.min(CHUNK);
            for (disk, buffer) in buffers.iter_mut().enumerate() {
                read(disks, disk, at, &buffer.io_vec().slice(0, len)).await?;
            }
            let parts = [&buffers[0][..len as usize], &buffers[1][..len as usize]];
            if let Some(differs) = first_difference(parts) {
                return Ok(Verdict::ContentsDiffer(at + differs));
            }
        } else {
            len = len.min(CHUNK);
            let disk = usize::from(stored[1]);
            let zeroes = all_zeroes(disks, disk, at, &mut buffers[0], len).await?;
            if let Some(differs) = zeroes {
                return Ok(Verdict::ContentsDiffer(differs));
            }
        }
        at += len;
        progress.step(len, long);
    }
    if short != long {
        mismatch();
    }
    let disk = usize::from(disks[1].len() > disks[0].len());
    while at < long {
        let run = next_run(disks, disk, at, long - at).await?;
        let mut len = run.len;
        if run.has(Status::ALLOCATED) && !run.has(Status::ZERO) {
            len = len.min(CHUNK);
            let zeroes = all_zeroes(disks, disk, at, &mut buffers[0], len).await?;
            if let Some(differs) = zeroes {
                return Ok(Verdict::ContentsDiffer(differs));
            }
        }
        at += len;
        progress.step(len, long);
    }
    Ok(Verdict::Identical)
}

async fn next_run(disks: [&Disk; 2], disk: usize, at: u64, len: u64) -> Result<Run, Trouble> {
    let run = extents::query(disks[disk].node(), at, len, Precision::Zeroes, None).await;
    run.map_err(|errno| Trouble::Status(disk, at, errno))
}

async fn read(disks: [&Disk; 2], disk: usize, at: u64, into: &IoVec<'_>) -> Result<(), Trouble> {
    let result = disks[disk].read(at, into).await;
    result.map_err(|errno| Trouble::Read(disk, at, errno))
}

/// Where the range of `len` bytes is not all zero: the sector's offset on the disk.
async fn all_zeroes(
    disks: [&Disk; 2],
    disk: usize,
    at: u64,
    buffer: &mut AlignedBuf,
    len: u64,
) -> Result<Option<u64>, Trouble> {
    read(disks, disk, at, &buffer.io_vec().slice(0, len)).await?;
    let bad = buffer[..len as usize].chunks(SECTOR as usize).position(|sector| !is_zero(sector));
    Ok(bad.map(|sector| at + sector as u64 * SECTOR))
}

/// Where the first sector that differs begins.
fn first_difference(parts: [&[u8]; 2]) -> Option<u64> {
    if parts[0] == parts[1] {
        return None;
    }
    let pairs = parts[0].chunks(SECTOR as usize).zip(parts[1].chunks(SECTOR as usize));
    let at = pairs.into_iter().position(|(a, b)| a != b)?;
    Some(at as u64 * SECTOR)
}
