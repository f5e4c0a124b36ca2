//! Standing an image on another backing file: what would be read differently is copied into the image
//! first, and is durable before the header names the new file.

use super::{Opened, Progress};
use crate::block::extents;
use crate::block::{Node, Precision, SECTOR, Status, WriteFlags, ZeroFlags};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
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
/// nothing at all.
pub async fn make_own(
    image: &Opened,
    new: Option<&Opened>,
    progress: &Progress,
) -> Result<(), Trouble> {
    let old = extents::backing(image.node());
    let new = new.map(|new| new.node());
    let memory = || AlignedBuf::new(CHUNK as usize, 4096).ok_or(Trouble::Memory);
    let (mut before, mut after) = (memory()?, memory()?);
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
            let told = at + step;
            while at < told {
                let n = differing(old.as_ref(), new, at, told - at).await;
                let (n, may_differ) = n.map_err(Trouble::Status)?;
                if may_differ {
                    let (before, after) = (&mut before[..n as usize], &mut after[..n as usize]);
                    read(old.as_ref(), at, before).await.map_err(Trouble::ReadOld)?;
                    read(new, at, after).await.map_err(Trouble::ReadNew)?;
                    let old_len = old.as_ref().map_or(0, |old| old.len());
                    let written = write_differing(image, at, before, after, old_len).await;
                    written.map_err(Trouble::Write)?;
                }
                at += n;
            }
            progress.step(1, len / len.min(CHUNK));
        }
    }
    match image.node().flush().await {
        Ok(()) => Ok(()),
        Err(errno) => Err(Trouble::Write(errno)),
    }
}

/// For how many bytes of those that the image has not the mappings tell the same, and whether contents
/// have to be compared.
async fn differing(
    old: Option<&Arc<Node>>,
    new: Option<&Arc<Node>>,
    at: u64,
    left: u64,
) -> IoResult<(u64, bool)> {
    let mut len = left;
    let mut are_zero = true;
    for node in [old, new] {
        let (there, zero) = reads_zero(node, at, len).await?;
        len = there;
        are_zero &= zero;
    }
    Ok(if are_zero { (len, false) } else { (len.min(CHUNK), true) })
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

/// Writes the runs of sectors that differ; where the old backing file has ended, after `old_len` bytes, they
/// are zeroed.
async fn write_differing(
    image: &Opened,
    at: u64,
    before: &[u8],
    after: &[u8],
    old_len: u64,
) -> IoResult {
    let sector = SECTOR as usize;
    let differ: Vec<bool> =
        before.chunks(sector).zip(after.chunks(sector)).map(|(a, b)| a != b).collect();
    let mut done = 0;
    for run in differ.chunk_by(|a, b| a == b) {
        let end = (done + run.len() * sector).min(before.len());
        let kept = &before[done..end];
        let place = at + done as u64;
        match run[0] {
            true if place >= old_len => {
                image.zero(place, kept.len() as u64, ZeroFlags::empty()).await?;
            }
            true => image.write(place, &IoVec::from_ref(kept), WriteFlags::empty()).await?,
            false => {}
        }
        done = end;
    }
    Ok(())
}
