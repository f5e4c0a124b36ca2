//! Writing: what the layer ([`crate::cow`]) asks of this format, and in which order things reach the disk.
//!
//! 1. New space at the end of the file begins with a footer at the file's new end. Then the bitmaps of the new blocks are
//!    written, the first of them over the old footer, and all of it becomes durable, with the length of the file.
//! 2. Data is written to its block. What was copied from a parent or zeroed around it is durable before the next step.
//! 3. The entry of the block is written. Readers are shown it, and the guest is answered.
//! 4. A block that has only some of its sectors becomes whole before it is written: the parent's sectors are copied,
//!    durably, and the bitmap then says that all are there. Until then it says what it said.
//! 5. When the image is closed, all of that is made durable. The footer moves to the end of the last block that is used,
//!    durably, and the file is cut off behind it.
//!
//! A crash at any moment leaves an image whose entries lead inside the file, with what was flushed. Between two writes of
//! the first step the file may end without a footer; the copy at the head, which never changes, tells the same. The next
//! opening for writing gives back new space that no entry names, in the order of the fifth step.

use super::mapping::{BadPlace, Entry};
use super::space::{self, end_of_blocks};
use super::{Vpc, footer, header::Header};
use crate::block::{Error, Event, HandOver, LocalFuture, WriteFlags, ZeroFlags};
use crate::cow::{
    Empty, Journaling, Need, Release, Stop, Writable, Writer, Zeroing, announce, begin_rest,
    check_ready, check_sound, discard_in_place, file, write_suspects, zero_in_place,
};
use crate::io::{Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Writable for Vpc {
    fn store(entry: Entry, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.bytes());
    }

    async fn prepare(&self) -> IoResult {
        if !self.is_writable || self.is_frozen.load(Ordering::SeqCst) {
            return Err(Errno::EPERM);
        }
        check_ready(self).await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            self.mend_head().await?;
            self.is_prepared.store(true, Ordering::Release);
        }
        self.mapping.end_rest();
        Ok(())
    }
}

impl Journaling for Vpc {
    fn refers_to_nothing(&self, entry: Entry) -> bool {
        entry.bitmap().is_none()
    }
}

impl Writer for Vpc {
    /// The table was made with the image. A block that is there becomes whole.
    async fn ensure_table(&self, guest: u64) -> IoResult {
        self.make_whole(guest).await
    }

    fn need(&self, entry: Entry) -> Result<Need, BadPlace> {
        Ok(match self.place(entry)? {
            Some(_) => Need::Nothing,
            None => Need::Cluster,
        })
    }

    fn entry_showing(&self, _: Entry, host: u64, _: Range<u64>) -> Entry {
        Entry::whole_at(host - self.header.bitmap_len())
    }

    /// No entry ever drops its block.
    fn references(&self, _: Entry) -> Option<Release> {
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

impl Zeroing for Vpc {
    fn disk_len(&self) -> u64 {
        self.size
    }

    fn has_zero_entries(&self) -> bool {
        false
    }

    fn emptied(
        &self,
        old: Entry,
        _: u64,
        _: Range<u64>,
        _: Empty,
    ) -> Result<(Entry, bool), BadPlace> {
        self.place(old).map(|_| (old, false))
    }
}

impl Vpc {
    /// Zeroes bytes of an image without a parent, where what is not present shows zeroes already.
    pub(super) async fn zero_bytes(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.prepare().await?;
        zero_in_place(self, at..at + len, flags).await
    }

    /// What is the parent's stays so.
    pub(super) async fn discard_bytes(&self, at: u64, len: u64) -> IoResult {
        self.prepare().await?;
        discard_in_place(self, at..at + len).await
    }

    /// Writes the copy of the footer at the head again if it was found damaged, durably.
    async fn mend_head(&self) -> IoResult {
        if self.head_is_whole.load(Ordering::Acquire) {
            return Ok(());
        }
        self.write_footer(0).await?;
        file(self).flush().await?;
        self.head_is_whole.store(true, Ordering::Release);
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

    /// Brings the image to rest: nothing is in flight. What was written is durable, and the footer is at its end.
    pub(super) async fn close_image(&self) -> IoResult {
        let is_ours = self.mapping.stopped.get() != Stop::ForGood;
        if !self.is_prepared.load(Ordering::Acquire) || !is_ours {
            return Ok(());
        }
        begin_rest(self).await;
        self.flush_all().await?;
        check_sound(self).await?;
        self.cut_file().await?;
        self.is_prepared.store(false, Ordering::Release);
        Ok(())
    }

    /// Reads again what another process may have changed.
    async fn reload(&self) -> Result<(), Error> {
        let file = file(self);
        let mut found = footer::read(&file).await?;
        let header = Header::read(&file, found.footer.header_at, self.size).await?;
        if header != self.header || found.footer.id != self.footer.id {
            return Err(Error::new("the image has another layout than when it was opened"));
        }
        if self.is_writable {
            let start =
                space::start(&header, end_of_blocks(&file, &header, self.clear_from).await?);
            space::settle(&self.name, &file, &header, &mut found, start).await?;
            let len = file.driver().len();
            self.space_start.store(start, Ordering::Release);
            self.space.replace(space::extent(&header, self.size, start, len));
        }
        self.file_len.store(file.driver().len(), Ordering::Release);
        self.head_is_whole.store(found.head_is_whole, Ordering::Release);
        self.tail_is_whole.store(found.tail_is_whole, Ordering::Release);
        self.mapping.cache.forget(|_| true);
        self.is_prepared.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl HandOver for Vpc {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.close_image())
    }
}
