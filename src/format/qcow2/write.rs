//! The methods that [`crate::cow`] needs for writing.
//!
//! The order of writes is that of [`super::order`].

use super::layout::{BadEntry, Cluster, L2Entry};
use super::overlap::Kinds;
use super::{Qcow2, corrupt};
use crate::block::{Event, WriteFlags};
use crate::cow::{Allocator, Compressed, Need, Packing, Release, Run, Taken, Writer, ensure_table};
use crate::io::{IoResult, IoVec};
use std::ops::Range;

impl Allocator for Qcow2 {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Qcow2>> {
        Ok(self.hold(self.space.take(self.metadata(), most).await?.keep()))
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }

    async fn release(&self, releases: &[Release]) {
        self.free(releases).await;
    }
}

impl Writer for Qcow2 {
    async fn ensure_table(&self, guest: u64) -> IoResult {
        ensure_table(self, guest).await
    }

    fn need(&self, entry: L2Entry) -> Result<Need, BadEntry> {
        Ok(self.need_of(entry, self.geometry.decode(entry)?))
    }

    fn entry_showing(&self, old: L2Entry, host: u64, inside: Range<u64>) -> L2Entry {
        if !self.geometry.extended_l2 {
            return L2Entry::normal(host, true, 0);
        }
        let bits = self.geometry.subcluster_bits();
        let (first, end) = (inside.start >> bits, inside.end.div_ceil(1 << bits));
        let mask = ((1u64 << (end - first)) - 1) << first;
        let (allocated, zero) = match self.geometry.decode(old) {
            Ok(Cluster::Subclusters { allocated, zero, .. }) => (allocated as u64, zero as u64),
            _ => (0, 0),
        };
        L2Entry::normal(host, true, allocated | mask | (zero & !mask) << 32)
    }

    fn references(&self, entry: L2Entry) -> Option<Release> {
        let run = self.geometry.clusters_of(entry)?;
        Some(Release { run, discard: self.settings.discards.other })
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        let data = self.data();
        if self.overlaps.has_bad_entry() {
            self.metadata().check_write(host, from.len(), Kinds::empty())?;
        }
        let end = host + from.len();
        if end > data.len() {
            // A data file that was never that long; or the file ends inside its last cluster.
            let most = data.len().next_multiple_of(self.geometry.cluster_size());
            match self.geometry.external_data {
                true => self.nodes.grow(&data, end.max(self.size())).await?,
                false if end <= most => self.nodes.grow(&data, most).await?,
                false => return Err(corrupt::data_outside(self.metadata(), "Data cluster", host)),
            }
        }
        self.event(Event::WriteAio).await;
        data.write(host, from, WriteFlags::empty()).await
    }

    /// The state of a virtual machine behind the disk has no end.
    fn guest_end(&self, at: u64) -> u64 {
        if at >= self.state_start() { u64::MAX } else { self.size() }
    }

    /// While a snapshot is made, clusters become shared. Making one waits for the writes that had the permission.
    fn may_overwrite(&self) -> bool {
        !self.snapshots.are_writes_stopped()
    }

    /// An entry that points at metadata was seen, or the image was found to be corrupt. Writes that had the
    /// permission continue: the entries that they found point at data.
    fn may_follow(&self) -> bool {
        !self.overlaps.has_bad_entry() && !self.corruption.is_fatal()
    }

    fn fixed_host(&self, guest: u64) -> Option<u64> {
        self.geometry.external_data.then_some(guest)
    }

    fn unit(&self) -> u64 {
        self.geometry.subcluster_size()
    }

    /// Compressed data has to move, and subclusters that are allocated in a cluster of others.
    fn must_relocate(&self, entry: L2Entry, guest: u64) -> bool {
        match self.geometry.decode(entry) {
            Ok(cluster @ Cluster::Subclusters { host: Some(_), allocated, .. }) => {
                allocated >> self.geometry.subcluster_index(guest) & 1 == 1
                    && self.need_of(entry, cluster) == Need::Cluster
            }
            Ok(Cluster::Compressed(_)) => true,
            _ => false,
        }
    }

    fn shows_own(&self, entry: L2Entry, guest: u64) -> bool {
        match self.geometry.decode(entry) {
            Ok(cluster @ Cluster::Subclusters { allocated, .. }) => {
                self.need_of(entry, cluster) != Need::Cluster
                    && allocated >> self.geometry.subcluster_index(guest) & 1 == 1
            }
            _ => false,
        }
    }
}

impl Packing for Qcow2 {
    async fn place(&self, units: &[&[u8]]) -> IoResult<(u64, usize)> {
        self.space.place(self.metadata(), units).await
    }

    fn packed_entry(&self, place: Compressed) -> Option<L2Entry> {
        self.geometry.encode_compressed(place.host, place.len)
    }
}

impl Qcow2 {
    /// Clusters that were taken in another way, and go back to what is reserved if they are not kept.
    pub(super) fn hold(&self, run: Run) -> Taken<'_, Qcow2> {
        Taken::new(self, run, run.offset(self.geometry.cluster_bits))
    }

    fn need_of(&self, entry: L2Entry, cluster: Cluster) -> Need {
        let own = entry.is_copied() || self.geometry.external_data;
        match cluster {
            Cluster::Normal { .. } if own => Need::Nothing,
            Cluster::Zero { host: Some(host) } if own => Need::Fill { host },
            Cluster::Subclusters { host: Some(_), allocated: u32::MAX, .. } if own => Need::Nothing,
            Cluster::Subclusters { host: Some(host), .. } if own => Need::Fill { host },
            _ => Need::Cluster,
        }
    }
}
