//! Where a guest's bytes are: from L1 and L2 entries to runs of one kind.
//!
//! One way of looking serves all: the fast road looks at what is in memory and gives up at the first
//! slice that is not; the slow road reads the slice and looks again.

use super::l2_cache::{Pinned, SliceNo};
use super::layout::{BadEntry, Cluster, Compressed, L2Entry};
use super::{Qcow2, corrupt};
use crate::block::{Event, Node, event};
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult};
use std::sync::Arc;

/// What some of the guest's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// At this offset of the file that holds the guest's data. `copied`: nobody else refers to it.
    Data {
        host: u64,
        copied: bool,
    },
    /// Zeroes; the place that is kept for them, if there is one.
    Zero {
        host: Option<u64>,
    },
    /// The backing file decides; the place in a host cluster of which other subclusters are used.
    Unallocated {
        host: Option<u64>,
    },
    Compressed(Compressed),
}

/// What the first `len` bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Not zero.
    pub len: u64,
    pub found: Found,
}

/// An entry that makes no sense, and why.
pub type Bad = (L2Entry, BadEntry);

/// What memory knows of a guest cluster.
enum Known {
    Entry(L2Entry),
    /// There is no L2 table.
    NoTable,
    /// Its slice is not in memory.
    Absent,
}

impl Qcow2 {
    /// The slice that a guest offset is in, and the entry's index there.
    pub(super) fn slice_of(&self, guest: u64) -> (SliceNo, usize) {
        let cluster = guest >> self.geometry.cluster_bits;
        let entries = self.l2.entries() as u64;
        (SliceNo(cluster >> entries.trailing_zeros()), (cluster & (entries - 1)) as usize)
    }

    fn known(&self, guest: u64) -> Known {
        if self.l1.get(self.geometry.l1_index(guest)).l2_table() == 0 {
            return Known::NoTable;
        }
        let (slice, index) = self.slice_of(guest);
        self.l2.get(slice, index).map_or(Known::Absent, Known::Entry)
    }

