//! Partially present blocks of a differencing image ([MS-VHDX] 2.5.1.2).
//!
//! A sector bitmap for each chunk says which sectors are present; the others are the parent's.
//!
//! Bitmaps are read and never written: a write to such a block makes it whole.

use super::Vhdx;
use super::bytes::{MIB, u64_at};
use super::mapping::{ENTRY_BYTES, Entry, state};
use crate::cow::{Found, Piece, file, read_padded};
use crate::io::{Errno, IoResult, IoVec};

/// Bytes of a bitmap that are looked at at once.
const AT_ONCE: usize = 512;

impl Vhdx {
    /// What the bytes from guest offset `at` on are, of at most `want` inside one block, which has some of its sectors;
    /// `host` is where the first byte has its place.
    pub(super) async fn sort_out_partial(&self, at: u64, want: u64, host: u64) -> IoResult<Piece> {
        let bitmap = self.bitmap_of(at).await?;
        let geometry = self.geometry();
        // The number of the first sector in its chunk.
        let sector = (at >> geometry.sector_bits) & ((8 << 20) - 1);
        let mut bytes = [0; AT_ONCE];
        let first = sector / 8;
        let read = (MIB - first).min(AT_ONCE as u64);
        let bits = &mut bytes[..read as usize];
        read_padded(&file(self), bitmap + first, &IoVec::from_mut(bits)).await?;
        let is_there = |sector: u64| bits[(sector / 8 - first) as usize] >> (sector % 8) & 1 != 0;
        let is_own = is_there(sector);
        let end = (first + read) * 8;
        let same = (sector..end).take_while(|&sector| is_there(sector) == is_own).count() as u64;
        // The first sector may begin before `at`.
        let inside = at & ((1 << geometry.sector_bits) - 1);
        let len = want.min((same << geometry.sector_bits) - inside);
        let found = match is_own {
            true => Found::Data { host, exclusive: false },
            false => Found::Unallocated { host: Some(host) },
        };
        Ok(Piece { len, found })
    }

    /// Where the sector bitmap of a guest offset is.
    async fn bitmap_of(&self, at: u64) -> IoResult<u64> {
        let geometry = self.geometry();
        let chunk = at >> (geometry.block_bits + geometry.chunk_bits());
        let place = self.regions.bat.offset + geometry.bitmap_entry_of(chunk) * ENTRY_BYTES;
        let mut bytes = [0; ENTRY_BYTES as usize];
        read_padded(&file(self), place, &IoVec::from_mut(&mut bytes)).await?;
        let entry = Entry(u64_at(&bytes, 0));
        let (state, host) = (entry.state(), entry.host());
        match self.layout.has_room(host, MIB, self.file_len()) {
            true if state == state::PRESENT => Ok(host),
            _ => {
                self.report(format_args!(
                    "the sector bitmap of guest offset {at:#x} has the state {state} and is said to be at {host:#x}"
                ));
                Err(Errno::EIO)
            }
        }
    }
}
