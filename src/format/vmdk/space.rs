//! Grains for what is new: the file's end ([`crate::cow::Appending`]).
//!
//! Nothing counts grains: those that no table names are lost. Closing the image cuts off what was not used. Compressed
//! grains take as many sectors as they need, and space is counted in these.

use super::esx::NEXT_FREE_AT;
use super::layout::{Kind, Layout, Packing};
use super::sparse::Sparse;
use crate::block::{SECTOR, WriteFlags};
use crate::cow::{
    Allocator, Appending, FileEnd, FileExtent, Run, Taken, cut, file, lengthen, take_at_end,
};
use crate::io::{IoResult, IoVec};
use std::sync::atomic::Ordering;

/// The logarithm of what space is counted in, in bytes.
fn unit_bits(layout: &Layout) -> u32 {
    match layout.packing {
        Packing::No => layout.grain_bits,
        Packing::Marked | Packing::Bare => SECTOR.ilog2(),
    }
}

/// The space of a file of so many bytes.
pub fn space(layout: &Layout, file_len: u64) -> FileEnd {
    FileEnd::new(extent(layout, file_len), 1 << unit_bits(layout))
}

/// What a file of so many bytes has.
fn extent(layout: &Layout, file_len: u64) -> FileExtent {
    let bits = unit_bits(layout);
    // The last grain may be there in part.
    let used = file_len.div_ceil(1 << bits);
    // Entries name sectors in 32 bits.
    let limit = ((u64::from(u32::MAX) + 1) * SECTOR) >> bits;
    FileExtent { used, fresh_from: used, limit }
}

/// What a file has of which nothing is used behind so many bytes; `is_cut`: it ends there.
pub fn after_emptying(layout: &Layout, used: u64, is_cut: bool) -> FileExtent {
    let extent = extent(layout, used);
    FileExtent { fresh_from: if is_cut { extent.used } else { u64::MAX }, ..extent }
}

impl Sparse {
    /// The length of a file that has so many bytes, and ends where space may begin.
    pub fn rounded(&self, len: u64) -> u64 {
        len.next_multiple_of(self.space_unit())
    }

    /// What space is counted in, in bytes.
    pub fn space_unit(&self) -> u64 {
        1 << unit_bits(&self.layout)
    }

    /// Nothing that was known of the file holds any more, which has so many bytes now.
    pub fn renew_space(&self, file_len: u64) {
        self.space.replace(extent(&self.layout, file_len));
        self.end_at_opening.store(self.space.end(), Ordering::Release);
    }

    /// Where the file ends, as far as its grains may be written in place, in bytes. No lock.
    pub fn file_len(&self) -> u64 {
        self.space.end() << unit_bits(&self.layout)
    }

    /// Cuts off what was not used at the file's end.
    pub async fn cut_file(&self) -> IoResult {
        let end = self.space.cut();
        cut(&file(self), self.place_of(end)).await;
        self.note_end(end).await
    }

    /// Tells other programs where the file is free, in extents that say so.
    pub async fn note_end(&self, end: u64) -> IoResult {
        if self.layout.kind != Kind::Cowd {
            return Ok(());
        }
        let sector = u32::try_from(self.place_of(end) / SECTOR).unwrap_or(u32::MAX);
        let bytes = sector.to_le_bytes();
        file(self).write(NEXT_FREE_AT, &IoVec::from_ref(&bytes), WriteFlags::empty()).await
    }
}

impl Allocator for Sparse {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Sparse>> {
        take_at_end(self, 1, most).await
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }
}

impl Appending for Sparse {
    fn file_end(&self) -> &FileEnd {
        &self.space
    }

    fn place_of(&self, unit: u64) -> u64 {
        unit << unit_bits(&self.layout)
    }

    /// The new length is durable before an entry can name what is behind the old one: after a crash new grains come
    /// from behind all that any entry names.
    async fn extend(&self, end: u64) -> IoResult {
        let file = file(self);
        lengthen(&file, self.place_of(end)).await?;
        self.note_end(end).await?;
        file.flush().await
    }
}
