//! What the layer asks of a format that it reads through.
//!
//! The layer is generic over [`Format`], so every call below is static. A format with several mappings (one per
//! extent) implements the trait for each of them.

use super::lookup::{Compressed, Piece};
use super::table_cache::TableEntry;
use super::tables::Tables;
use crate::block::{Access, Child, Event, Node, Precision, Status, event};
use crate::io::{Errno, IoResult, IoVec};
use std::future::{Future, ready};
use std::sync::Arc;

/// One mapping of a format, from guest offsets to host offsets.
///
/// Methods that the fast path calls ([`has_table`](Format::has_table), [`decode`](Format::decode), those that
/// return children) take no lock, allocate nothing and write no memory that threads share.
pub trait Format {
    /// An entry of a mapping table.
    type Entry: TableEntry;
    /// Why an entry makes no sense.
    type Bad: Copy;

    // ---- State and nodes

    fn tables(&self) -> &Tables<Self::Entry>;

    /// The child that holds the tables.
    fn file_child(&self) -> &Child;

    /// The child that holds the guest's data, and its index in [`Driver::children`](crate::block::Driver::children).
    fn data_child(&self) -> (usize, &Child) {
        (0, self.file_child())
    }

    /// The child that is read where a cluster is unallocated; zeroes are read if there is none.
    fn backing_child(&self) -> Option<&Child> {
        None
    }

    /// Where the first byte of the mapping lies in the backing file. A disk may have several mappings, each of which
    /// begins where the one before it ends.
    fn backing_start(&self) -> u64 {
        0
    }

    /// Unallocated bytes from this guest offset on read as zeroes, whatever the backing file has there.
    fn backing_end(&self) -> u64 {
        u64::MAX
    }

    // ---- Tables and entries

    /// Whether there is a table that maps a guest offset. Without one the offset is unallocated.
    fn has_table(&self, guest: u64) -> bool;

    /// Where the slice of a guest offset is in the file, in bytes. There is a table.
    ///
    /// # Errors
    /// The place makes no sense; the format has reported it.
    fn slice_offset(&self, guest: u64) -> IoResult<u64>;

    /// How many entries of a slice the table has. The last slice of a flat table may be shorter than others.
    fn slice_len(&self, _guest: u64) -> usize {
        self.tables().cache.entries()
    }

    /// An entry out of its bytes on the disk, of which there are [`Shape::entry_bytes`](super::Shape).
    fn parse(bytes: &[u8]) -> Self::Entry;

    /// What the bytes from guest offset `at` on are, of at most `want`, inside one cluster.
    ///
    /// # Errors
    /// The entry makes no sense.
    fn decode(&self, entry: Self::Entry, at: u64, want: u64) -> Result<Piece, Self::Bad>;

    /// What the bytes from guest offset `at` on are, of at most `want` inside one cluster that is
    /// [`Found::Mixed`](super::Found); `host` is the place of the first.
    fn sort_out(&self, _at: u64, _want: u64, _host: u64) -> impl Future<Output = IoResult<Piece>> {
        ready(Err(Errno::EIO))
    }

    /// Looks at the entries of a slice before one of them can be followed.
    fn examine(&self, _entries: &[Self::Entry]) {}

    // ---- Errors, reported by the format in its own words

    /// An entry that makes no sense was met at guest offset `at`.
    fn bad_entry(&self, at: u64, entry: Self::Entry, bad: Self::Bad, access: Access) -> Errno;

    /// A table is said to be at `offset`, past the end of the file.
    fn table_outside(&self, offset: u64) -> Errno;

    // ---- Contents that are not simply at an offset

    /// Reads guest bytes from `at` on out of a compressed cluster.
    fn read_compressed(
        &self,
        _at: u64,
        _place: Compressed,
        _into: &IoVec<'_>,
    ) -> impl Future<Output = IoResult> {
        ready(Err(Errno::EIO))
    }

    /// The status of the guest's data at a host offset: it may be a hole there. Returns for how many bytes.
    fn data_status(
        &self,
        _host: u64,
        len: u64,
        _precision: Precision,
    ) -> impl Future<Output = IoResult<(u64, Status)>> {
        ready(Ok((len, Status::DATA | Status::ALLOCATED)))
    }
}

/// The node that holds a format's tables.
pub fn file<F: Format>(image: &F) -> Arc<Node> {
    image.file_child().node()
}

/// The node that holds the guest's data.
pub fn data<F: Format>(image: &F) -> Arc<Node> {
    image.data_child().1.node()
}

/// The node that is read where a cluster is unallocated.
pub fn backing<F: Format>(image: &F) -> Option<Arc<Node>> {
    image.backing_child().map(Child::node)
}

/// Tells debugging filters below what is about to be done to the image.
pub async fn announce<F: Format>(image: &F, event: Event) {
    if event::has_listeners() {
        file(image).event(event).await;
    }
}
