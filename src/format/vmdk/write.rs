//! Writing: what the layer ([`crate::cow`]) asks of a sparse extent, and in which order things reach the disk.
//!
//! 1. Before the first write since the image was opened its descriptor has another content ID, durably: images that stand
//!    on it know that it has changed ([`super::shared`]).
//! 2. The file is longer, durably, before anything is written to its new grains ([`super::space`]): entries never lead past
//!    its end, and no grain is given away twice, although nothing counts grains.
//! 3. A new grain table, and its copy, read as zeroes, durably, before an entry of the directory names them.
//! 4. Data is written before its entry. What was copied around it, and compressed grains, are durable before their
//!    entries.
//! 5. An entry is written to the copy of its table, then to the table, which is the one that is read. A flush makes both
//!    durable.
//!
//! A kill or a power cut at any moment leaves an image that opens, with all that was flushed, and at worst space that
//! nothing names, and an entry in the copy that the table does not have yet.

use super::layout::{Kind, Packing};
use super::sparse::{BadEntry, Grain, Sparse, Stored, TableAt};
use crate::block::{Event, SECTOR, WriteFlags, ZeroFlags};
use crate::cow::{
    Empty, Format, Need, Release, Writable, Writer, Zeroing, announce, begin_rest, check_ready,
    check_sound, discard_in_place, file, lengthen, pin_empty, settle_journal, take_at_end,
    write_suspects, zero_in_place, zero_range,
};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Writable for Sparse {
    fn store(entry: Grain, bytes: &mut [u8]) {
        let stored = entry.0.to_le_bytes();
        bytes.copy_from_slice(&stored[..bytes.len()]);
    }

    async fn prepare(&self) -> IoResult {
        self.shared.check_writable()?;
        check_ready(self).await?;
        self.shared.mark_changed().await?;
        if !self.is_ready.load(Ordering::Acquire) {
            // Held, so that the file does not grow meanwhile.
            let _lock = self.lock.lock().await;
            if !self.is_ready.load(Ordering::Acquire) {
                // Its last grain may be there in part.
                let file = file(self);
                if file.len() < self.file_len() {
                    lengthen(&file, self.file_len()).await?;
                }
                self.mapping.journal.mark_in_use(true);
                self.is_ready.store(true, Ordering::Release);
            }
        }
        self.mapping.end_rest();
        Ok(())
    }

    async fn write_table(&self, guest: u64, at: u64, bytes: &AlignedBuf) -> IoResult {
        let file = file(self);
        if let Some(copy) = self.place_in_copy(guest, at, file.len()) {
            file.write(copy, &bytes.source(), WriteFlags::empty()).await?;
        }
        file.write(at, &bytes.source(), WriteFlags::empty()).await
    }
}

impl Writer for Sparse {
    async fn ensure_table(&self, guest: u64) -> IoResult {
        match self.has_table(guest) {
            true => Ok(()),
            false => self.make_table(guest).await,
        }
    }

    fn need(&self, entry: Grain) -> Result<Need, BadEntry> {
        Ok(match self.place_of_grain(entry)? {
            Stored::At(host) if self.is_inside(host) => Need::Nothing,
            _ => Need::Cluster,
        })
    }

    fn entry_showing(&self, _: Grain, host: u64, _: Range<u64>) -> Grain {
        Grain(host / SECTOR)
    }

    /// No entry drops its grain, but for compressed ones, which are lost.
    fn references(&self, _: Grain) -> Option<Release> {
        None
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        announce(self, Event::WriteAio).await;
        file(self).write(host, from, WriteFlags::empty()).await
    }

    fn guest_end(&self, _: u64) -> u64 {
        self.len()
    }
}

impl Zeroing for Sparse {
    fn disk_len(&self) -> u64 {
        self.len()
    }

    fn has_zero_entries(&self) -> bool {
        self.layout.has_zero_grains
    }

    /// A grain that is there stays, because nothing would find it again; it is emptied where it is
    /// ([`Zeroing::before_emptying`]).
    fn emptied(
        &self,
        old: Grain,
        _: u64,
        _: Range<u64>,
        _: Empty,
    ) -> Result<(Grain, bool), BadEntry> {
        let is_plain = self.layout.packing == Packing::No;
        let new = match self.place_of_grain(old)? {
            Stored::At(host) if is_plain && self.is_inside(host) => old,
            _ => Grain::ZERO,
        };
        Ok((new, false))
    }

