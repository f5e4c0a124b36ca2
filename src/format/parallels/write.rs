//! Writing: what the layer ([`crate::cow`]) asks of this format.
//!
//! The order:
//!
//! * Before anything is written the header says, durably, that the image is in use, and names no extension any more: what
//!   is written would not be in its dirty bitmaps.
//! * New clusters lie at the end of the file, which is longer, durably, before an entry names one of them: no entry leads
//!   past the end, and no cluster is given away twice, although nothing counts clusters.
//! * Data is written before the entry that names its cluster. A flush makes both durable.
//! * Clusters stay where they are: zeroing and discarding empty them in their place.
//! * Closing the image makes all of that durable, cuts off what was not used at the end of the file, durably, and then takes
//!   the mark back.
//!
//! A crash at any moment leaves what was flushed, the mark, and clusters that nothing names. The next opening for writing
//! finds them by the catalogue and uses them again.

use super::Parallels;
use super::mapping::{BeforeData, Entry};
use super::open::{must_not_change, read_extension, read_header, used, write_state};
use super::space::extent;
use crate::block::{Error, Event, HandOver, LocalFuture, WriteFlags, ZeroFlags};
use crate::cow::{
    Found, Journaling, Need, Release, Stop, Writable, Writer, announce, backing, begin_rest,
    check_ready, check_sound, cut, discard_in_place, file, lengthen, lookup, reads_zero,
    write_range, write_suspects,
};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Zeroes that are written at once, in bytes.
const CHUNK: u64 = 1 << 20;

impl Writable for Parallels {
    fn store(entry: Entry, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.0.to_le_bytes());
    }

    async fn prepare(&self) -> IoResult {
        if !self.is_writable || self.is_frozen.load(Ordering::SeqCst) {
            return Err(Errno::EPERM);
        }
        check_ready(self).await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            self.mark(true).await?;
        }
        self.mapping.end_rest();
        Ok(())
    }
}

impl Journaling for Parallels {
    fn refers_to_nothing(&self, entry: Entry) -> bool {
        entry.0 == 0
    }
}

impl Writer for Parallels {
    /// The catalogue was made with the image.
    async fn ensure_table(&self, _: u64) -> IoResult {
        Ok(())
    }

    fn need(&self, entry: Entry) -> Result<Need, BeforeData> {
        match entry.0 {
            0 => Ok(Need::Cluster),
            _ => self.header.offset_of(entry.0).map(|_| Need::Nothing).ok_or(BeforeData),
        }
    }

    fn entry_showing(&self, _: Entry, host: u64, _: Range<u64>) -> Entry {
        Entry(self.header.entry_at(host))
    }

    /// No entry drops its cluster.
    fn references(&self, _: Entry) -> Option<Release> {
        None
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        announce(self, Event::WriteAio).await;
        file(self).write(host, from, WriteFlags::empty()).await
    }

    fn guest_end(&self, _: u64) -> u64 {
        match self.stretch.has_gaps() {
            // Clusters are zeroed in whole before they are written.
            true => u64::MAX,
            false => self.header.size,
        }
    }
}

impl Parallels {
    /// Has the header say, durably, whether the image is in use. An image that is has all of its last cluster.
    async fn mark(&self, is_open: bool) -> IoResult {
        let mut state = self.state.lock().await;
        if is_open && self.is_prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let new = state.written(is_open);
        let file = file(self);
        if is_open && file.driver().len() < self.header.place_of(self.space.end()) {
            lengthen(&file, self.header.place_of(self.space.end())).await?;
        }
        write_state(&file, &self.header, &new).await?;
        if state.extension != 0 {
            log::warn!(
                "{}: parallels: the image is written: its dirty bitmaps are dropped",
                self.name
            );
        }
        self.bitmaps.lock().clear();
        *state = new;
        self.is_prepared.store(is_open, Ordering::Release);
        Ok(())
    }

