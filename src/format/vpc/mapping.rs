//! The mapping of blocks in a dynamic image: the block allocation table.
//!
//! It is a flat table with an entry of 32 bits for each block, which gives the sector of its bitmap. The block
//! follows the bitmap.

use super::Vpc;
use super::header::{ENTRY_BYTES, Header};
use crate::block::{Access, Child, SECTOR};
use crate::cow::{Format, Found, Piece, Shape, TableCache, TableEntry, Tables};
use crate::io::{Errno, IoResult};
use std::sync::atomic::Ordering;

/// Bytes of entries that are kept in memory at most, of 8 bytes for each block.
const CACHE: u64 = 32 << 20;
/// Entries that are read at once: 4 KiB.
const SLICE: u64 = 1024;
/// The entry of a block that is not there.
const UNUSED: u32 = u32::MAX;
/// In memory only: the bitmap says that all sectors of the block are there.
const IS_WHOLE: u64 = 1 << 32;

/// The entry of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// An entry out of its four bytes.
    pub fn parse(bytes: &[u8]) -> Entry {
        Entry(bytes.first_chunk().map_or(UNUSED, |entry| u32::from_be_bytes(*entry)).into())
    }

    /// The bitmap of a block that is there in whole lies at this offset.
    pub fn whole_at(bitmap: u64) -> Entry {
        Entry((bitmap / SECTOR) | IS_WHOLE)
    }

    /// The same entry, when the bitmap is known to say that all sectors are there.
    pub fn whole(self) -> Entry {
        Entry(self.0 | IS_WHOLE)
    }

    pub fn is_whole(self) -> bool {
        self.0 & IS_WHOLE != 0
    }

    /// Where the bitmap is in the file, in bytes; none if the block is not there.
    pub fn bitmap(self) -> Option<u64> {
        let sector = self.0 as u32;
        (sector != UNUSED).then_some(u64::from(sector) * SECTOR)
    }

    /// The entry as it is stored.
    pub fn bytes(self) -> [u8; 4] {
        (self.0 as u32).to_be_bytes()
    }
}

impl TableEntry for Entry {
    fn from_words(first: u64, _: u64) -> Entry {
        Entry(first)
    }

    fn words(self) -> [u64; 2] {
        [self.0, 0]
    }
}

/// The entry leads past the end of the file, or to metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPlace;

/// The mapping of an image that was just opened.
///
/// # Errors
/// There is not so much memory.
pub fn tables(header: &Header, disk_size: u64) -> IoResult<Tables<Entry>> {
    // The flat table counts as tables of one slice each.
    let shape = Shape {
        cluster_bits: header.block_bits,
        table_bits: SLICE.ilog2(),
        entry_bytes: ENTRY_BYTES,
    };
    let all = disk_size.div_ceil(header.block_size()) * 8;
    Ok(Tables::new(shape, TableCache::new(all.min(CACHE), SLICE as usize, 1)?))
}

impl Format for Vpc {
    type Entry = Entry;
    type Bad = BadPlace;

    fn tables(&self) -> &Tables<Entry> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    fn backing_child(&self) -> Option<&Child> {
        self.children.get(1)
    }

    fn has_table(&self, _: u64) -> bool {
        true
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        Ok(self.header.table_at + self.mapping.shape.table_index(guest) * SLICE * ENTRY_BYTES)
    }

    fn slice_len(&self, guest: u64) -> usize {
        let first = self.mapping.shape.table_index(guest) * SLICE;
        u64::from(self.header.entries).saturating_sub(first).min(SLICE) as usize
    }

    fn parse(bytes: &[u8]) -> Entry {
        Entry::parse(bytes)
    }

    fn decode(&self, entry: Entry, at: u64, want: u64) -> Result<Piece, BadPlace> {
        let found = match self.place(entry)? {
            None if self.is_differencing() => Found::Unallocated { host: None },
            None => Found::Zero { host: None },
            Some(block) => {
                let host = block + self.mapping.shape.offset_in_cluster(at);
                match entry.is_whole() || !self.is_differencing() {
                    // No block is shared. Sectors become data in the bitmap before they are written.
                    true => Found::Data { host, exclusive: entry.is_whole() },
                    false => Found::Mixed { host },
                }
            }
        };
        Ok(Piece { len: want, found })
    }

    async fn sort_out(&self, at: u64, want: u64, host: u64) -> IoResult<Piece> {
        self.sort_out_by_bitmap(at, want, host).await
    }

    fn bad_entry(&self, at: u64, entry: Entry, _: BadPlace, _: Access) -> Errno {
        self.report(format_args!(
            "the block of guest offset {at:#x} is said to be at {:#x} of a file of {:#x} bytes",
            entry.bitmap().unwrap_or_default(),
            self.file_len()
        ));
        Errno::EIO
    }

    fn table_outside(&self, offset: u64) -> Errno {
        self.report(format_args!(
            "the block allocation table at {offset:#x} is past the end of the file"
        ));
        Errno::EIO
    }
}

impl Vpc {
    /// Where the block of an entry is, behind its bitmap, if it is there and that can be.
    pub(super) fn place(&self, entry: Entry) -> Result<Option<u64>, BadPlace> {
        let Some(bitmap) = entry.bitmap() else { return Ok(None) };
        let end = bitmap + self.header.unit_len();
        let is_clear = bitmap >= self.clear_from
            || self.taken.iter().all(|taken| end <= taken.start || taken.end <= bitmap);
        match is_clear && end <= self.file_len() {
            true => Ok(Some(bitmap + self.header.bitmap_len())),
            false => Err(BadPlace),
        }
    }

    /// Where the file ends, as far as entries may lead, in bytes. No lock.
    pub(super) fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    /// Logs the first thing in the tables that makes no sense: a guest must not fill the log.
    pub(super) fn report(&self, what: std::fmt::Arguments<'_>) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            log::info!("{}: vpc: {what}; check the image", self.name);
        }
    }
}
