//! The sector bitmaps before blocks: which sectors of a block are the image's own.
//!
//! All other sectors of a block of a differencing image are the parent's. In any other image they read as what the block
//! has there, zeroes mostly, as they do in QEMU. Before such a block is written it becomes whole: the parent's sectors are
//! copied, and the bitmap says that all are there. That a block is whole is kept with its entry in memory, so requests read
//! its bitmap once.

use super::Vpc;
use super::mapping::Entry;
use crate::block::working_memory::COPY_LIMIT;
use crate::block::{Access, SECTOR, WriteFlags};
use crate::cow::{Format, Found, Piece, file, lookup, pin, read_padded, read_range};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

/// Bytes of a bitmap that are looked at at once.
const AT_ONCE: u64 = 512;

/// A part of a bitmap.
struct Bits {
    bytes: [u8; AT_ONCE as usize],
    /// The numbers of the first sector and of that behind the last, in the block.
    first: u64,
    end: u64,
}

impl Bits {
    fn has(&self, sector: u64) -> bool {
        let bit = sector - self.first;
        self.bytes[(bit / 8) as usize] & 0x80 >> (bit % 8) != 0
    }

    /// How many sectors from this one on are of the same kind.
    fn same(&self, sector: u64) -> u64 {
        let is_own = self.has(sector);
        (sector..self.end).take_while(|&sector| self.has(sector) == is_own).count() as u64
    }
}

impl Vpc {
    /// The part of the bitmap at `bitmap` that has a sector of the block.
    async fn bits(&self, bitmap: u64, sector: u64) -> IoResult<Bits> {
        let part = sector / 8 / AT_ONCE;
        let mut bytes = [0; AT_ONCE as usize];
        let place = bitmap + part * AT_ONCE;
        read_padded(&file(self), place, &IoVec::from_mut(&mut bytes)).await?;
        let first = part * AT_ONCE * 8;
        let sectors = self.header.block_size() / SECTOR;
        Ok(Bits { bytes, first, end: sectors.min(first + AT_ONCE * 8) })
    }

    /// Whether the bitmap says that all sectors of a block are there.
    async fn is_full(&self, bitmap: u64) -> IoResult<bool> {
        let sectors = self.header.block_size() / SECTOR;
        let mut sector = 0;
        while sector < sectors {
            let bits = self.bits(bitmap, sector).await?;
            if !bits.has(sector) || sector + bits.same(sector) < bits.end {
                return Ok(false);
            }
            sector = bits.end;
        }
        Ok(true)
    }

    /// What the bytes from guest offset `at` on are, of at most `want` inside one block of a differencing image; `host` is
    /// where the first byte has its place.
    pub(super) async fn sort_out_by_bitmap(
        &self,
        at: u64,
        want: u64,
        host: u64,
    ) -> IoResult<Piece> {
        let inside = self.mapping.shape.offset_in_cluster(at);
        let bitmap = host - inside - self.header.bitmap_len();
        let sector = inside / SECTOR;
        let bits = self.bits(bitmap, sector).await?;
        let same = bits.same(sector);
        let is_own = bits.has(sector);
        // The first sector may begin before `at`.
        let len = want.min(same * SECTOR - inside % SECTOR);
        let found = match is_own {
            true => Found::Data { host, exclusive: false },
            false => Found::Unallocated { host: Some(host) },
        };
        let is_all = bits.first == 0 && bits.end * SECTOR == self.header.block_size();
        if is_own && is_all && bits.same(0) == bits.end {
            self.note_whole(at).await?;
        }
        Ok(Piece { len, found })
    }

    /// Notes that the block of a guest offset, which has its place, is whole. Entries of blocks that are there never change
    /// otherwise.
    async fn note_whole(&self, at: u64) -> IoResult {
        let pinned = pin(self, at).await?;
        let (_, index) = self.mapping.slice_of(at);
        pinned.publish(&[(index, pinned.get(index).whole())]);
        Ok(())
    }

    /// Makes the block of a guest offset whole, if it is there. The caller holds the block's range.
    pub(super) async fn make_whole(&self, guest: u64) -> IoResult {
        let (_, index) = self.mapping.slice_of(guest);
        let entry: Entry = pin(self, guest).await?.get(index);
        let bad = |bad| self.bad_entry(guest, entry, bad, Access::Write);
        let Some(block) = self.place(entry).map_err(bad)? else { return Ok(()) };
        if entry.is_whole() {
            return Ok(());
        }
        let bitmap = block - self.header.bitmap_len();
        if !self.is_full(bitmap).await? {
            if self.is_differencing() {
                self.copy_missing(guest & !(self.header.block_size() - 1), block).await?;
                file(self).flush().await?;
            }
            self.fill_bitmap(bitmap).await?;
        }
        self.note_whole(guest).await
    }

    /// Copies what a block at guest offset `start` has not from the parent to where it has its place.
    async fn copy_missing(&self, start: u64, block: u64) -> IoResult {
        let end = (start + self.header.block_size()).min(self.size);
        let mut at = start;
        while at < end {
            let piece = lookup(self, at, (end - at).min(COPY_LIMIT)).await?;
            if matches!(piece.found, Found::Unallocated { .. }) {
                let len = piece.len as usize;
                let mut copy = AlignedBuf::for_overwriting(len, 4096).ok_or(Errno::ENOMEM)?;
                Box::pin(read_range(self, at, &copy.io_vec())).await?;
                let host = block + (at - start);
                file(self).write(host, &copy.source(), WriteFlags::empty()).await?;
            }
            at += piece.len;
        }
        Ok(())
    }

    /// Has a bitmap say that all sectors of its block are there.
    pub(super) async fn fill_bitmap(&self, bitmap: u64) -> IoResult {
        let len = self.header.bitmap_len();
        let most = len.min(64 << 10);
        let full = vec![0xff; most as usize];
        for at in (0..len).step_by(most as usize) {
            let part = IoVec::from_ref(&full[..(len - at).min(most) as usize]);
            file(self).write(bitmap + at, &part, WriteFlags::empty()).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sector_has_the_highest_bit() {
        let mut bytes = [0; AT_ONCE as usize];
        bytes[..3].copy_from_slice(&[0b1100_0001, 0xff, 0b1000_0000]);
        let bits = Bits { bytes, first: 4096, end: 4096 + 20 };
        let runs: Vec<_> = [0, 2, 7, 17].map(|n| (bits.has(4096 + n), bits.same(4096 + n))).into();
        assert_eq!(runs, [(true, 2), (false, 5), (true, 10), (false, 3)]);
    }
}
