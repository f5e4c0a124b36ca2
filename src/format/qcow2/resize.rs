//! Resizing the disk.
//!
//! What the orders of [`super::order`] make of it. **Longer**: what is beyond the old end (of a machine's state, or
//! of a shrink that was cut off) is unmapped, and what a backing file would show there is zeroed, before the header's
//! new length is written; whatever a crash leaves of it is beyond the end. **Shorter**: what is beyond the new end is
//! unmapped first, as by a discard, then the header is written, then the L1 entries beyond are dropped. Where
//! unmapping would show the backing file (version 2), the header comes first.

use super::Qcow2;
use super::layout::L1Entry;
use crate::block::*;
use crate::cow::{
    Empty, Found, Release, SliceNo, empty_clusters, lookup, pin_suspects, reads_zero, write_zeroes,
    zero_range,
};
use crate::io::{Errno, IoResult, IoVec, epoch};
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// As [`Image::resize`] and [`Image::grow`]; nothing else is in flight.
    pub(super) async fn resize_to(
        &self,
        len: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let version = self.header.now().version;
        self.resize_for_version(version, len, shrink, preallocation).await
    }

    /// The same, of an image whose header is about to have another version.
    pub(super) async fn resize_for_version(
        &self,
        version: u32,
        len: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        self.check_resize(version, len, shrink, preallocation)?;
        let failed = |errno| Error::os("Could not resize the image", errno);
        self.prepare_writing().await.map_err(failed)?;
        let old = self.size();
        if len < old {
            return self.shorten(len).await;
        }
        let data_len = self.geometry.external_data.then(|| self.data().driver().len());
        let grown = self.lengthen(old, len, preallocation).await;
        if grown.is_err()
            && let Err(errno) = self.undo_growth(old, data_len).await
        {
            // What is left beyond the end does no harm there, but takes room.
            log::debug!("{}: giving back what a resize took: {errno}", self.settings.name);
        }
        grown
    }

    /// Gives back what a resize that has failed took beyond a disk of `len` bytes, so that an image that found no
    /// room takes none. An external data file gets its old length, `data_len`.
    async fn undo_growth(&self, len: u64, data_len: Option<u64>) -> IoResult {
        self.unmap(len, Empty::Crop).await?;
        self.shrink_l1(len).await?;
        self.cut_to_use().await?;
        if let Some(len) = data_len.filter(|&len| len < self.data().driver().len())
            && let Some(image) = self.data().driver().image()
        {
            // A device keeps its length.
            let _ = image.resize(len, true).await;
        }
        Ok(())
    }

    /// What can be said before anything changes, in QEMU's order.
    fn check_resize(
        &self,
        version: u32,
        len: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let refused = |text: &str| Err(Error::new(text));
        if !self.settings.is_writable {
            return refused("Image is read-only");
        }
        if !len.is_multiple_of(SECTOR) {
            return refused("The new size must be a multiple of 512");
        }
        if version < 3 && self.header.now().nb_snapshots > 0 {
            return refused("Can't resize a v2 image which has snapshots");
        }
        self.snapshots.check()?;
        let old = self.size();
        if len < old && preallocation != Preallocation::Off {
            return refused("Preallocation can't be used for shrinking an image");
        }
        if len < old && !shrink {
            return Err(Error::new(format!(
                "{len} bytes are less than the disk's {old}, and shrinking was not asked for"
            )));
        }
        let uncovered = old.next_multiple_of(self.geometry.cluster_size()) < len;
        let hides = matches!(preallocation, Preallocation::Falloc | Preallocation::Full);
        if !self.geometry.zero_flag && uncovered && !hides && self.shows_backing(old..len) {
            return Err(Error::os("Failed to zero out new clusters", Errno::ENOTSUP));
        }
        Ok(())
    }

    /// Whether the backing file has something to show in a range that is not mapped.
    pub(super) fn shows_backing(&self, guest: Range<u64>) -> bool {
        self.backing().is_some_and(|backing| !guest.is_empty() && backing.len() > guest.start)
    }

    async fn lengthen(&self, old: u64, new: u64, mode: Preallocation) -> Result<(), Error> {
        let failed = |what: &'static str| move |errno| Error::os(what, errno);
        let cluster_end = old.next_multiple_of(self.geometry.cluster_size());
        let zeroing = failed("Failed to zero out new clusters");
        self.unmap(old, Empty::Crop).await.map_err(zeroing)?;
        let entries = self.geometry.l1_entries_for(new);
        self.grow_l1(entries).await.map_err(failed("Failed to grow the L1 table"))?;
        let stale = self.lengthen_data_file(old, new).await;
        let stale = stale.map_err(failed("Failed to resize the data file"))?;
        let hides = self.shows_backing(old..new);
        // With zero clusters, what begins behind the end needs nothing written.
        let written = match hides && self.geometry.zero_flag {
            true => old.next_multiple_of(self.geometry.subcluster_size()).min(new),
            false => cluster_end.min(new),
        };
        self.zero_tail(old..written, stale).await.map_err(zeroing)?;
        if hides && self.geometry.zero_flag && written < new {
            let zeroed = zero_range(self, written, new - written, ZeroFlags::empty()).await;
            zeroed.map_err(zeroing)?;
        }
        let mode = match mode {
            // Every byte of the data file is the disk's from the start.
            Preallocation::Off if self.settings.raw_data => Preallocation::Metadata,
            mode => mode,
        };
        if mode != Preallocation::Off {
            let placing = failed("Could not allocate new clusters");
            let tail = old..cluster_end.min(new);
            self.preallocate_tail(tail, mode, hides).await.map_err(placing)?;
            let whole = cluster_end..new.max(cluster_end);
            self.preallocate(whole, mode, hides).await.map_err(placing)?;
        }
        self.write_size(new).await.map_err(failed("Failed to update the image size"))
    }

    /// The bytes behind the disk's end in its last cluster may be anything; from `stale` on, those of an
    /// external data file are zeroes.
    async fn zero_tail(&self, tail: Range<u64>, stale: u64) -> IoResult {
        let mut at = tail.start;
        while at < tail.end {
            let (stop, is_zero) = {
                let _visit = self.mapping.tables().visits.enter();
                let end = if at < stale { tail.end.min(stale) } else { tail.end };
                let piece = lookup(self, at, end - at).await?;
                let stop = at + piece.len;
                let is_zero_data = at >= stale && matches!(piece.found, Found::Data { .. });
                (stop, is_zero_data || reads_zero(self, at..stop).await?)
            };
            if !is_zero {
                write_zeroes(self, at..stop).await?;
            }
            at = stop;
        }
        Ok(())
    }

    /// A file of its own for the data is as long as the disk, and, if it is to be a disk image by
    /// itself, reads as zeroes where the disk does. How far what is behind the disk's old end may be
    /// anything.
    async fn lengthen_data_file(&self, old: u64, new: u64) -> IoResult<u64> {
        if !self.geometry.external_data {
            return Ok(u64::MAX);
        }
        let data = self.data();
        let there = data.len();
        self.nodes.grow(&data, new).await?;
        let stale = old..new.min(there);
        if self.settings.raw_data && !stale.is_empty() {
            data.zero(stale.start, stale.end - stale.start, ZeroFlags::UNMAP).await?;
            return Ok(old);
        }
        Ok(there.max(old))
    }

    async fn shorten(&self, new: u64) -> Result<(), Error> {
        let failed = |what: &'static str| move |errno| Error::os(what, errno);
        let discarding = failed("Failed to discard cropped clusters");
        let sizing = failed("Failed to update the image size");
        let counted = self.space.check_table(self.metadata()).await;
        counted.map_err(failed("Failed to discard unused refblocks"))?;
        let shows = self.shows_backing(new..self.size());
        match (shows, self.geometry.zero_flag) {
            (false, _) => {
                self.unmap(new, Empty::Crop).await.map_err(discarding)?;
                self.write_size(new).await.map_err(sizing)?;
            }
            (true, true) => {
                self.unmap(new, Empty::Cut).await.map_err(discarding)?;
                self.write_size(new).await.map_err(sizing)?;
            }
            (true, false) => {
                self.write_size(new).await.map_err(sizing)?;
                self.unmap(new, Empty::Crop).await.map_err(discarding)?;
            }
        }
        self.shrink_l1(new).await.map_err(failed("Failed to reduce the number of L2 tables"))?;
        self.cut_to_use().await.map_err(failed("Failed to discard unused clusters"))?;
        if self.geometry.external_data
            && let Some(image) = self.data().driver().image()
        {
            // A device keeps its length.
            let _ = image.resize(new, true).await;
        }
        Ok(())
    }

    /// Empties the entries of all guest clusters from `from` on, as far as the L1 table reaches.
    pub(super) async fn unmap(&self, from: u64, kind: Empty) -> IoResult {
        let end = self.mapping.l1_entries() * self.geometry.l2_coverage();
        let from = from.next_multiple_of(self.geometry.cluster_size());
        empty_clusters(self, from..end, kind).await
    }

    /// Writes the disk's length, when all that it relies on is durable; then it holds.
    async fn write_size(&self, size: u64) -> IoResult {
        self.flush_all().await?;
        let mut header = self.metadata().lock_header().await;
        let mut new = header.clone();
        new.size = size;
        let written = header.write(new).await;
        match written {
            Ok(()) => self.size.store(size, Ordering::SeqCst),
            Err(_) => {
                // The disk may have either, until the one that holds is written again.
                let mut old = header.clone();
                old.size = self.size();
                header.show(old);
            }
        }
        written
    }

    /// Drops the L1 entries beyond a disk of `len` bytes, whose tables name no clusters any more.
    pub(super) async fn shrink_l1(&self, len: u64) -> IoResult {
        let lock = self.mapping.lock_l1().await;
        let first = self.geometry.l1_entries_for(len);
        let tables: Vec<u64> = (first..self.mapping.l1_entries())
            .map(|index| self.mapping.l1_at(index).l2_table())
            .filter(|&table| table != 0)
            .collect();
        if tables.is_empty() {
            return Ok(());
        }
        // A table that is made there later has other entries.
        let per_table = self.geometry.l2_entries() / self.mapping.tables().cache.entries() as u64;
        let is_dropped = |SliceNo(slice): SliceNo| slice >= first * per_table;
        let doubtful = pin_suspects(self, is_dropped).await?;
        let count = self.mapping.l1_entries() - first;
        let empty = vec![0; count as usize * 8];
        let place = self.header.now().l1_table_offset + first * 8;
        let empty = IoVec::from_ref(&empty);
        self.event(Event::L1ShrinkWriteTable).await;
        let written = self.file().write(place, &empty, WriteFlags::empty()).await;
        // Also if it has failed: the disk may have either, and nothing goes to the old tables.
        (first..self.mapping.l1_entries()).for_each(|index| lock.set(index, L1Entry(0)));
        if written.is_ok() {
            self.mapping.tables().forget_suspects(doubtful);
        }
        self.mapping.tables().cache.forget(is_dropped);
        drop(lock);
        written?;
        self.event(Event::L1ShrinkFreeL2Clusters).await;
        let release = |&table: &u64| Release { run: self.geometry.run_of(table), discard: true };
        self.free(&tables.iter().map(release).collect::<Vec<_>>()).await;
        Ok(())
    }

    /// Gives back what is free, and cuts the file behind the last cluster in use.
    pub(super) async fn cut_to_use(&self) -> IoResult {
        self.flush_all().await?;
        epoch::synchronize(&self.data().members()).await;
        self.space.cut_to_use(self.metadata()).await
    }
}
