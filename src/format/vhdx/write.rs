//! Writing: what the layer ([`crate::cow`]) asks of this format, and in which order things reach the disk.
//!
//! 1. Before the first write a header says, durably, that file and disk change: fresh GUIDs.
//! 2. Data is written to its block, which is new space at the end of the file or belongs to the guest's block already. What
//!    was copied or zeroed around it is durable before the next step.
//! 3. The changed sectors of the block allocation table go to the log, and are durable there ([`super::log::append`]).
//!    With the first of them a header names the log.
//! 4. They are written in their places. Readers are shown the entries, and the guest is answered.
//! 5. When the image is closed all of that is made durable; then a header says that the log is empty, and what was not
//!    used at the end of the file is cut off.
//!
//! After a crash the log is replayed when the image is opened: each entry is the old one or the new one, whole. The log
//! also says how long the file has to be, so no entry leads past its end. New space that no entry names is leaked.

use super::mapping::{BadEntry, Entry, state};
use super::{State, Vhdx, header};
use crate::block::{Access, Event, Node, WriteFlags, ZeroFlags};
use crate::cow::{
    Empty, Format, Journaling, Need, Release, Stop, Writable, Writer, Zeroing, announce,
    begin_rest, check_ready, check_sound, discard_in_place, file, pin, write_suspects,
    zero_in_place,
};
use crate::format::vhdx::header::Header;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::atomic::Ordering;
use uuid::Uuid;

impl State {
    /// Writes the changed header over the one that is not current, durably.
    pub(super) async fn write(
        &mut self,
        file: &Node,
        change: impl FnOnce(&mut Header),
    ) -> IoResult {
        let mut new = self.header.clone();
        change(&mut new);
        new.sequence = new.sequence.checked_add(1).ok_or(Errno(libc::EOVERFLOW))?;
        let place = 1 - self.place;
        let bytes = new.encode();
        file.write(header::PLACES[place], &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        file.flush().await?;
        *self = State { header: new, place };
        Ok(())
    }
}

impl Writable for Vhdx {
    fn store(entry: Entry, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.0.to_le_bytes());
    }

    async fn prepare(&self) -> IoResult {
        if !self.is_writable || self.is_frozen.load(Ordering::SeqCst) {
            return Err(Errno::EPERM);
        }
        check_ready(self).await?;
        self.mark_changed().await?;
        self.mapping.end_rest();
        Ok(())
    }

    async fn write_table(&self, _: u64, at: u64, bytes: &AlignedBuf) -> IoResult {
        self.write_logged(at, bytes).await
    }
}

impl Journaling for Vhdx {
    fn refers_to_nothing(&self, entry: Entry) -> bool {
        !matches!(entry.state(), state::PRESENT | state::PARTIAL)
    }
}

impl Writer for Vhdx {
    /// The table is there in whole.
    async fn ensure_table(&self, _: u64) -> IoResult {
        Ok(())
    }

    fn need(&self, entry: Entry) -> Result<Need, BadEntry> {
        match entry.state() {
            state::PRESENT => self.check_place(entry).map(|_| Need::Nothing),
            // All of it becomes the image's own.
            state::PARTIAL if self.geometry().has_parent => {
                self.check_place(entry).map(|host| Need::Fill { host })
            }
            state::PARTIAL => Err(BadEntry::State),
            _ => Ok(Need::Cluster),
        }
    }

    fn entry_showing(&self, _: Entry, host: u64, _: Range<u64>) -> Entry {
        Entry::present(host)
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
        self.geometry().size
    }
}

impl Zeroing for Vhdx {
    fn disk_len(&self) -> u64 {
        self.geometry().size
    }

    fn has_zero_entries(&self) -> bool {
        true
    }

