//! The references of all that an L1 table names: raised, lowered, and the COPIED flags of the disk's
//! entries that follow from them.

use crate::block::{Event, WriteFlags};
use crate::cow::{Run, change_entries, pin, read_padded};
use crate::format::qcow2::layout::{Cluster, L1Entry, L2Entry};
use crate::format::qcow2::mapping::L1Turn;
use crate::format::qcow2::space::Change;
use crate::format::qcow2::{Qcow2, corrupt};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

impl Qcow2 {
    /// The disk's L1 table.
    pub(in crate::format::qcow2) fn active_l1(&self) -> Vec<L1Entry> {
        let entries = u64::from(self.header.now().l1_size);
        (0..entries).map(|index| self.mapping.l1_at(index)).collect()
    }

    /// One reference more, or one less, to each thing that the L1 table names and that its L2 tables
    /// name, in an order that is always the same; no more than the first `most`. Raised refcounts are
    /// in memory then ([`Space::write`](crate::format::qcow2::space::Space::write)).
    ///
    /// Nothing else may change the tables meanwhile, and lowered references must be gone, durably.
    ///
    /// # Errors
    /// How many were changed, and why no more.
    pub(super) async fn change_references(
        &self,
        l1: &[L1Entry],
        change: Change,
        most: u64,
    ) -> Result<(), (u64, Errno)> {
        let mut done = 0;
        for (index, &entry) in l1.iter().enumerate() {
            if entry.l2_table() == 0 || done == most {
                continue;
            }
            let clusters = self.named_by(index as u64, entry).await.map_err(|e| (done, e))?;
            let some = &clusters[..clusters.len().min((most - done) as usize)];
            let discard = self.passes_snapshot_discards;
            let changed = self.space.change(self.metadata(), some, change, discard).await;
            changed.map_err(|(n, errno)| (done + n, errno))?;
            done += some.len() as u64;
        }
        Ok(())
    }

    /// Whether all that entries of L1 tables name, and that their L2 tables name, makes sense and is counted.
    /// What is not counted would be given out while references are raised.
    pub(in crate::format::qcow2) async fn check_references(
        &self,
        entries: impl Iterator<Item = (u64, L1Entry)>,
    ) -> IoResult {
        for (index, entry) in entries.filter(|(_, entry)| entry.l2_table() != 0) {
            let clusters = self.named_by(index, entry).await?;
            self.space.check_counted(self.metadata(), &clusters).await?;
        }
        Ok(())
    }

    /// The L2 table that an entry of an L1 table names, as the file has it.
    ///
    /// # Errors
    /// There can be no table, or it cannot be read.
    pub(in crate::format::qcow2) async fn stored_l2(
        &self,
        index: u64,
        entry: L1Entry,
    ) -> IoResult<Vec<L2Entry>> {
        let table = entry.l2_table();
        let is_sane = !entry.has_reserved_bits() && self.geometry.is_cluster_start(table);
        if !is_sane || table >= self.file().len() {
            let guest = index * self.geometry.l2_coverage();
            return Err(corrupt::bad_l1(self.metadata(), guest, entry));
        }
        let size = self.geometry.cluster_size() as usize;
        let mut bytes = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
        self.event(Event::L2Load).await;
        read_padded(&self.file(), table, &bytes.io_vec()).await?;
        let word = |bytes: &[u8]| bytes.iter().fold(0u64, |w, &b| w << 8 | u64::from(b));
        let entries = bytes[..size].chunks_exact(self.geometry.l2_entry_size() as usize);
        let read = |bytes: &[u8]| L2Entry { word: word(&bytes[..8]), bitmap: word(&bytes[8..]) };
        Ok(entries.map(read).collect())
    }

    /// The L2 table that an entry names and the clusters that this names: each as often as it does.
    async fn named_by(&self, index: u64, entry: L1Entry) -> IoResult<Vec<u64>> {
        let guest = index * self.geometry.l2_coverage();
        let entries = self.stored_l2(index, entry).await?;
        let mut clusters = vec![self.run_of(entry.l2_table()).first];
        for (n, entry) in entries.into_iter().enumerate() {
            if let Err(error) = self.geometry.decode(entry) {
                let guest = guest + ((n as u64) << self.geometry.cluster_bits);
                return Err(corrupt::bad_entry(self.metadata(), guest, entry, error));
            }
            if let Some(release) = self.releases_of(entry, false) {
                let Run { first, count, .. } = release.run;
                clusters.extend(first..first + count);
            }
        }
        // One block of refcounts after the other.
        clusters[1..].sort_unstable();
        Ok(clusters)
    }

    /// Clears the COPIED flags of all entries of the disk, whose references have been raised. The
    /// caller has its mapping to himself.
    pub(super) async fn clear_copied(&self, l1: &[L1Entry]) -> IoResult {
        for (index, _) in l1.iter().enumerate().filter(|(_, entry)| entry.l2_table() != 0) {
            for guest in self.slices_of(index as u64) {
                let entries = self.slice_entries(guest).await?;
                if entries.iter().any(|entry| entry.is_copied()) {
                    let new: Vec<_> =
                        entries.iter().map(|entry| entry.with_copied(false)).collect();
                    change_entries(self, guest, &new).await?;
                }
            }
        }
        let own = |entry: &L1Entry| entry.is_copied();
        let (Some(first), Some(last)) = (l1.iter().position(own), l1.iter().rposition(own)) else {
            return Ok(());
        };
        let turn = self.mapping.lock_l1().await;
        self.write_l1(&turn, first, l1[first..=last].iter().map(|entry| entry.with_copied(false)))
            .await
    }

