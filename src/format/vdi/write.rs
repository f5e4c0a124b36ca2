//! Writing: what the layer ([`crate::cow`]) asks of this format.
//!
//! The order:
//!
//! * The header counts a block, durably, before an entry of the map can name it; several blocks are counted at once. So
//!   a program that takes the header's number for its next block never takes one that is named.
//! * New blocks are at the end of the file, where they read as zeroes; data is written before the entry that names
//!   its block. A flush makes both durable.
//! * Blocks stay where they are: zeroing and discarding empty them in their place.
//! * Closing the image brings header, map and file to agree ([`super::blocks::settle`]): blocks that were counted and not
//!   used go, and so do those at the end that have been emptied; their entries say that they were discarded.
//!
//! A crash at any moment leaves what was flushed, and a header that counts some blocks too many. The next opening for
//! writing counts them again; until then a check says so.

use super::blocks::{Emptied, settle};
use super::mapping::Entry;
use super::open::{read_header, settled};
use super::{Vdi, space};
use crate::block::{Error, Event, HandOver, LocalFuture, WriteFlags, ZeroFlags};
use crate::cow::{
    Journaling, Need, Release, Stop, Writable, Writer, announce, begin_rest, check_ready,
    check_sound, discard_in_place, file, write_suspects, zero_in_place,
};
use crate::io::{Errno, IoResult, IoVec};
use std::convert::Infallible;
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Writable for Vdi {
    fn store(entry: Entry, bytes: &mut [u8]) {
        entry.store(bytes);
    }

    async fn prepare(&self) -> IoResult {
        if !self.is_writable || self.is_frozen.load(Ordering::SeqCst) {
            return Err(Errno::EPERM);
        }
        check_ready(self).await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            // Where it counts too few, or the file does not have them in whole.
            self.reserve(self.space.end()).await?;
            self.is_prepared.store(true, Ordering::Release);
        }
        self.mapping.end_rest();
        Ok(())
    }
}

impl Journaling for Vdi {
    fn refers_to_nothing(&self, entry: Entry) -> bool {
        entry.block().is_none()
    }
}

impl Writer for Vdi {
    /// The map was made with the image.
    async fn ensure_table(&self, _: u64) -> IoResult {
        Ok(())
    }

    fn need(&self, entry: Entry) -> Result<Need, Infallible> {
        Ok(match entry.block() {
            None => Need::Cluster,
            Some(_) => Need::Nothing,
        })
    }

    fn entry_showing(&self, _: Entry, host: u64, _: Range<u64>) -> Entry {
        Entry(self.header.block_at(host))
    }

    /// No entry drops its block while the image is open.
    fn references(&self, _: Entry) -> Option<Release> {
        None
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        announce(self, Event::WriteAio).await;
        file(self).write(host, from, WriteFlags::empty()).await
    }

    fn guest_end(&self, _: u64) -> u64 {
        self.header.size
    }
}

impl Vdi {
    pub(super) async fn zero_blocks(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.prepare().await?;
        zero_in_place(self, at..at + len, flags).await
    }

    pub(super) async fn discard_blocks(&self, at: u64, len: u64) -> IoResult {
        self.prepare().await?;
        discard_in_place(self, at..at + len).await
    }

    pub(super) async fn flush_all(&self) -> IoResult {
        if !self.is_prepared.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        write_suspects(self).await?;
        file(self).flush().await
    }

    /// Brings the image to rest: nothing but reads is in flight. What was written is durable, and header and map agree.
    pub(super) async fn bring_to_rest(&self, emptied: Emptied) -> IoResult {
        let is_ours = self.mapping.stopped.get() != Stop::ForGood;
        if !self.is_prepared.load(Ordering::Acquire) || !is_ours {
            return Ok(());
        }
        begin_rest(self).await;
        self.flush_all().await?;
        check_sound(self).await?;
        let file = file(self);
        let mut head = self.head.lock().await;
        let settled = settle(&file, &mut head, emptied).await;
        self.mapping.cache.forget(|_| true);
        settled.map_err(|error| error.errno().unwrap_or(Errno::EIO))?;
        let end = head.0.allocated;
        self.space.replace(space::extent(&head.0, end, file.driver().len()));
        self.is_prepared.store(false, Ordering::Release);
        Ok(())
    }

    /// Reads again what another process may have changed.
    async fn reload(&self) -> Result<(), Error> {
        let file = file(self);
        let mut new = read_header(&file).await?;
        let mut head = self.head.lock().await;
        if !new.0.is_same_disk(&head.0) {
            return Err(Error::new("the image has another layout than when it was opened"));
        }
        if self.is_writable {
            let blocks = settled(&self.name, &file, &mut new, true).await?;
            self.space.replace(space::extent(&new.0, blocks.end, file.driver().len()));
        }
        self.mapping.cache.forget(|_| true);
        *head = new;
        self.is_prepared.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl HandOver for Vdi {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.bring_to_rest(Emptied::Stay))
    }
}
