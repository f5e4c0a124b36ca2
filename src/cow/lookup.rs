//! Where a guest's bytes are: from table entries to runs of one kind.
//!
//! All callers share one lookup: the fast path uses what is in memory and gives up at the first slice that is not
//! there; the slow path reads that slice and looks again.

use super::format::{Format, announce, file};
use super::table_cache::{Pinned, TableEntry};
use crate::block::{Access, Event};
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult};

/// What some of the guest's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Data at this offset of the file that holds the guest's data. `exclusive`: no other entry refers to its
    /// cluster, so that it may be overwritten in place.
    Data { host: u64, exclusive: bool },
    /// Zeroes; the place that is kept for them, if there is one.
    Zero { host: Option<u64> },
    /// The backing file decides; the place in a host cluster of which other parts are used, if there is one.
    Unallocated { host: Option<u64> },
    /// The cluster is stored in a form that has to be unpacked.
    Compressed(Compressed),
    /// Data in some parts, unallocated in others; the place of the first byte. The entry does not tell which:
    /// [`Format::sort_out`] does, and [`lookup`] has asked it.
    Mixed { host: u64 },
}

/// Where a compressed cluster is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The offset of the first byte. In a hostile image it may be any number.
    pub host: u64,
    /// Bytes that hold the compressed data: as many as it has, or more.
    pub len: u64,
}

/// What the first `len` bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Not zero.
    pub len: u64,
    pub found: Found,
}

/// An entry that makes no sense, and why.
pub type BadEntryOf<F> = (<F as Format>::Entry, <F as Format>::Bad);

/// What memory knows of a guest cluster.
enum Known<E> {
    Entry(E),
    /// There is no table.
    NoTable,
    /// Its slice is not in memory.
    Absent,
}

impl Piece {
    /// Whether what comes right behind is more of the same.
    fn continues(&self, next: &Piece) -> bool {
        match (self.found, next.found) {
            (Found::Data { host, exclusive }, Found::Data { host: next, exclusive: same }) => {
                next == host + self.len && exclusive == same
            }
            (Found::Zero { host }, Found::Zero { host: next })
            | (Found::Unallocated { host }, Found::Unallocated { host: next }) => {
                next == host.map(|host| host + self.len)
            }
            _ => false,
        }
    }
}

fn known<F: Format>(image: &F, guest: u64) -> Known<F::Entry> {
    if !image.has_table(guest) {
        return Known::NoTable;
    }
    let (slice, index) = image.tables().slice_of(guest);
    image.tables().cache.get(slice, index).map_or(Known::Absent, Known::Entry)
}

/// What is at `at`, of at most `want` bytes, as far as memory tells: no lock, no I/O.
pub fn piece<F: Format>(image: &F, at: u64, want: u64) -> Option<Result<Piece, BadEntryOf<F>>> {
    let mut piece = match piece_of_cluster(image, at, want)? {
        Ok(piece) => piece,
        Err(error) => return Some(Err(error)),
    };
    while piece.len < want {
        let next = match piece_of_cluster(image, at + piece.len, want - piece.len) {
            Some(Ok(next)) if piece.continues(&next) => next,
            _ => break,
        };
        piece.len += next.len;
    }
    Some(Ok(piece))
}

/// As [`piece`], up to the end of the cluster, or of the range of a table that does not exist.
fn piece_of_cluster<F: Format>(
    image: &F,
    at: u64,
    want: u64,
) -> Option<Result<Piece, BadEntryOf<F>>> {
    let shape = &image.tables().shape;
    let rest_of = |size: u64| size - (at & (size - 1));
    match known(image, at) {
        Known::Absent => None,
        Known::NoTable => {
            let len = want.min(rest_of(shape.coverage()));
            Some(Ok(Piece { len, found: Found::Unallocated { host: None } }))
        }
        Known::Entry(entry) => {
            let want = want.min(rest_of(shape.cluster_size()));
            Some(image.decode(entry, at, want).map_err(|bad| (entry, bad)))
        }
    }
}

/// What is at `at`, of at most `want` bytes; reads what memory does not hold. The bytes stay where they were
/// found as long as the caller's visit lasts ([`Visits`](super::Visits)).
pub async fn lookup<F: Format>(image: &F, at: u64, want: u64) -> IoResult<Piece> {
    let found = find(image, at, want).await?;
    found.map_err(|(entry, bad)| image.bad_entry(at, entry, bad, Access::Read))
}

/// As [`lookup`], but the caller reports an entry that makes no sense.
pub async fn find<F: Format>(
    image: &F,
    at: u64,
    want: u64,
) -> IoResult<Result<Piece, BadEntryOf<F>>> {
    match read_piece(image, at, want).await? {
        Ok(Piece { len, found: Found::Mixed { host } }) => {
            image.sort_out(at, len, host).await.map(Ok)
        }
        found => Ok(found),
    }
}

/// What is at `at` by its entries, which are read if need be.
async fn read_piece<F: Format>(
    image: &F,
    at: u64,
    want: u64,
) -> IoResult<Result<Piece, BadEntryOf<F>>> {
    loop {
        if let Some(found) = piece(image, at, want) {
            return Ok(found);
        }
        let pinned = pin(image, at).await?;
        if let Some(found) = piece(image, at, want) {
            return Ok(found);
        }
        drop(pinned);
    }
}

/// The slice of a guest offset, read if need be. There is a table.
pub async fn pin<F: Format>(image: &F, guest: u64) -> IoResult<Pinned<'_, F::Entry>> {
    let (slice, _) = image.tables().slice_of(guest);
    let examine = |entries: &[F::Entry]| image.examine(entries);
    image.tables().cache.pin(slice, load_slice(image, guest), examine).await
}

/// The slice of a guest offset that has no table yet, as the first slice of a new, empty table.
pub async fn pin_empty<F: Format>(image: &F, guest: u64) -> IoResult<Pinned<'_, F::Entry>> {
    let cache = &image.tables().cache;
    let (slice, _) = image.tables().slice_of(guest);
    let empty = F::Entry::from_words(0, 0);
    cache.pin(slice, async move { Ok(vec![empty; cache.entries()]) }, |_| ()).await
}

async fn load_slice<F: Format>(image: &F, guest: u64) -> IoResult<Vec<F::Entry>> {
    let tables = image.tables();
    let at = image.slice_offset(guest)?;
    let len = image.slice_len(guest) * tables.shape.entry_bytes as usize;
    let file = file(image);
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    if at >= file.len() {
        return Err(image.table_outside(at));
    }
    announce(image, Event::L2Load).await;
    read_padded(&file, at, &bytes.io_vec()).await?;
    let mut entries = Vec::with_capacity(tables.cache.entries());
    entries.extend(bytes[..len].chunks_exact(tables.shape.entry_bytes as usize).map(F::parse));
    entries.resize(tables.cache.entries(), F::Entry::from_words(0, 0));
    // Readers see entries that wait to be written.
    tables.journal.show(tables.slice_of(guest).0, &mut entries);
    Ok(entries)
}