    /// Sets the COPIED flags of the disk's entries that have the only reference. Requests may be in
    /// flight, but what adds references is not.
    pub(super) async fn set_copied(&self) -> IoResult {
        let tables = u64::from(self.header.now().l1_size);
        for index in (0..tables).filter(|&index| self.mapping.l1_at(index).l2_table() != 0) {
            let first = index * self.geometry.l2_entries();
            let _range =
                self.mapping.tables().ranges.lock(first..first + self.geometry.l2_entries()).await;
            self.set_copied_below(index).await?;
        }
        Ok(())
    }

    /// As [`Qcow2::set_copied`], of what one L1 entry names. The caller has the range of its guest
    /// clusters.
    pub(super) async fn set_copied_below(&self, index: u64) -> IoResult {
        let entry = self.mapping.l1_at(index);
        if entry.l2_table() == 0 || !self.is_sole(entry.l2_table()).await? {
            // What a table with several references names has several, too.
            return Ok(());
        }
        for guest in self.slices_of(index) {
            self.set_copied_in_slice(guest).await?;
        }
        let turn = self.mapping.lock_l1().await;
        match entry.is_copied() {
            true => Ok(()),
            false => {
                self.write_l1(&turn, index as usize, [entry.with_copied(true)].into_iter()).await
            }
        }
    }

    /// Clears flags that somebody has left in a snapshot's tables, before the disk uses these.
    pub(super) async fn clear_stale_flags(&self, l1: &[L1Entry]) -> IoResult {
        let file = self.file();
        for entry in l1.iter().filter(|entry| entry.l2_table() != 0) {
            let (mut bytes, is_changed) = self.without_flags(entry.l2_table()).await?;
            if is_changed {
                file.write(entry.l2_table(), &bytes.io_vec(), WriteFlags::empty()).await?;
            }
        }
        Ok(())
    }

    /// An L2 table without COPIED flags, and whether it had any.
    async fn without_flags(&self, table: u64) -> IoResult<(AlignedBuf, bool)> {
        let size = self.geometry.cluster_size() as usize;
        let mut bytes = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(&self.file(), table, &bytes.io_vec()).await?;
        let mut is_changed = false;
        for entry in bytes.chunks_exact_mut(self.geometry.l2_entry_size() as usize) {
            // The first bit of an entry.
            is_changed |= entry[0] & 0x80 != 0;
            entry[0] &= 0x7f;
        }
        Ok((bytes, is_changed))
    }

    async fn set_copied_in_slice(&self, guest: u64) -> IoResult {
        let mut entries = self.slice_entries(guest).await?;
        let mut is_changed = false;
        for entry in entries.iter_mut().filter(|entry| !entry.is_copied()) {
            let host = match self.geometry.decode(*entry) {
                Ok(Cluster::Normal { host } | Cluster::Zero { host: Some(host) }) => host,
                Ok(Cluster::Subclusters { host: Some(host), .. }) => host,
                _ => continue,
            };
            if self.is_sole(host).await? {
                *entry = entry.with_copied(true);
                is_changed = true;
            }
        }
        if is_changed { change_entries(self, guest, &entries).await } else { Ok(()) }
    }

    /// Whether a host cluster has one reference.
    async fn is_sole(&self, host: u64) -> IoResult<bool> {
        let cluster = host >> self.geometry.cluster_bits;
        Ok(self.space.references(self.metadata(), cluster).await? == 1)
    }

    /// Guest offsets of the slices of an L2 table.
    fn slices_of(&self, index: u64) -> impl Iterator<Item = u64> + use<> {
        let start = index * self.geometry.l2_coverage();
        let step = (self.mapping.tables().cache.entries() as u64) << self.geometry.cluster_bits;
        let slices = self.geometry.l2_coverage() / step;
        (0..slices).map(move |n| start + n * step)
    }

    async fn slice_entries(&self, guest: u64) -> IoResult<Vec<L2Entry>> {
        let pinned = pin(self, guest).await?;
        Ok((0..self.mapping.tables().cache.entries()).map(|index| pinned.get(index)).collect())
    }

    /// Writes entries of the disk's L1 table from `first` on, and shows them.
    async fn write_l1(
        &self,
        turn: &L1Turn<'_>,
        first: usize,
        entries: impl Iterator<Item = L1Entry> + Clone,
    ) -> IoResult {
        let place = self.header.now().l1_table_offset + first as u64 * 8;
        let bytes: Vec<u8> = entries.clone().flat_map(|entry| entry.0.to_be_bytes()).collect();
        self.file().write(place, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        for (n, entry) in entries.enumerate() {
            turn.set((first + n) as u64, entry);
        }
        Ok(())
    }
}
