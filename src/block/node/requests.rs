//! The slow path of a node: every request, with fallbacks for drivers that lack one.
//!
//! Range, permission, overlap and the ladder of ways to write zeroes are seen to here.

use super::pieces::{is_zero, round_down};
use super::{DetectZeroes, Node};
use crate::block::event;
use crate::block::extents::REST;
use crate::block::overlap::Listed;
use crate::block::{Abilities, Event, Extent, Perm, Precision, Status, WriteFlags, ZeroFlags};
use crate::io::{Errno, IoResult, IoVec};
use std::ops::Range;

impl Node {
    /// Reads. Any offset and length inside the disk, any memory.
    pub async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        self.check_range(at, into.len())?;
        if into.is_empty() {
            return Ok(());
        }
        let align = self.traits.request_align() as u64;
        if (at | into.len()) & (align - 1) == 0 && into.is_aligned(self.traits.buffer_align()) {
            return self.read_pieces(at, into).await;
        }
        // Bounce: whole blocks into memory of our own, and from there.
        let mut done = 0;
        while done < into.len() {
            let start = round_down(at + done, align);
            let end = (at + into.len()).next_multiple_of(align).min(start + self.bounce_limit());
            let mut bounce = self.bounce(end - start)?;
            self.read_pieces(start, &bounce.io_vec()).await?;
            let skip = at + done - start;
            let n = (into.len() - done).min(end - start - skip);
            into.slice(done, n).copy_from(&bounce[skip as usize..][..n as usize]);
            done += n;
        }
        Ok(())
    }

    /// Writes. Any offset and length inside the disk, any memory. With the resize permission, on a
    /// disk that can ([`Abilities::GROW`]), also past the end, which moves, for direct I/O to the end
    /// of the block.
    pub async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        self.check_writable()?;
        let mut flags = flags;
        flags.set(WriteFlags::GROW, self.grows(at, from.len())?);
        if from.is_empty() {
            return if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) };
        }
        self.mark_write(at, from.len());
        let (_writing, _recorded) = (self.writing(), self.record(at, from.len()));
        if self.options.detect_zeroes != DetectZeroes::Off && is_zero(from) {
            let mut zero = ZeroFlags::empty();
            zero.set(ZeroFlags::UNMAP, self.options.detect_zeroes == DetectZeroes::Unmap);
            zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
            return self.zero(at, from.len(), zero).await;
        }
        let native = self.traits.abilities().contains(Abilities::FUA);
        let pass = if native { flags } else { flags - WriteFlags::FUA };
        let align = self.traits.request_align() as u64;
        if (at | from.len()) & (align - 1) == 0 {
            let _listed = self.overlap.write(at..at + from.len()).await;
            self.event(Event::Pwritev).await;
            self.write_aligned(at, from, pass).await?;
        } else {
            self.write_modified(at, from, pass).await?;
        }
        self.event(Event::PwritevDone).await;
        if flags.contains(WriteFlags::FUA) && !native { self.flush().await } else { Ok(()) }
    }

    /// Makes a range read as zeroes, by the quickest way there is. Past the end as [`Node::write`].
    pub async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.check_writable()?;
        let mut flags = flags;
        flags.set(ZeroFlags::GROW, self.grows(at, len)?);
        self.mark_write(at, len);
        let (_writing, _recorded) = (self.writing(), self.record(at, len));
        let mut pass = flags - ZeroFlags::FUA;
        if !self.options.discard {
            pass -= ZeroFlags::UNMAP;
        }
        let align = self.traits.zero_align() as u64;
        let end = at + len;
        let (middle, middle_end) = (at.next_multiple_of(align).min(end), end - end % align);
        self.event(Event::PwritevZero).await;
        if middle < middle_end && self.traits.abilities().contains(Abilities::ZERO) {
            self.zero_written(at, middle - at, flags).await?;
            let mut pos = middle;
            while pos < middle_end {
                let n = (middle_end - pos).min(self.traits.max_zero());
                let listed = self.overlap.write(pos..pos + n).await;
                let result = self.driver.zero(pos, n, pass).await;
                drop(listed);
                match result {
                    Err(errno) if errno.is_unsupported() => {
                        self.zero_written(pos, n, flags).await?
                    }
                    other => other?,
                }
                pos += n;
            }
            self.zero_written(middle_end, end - middle_end, flags).await?;
        } else {
            self.zero_written(at, len, flags).await?;
        }
        self.event(Event::PwritevDone).await;
        if flags.contains(ZeroFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    /// Advises that a range is no longer needed. What does not fill whole units, or cannot be given
    /// back, is left as it is, and that is success.
    pub async fn discard(&self, at: u64, len: u64) -> IoResult {
        self.check_writable()?;
        self.check_range(at, len)?;
        if !self.traits.abilities().contains(Abilities::DISCARD) {
            return Ok(());
        }
        let align = self.traits.discard_align() as u64;
        let (mut pos, end) = (at.next_multiple_of(align), (at + len) - (at + len) % align);
        let (_writing, _recorded) = (self.writing(), self.record(pos, end.saturating_sub(pos)));
        while pos < end {
            let n = (end - pos).min(self.traits.max_discard());
            let _listed = self.overlap.write(pos..pos + n).await;
            let result = self.driver.discard(pos, n).await;
            self.discards.count(n, result.is_ok());
            match result {
                Err(errno) if errno.is_unsupported() => return Ok(()),
                other => other?,
            }
            pos += n;
        }
        Ok(())
    }

    /// Makes what this node takes from its backing file in a range its own: reads it and writes it
    /// back, with no other write in between. The range grows to whole blocks; what the node has
    /// itself is left as it is.
    pub async fn populate(&self, at: u64, len: u64) -> IoResult {
        self.check_writable()?;
        self.check_range(at, len)?;
        let align = self.traits.request_align() as u64;
        let (start, end) = (round_down(at, align), (at + len).next_multiple_of(align));
        let _listed = self.overlap.serialise(start..end, || self.members()).await;
        let mut pos = start;
        while pos < end.min(self.driver.len()) {
            let left = end.min(self.driver.len()) - pos;
            let extent = self.driver.status(pos, left, Precision::Allocation).await?;
            let n = extent.len.next_multiple_of(align).min(self.bounce_limit());
            if !extent.status.contains(Status::ALLOCATED) {
                let mut bounce = self.bounce(n)?;
                self.read_pieces(pos, &bounce.io_vec()).await?;
                self.event(Event::CorWrite).await;
                self.write_back(pos, &bounce.io_vec()).await?;
            }
            pos += n;
        }
        Ok(())
    }

    /// Zeroes are written as such, which may cost no space.
    async fn write_back(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        let (len, align) = (from.len(), self.traits.zero_align() as u64);
        let fits = at.is_multiple_of(align) && len.is_multiple_of(align);
        if fits
            && at + len <= self.len()
            && len <= self.traits.max_zero()
            && self.traits.abilities().contains(Abilities::ZERO)
            && is_zero(from)
        {
            match self.driver.zero(at, len, ZeroFlags::empty()).await {
                Err(errno) if errno.is_unsupported() => {}
                result => return result,
            }
        }
        self.write_pieces(at, from, WriteFlags::empty()).await
    }

    /// Makes every write completed before, on any worker, durable.
    pub async fn flush(&self) -> IoResult {
        if self.options.no_flush || self.traits.abilities().contains(Abilities::READ_ONLY) {
            return Ok(());
        }
        match event::has_listeners() {
            true => self.flush_announced().await,
            false => self.driver.flush().await,
        }
    }

    /// The status of a range: at least its first byte, at most `len` bytes.
    pub async fn status(&self, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
        self.check_range(at, len)?;
        let own = self.driver.len();
        if at >= own {
            return self.status_of_rest(at, len, precision).await;
        }
        let mut extent = self.driver.status(at, len.min(own - at), precision).await?;
        extent.len = extent.len.min(len);
        if at + extent.len == own && extent.status == REST {
            extent.len = len;
        }
        Ok(extent)
    }

    /// Records a write in the bitmaps now, and once more when it has ended.
    pub(in crate::block) fn record(&self, at: u64, len: u64) -> Recorded<'_> {
        let recorded = Recorded { node: self, at, len };
        recorded.mark();
        recorded
    }

    pub(in crate::block) fn check_range(&self, at: u64, len: u64) -> IoResult {
        match at.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// Whether a write to this range reaches past the end, with the blocks that it is rounded out to.
    ///
    /// # Errors
    /// It must not.
    fn grows(&self, at: u64, len: u64) -> IoResult<bool> {
        let may =
            self.traits.abilities().contains(Abilities::GROW) && self.held().contains(Perm::RESIZE);
        if !may {
            return self.check_range(at, len).map(|()| false);
        }
        let align = self.traits.request_align() as u64;
        let end = at.checked_add(len).and_then(|end| end.checked_next_multiple_of(align));
        let end = end.filter(|&end| i64::try_from(end).is_ok()).ok_or(Errno::EIO)?;
        Ok(len > 0 && end > self.driver.len())
    }

    /// Lists a write of whole blocks as under way, once those that it must wait for have ended.
    pub(in crate::block) async fn list_write(&self, range: Range<u64>) -> Listed<'_> {
        self.overlap.write(range).await
    }
}

/// A slow write, until it has ended.
pub(in crate::block) struct Recorded<'a> {
    node: &'a Node,
    at: u64,
    len: u64,
}

impl Recorded<'_> {
    fn mark(&self) {
        let Recorded { node, at, len } = *self;
        if !node.bitmaps.is_idle() {
            node.bitmaps.record(at, len, node.len(), || node.members());
        }
    }
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        self.mark();
    }
}
