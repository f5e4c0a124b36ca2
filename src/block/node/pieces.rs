//! Transfers of any shape, cut into those that a driver accepts.
//!
//! The driver sees aligned requests within its limits, through bounce buffers where necessary.

use super::Node;
use crate::block::working_memory::BOUNCE_LIMIT;
use crate::block::{Event, WriteFlags, ZeroFlags};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec, is_aligned};

impl Node {
    /// The longest bounce buffer, in bytes: a whole number of blocks.
    pub(super) fn bounce_limit(&self) -> u64 {
        BOUNCE_LIMIT.max(self.traits.request_align() as u64)
    }

    /// A buffer for `len` bytes, aligned for the node. Its bytes are undefined until they are written.
    pub(super) fn bounce(&self, len: u64) -> IoResult<AlignedBuf> {
        AlignedBuf::for_overwriting(len as usize, self.memory_align()).ok_or(Errno::ENOMEM)
    }

    fn memory_align(&self) -> usize {
        self.traits.buffer_align().max(self.traits.request_align()) as usize
    }

    /// The next piece of `all` from `done` on that fits the limits of one transfer.
    fn piece<'m>(&self, all: &IoVec<'m>, done: u64) -> IoVec<'m> {
        let mut n = (all.len() - done).min(self.traits.max_transfer() as u64);
        let mut piece = all.slice(done, n);
        let most = self.traits.max_segments() as usize;
        if piece.as_raw().len() > most {
            n = piece.as_raw()[..most].iter().map(|s| s.iov_len as u64).sum();
            n = round_down(n, self.traits.request_align() as u64);
            // So many tiny segments that they do not even fill a block: go by what memory gives.
            n = n.max(self.traits.request_align() as u64).min(all.len() - done);
            piece = all.slice(done, n);
        }
        piece
    }

    /// Whether a transfer fits the limits as it is.
    fn is_one_piece(&self, all: &IoVec<'_>) -> bool {
        let segments = all.as_raw().len() as u64;
        all.len() <= self.traits.max_transfer() as u64
            && segments <= self.traits.max_segments() as u64
    }

    pub(super) async fn read_pieces(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        if self.is_one_piece(into) {
            return self.driver.read(at, into).await;
        }
        let mut done = 0;
        while done < into.len() {
            let piece = self.piece(into, done);
            if piece.as_raw().len() > self.traits.max_segments() as usize {
                let mut bounce = self.bounce(piece.len())?;
                self.driver.read(at + done, &bounce.io_vec()).await?;
                piece.copy_from(&bounce);
            } else {
                self.driver.read(at + done, &piece).await?;
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Reads a block that a request covers in part: the one that it begins in, ends in, or both.
    async fn read_rest(&self, at: u64, into: &IoVec<'_>, (head, tail): (bool, bool)) -> IoResult {
        self.rounding_event(head.then_some(Event::PwritevRmwHead)).await;
        self.rounding_event(tail.then_some(Event::PwritevRmwTail)).await;
        self.read_block(at, into).await?;
        self.rounding_event(head.then_some(Event::PwritevRmwAfterHead)).await;
        self.rounding_event(tail.then_some(Event::PwritevRmwAfterTail)).await;
        Ok(())
    }

    /// Reads one block, into memory that is aligned for blocks but perhaps not for the disk. Past the
    /// end there are zeroes.
    async fn read_block(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        if at >= self.len() {
            into.zero();
            return Ok(());
        }
        if into.is_aligned(self.traits.buffer_align()) {
            return self.read_pieces(at, into).await;
        }
        let mut bounce = self.bounce(into.len())?;
        self.read_pieces(at, &bounce.io_vec()).await?;
        into.copy_from(&bounce);
        Ok(())
    }

    pub(super) async fn write_pieces(
        &self,
        at: u64,
        from: &IoVec<'_>,
        flags: WriteFlags,
    ) -> IoResult {
        if self.is_one_piece(from) {
            return self.driver.write(at, from, flags).await;
        }
        let mut done = 0;
        while done < from.len() {
            let piece = self.piece(from, done);
            if piece.as_raw().len() > self.traits.max_segments() as usize {
                let mut bounce = self.bounce(piece.len())?;
                piece.copy_to(&mut bounce);
                self.driver.write(at + done, &bounce.io_vec(), flags).await?;
            } else {
                self.driver.write(at + done, &piece, flags).await?;
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Writes whole blocks, from memory that may not be aligned.
    pub(super) async fn write_aligned(
        &self,
        at: u64,
        from: &IoVec<'_>,
        flags: WriteFlags,
    ) -> IoResult {
        if is_aligned(from.as_raw(), self.traits.buffer_align()) {
            return self.write_pieces(at, from, flags).await;
        }
        let mut done = 0;
        while done < from.len() {
            let n = (from.len() - done).min(self.bounce_limit());
            let mut bounce = self.bounce(n)?;
            from.slice(done, n).copy_to(&mut bounce);
            self.write_pieces(at + done, &bounce.io_vec(), flags).await?;
            done += n;
        }
        Ok(())
    }

    /// Read-modify-write: blocks that the request covers in part are read, changed and written
    /// whole, with no other write to them in between.
    pub(super) async fn write_modified(
        &self,
        at: u64,
        from: &IoVec<'_>,
        flags: WriteFlags,
    ) -> IoResult {
        let align = self.traits.request_align() as u64;
        let (start, end) = (round_down(at, align), (at + from.len()).next_multiple_of(align));
        let _listed = self.overlap.serialise(start..end, || self.members()).await;
        let mut pos = start;
        while pos < end {
            let n = (end - pos).min(self.bounce_limit());
            let mut bounce = self.bounce(n)?;
            let tail = n - align;
            let has_tail = pos + n > at + from.len();
            if pos < at {
                let events = (true, has_tail && tail == 0);
                self.read_rest(pos, &bounce.io_vec().slice(0, align), events).await?;
            }
            if has_tail && (tail > 0 || pos >= at) {
                let rest = bounce.io_vec().slice(tail, align);
                self.read_rest(pos + tail, &rest, (false, true)).await?;
            }
            let skip = at.saturating_sub(pos);
            let done = (pos + skip) - at;
            let take = (from.len() - done).min(n - skip);
            from.slice(done, take).copy_to(&mut bounce[skip as usize..][..take as usize]);
            self.event(Event::Pwritev).await;
            self.write_pieces(pos, &bounce.io_vec(), flags).await?;
            pos += n;
        }
        Ok(())
    }

    /// The last rung of the zero ladder: zeroes written as data.
    pub(super) async fn zero_written(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        if len == 0 {
            return Ok(());
        }
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(Errno::ENOTSUP);
        }
        let memory = len.min(BOUNCE_LIMIT) as usize;
        let zeroes = AlignedBuf::new(memory, self.memory_align()).ok_or(Errno::ENOMEM)?;
        let align = self.traits.request_align() as u64;
        let mut pass = WriteFlags::empty();
        pass.set(WriteFlags::GROW, flags.contains(ZeroFlags::GROW));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeroes.len() as u64);
            let part = zeroes.source().slice(0, n);
            if ((at + done) | n) & (align - 1) == 0 {
                let _listed = self.overlap.write(at + done..at + done + n).await;
                self.write_aligned(at + done, &part, pass).await?;
            } else {
                self.write_modified(at + done, &part, pass).await?;
            }
            done += n;
        }
        Ok(())
    }
}

pub(super) fn round_down(value: u64, align: u64) -> u64 {
    value & !(align - 1)
}

/// Whether all bytes are zero. The memory may change meanwhile; a caller that acts on the answer
/// writes zeroes, which is one of the values that the guest may expect to find.
pub(super) fn is_zero(list: &IoVec<'_>) -> bool {
    let mut chunk = [0u8; 4096];
    let mut at = 0;
    while at < list.len() {
        let n = (list.len() - at).min(chunk.len() as u64);
        list.slice(at, n).copy_to(&mut chunk);
        if chunk[..n as usize].iter().any(|&b| b != 0) {
            return false;
        }
        at += n;
    }
    true
}
