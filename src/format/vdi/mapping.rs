//! How an image maps a guest's blocks: one flat map, an entry of 32 bits for each.

use super::Vdi;
use super::header::{BLOCK_BITS, Header};
use crate::block::{Access, Child, Precision, Status};
use crate::cow::{
    Format, Found, Piece, Shape, TableCache, TableEntry, Tables, data, stored_status,
};
use crate::io::{Errno, IoResult};
use std::convert::Infallible;

/// Entries that are read at once: 4 KiB.
const SLICE: u32 = 1024;
/// Entries from here on name no block: it was discarded, or never written. Both read as zeroes.
pub const DISCARDED: u32 = 0xffff_fffe;
/// No block was ever written.
pub const UNALLOCATED: u32 = u32::MAX;

/// The number of a block in the file, or that there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u32);

impl Entry {
    /// An entry out of its four bytes.
    pub fn parse(bytes: &[u8]) -> Entry {
        Entry(bytes.first_chunk().map_or(UNALLOCATED, |entry| u32::from_le_bytes(*entry)))
    }

    /// Puts the entry into its four bytes.
    pub fn store(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.to_le_bytes());
    }

    /// The block of the file.
    pub fn block(self) -> Option<u32> {
        (self.0 < DISCARDED).then_some(self.0)
    }
}

impl TableEntry for Entry {
    fn from_words(first: u64, _: u64) -> Entry {
        Entry(first as u32)
    }

    fn words(self) -> [u64; 2] {
        [self.0.into(), 0]
    }
}

/// The mapping of an image that was just opened. All of the map fits into memory: 4 bytes for 1 MiB of the disk, up
/// to 2 GiB; it is kept as it is used, up to 32 MiB.
///
/// # Errors
/// There is not so much memory.
pub(super) fn tables(header: &Header) -> IoResult<Tables<Entry>> {
    // A word in memory for each entry.
    let all = u64::from(header.blocks) * 8;
    let cache = TableCache::new(all.min(32 << 20), SLICE as usize, 1)?;
    // The flat map counts as tables of one slice each.
    let shape = Shape { cluster_bits: BLOCK_BITS, table_bits: SLICE.ilog2(), entry_bytes: 4 };
    Ok(Tables::new(shape, cache))
}

impl Format for Vdi {
    type Entry = Entry;
    /// Every number is a place, or that there is none.
    type Bad = Infallible;

    fn tables(&self) -> &Tables<Entry> {
        &self.mapping
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    fn has_table(&self, _: u64) -> bool {
        true
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let first = self.mapping.shape.table_index(guest) * u64::from(SLICE);
        Ok(u64::from(self.header.map_offset) + first * self.mapping.shape.entry_bytes)
    }

    fn slice_len(&self, guest: u64) -> usize {
        let first = self.mapping.shape.table_index(guest) * u64::from(SLICE);
        u64::from(self.header.blocks).saturating_sub(first).min(SLICE.into()) as usize
    }

    fn parse(bytes: &[u8]) -> Entry {
        Entry::parse(bytes)
    }

    fn decode(&self, entry: Entry, at: u64, want: u64) -> Result<Piece, Infallible> {
        let inside = self.mapping.shape.offset_in_cluster(at);
        let found = match entry.block() {
            // No block is shared.
            Some(block) => {
                Found::Data { host: self.header.offset_of(block.into()) + inside, exclusive: true }
            }
            None => Found::Zero { host: None },
        };
        Ok(Piece { len: want, found })
    }

    fn bad_entry(&self, _: u64, _: Entry, bad: Infallible, _: Access) -> Errno {
        match bad {}
    }

    fn table_outside(&self, _: u64) -> Errno {
        Errno::EIO
    }

    /// The blocks of a static image are there before they are written, and may be holes.
    async fn data_status(
        &self,
        host: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<(u64, Status)> {
        match self.header.is_static && precision != Precision::Allocation {
            true => stored_status(&data(self), host, len, precision).await,
            false => Ok((len, Status::DATA | Status::ALLOCATED)),
        }
    }
}
