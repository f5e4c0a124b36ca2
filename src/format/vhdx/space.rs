//! Blocks for what is new: they come from the end of the file.
//!
//! Blocks lie at whole MiB, wherever the file ended when it was opened, so they are counted from there on. What a crash
//! has left behind the last block that an entry names is lost space, and nothing else.

use super::Vhdx;
use super::bytes::MIB;
use super::metadata::Geometry;
use crate::cow::{
    Allocator, Appending, FileEnd, FileExtent, Run, Taken, cut, file, lengthen, take_at_end,
};
use crate::io::IoResult;
use std::sync::atomic::Ordering;

/// Where the first new block begins in a file of so many bytes.
pub(super) fn start(file_len: u64) -> u64 {
    file_len.next_multiple_of(MIB)
}

/// The space behind that, which nothing has been written to.
pub(super) fn extent(geometry: &Geometry) -> FileExtent {
    FileExtent { used: 0, fresh_from: 0, limit: (1 << 62) >> geometry.block_bits }
}

impl Appending for Vhdx {
    fn file_end(&self) -> &FileEnd {
        &self.space
    }

    fn place_of(&self, block: u64) -> u64 {
        self.space_start.load(Ordering::Acquire) + (block << self.geometry().block_bits)
    }

    /// Entries of the log tell how long the file has to be.
    async fn extend(&self, end: u64) -> IoResult {
        let len = self.place_of(end);
        lengthen(&file(self), len).await?;
        self.file_len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }
}

impl Allocator for Vhdx {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Vhdx>> {
        take_at_end(self, 1, most).await
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }
}

impl Vhdx {
    /// Cuts off what was not used at the file's end.
    pub(super) async fn cut_file(&self) {
        if self.space.end() == 0 {
            return;
        }
        let len = self.place_of(self.space.cut());
        self.file_len.store(len, Ordering::Release);
        cut(&file(self), len).await;
    }
}
