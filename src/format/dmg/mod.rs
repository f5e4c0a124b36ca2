//! Disk images of macOS (UDIF, `.dmg`), which are only read.
//!
//! | file | it holds |
//! |---|---|
//! | `trailer` | the trailer at the end of the file |
//! | `resources` | tables of chunks among the resources |
//! | `table` | the chunks, checked and in order |
//! | `unpack`, `adc` | how chunks are unpacked |

mod adc;
mod resources;
mod table;
mod trailer;
mod unpack;

use super::chunks::Chunks;
use super::read_only::{self, Content, ReadOnly, open_file};
use crate::block::registry::{DriverEntry, Kind as DriverKind};
use crate::block::*;
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::Map;
use resources::{tables_of_fork, tables_of_list};
use std::sync::atomic::{AtomicBool, Ordering};
use table::{Chunk, Kind, chunks_of};
use trailer::{Resources, Trailer, read_trailer};
use unpack::{Packing, unpack};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: read_only::HELP,
    growth: Growth::Own(&[]),
    // The mark is at the end of the file; what is looked at is the name. The score is QEMU's.
    probe: Some(Probe::Bytes(|_, filename| if filename.ends_with(".dmg") { 2 } else { 0 })),
    ..DriverEntry::new("dmg", DriverKind::Format, |opening, map| Box::pin(open(opening, map)))
};

/// An open image.
struct Dmg {
    /// The node's, for what is logged.
    name: String,
    children: [Child; 1],
    /// Of the disk, in bytes.
    size: u64,
    /// In the order of the disk.
    chunks: Vec<Chunk>,
    unpacked: Chunks,
    /// Something that cannot be read was reported.
    has_reported: AtomicBool,
}

/// Finds the tables of chunks among the resources.
type FindTables = fn(&[u8]) -> Result<Vec<Vec<u8>>, Error>;

async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let file = open_file(opening, map).await?;
    let node = file.node();
    let Trailer { data_fork, resources, size } = read_trailer(&node).await?;
    let (range, find) = match resources {
        Resources::Fork(range) => (range, tables_of_fork as FindTables),
        Resources::List(range) => (range, tables_of_list as FindTables),
    };
    let len = (range.end - range.start) as usize;
    let failed = |errno| Error::os("Could not read the resources", errno);
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(failed(Errno::ENOMEM))?;
    read_padded(&node, range.start, &bytes.io_vec()).await.map_err(failed)?;
    // Many of them take longer than a worker may be kept.
    let work = move || chunks_of(&find(&bytes[..len])?, data_fork);
    let chunks = opening.blocking().compute(work).await?;
    Ok(Box::new(ReadOnly(Dmg {
        name: opening.name().to_owned(),
        children: [file],
        size,
        chunks,
        unpacked: Chunks::new(opening.blocking()),
        has_reported: AtomicBool::new(false),
    })))
}

impl Content for Dmg {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn children(&self) -> &[Child; 1] {
        &self.children
    }

    fn len(&self) -> u64 {
        self.size
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let mut done = 0;
        while done < into.len() {
            let index = self.chunk_at(at + done)?;
            let chunk = &self.chunks[index];
            let inside = at + done - chunk.start;
            let len = (into.len() - done).min(chunk.len - inside);
            let part = into.slice(done, len);
            match chunk.kind {
                Kind::Zero => part.zero(),
                Kind::Raw => self.read_raw(chunk, inside, &part).await?,
                Kind::Packed(packing) => self.read_packed(index, packing, inside, &part).await?,
                Kind::Unknown(kind) => {
                    self.report(format_args!("there are chunks of the unknown type {kind:#x}"));
                    return Err(Errno::EIO);
                }
            }
            done += len;
        }
        Ok(())
    }
}

impl Dmg {
    /// The index of the chunk that has a byte of the disk.
    fn chunk_at(&self, at: u64) -> IoResult<usize> {
        let behind = self.chunks.partition_point(|chunk| chunk.start <= at);
        match behind.checked_sub(1) {
            Some(index) if at - self.chunks[index].start < self.chunks[index].len => Ok(index),
            _ => {
                self.report(format_args!("no chunk has the data at {at:#x}"));
                Err(Errno::EIO)
            }
        }
    }

    /// What is stored as it is; a chunk of which less is stored ends with zeroes.
    async fn read_raw(&self, chunk: &Chunk, inside: u64, into: &IoVec<'_>) -> IoResult {
        let file = self.children[0].node();
        let there = chunk.stored.saturating_sub(inside).min(into.len());
        into.slice(there, into.len() - there).zero();
        if there == 0 {
            return Ok(());
        }
        if chunk.offset + inside >= file.len() {
            self.report(format_args!("the file ends before the chunk at {:#x}", chunk.offset));
            return Err(Errno::EIO);
        }
        read_padded(&file, chunk.offset + inside, &into.slice(0, there)).await
    }

    async fn read_packed(
        &self,
        index: usize,
        packing: Packing,
        inside: u64,
        into: &IoVec<'_>,
    ) -> IoResult {
        let Chunk { start, len, offset, stored, .. } = self.chunks[index];
        let file = self.children[0].node();
        let work = move |stored: &[u8], chunk: &mut [u8]| unpack(packing, stored, chunk);
        let (stored, scratch) = (offset..offset + stored, packing.scratch());
        let got = self.unpacked.get(index as u64, &file, stored, (len as usize, scratch), work);
        let unpacked = got.await.inspect_err(|_| {
            self.report(format_args!("the chunk of {start:#x} ({packing:?}) cannot be unpacked"));
        })?;
        into.copy_from(&unpacked[inside as usize..]);
        Ok(())
    }

    /// Logs the first thing that cannot be read: a guest must not fill the log.
    fn report(&self, what: std::fmt::Arguments<'_>) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            log::info!("{}: dmg: {what}", self.name);
        }
    }
}