    async fn before_emptying(&self, range: Range<u64>, kind: Empty) -> IoResult {
        let flags = if kind == Empty::Zero { ZeroFlags::empty() } else { ZeroFlags::UNMAP };
        zero_in_place(self, range, flags).await
    }
}

impl Sparse {
    /// Where the copy of a table has what the table has at `at`. A copy that is not in the file is left alone.
    fn place_in_copy(&self, guest: u64, at: u64, file_len: u64) -> Option<u64> {
        let index = self.mapping.shape.table_index(guest);
        let table = self.place_of_table(self.directory.get(index))?;
        let copy = self.place_of_table(self.copies.as_ref()?.get(index))?;
        let is_there = copy + self.layout.table_bytes() <= file_len;
        is_there.then(|| copy + (at - table))
    }

    /// Makes a grain table and its copy. Most images are made with all of them.
    async fn make_table(&self, guest: u64) -> IoResult {
        let _lock = self.lock.lock().await;
        // Another task may have made it.
        if self.has_table(guest) {
            return Ok(());
        }
        let index = self.mapping.shape.table_index(guest);
        // Entries name sectors.
        let table = self.layout.table_bytes().next_multiple_of(SECTOR);
        let len = if self.copies.is_some() { 2 * table } else { table };
        let units = len.div_ceil(self.space_unit());
        let taken = take_at_end(self, units, units).await?;
        let (file, host) = (file(self), taken.host());
        announce(self, Event::L2AllocWrite).await;
        if !taken.run.is_fresh {
            file.zero(host, len, ZeroFlags::empty()).await?;
        }
        file.flush().await?;
        // Whether the writes below fail or not, entries may name it.
        taken.keep();
        announce(self, Event::L1Update).await;
        let put = async |directory: u64, place: u64| {
            let entry = ((place / SECTOR) as u32).to_le_bytes();
            let at = directory + index * self.layout.entry_bytes();
            file.write(at, &IoVec::from_ref(&entry), WriteFlags::empty()).await
        };
        if let (Some(directory), Some(copies)) = (self.layout.copy, &self.copies) {
            put(directory, host + table).await?;
            copies.set(index, TableAt((host + table) / SECTOR));
        }
        put(self.layout.directory, host).await?;
        // What a new table holds need not be read.
        let _first = pin_empty(self, guest).await?;
        self.directory.set(index, TableAt(host / SECTOR));
        Ok(())
    }

    /// Brings the extent to rest: nothing is in flight. What was written is durable.
    pub async fn close_extent(&self) -> IoResult {
        if !self.is_ready.load(Ordering::Acquire) {
            self.mapping.journal.mark_in_use(false);
            return Ok(());
        }
        begin_rest(self).await;
        self.write_doubtful().await?;
        file(self).flush().await?;
        check_sound(self).await?;
        self.cut_file().await?;
        file(self).flush().await?;
        self.mapping.journal.mark_in_use(false);
        self.is_ready.store(false, Ordering::Release);
        Ok(())
    }

    /// Hands over what failed to be written before, and the entries that wait.
    pub async fn write_doubtful(&self) -> IoResult {
        if !self.is_ready.load(Ordering::Acquire) {
            return Ok(());
        }
        write_suspects(self).await?;
        settle_journal(self).await
    }

    /// Whether zeroes need not be written as data.
    pub fn can_zero(&self) -> bool {
        self.says_zeroes()
            || self.layout.packing == Packing::No && self.shared.backing_child().is_none()
    }

    /// Makes a range read as zeroes. Grains that are there are emptied in their place.
    ///
    /// # Errors
    /// ENOTSUP where zeroes are data.
    pub async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        if self.says_zeroes() {
            return zero_range(self, at, len, flags).await;
        }
        if !self.can_zero() {
            return Err(Errno::ENOTSUP);
        }
        // What is not there reads as zeroes already.
        self.prepare().await?;
        zero_in_place(self, at..at + len, flags).await
    }

    /// Gives the storage back what the grains of a range have, which stay where they are.
    pub async fn discard(&self, at: u64, len: u64) -> IoResult {
        self.prepare().await?;
        discard_in_place(self, at..at + len).await
    }

    /// Whether its grains can say that they are zeroes.
    fn says_zeroes(&self) -> bool {
        self.layout.kind == Kind::Hosted && self.layout.has_zero_grains
    }
}
