//! Allocation of blocks at the end of the file ([`crate::cow::Appending`]).
//!
//! Blocks are counted from the first one of the file, and the header says how many there are. It says so before an entry
//! names one, because other programs take the number in the header for that of the next new block.

use super::Vdi;
use super::blocks::{Blocks, write_allocated};
use super::header::{BLOCK_SIZE, Header};
use crate::cow::{
    Allocator, Appending, FileEnd, FileExtent, Run, Taken, file, lengthen, take_at_end,
};
use crate::io::IoResult;

/// The space of an image with these blocks, in a file of this many bytes.
pub(super) fn space(header: &Header, blocks: &Blocks, file_len: u64) -> FileEnd {
    let space = FileEnd::new(extent(header, blocks.end, file_len), BLOCK_SIZE);
    // Where the image could not be brought to rest when it was opened. New blocks may go there.
    for first in blocks.gaps(blocks.end) {
        space.put_back(Run { first: first.into(), count: 1, is_fresh: false });
    }
    space
}

/// What an image has whose blocks before `end` may be named.
pub(super) fn extent(header: &Header, end: u32, file_len: u64) -> FileExtent {
    let behind = file_len.saturating_sub(header.offset_of(0));
    FileExtent {
        used: end.into(),
        fresh_from: behind.div_ceil(BLOCK_SIZE),
        limit: header.blocks.into(),
    }
}

impl Vdi {
    /// Makes the header count all blocks before `end`, durably, and the file have them.
    pub(super) async fn reserve(&self, end: u64) -> IoResult {
        let file = file(self);
        let len = self.header.offset_of(end);
        let mut head = self.head.lock().await;
        if file.driver().len() < len {
            lengthen(&file, len).await?;
        }
        let (header, bytes) = &mut *head;
        match u64::from(header.allocated) < end {
            true => write_allocated(&file, (header, bytes), end as u32).await,
            false => Ok(()),
        }
    }
}

impl Allocator for Vdi {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Vdi>> {
        take_at_end(self, 1, most).await
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }
}

impl Appending for Vdi {
    fn file_end(&self) -> &FileEnd {
        &self.space
    }

    fn place_of(&self, block: u64) -> u64 {
        self.header.offset_of(block)
    }

    async fn extend(&self, end: u64) -> IoResult {
        self.reserve(end).await
    }
}
