//! Writing: what the layer ([`crate::cow`]) asks of this format.
//!
//! The order: the image says, durably, that it needs a check before a cluster is allocated ([`super::idle`]); a crash then
//! leaves at worst entries past the end of the file, which the check takes away, and clusters that nothing names. A new L2 table
//! reads as zeroes before the L1 entry names it, and data is written before its entry; what was copied with it is durable
//! before its entry is on the disk, or the entry waits in the front end's memory ([`super::journal`]). When the image is
//! closed all of that is durable before the image says that it needs no check any more.

use super::header::{Features, Header};
use super::mapping::{BadEntry, L1Entry, L2Entry, ZERO};
use super::open::read_l1;
use super::{Qed, RecordedName, check, space};
use crate::block::{Error, Event, Node, SECTOR, WriteFlags, ZeroFlags};
use crate::cow::{
    Empty, Format, Found, LockGuard, Need, NewTable, Release, Stop, TwoLevels, Writable, Writer,
    Zeroing, announce, backing, begin_rest, check_ready, check_sound, discard_in_place,
    ensure_table, file, lookup, settle_journal, take_at_end, write_suspects, zero_in_place,
    zero_range,
};
use crate::io::{Errno, IoResult, IoVec};
use crate::options::bytes;
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Writable for Qed {
    fn store(entry: L2Entry, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.0.to_le_bytes());
    }

    async fn prepare(&self) -> IoResult {
        if !self.is_writable || self.is_frozen.load(Ordering::SeqCst) {
            return Err(Errno::EPERM);
        }
        check_ready(self).await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            let mut header = self.header.lock().await;
            let new = header.clone().with_mark(header.mark());
            if new != *header {
                // The other bits are unknown, and what they promise does not hold after a write.
                write_header(&file(self), &new).await?;
                *header = new;
            }
            self.mapping.journal.mark_in_use(true);
            self.is_prepared.store(true, Ordering::Release);
        }
        if self.unclosed.take_due() {
            self.unnamed.reuse(&self.space);
        }
        self.mapping.end_rest();
        Ok(())
    }
}

/// Writes the fixed fields, durably. They are in one sector.
pub(super) async fn write_header(file: &Node, header: &Header) -> IoResult {
    file.write(0, &IoVec::from_ref(&header.encode()), WriteFlags::empty()).await?;
    file.flush().await
}

impl Writer for Qed {
    async fn ensure_table(&self, guest: u64) -> IoResult {
        ensure_table(self, guest).await
    }

    fn need(&self, entry: L2Entry) -> Result<Need, BadEntry> {
        Ok(match self.cluster_of(entry)? {
            None => Need::Cluster,
            Some(_) => Need::Nothing,
        })
    }

    fn entry_showing(&self, _: L2Entry, host: u64, _: Range<u64>) -> L2Entry {
        L2Entry(host)
    }

    /// No entry ever drops its cluster.
    fn references(&self, _: L2Entry) -> Option<Release> {
        None
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        announce(self, Event::WriteAio).await;
        file(self).write(host, from, WriteFlags::empty()).await
    }

    fn guest_end(&self, _: u64) -> u64 {
        self.size()
    }
}

impl TwoLevels for Qed {
    type UpperLock<'a> = LockGuard<'a, ()>;
    type Claim = ();

    /// No other table refers to it.
    fn has_own_table(&self, guest: u64) -> bool {
        self.has_table(guest)
    }

    async fn lock_upper(&self) -> LockGuard<'_, ()> {
        self.l1_lock.lock().await
    }

    async fn make_table(&self, guest: u64) -> IoResult<NewTable<'_, Qed>> {
        self.mark().await?;
        let clusters = u64::from(self.geometry().table_clusters);
        let taken = take_at_end(self, clusters, clusters).await?;
        let file = file(self);
        announce(self, Event::L2AllocWrite).await;
        if !taken.run.is_fresh {
            file.zero(taken.host(), self.geometry().table_size(), ZeroFlags::empty()).await?;
            file.flush().await?;
        }
        let entry = taken.host().to_le_bytes();
        let place = self.l1_offset + self.mapping.shape.table_index(guest) * 8;
        Ok(NewTable { taken, claim: (), entry, place, replaced: None })
    }

    fn show_table(&self, _: &LockGuard<'_, ()>, guest: u64, host: u64) {
        self.l1.set(self.mapping.shape.table_index(guest), L1Entry(host));
    }
}

impl Zeroing for Qed {
    fn disk_len(&self) -> u64 {
        self.size()
    }

    fn has_zero_entries(&self) -> bool {
        true
    }

    /// A cluster that is there stays, because nothing would find it again; it is emptied where it is
    /// ([`Zeroing::before_emptying`]).
    fn emptied(
        &self,
        old: L2Entry,
        _: u64,
        _: Range<u64>,
        kind: Empty,
    ) -> Result<(L2Entry, bool), BadEntry> {
        let new = match self.cluster_of(old)? {
            Some(_) => old,
            None if kind == Empty::Discard && self.children.len() == 1 => old,
            None => L2Entry(ZERO),
        };
        Ok((new, false))
    }

