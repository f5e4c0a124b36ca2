//! What the layer asks of a format when the guest writes.

use super::allocator::{Allocator, Release};
use super::journal::Journaling;
use crate::io::{IoResult, IoVec};
use std::future::Future;
use std::ops::Range;

/// What a guest cluster needs before it can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: the bytes may be overwritten in place.
    Nothing,
    /// A new host cluster.
    Cluster,
    /// It has this host cluster for itself, but parts of it hold nothing of the guest's yet.
    Fill { host: u64 },
}

/// A mapping that a guest writes through. Host and guest offsets are in bytes.
pub trait Writer: Journaling + Allocator {
    /// Makes a table for a guest offset, if there is none, and one that may be changed, if others refer to it, too. The
    /// new table is durable before the entry that names it. The caller holds the guest cluster's range.
    fn ensure_table(&self, guest: u64) -> impl Future<Output = IoResult>;

    /// What a cluster with this entry needs before it is written.
    ///
    /// # Errors
    /// The entry makes no sense.
    fn need(&self, entry: Self::Entry) -> Result<Need, Self::Bad>;

    /// The entry of the cluster at `host` that shows what `old` did, and `inside` (bytes of the cluster) as data.
    fn entry_showing(&self, old: Self::Entry, host: u64, inside: Range<u64>) -> Self::Entry;

    /// The references to host clusters that an entry has: they are released when it is replaced.
    fn references(&self, entry: Self::Entry) -> Option<Release>;

    /// Writes the guest's data at a host offset. Makes the file longer where an entry may lead past its end, and refuses
    /// places that no data may be at.
    fn write_data(&self, host: u64, from: &IoVec<'_>) -> impl Future<Output = IoResult>;

    /// Where the guest's bytes at `at` and behind it end: bytes from there on are copied as zeroes.
    fn guest_end(&self, at: u64) -> u64;

    /// Whether data may be overwritten in place. It is asked before an entry is read, and no longer given before entries
    /// change in a way that writes must not miss ([`without_fast_writes`](super::without_fast_writes)).
    fn may_overwrite(&self) -> bool {
        true
    }

    /// Whether a fast write may follow an entry. It is asked after the entry was read, and no longer given before an entry
    /// that must not be followed can be seen ([`Format::examine`](super::Format::examine)).
    fn may_follow(&self) -> bool {
        true
    }

    /// The host cluster that belongs to a guest cluster for ever, in formats that allocate none.
    fn fixed_host(&self, _guest: u64) -> Option<u64> {
        None
    }

    // ---- Parts of clusters that entries can tell apart. Without such, an entry is about its whole cluster.

    /// Bytes of the smallest part: a power of two, at most a cluster.
    fn unit(&self) -> u64 {
        self.tables().shape.cluster_size()
    }

    /// Whether the part that a guest offset is in has to be copied when another part of its cluster gets a new host
    /// cluster, although the rest may stay with the backing file.
    fn must_relocate(&self, _entry: Self::Entry, _guest: u64) -> bool {
        false
    }

    /// Whether an entry shows the part that a guest offset is in, and may go on showing it: fast writes to it may be
    /// under way.
    fn shows_own(&self, _entry: Self::Entry, _guest: u64) -> bool {
        false
    }
}
