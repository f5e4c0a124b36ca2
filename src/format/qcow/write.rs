//! Writing: what the layer ([`crate::cow`]) asks of this format.
//!
//! The order, which leaves a sound image after a kill or a power cut at any moment, with lost space at worst:
//!
//! * the file is longer, durably, before anything is written to its new clusters ([`super::space`]): entries never lead
//!   past its end, and no cluster is given away twice, although nothing counts clusters;
//! * a new L2 table reads as zeroes, durably, before the L1 entry names it; data is written, and what was copied around
//!   it is durable, before its entry is on the disk, or the entry waits in the front end's memory ([`super::journal`]);
//!   packed clusters are durable before their entries;
//! * the name of another backing file lies in clusters of its own, durably, before the header names it, in one sector;
//! * emptying the image ends all L1 entries, durably, before the file is cut and its clusters are used again.

use super::Qcow;
use super::entries::{BadEntry, L1Entry, L2Entry};
use super::header::{self, Cluster, Header};
use crate::block::{Error, Event, WriteFlags, ZeroFlags};
use crate::cow::{
    Format, LockGuard, Need, NewTable, Release, TwoLevels, Writable, Writer, announce, begin_rest,
    check_ready, check_sound, ensure_table, file, lengthen, settle_journal, take_at_end,
    write_suspects,
};
use crate::io::{Errno, IoResult, IoVec};
use crate::options::bytes;
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Writable for Qcow {
    fn store(entry: L2Entry, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.0.to_be_bytes());
    }

    async fn prepare(&self) -> IoResult {
        if !self.is_writable || self.is_frozen.load(Ordering::SeqCst) {
            return Err(Errno::EPERM);
        }
        check_ready(self).await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            // Held, so that the file does not grow meanwhile.
            let _header = self.header.lock().await;
            if !self.is_prepared.load(Ordering::Acquire) {
                // Its last cluster may be there in part.
                let file = file(self);
                if file.len() < self.file_len() {
                    lengthen(&file, self.file_len()).await?;
                }
                self.mapping.journal.mark_in_use(true);
                self.is_prepared.store(true, Ordering::Release);
            }
        }
        self.mapping.end_rest();
        Ok(())
    }
}

impl Writer for Qcow {
    async fn ensure_table(&self, guest: u64) -> IoResult {
        ensure_table(self, guest).await
    }

    fn need(&self, entry: L2Entry) -> Result<Need, BadEntry> {
        Ok(match self.geometry.decode(entry) {
            Cluster::Normal { host } if self.is_inside(host) => Need::Nothing,
            _ => Need::Cluster,
        })
    }

    fn entry_showing(&self, _: L2Entry, host: u64, _: Range<u64>) -> L2Entry {
        L2Entry(host)
    }

    /// What a compressed cluster had is lost: others may share its clusters.
    fn references(&self, _: L2Entry) -> Option<Release> {
        None
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        announce(self, Event::WriteAio).await;
        file(self).write(host, from, WriteFlags::empty()).await
    }

    fn guest_end(&self, _: u64) -> u64 {
        self.size
    }
}

impl TwoLevels for Qcow {
    type UpperLock<'a> = LockGuard<'a, ()>;
    type Claim = ();

    /// No other table refers to it.
    fn has_own_table(&self, guest: u64) -> bool {
        self.has_table(guest)
    }

    async fn lock_upper(&self) -> LockGuard<'_, ()> {
        self.l1_lock.lock().await
    }

    async fn make_table(&self, guest: u64) -> IoResult<NewTable<'_, Qcow>> {
        let clusters = self.geometry.table_clusters();
        let taken = take_at_end(self, clusters, clusters).await?;
        let file = file(self);
        announce(self, Event::L2AllocWrite).await;
        if !taken.run.is_fresh {
            file.zero(taken.host(), self.geometry.table_size(), ZeroFlags::empty()).await?;
            file.flush().await?;
        }
        let entry = taken.host().to_be_bytes();
        let place = self.l1_offset + self.mapping.shape.table_index(guest) * 8;
        Ok(NewTable { taken, claim: (), entry, place, replaced: None })
    }

    fn show_table(&self, _: &LockGuard<'_, ()>, guest: u64, host: u64) {
        self.l1.set(self.mapping.shape.table_index(guest), L1Entry(host));
    }
}

impl Qcow {
    pub(super) async fn flush_all(&self) -> IoResult {
        if !self.is_prepared.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        write_suspects(self).await?;
        settle_journal(self).await?;
        file(self).flush().await
    }

    /// Brings the image to rest: nothing is in flight. What was written is durable.
    pub(super) async fn close_image(&self) -> IoResult {
        if !self.is_prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        begin_rest(self).await;
        self.flush_all().await?;
        check_sound(self).await?;
        self.cut_file().await;
        file(self).flush().await?;
        self.mapping.journal.mark_in_use(false);
        self.is_prepared.store(false, Ordering::Release);
        Ok(())
    }

    /// Makes the image empty, so that its backing file shows. Nothing is in flight.
    pub(super) async fn empty(&self) -> IoResult {
        self.prepare().await?;
        begin_rest(self).await;
        write_suspects(self).await?;
        settle_journal(self).await?;
        let _lock = self.l1_lock.lock().await;
        let file = file(self);
        announce(self, Event::EmptyImagePrepare).await;
        announce(self, Event::L1Update).await;
        // From here on the disk may have any of the entries.
        file.zero(self.l1_offset, self.l1.entries() * 8, ZeroFlags::empty()).await?;
        file.flush().await?;
        (0..self.l1.entries()).for_each(|index| self.l1.set(index, L1Entry(0)));
        self.mapping.cache.forget(|_| true);
        let header = self.header.lock().await.clone();
        self.forget_clusters(&header).await;
        file.flush().await
    }

    /// Records another backing file, by its name as it is stored. The format records no format.
    pub(super) async fn change_backing(&self, name: Option<&str>) -> Result<(), Error> {
        let failed = |errno| Error::os("Could not change the backing file", errno);
        let stored = name.map(|name| bytes::bytes_of(name).into_owned()).unwrap_or_default();
        if stored.len() > header::BACKING_NAME_LIMIT as usize {
            return Err(Error::new("Backing file name too long"));
        }
        self.prepare().await.map_err(failed)?;
        let file = file(self);
        let (mut backing_offset, backing_len) = (0, stored.len() as u32);
        if !stored.is_empty() {
            let clusters = self.geometry.clusters(stored.len() as u64);
            let taken = take_at_end(self, clusters, clusters).await.map_err(failed)?;
            backing_offset = taken.host();
            let from = IoVec::from_ref(&stored);
            file.write(backing_offset, &from, WriteFlags::empty()).await.map_err(failed)?;
            file.flush().await.map_err(failed)?;
            // Whether the write below fails or not, the header may name it.
            taken.keep();
        }
        let mut header = self.header.lock().await;
        let changed = Header { backing_offset, backing_len, ..header.clone() };
        let fields = changed.encode_backing();
        let from = IoVec::from_ref(&fields);
        file.write(header::BACKING_AT, &from, WriteFlags::empty()).await.map_err(failed)?;
        file.flush().await.map_err(failed)?;
        *header = changed;
        *self.backing_name.lock() = name.map(str::to_owned);
        Ok(())
    }
}