    async fn before_emptying(&self, range: Range<u64>, kind: Empty) -> IoResult {
        let flags = match kind {
            Empty::Discard => return discard_in_place(self, range).await,
            Empty::Zero => ZeroFlags::empty(),
            Empty::Unmap | Empty::Cut | Empty::Crop => ZeroFlags::UNMAP,
        };
        zero_in_place(self, range, flags).await
    }
}

impl Qed {
    pub(super) async fn flush_all(&self) -> IoResult {
        if !self.is_prepared.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        write_suspects(self).await?;
        settle_journal(self).await?;
        file(self).flush().await
    }

    /// Brings the image to rest: nothing is in flight. What was written is durable, and the image needs no check.
    pub(super) async fn close_image(&self) -> IoResult {
        let is_ours = self.mapping.stopped.get() != Stop::ForGood;
        if !self.is_prepared.load(Ordering::Acquire) || !is_ours {
            return Ok(());
        }
        begin_rest(self).await;
        self.flush_all().await?;
        check_sound(self).await?;
        self.unmark().await?;
        self.mapping.journal.mark_in_use(false);
        if self.unnamed.forget() {
            // What a killed process has left, and nobody came for.
            let cut = check::cut_unnamed(&file(self)).await;
            cut.map_err(|error| error.errno().unwrap_or(Errno::EIO))?;
            let len = file(self).driver().len();
            self.space.replace(space::extent(len, self.geometry()));
        }
        self.is_prepared.store(false, Ordering::Release);
        Ok(())
    }

    /// Sets the length of the disk, in bytes: the header alone says it.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) async fn resize_to(&self, len: u64) -> Result<(), Error> {
        if len < self.size() {
            return Err(Error::new("Shrinking images is currently not supported"));
        }
        let geometry = self.geometry();
        if !geometry.is_size(len) {
            return Err(Error::new("Invalid image size specified"));
        }
        let failed = |errno| Error::os("Failed to update the image size", errno);
        self.prepare().await.map_err(failed)?;
        self.load_l1(geometry.l1_entries(len)).await.map_err(failed)?;
        // Durable before the header shows it.
        self.zero_new(self.size()..len).await.map_err(failed)?;
        write_suspects(self).await.map_err(failed)?;
        file(self).flush().await.map_err(failed)?;
        let mut header = self.header.lock().await;
        let changed = Header { size: len, ..header.clone() };
        write_header(&file(self), &changed).await.map_err(failed)?;
        *header = changed;
        self.size.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// Loads entries of the L1 table that the disk has not needed so far. The table itself is as long as it will ever be.
    async fn load_l1(&self, needed: u64) -> IoResult {
        let _lock = self.l1_lock.lock().await;
        let old = self.l1.entries();
        if needed > old {
            let more = read_l1(&file(self), self.l1_offset, old..needed).await?;
            self.l1.grow(needed);
            for (index, entry) in (old..).zip(more) {
                self.l1.set(index, entry);
            }
        }
        Ok(())
    }

    /// Makes what is behind the end of the disk read as zeroes: what a backing file has there, and what is left in
    /// clusters.
    async fn zero_new(&self, range: Range<u64>) -> IoResult {
        let shown = backing(self).map_or(0, |backing| backing.len());
        let mut at = range.start;
        while at < range.end {
            let visit = self.mapping.visits.enter();
            let piece = lookup(self, at, range.end - at).await?;
            drop(visit);
            let end = match piece.found {
                Found::Data { .. } => at + piece.len,
                Found::Unallocated { .. } => (at + piece.len).min(shown),
                Found::Zero { .. } | Found::Compressed(_) | Found::Mixed { .. } => at,
            };
            if end > at {
                zero_range(self, at, end - at, ZeroFlags::empty()).await?;
            }
            at += piece.len;
        }
        Ok(())
    }

    /// Records another backing file, by its name as it is stored, behind the fields of the header.
    pub(super) async fn change_backing(
        &self,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<(), Error> {
        let failed = |errno| Error::os("Could not change the backing file", errno);
        let stored = name.map(|name| bytes::bytes_of(name).into_owned()).unwrap_or_default();
        self.prepare().await.map_err(failed)?;
        let mut header = self.header.lock().await;
        let changed = header.with_backing(&stored, format)?;
        let file = file(self);
        // The fields and the name change at once where they are in one sector; a longer name is written first, while
        // nothing names what is there.
        let mut head = changed.encode().to_vec();
        head.extend_from_slice(&stored);
        if head.len() as u64 > SECTOR {
            let without =
                Header { features: changed.features - Features::BACKING_FILE, ..changed.clone() };
            write_header(&file, &without).await.map_err(failed)?;
        }
        file.write(0, &IoVec::from_ref(&head), WriteFlags::empty()).await.map_err(failed)?;
        file.flush().await.map_err(failed)?;
        let format = changed.backing_format();
        *header = changed;
        *self.backing.lock() = RecordedName { name: name.map(str::to_owned), format };
        Ok(())
    }
}