    /// Refuses to write where the catalogue has no entries.
    fn check_mapped(&self, end: u64) -> IoResult {
        if end > self.header.mapped_end() { Err(Errno::EINVAL) } else { Ok(()) }
    }

    pub(super) async fn write_all(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        self.check_mapped(at + from.len())?;
        let mut done = 0;
        while done < from.len() {
            let (place, len) = self.stretch.first(at + done, from.len() - done);
            write_range(self, place, &from.slice(done, len)).await?;
            done += len;
        }
        Ok(())
    }

    pub(super) async fn zero_all(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.prepare().await?;
        self.check_mapped(at + len)?;
        let end = at + len;
        let mut at = at;
        while at < end {
            let (place, len) = self.stretch.first(at, end - at);
            at += self.zero_piece(place, len, flags).await?;
        }
        Ok(())
    }

    /// Makes the first bytes of a range that the layer sees read as zeroes; returns how many that were.
    async fn zero_piece(&self, place: u64, len: u64, flags: ZeroFlags) -> IoResult<u64> {
        let piece = {
            let _visit = self.mapping.visits.enter();
            let piece = lookup(self, place, len).await?;
            if let Found::Data { host, .. } = piece.found {
                file(self).zero(host, piece.len, flags).await?;
                return Ok(piece.len);
            }
            if backing(self).is_none() || reads_zero(self, place..place + piece.len).await? {
                return Ok(piece.len);
            }
            piece
        };
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(Errno::ENOTSUP);
        }
        // An entry cannot say that the backing file does not show.
        let len = piece.len.min(CHUNK);
        let zeroes = AlignedBuf::new(len as usize, 4096).ok_or(Errno::ENOMEM)?;
        write_range(self, place, &zeroes.source()).await?;
        Ok(len)
    }

    pub(super) async fn discard_all(&self, at: u64, len: u64) -> IoResult {
        self.prepare().await?;
        let mut done = 0;
        while done < len {
            let (place, len) = self.stretch.first(at + done, len - done);
            discard_in_place(self, place..place + len).await?;
            done += len;
        }
        Ok(())
    }

    pub(super) async fn flush_all(&self) -> IoResult {
        if !self.is_prepared.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        write_suspects(self).await?;
        file(self).flush().await
    }

    /// Brings the image to rest: nothing but reads is in flight. What was written is durable, and the image is not in use.
    pub(super) async fn bring_to_rest(&self) -> IoResult {
        let is_ours = self.mapping.stopped.get() != Stop::ForGood;
        if !self.is_prepared.load(Ordering::Acquire) || !is_ours {
            return Ok(());
        }
        begin_rest(self).await;
        self.flush_all().await?;
        check_sound(self).await?;
        let (file, end) = (file(self), self.space.cut());
        if !cut(&file, self.header.place_of(end)).await {
            // What is still there does not read as zeroes.
            self.space.replace(extent(&self.header, end, file.driver().len()));
        }
        file.flush().await?;
        self.mark(false).await
    }

    /// Reads again what another process may have changed.
    async fn reload(&self) -> Result<(), Error> {
        let file = file(self);
        let mut new = read_header(&file).await?;
        if !new.is_same_disk(&self.header) {
            return Err(Error::new("the image has another layout than when it was opened"));
        }
        let extension = read_extension(&self.name, &file, &new).await;
        if let Some(feature) = extension.needed.filter(|_| self.is_writable) {
            return Err(must_not_change(feature));
        }
        let mut state = self.state.lock().await;
        if self.is_writable {
            let named = used(&self.name, &file, &mut new, true).await?;
            self.forget_clusters(named, file.driver().len());
        }
        *self.bitmaps.lock() = extension.bitmaps;
        self.mapping.cache.forget(|_| true);
        self.is_prepared.store(false, Ordering::SeqCst);
        *state = new.state;
        Ok(())
    }
}

impl HandOver for Parallels {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.bring_to_rest())
    }
}
