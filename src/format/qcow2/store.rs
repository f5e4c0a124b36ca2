//! Storing compressed clusters: their bytes, and the entries that name them.

use super::layout::{Cluster, L2Entry};
use super::{Qcow2, corrupt};
use crate::block::{Event, WriteFlags};
use crate::cow::{change_entries, ensure_table, pin};
use crate::io::{Errno, IoResult, IoVec};

impl Qcow2 {
    /// Stores packed clusters of the guest's clusters from `at` on.
    pub(super) async fn store_units(&self, at: u64, units: &[&[u8]]) -> IoResult {
        if self.geometry.external_data {
            return Err(Errno::ENOTSUP);
        }
        self.prepare_writing().await?;
        let bits = self.geometry.cluster_bits;
        let mut done = 0;
        while done < units.len() {
            let first = (at >> bits) + done as u64;
            // What one slice of entries maps.
            let most = self.mapping.tables().cache.entries() as u64
                - (first & (self.mapping.tables().cache.entries() as u64 - 1));
            let count = (units.len() - done).min(most as usize);
            self.store_in_slice(first, &units[done..done + count]).await?;
            done += count;
        }
        Ok(())
    }

    async fn store_in_slice(&self, first: u64, units: &[&[u8]]) -> IoResult {
        let guest = first << self.geometry.cluster_bits;
        let _range = self.mapping.tables().ranges.lock(first..first + units.len() as u64).await;
        let _visit = self.mapping.tables().visits.enter();
        ensure_table(self, guest).await?;
        let free = self.free_entries(guest, units.len()).await?;
        let (units, refused) = units.split_at(free);
        let mut done = 0;
        while done < units.len() {
            let (host, count) = self.space.place(self.metadata(), &units[done..]).await?;
            let some = &units[done..done + count];
            let guest = guest + ((done as u64) << self.geometry.cluster_bits);
            // If it fails their references are leaked: an entry may name them.
            self.store_at(guest, host, some).await?;
            done += count;
        }
        // QEMU's answer, too.
        if refused.is_empty() { Ok(()) } else { Err(Errno::EIO) }
    }

    /// How many guest clusters from `guest` on have nothing that would be overwritten.
    async fn free_entries(&self, guest: u64, most: usize) -> IoResult<usize> {
        let pinned = pin(self, guest).await?;
        let (_, index) = self.mapping.tables().slice_of(guest);
        for n in 0..most {
            let entry = pinned.get(index + n);
            let cluster = self.geometry.decode(entry);
            let at = guest + ((n as u64) << self.geometry.cluster_bits);
            match cluster
                .map_err(|error| corrupt::bad_entry_to_write(self.metadata(), at, entry, error))?
            {
                Cluster::Unallocated
                | Cluster::Zero { host: None }
                | Cluster::Subclusters { host: None, .. } => {}
                _ => return Ok(n),
            }
        }
        Ok(most)
    }

    /// Writes what lies side by side at `host`, durably, and the entries that name it.
    async fn store_at(&self, guest: u64, host: u64, units: &[&[u8]]) -> IoResult {
        let mut entries: Vec<L2Entry> = Vec::with_capacity(units.len());
        let mut at = host;
        for unit in units {
            let entry = self.geometry.encode_compressed(at, unit.len() as u64);
            entries.push(entry.ok_or(Errno(libc::EFBIG))?);
            at += unit.len() as u64;
        }
        let parts: Vec<IoVec<'_>> = units.iter().map(|unit| IoVec::from_ref(unit)).collect();
        let parts: Vec<&IoVec<'_>> = parts.iter().collect();
        let file = self.file();
        file.event(Event::WriteCompressed).await;
        file.write(host, &IoVec::concat(&parts), WriteFlags::empty()).await?;
        file.flush().await?;
        self.event(Event::L2UpdateCompressed).await;
        change_entries(self, guest, &entries).await
    }
}
