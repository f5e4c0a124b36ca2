//! Allocation of clusters at the end of the file ([`crate::cow::Appending`]).
//!
//! Nothing counts clusters: those that no table names are free. Closing the image cuts off what was not used, and so
//! does the check of an image that was not closed.

use super::Qed;
use super::header::Geometry;
use crate::cow::{
    Allocator, Appending, FileEnd, FileExtent, Run, Taken, cut, file, lengthen, take_at_end,
};
use crate::io::IoResult;

/// The space of a file of this many bytes.
pub(super) fn space(file_len: u64, geometry: &Geometry) -> FileEnd {
    FileEnd::new(extent(file_len, geometry), geometry.cluster_size())
}

/// What a file of this many bytes has.
pub(super) fn extent(file_len: u64, geometry: &Geometry) -> FileExtent {
    let bits = geometry.cluster_bits;
    // What follows the last whole cluster may be anything.
    let fresh_from = file_len.div_ceil(1 << bits);
    FileExtent { used: file_len >> bits, fresh_from, limit: u64::MAX >> bits }
}

impl Qed {
    /// Bytes of the file's whole clusters: entries that lead behind them make no sense. No lock.
    pub(super) fn file_len(&self) -> u64 {
        self.space.end() << self.geometry().cluster_bits
    }

    /// Cuts off what was not used at the file's end.
    pub(super) async fn cut_file(&self) {
        let len = self.space.cut() << self.geometry().cluster_bits;
        cut(&file(self), len).await;
    }
}

impl Allocator for Qed {
    /// The image says, durably, that it needs a check, which takes away entries that lead past the end of the file.
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Qed>> {
        self.mark().await?;
        take_at_end(self, 1, most).await
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }
}

impl Appending for Qed {
    fn file_end(&self) -> &FileEnd {
        &self.space
    }

    fn place_of(&self, cluster: u64) -> u64 {
        cluster << self.geometry().cluster_bits
    }

    async fn extend(&self, end: u64) -> IoResult {
        lengthen(&file(self), self.place_of(end)).await
    }
}