    /// What is at `at`, of at most `want` bytes, as far as memory tells.
    pub(super) fn piece(&self, at: u64, want: u64) -> Option<Result<Piece, Bad>> {
        let mut piece = match self.piece_of_cluster(at, want)? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(error)),
        };
        while piece.len < want {
            let next = match self.piece_of_cluster(at + piece.len, want - piece.len) {
                Some(Ok(next)) if piece.goes_on(&next) => next,
                _ => break,
            };
            piece.len += next.len;
        }
        Some(Ok(piece))
    }

    /// As [`Qcow2::piece`], up to the end of the cluster, or of the L2 table that is not there.
    fn piece_of_cluster(&self, at: u64, want: u64) -> Option<Result<Piece, Bad>> {
        let rest_of = |size: u64| size - (at & (size - 1));
        match self.known(at) {
            Known::Absent => None,
            Known::NoTable => {
                let len = want.min(rest_of(self.geometry.l2_coverage()));
                Some(Ok(Piece { len, found: Found::Unallocated { host: None } }))
            }
            Known::Entry(entry) => {
                let want = want.min(rest_of(self.geometry.cluster_size()));
                let cluster = self.geometry.decode(entry).map_err(|error| (entry, error));
                Some(cluster.map(|cluster| self.part(entry, cluster, at, want)))
            }
        }
    }

    /// What the bytes from `at` on are, inside one cluster.
    pub(super) fn part(&self, entry: L2Entry, cluster: Cluster, at: u64, want: u64) -> Piece {
        let inside = self.geometry.offset_in_cluster(at);
        // In an external data file nothing is ever shared.
        let copied = entry.is_copied() || self.geometry.external_data;
        let found = match cluster {
            Cluster::Unallocated => Found::Unallocated { host: None },
            Cluster::Zero { host } => Found::Zero { host: host.map(|host| host + inside) },
            Cluster::Normal { host } => Found::Data { host: host + inside, copied },
            Cluster::Compressed(place) => Found::Compressed(place),
            Cluster::Subclusters { host, allocated, zero } => {
                let first = self.geometry.subcluster_index(at);
                let kind = |n: u64| (allocated >> n & 1, zero >> n & 1);
                let count = (first..32).take_while(|&n| kind(n) == kind(first)).count() as u64;
                let end = (first + count) << self.geometry.subcluster_bits();
                let place = host.map(|host| host + inside);
                let found = match (kind(first), place) {
                    ((1, _), Some(host)) => Found::Data { host, copied },
                    ((_, 1), host) => Found::Zero { host },
                    (_, host) => Found::Unallocated { host },
                };
                return Piece { len: want.min(end - inside), found };
            }
        };
        Piece { len: want, found }
    }

    /// What is at `at`, of at most `want` bytes; reads what memory does not hold. The bytes stay
    /// where they are told to be as long as the caller's visit lasts ([`crate::cow::Visits`]).
    pub(super) async fn lookup(&self, at: u64, want: u64) -> IoResult<Piece> {
        let found = self.find(at, want).await?;
        found.map_err(|(entry, error)| corrupt::bad_entry(self, at, entry, error))
    }

    /// As [`Qcow2::lookup`]; an entry that makes no sense is for the caller to tell of.
    pub(super) async fn find(&self, at: u64, want: u64) -> IoResult<Result<Piece, Bad>> {
        loop {
            if let Some(found) = self.piece(at, want) {
                return Ok(found);
            }
            let pinned = self.pin(at).await?;
            if let Some(found) = self.piece(at, want) {
                return Ok(found);
            }
            drop(pinned);
        }
    }

    /// The slice of a guest offset, read if need be. There is an L2 table.
    pub(super) async fn pin(&self, guest: u64) -> IoResult<Pinned<'_>> {
        let (slice, _) = self.slice_of(guest);
        self.l2.pin(slice, self.load_slice(guest), |words| self.check_slice(words)).await
    }

    /// The slice of a guest offset, which has no L2 table yet, as the first that a new one has.
    pub(super) async fn pin_empty(&self, guest: u64) -> IoResult<Pinned<'_>> {
        let (slice, _) = self.slice_of(guest);
        let words = self.slice_bytes as usize / 8;
        self.l2.pin(slice, async move { Ok(vec![0; words]) }, |_| ()).await
    }

    async fn load_slice(&self, guest: u64) -> IoResult<Vec<u64>> {
        let at = self.slice_offset(guest)?;
        let words = self.slice_bytes / 8;
        let file = self.file();
        let mut bytes = AlignedBuf::new(self.slice_bytes as usize, 4096).ok_or(Errno::ENOMEM)?;
        if at >= file.len() {
            return Err(corrupt::outside(self, "L2 table", at));
        }
        self.event(Event::L2Load).await;
        read_padded(&file, at, &bytes.io_vec()).await?;
        let mut list = Vec::with_capacity(words as usize);
        list.extend(
            bytes
                .chunks_exact(8)
                .map(|word| word.iter().fold(0u64, |word, &byte| word << 8 | u64::from(byte))),
        );
        let per_entry = self.geometry.l2_entry_size() as usize / 8;
        self.journal.show(self.slice_of(guest).0, &mut list, per_entry);
        Ok(list)
    }

    /// Where the slice of a guest offset is in the file.
    pub(super) fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        let entry = self.l1.get(self.geometry.l1_index(guest));
        let table = entry.l2_table();
        if entry.has_reserved_bits() || table == 0 || !self.geometry.is_cluster_start(table) {
            return Err(corrupt::bad_l1(self, guest, entry));
        }
        let index = self.geometry.l2_index(guest) & !(self.l2.entries() as u64 - 1);
        Ok(table + index * self.geometry.l2_entry_size())
    }

    /// Tells debugging filters below what is about to be done to the image.
    pub(super) async fn event(&self, event: Event) {
        if event::are_heard() {
            self.file().event(event).await;
        }
    }

    pub(super) fn file(&self) -> Arc<Node> {
        self.children[0].node()
    }

    /// The node that holds the guest's data.
    pub(super) fn data(&self) -> Arc<Node> {
        self.children[self.data].node()
    }
}

impl Piece {
    /// Whether what comes right behind is more of the same.
    fn goes_on(&self, next: &Piece) -> bool {
        match (self.found, next.found) {
            (Found::Data { host, copied }, Found::Data { host: next, copied: same }) => {
                next == host + self.len && copied == same
            }
            (Found::Zero { host }, Found::Zero { host: next })
            | (Found::Unallocated { host }, Found::Unallocated { host: next }) => {
                next == host.map(|host| host + self.len)
            }
            _ => false,
        }
    }
}
