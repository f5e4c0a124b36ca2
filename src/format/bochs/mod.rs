//! Bochs redologs of versions 1 and 2 (growing), which are only read.
//!
//! A catalog names extents, each behind a bitmap of the sectors it stores. Other sectors read as zeroes.

mod header;

use super::chunks::{Chunk, Chunks};
use super::read_only::{self, Content, ReadOnly, open_file};
use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::Map;
use header::Header;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: read_only::HELP,
    growth: Growth::Own(&[]),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("bochs", Kind::Format, |opening, map| Box::pin(open(opening, map)))
};

/// The catalog's entry of an extent that the file has not.
const ABSENT: u32 = u32::MAX;

/// An open image.
struct Bochs {
    header: Header,
    children: [Child; 1],
    /// Where the extents are, counted in extents.
    catalog: Vec<u32>,
    /// The bitmaps of extents that were read last.
    bitmaps: Chunks,
}

async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let file = open_file(opening, map).await?;
    let node = file.node();
    let mut head = [0; header::LEN];
    let read = read_padded(&node, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read Bochs header", errno))?;
    let header = Header::parse(&head)?;
    if header.catalog_end() > node.len() {
        return Err(Error::new(format!(
            "The catalog ends at {:#x}, past the end of the file ({:#x})",
            header.catalog_end(),
            node.len()
        )));
    }
    let catalog = read_catalog(&node, &header).await;
    let catalog = catalog.map_err(|errno| Error::os("Could not read the catalog", errno))?;
    let bitmaps = Chunks::new(opening.blocking());
    Ok(Box::new(ReadOnly(Bochs { header, children: [file], catalog, bitmaps })))
}

async fn read_catalog(file: &Node, header: &Header) -> IoResult<Vec<u32>> {
    let len = header.catalog_len as usize * 4;
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, header.catalog_offset.into(), &bytes.io_vec()).await?;
    let entries = bytes[..len].chunks_exact(4).filter_map(|entry| entry.first_chunk());
    Ok(entries.map(|entry| u32::from_le_bytes(*entry)).collect())
}

impl Content for Bochs {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn children(&self) -> &[Child; 1] {
        &self.children
    }

    fn len(&self) -> u64 {
        self.header.size
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let extent_size = u64::from(self.header.extent_size);
        let mut done = 0;
        while done < into.len() {
            let (extent, inside) = ((at + done) / extent_size, (at + done) % extent_size);
            let len = (into.len() - done).min(extent_size - inside);
            let part = into.slice(done, len);
            match self.catalog.get(extent as usize) {
                Some(&place) if place != ABSENT => self.read_extent(place, inside, &part).await?,
                _ => part.zero(),
            }
            done += len;
        }
        Ok(())
    }
}

impl Bochs {
    /// Reads bytes of one extent from `inside` on.
    async fn read_extent(&self, place: u32, inside: u64, into: &IoVec<'_>) -> IoResult {
        let file = self.children[0].node();
        let bitmap = self.bitmap(&file, place).await?;
        let data = self.header.bitmap_of(place) + self.header.bitmap_size;
        let has = |at: u64| {
            let sector = at / SECTOR;
            bitmap[(sector / 8) as usize] >> (sector % 8) & 1 == 1
        };
        let mut done = 0;
        while done < into.len() {
            let start = inside + done;
            let mut end = start;
            while end < inside + into.len() && has(end) == has(start) {
                end = (end / SECTOR + 1) * SECTOR;
            }
            let len = (end - start).min(into.len() - done);
            let part = into.slice(done, len);
            match has(start) {
                true => read_padded(&file, data + start, &part).await?,
                false => part.zero(),
            }
            done += len;
        }
        Ok(())
    }

    async fn bitmap(&self, file: &Node, place: u32) -> IoResult<Chunk> {
        let (start, len) = (self.header.bitmap_of(place), self.header.bitmap_used());
        let copy = |stored: &[u8], bitmap: &mut [u8]| {
            bitmap.copy_from_slice(stored);
            Ok(())
        };
        self.bitmaps.get(place.into(), file, start..start + len, (len as usize, 0), copy).await
    }
}
