//! Blocks for what is new: they come from the end of the file, where the footer moves on before them.
//!
//! Other programs put a block where the one before it ends. Ours begin at whole 4 KiB, so that requests to the file are
//! aligned. Bitmaps are written when the space is made, because every new block is written whole.

use super::Vpc;
use super::footer::{self, Found};
use super::header::{ENTRY_BYTES, Header};
use super::mapping::Entry;
use crate::block::{Error, Node, SECTOR, WriteFlags};
use crate::cow::{
    Allocator, Appending, FileEnd, FileExtent, Run, Taken, cut, file, lengthen, read_padded,
    take_at_end,
};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::sync::atomic::Ordering;

/// What blocks of new space are aligned to, unless they are smaller.
const ALIGN: u64 = 4096;
/// Bytes of the table that are read at once.
const PIECE: u64 = 1 << 20;

/// Bytes from one new block to the next.
pub(super) fn stride(header: &Header) -> u64 {
    header.unit_len().next_multiple_of(ALIGN.min(header.block_size()))
}

/// Where the bitmap of the first new block goes, behind everything that ends at `end`.
pub(super) fn start(header: &Header, end: u64) -> u64 {
    let align = ALIGN.min(header.block_size());
    (end + header.bitmap_len()).next_multiple_of(align) - header.bitmap_len()
}

/// The space behind that in a file of so many bytes, of which the last may have been used. A disk needs no more blocks than
/// it has, and a few for those that were lost to failed writes.
pub(super) fn extent(header: &Header, disk_size: u64, start: u64, file_len: u64) -> FileExtent {
    let blocks = disk_size.div_ceil(header.block_size());
    let used_data = file_len.saturating_sub(start + header.bitmap_len());
    let room = (u64::from(u32::MAX) * SECTOR).saturating_sub(start);
    FileExtent {
        used: 0,
        fresh_from: used_data.div_ceil(stride(header)),
        limit: (room / stride(header)).min(blocks + blocks / 8),
    }
}

/// Where everything ends that is in use: metadata, and all blocks of the table.
///
/// # Errors
/// A block ends past the end of the file, or I/O failed.
pub(super) async fn end_of_blocks(
    file: &Node,
    header: &Header,
    clear_from: u64,
) -> Result<u64, Error> {
    let mut end = clear_from;
    let see = |_, entry: Entry| {
        if let Some(bitmap) = entry.bitmap() {
            end = end.max(bitmap + header.unit_len());
        }
        Ok(())
    };
    let read = for_each_entry(file, header, see).await;
    read.map_err(|errno| Error::os("Error reading pagetable", errno))?;
    match end > file.driver().len() {
        true => Err(Error::new(
            "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.",
        )),
        false => Ok(end),
    }
}

/// Brings the end of a file to order that was not closed: the footer lies behind the last block, and the file ends there.
///
/// # Errors
/// I/O failed.
pub(super) async fn settle(
    name: &str,
    file: &Node,
    header: &Header,
    found: &mut Found,
    start: u64,
) -> Result<(), Error> {
    let has_leaks = file.driver().len() >= start + stride(header) + footer::LEN as u64;
    if found.tail_is_whole && !has_leaks {
        return Ok(());
    }
    log::info!("{name}: vpc: the image was not closed cleanly: its end is put in order");
    let end = end_with(file, &found.footer.bytes, start).await;
    end.map_err(|errno| Error::os("Could not write the VHD footer", errno))?;
    found.tail_is_whole = true;
    Ok(())
}

/// Puts the footer at an offset, durably, and cuts the file off behind it.
async fn end_with(file: &Node, footer: &[u8; footer::LEN], at: u64) -> IoResult {
    let len = at + footer.len() as u64;
    if file.driver().len() < len {
        lengthen(file, len).await?;
    }
    file.write(at, &IoVec::from_ref(footer), WriteFlags::empty()).await?;
    file.flush().await?;
    cut(file, len).await;
    Ok(())
}

/// Shows all entries of the table, each with its index.
///
/// # Errors
/// I/O failed, or those of `see`.
pub(super) async fn for_each_entry(
    file: &Node,
    header: &Header,
    mut see: impl FnMut(u64, Entry) -> IoResult,
) -> IoResult {
    let len = header.table_len();
    for at in (0..len).step_by(PIECE as usize) {
        let part = (len - at).min(PIECE) as usize;
        let mut bytes = AlignedBuf::new(part, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(file, header.table_at + at, &bytes.io_vec()).await?;
        for (n, entry) in bytes[..part].chunks_exact(ENTRY_BYTES as usize).enumerate() {
            see(at / ENTRY_BYTES + n as u64, Entry::parse(entry))?;
        }
    }
    Ok(())
}

impl Appending for Vpc {
    fn file_end(&self) -> &FileEnd {
        &self.space
    }

    /// That of its bitmap.
    fn place_of(&self, block: u64) -> u64 {
        self.space_start.load(Ordering::Acquire) + block * stride(&self.header)
    }

    /// Everything is durable before an entry can lead there, the length of the file among it.
    async fn extend(&self, end: u64) -> IoResult {
        let footer_at = self.place_of(end);
        let file = file(self);
        let len = footer_at + self.footer.bytes.len() as u64;
        if file.driver().len() < len {
            lengthen(&file, len).await?;
        }
        self.write_footer(footer_at).await?;
        for block in self.space.end()..end {
            self.fill_bitmap(self.place_of(block)).await?;
        }
        file.flush().await?;
        self.file_len.fetch_max(footer_at, Ordering::AcqRel);
        Ok(())
    }
}

impl Allocator for Vpc {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Vpc>> {
        // Blocks do not touch: a bitmap lies between two.
        let taken = take_at_end(self, 1, most.min(1)).await?;
        let (run, host) = (taken.run, taken.host() + self.header.bitmap_len());
        taken.keep();
        Ok(Taken::new(self, run, host))
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }
}

impl Vpc {
    pub(super) async fn write_footer(&self, at: u64) -> IoResult {
        file(self).write(at, &IoVec::from_ref(&self.footer.bytes), WriteFlags::empty()).await
    }

    /// Puts the footer behind the last block that is used, and cuts the file off behind it.
    pub(super) async fn cut_file(&self) -> IoResult {
        let is_damaged = !self.tail_is_whole.load(Ordering::Acquire);
        if self.space.end() == 0 && !is_damaged {
            return Ok(());
        }
        let end = self.place_of(self.space.cut());
        end_with(&file(self), &self.footer.bytes, end).await?;
        self.file_len.store(end, Ordering::Release);
        self.tail_is_whole.store(true, Ordering::Release);
        Ok(())
    }
}