    /// A block that is there stays, because nothing would find it again; it is emptied where it is
    /// ([`Zeroing::before_emptying`]). Any other shows zeroes already, unless there is a parent.
    fn emptied(
        &self,
        old: Entry,
        _: u64,
        _: Range<u64>,
        _: Empty,
    ) -> Result<(Entry, bool), BadEntry> {
        let new = match old.state() {
            state::PRESENT => self.check_place(old).map(|_| old)?,
            state::PARTIAL => Entry::present(self.check_place(old)?),
            state::NOT_PRESENT if self.children.len() > 1 => Entry(state::ZERO),
            _ => old,
        };
        Ok((new, false))
    }

    async fn before_emptying(&self, range: Range<u64>, kind: Empty) -> IoResult {
        if self.geometry().has_parent {
            self.zero_partial(range.clone()).await?;
        }
        // The disk may end inside its last block, and the file with it.
        let range = range.start..range.end.min(self.geometry().size);
        match kind {
            // The blocks of a fixed image stay allocated.
            Empty::Discard if self.metadata.is_fixed => Ok(()),
            Empty::Discard => discard_in_place(self, range).await,
            Empty::Unmap | Empty::Cut | Empty::Crop if !self.metadata.is_fixed => {
                zero_in_place(self, range, ZeroFlags::UNMAP).await
            }
            _ => zero_in_place(self, range, ZeroFlags::empty()).await,
        }
    }
}

impl Vhdx {
    /// Zeroes bytes of any size: what is not present shows zeroes already.
    pub(super) async fn zero_bytes(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.prepare().await?;
        // The blocks of a fixed image stay allocated.
        let kept = if self.metadata.is_fixed { ZeroFlags::UNMAP } else { ZeroFlags::empty() };
        zero_in_place(self, at..at + len, flags - kept).await
    }

    /// Fills blocks that have some of their sectors with zeroes, durably, before their entries say that all of them are
    /// there.
    async fn zero_partial(&self, range: Range<u64>) -> IoResult {
        let (file, bits) = (file(self), self.geometry().block_bits);
        let mut is_filled = false;
        for block in range.start >> bits..=(range.end - 1) >> bits {
            let guest = block << bits;
            let entry = pin(self, guest).await?.get(self.mapping.slice_of(guest).1);
            if entry.state() == state::PARTIAL {
                let bad = |bad| self.bad_entry(guest, entry, bad, Access::Write);
                let host = self.check_place(entry).map_err(bad)?;
                let len = self.geometry().block_size().min(self.file_len() - host);
                file.zero(host, len, ZeroFlags::empty()).await?;
                is_filled = true;
            }
        }
        match is_filled {
            true => file.flush().await,
            false => Ok(()),
        }
    }

    /// Says, durably, that the file changes, and the disk with it, unless that was said since the image was opened.
    async fn mark_changed(&self) -> IoResult {
        if self.is_prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = self.header.lock().await;
        if self.is_prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let len = self.file_len();
        let (file_write, data_write) = (Uuid::new_v4(), Uuid::new_v4());
        let change = |header: &mut Header| {
            header.file_write = file_write;
            header.data_write = data_write;
            // It has no entries that count.
            header.log_guid = Uuid::nil();
        };
        state.write(&file(self), change).await?;
        self.is_prepared.store(true, Ordering::Release);
        drop(state);
        self.note_durable(len).await;
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

    /// Brings the image to rest: nothing is in flight. What was written is durable in its place, and the log is empty.
    pub(super) async fn close_image(&self) -> IoResult {
        let is_ours = self.mapping.stopped.get() != Stop::ForGood;
        if self.is_writable && !self.is_frozen.load(Ordering::SeqCst) && is_ours {
            self.keep_linkage().await?;
        }
        if !self.is_prepared.load(Ordering::Acquire) || !is_ours {
            return Ok(());
        }
        begin_rest(self).await;
        self.flush_all().await?;
        check_sound(self).await?;
        self.end_log().await?;
        // The log says no more how long the file has to be.
        self.cut_file().await;
        file(self).flush().await?;
        self.is_prepared.store(false, Ordering::Release);
        Ok(())
    }
}
