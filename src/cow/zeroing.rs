//! What the layer asks of a format when the guest zeroes and discards.

use super::allocator::Release;
use super::writer::Writer;
use crate::io::IoResult;
use std::future::{Future, ready};
use std::ops::Range;

/// What a range becomes when it is emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Empty {
    /// Zeroes; the host clusters are kept.
    Zero,
    /// Zeroes; the host clusters are given back.
    Unmap,
    /// Zeroes where the disk will end; the host clusters are given back, whatever the options say.
    Cut,
    /// Nothing that matters.
    Discard,
    /// Beyond the end of the disk, now or soon: nothing at all.
    Crop,
}

/// A mapping whose clusters can be emptied.
pub trait Zeroing: Writer {
    /// The length of the guest's disk, in bytes.
    fn disk_len(&self) -> u64;

    /// Whether an entry can say that its cluster reads as zeroes although a backing file has data there.
    fn has_zero_entries(&self) -> bool;

    /// What an entry becomes when `inside` (bytes of the cluster at `guest`) is emptied, and whether it drops the
    /// references of the old one.
    ///
    /// # Errors
    /// The entry makes no sense.
    fn emptied(
        &self,
        old: Self::Entry,
        guest: u64,
        inside: Range<u64>,
        kind: Empty,
    ) -> Result<(Self::Entry, bool), Self::Bad>;

    /// The references that an emptied entry had, as [`Writer::references`], for what was emptied like this.
    fn emptied_references(&self, entry: Self::Entry, _kind: Empty) -> Option<Release> {
        self.references(entry)
    }

    /// The host cluster that an emptied entry keeps, if the storage is to be advised that its contents do not matter.
    fn kept_place(&self, _old: Self::Entry, _new: Self::Entry, _kind: Empty) -> Option<u64> {
        None
    }

    /// Advises the storage of the clusters of [`kept_place`](Zeroing::kept_place), whose range the caller holds.
    fn discard_kept(&self, _hosts: &[u64]) -> impl Future<Output = IoResult> {
        ready(Ok(()))
    }

    /// Empties what a data file of its own has of whole units, before the entries change. The caller holds the range.
    fn before_emptying(&self, _range: Range<u64>, _kind: Empty) -> impl Future<Output = IoResult> {
        ready(Ok(()))
    }

    /// The same, after the entries have changed.
    fn after_emptying(&self, _range: Range<u64>, _kind: Empty) -> impl Future<Output = IoResult> {
        ready(Ok(()))
    }
}
