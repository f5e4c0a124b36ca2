//! The interface to a format's allocator: new clusters, and clusters that no entry names any more.
//!
//! The layer knows no reference counts, bitmaps or ends of files: it takes runs of clusters and gives them back.
//! A format with reference counts hands out a reservation; one that only appends hands out the file's end.

use crate::io::IoResult;
use std::future::{Future, ready};

/// Host clusters that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The number of the first one. Most formats count from the beginning of the file, some from the first cluster of data.
    pub first: u64,
    pub count: u64,
    /// They read as zeroes, also after a crash of the host.
    pub is_fresh: bool,
}

impl Run {
    /// The offset of the first cluster, in bytes, where clusters are counted from the beginning of the file.
    pub fn offset(&self, cluster_bits: u32) -> u64 {
        self.first << cluster_bits
    }
}

/// One reference less to each cluster of a run.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    pub run: Run,
    /// Clusters that become free are discarded in the storage.
    pub discard: bool,
}

/// Where a mapping's host clusters come from.
pub trait Allocator: Sized {
    /// Takes up to `most` host clusters side by side, at least one.
    ///
    /// When it returns, a crash cannot give these clusters to another owner: whatever says that they are in use is
    /// durable, or the format finds out when it opens the image (a dirty bit that is durable already, clusters
    /// behind everything that is named). They are inside the file if the format requires that of entries.
    fn take(&self, most: u64) -> impl Future<Output = IoResult<Taken<'_, Self>>>;

    /// Takes back clusters that were taken and that no entry names or may name. Something may have been written
    /// to them, so they are not fresh any more.
    fn put_back(&self, run: Run);

    /// Notes that entries which were handed to the kernel, and shown to readers, no longer refer to these clusters.
    ///
    /// They become free after the changed entries are durable, and after all requests have ended that began before
    /// the change and may still use them. A format that never reuses clusters forgets them: they are leaked.
    fn release(&self, _releases: &[Release]) -> impl Future<Output = ()> {
        ready(())
    }
}

/// Clusters that were taken: they go back to the allocator unless they are kept.
pub struct Taken<'a, A: Allocator> {
    allocator: &'a A,
    host: u64,
    pub run: Run,
}

impl<'a, A: Allocator> Taken<'a, A> {
    /// `host`: the offset of the first cluster, in bytes.
    pub fn new(allocator: &'a A, run: Run, host: u64) -> Taken<'a, A> {
        Taken { allocator, host, run }
    }

    /// The offset of the first cluster, in bytes.
    pub fn host(&self) -> u64 {
        self.host
    }

    /// An entry names them from now on, or may name them.
    pub fn keep(mut self) {
        self.run.count = 0;
    }
}

impl<A: Allocator> Drop for Taken<'_, A> {
    fn drop(&mut self) {
        if self.run.count > 0 {
            self.allocator.put_back(Run { is_fresh: false, ..self.run });
        }
    }
}
