//! Compressed grains: in streamOptimized extents, each behind a marker that says which grain it is and how long.
//!
//! What is read is hostile: a grain is unpacked into no more than its size, and no more is read of the file than a grain
//! that does not get smaller takes. Unpacked grains are kept, within bounds: guests read in smaller pieces.

use super::layout::{Packing as Packed, u32_at, u64_at};
use super::sparse::{Grain, Sparse};
use crate::block::{Packer, SECTOR};
use crate::cow::{Compressed, Packing, Shape, file, lookup, store_packed, take_at_end};
use crate::format::deflate;
use crate::io::{Errno, IoResult, IoVec};
use std::sync::Arc;

/// Bytes of a marker, before the stream.
const MARKER: usize = 12;

impl Sparse {
    /// The most that a stored grain takes.
    pub fn packed_limit(&self) -> u64 {
        let grain = self.layout.grain_size();
        grain + grain / 8 + 4096
    }

    /// Reads bytes of a compressed grain.
    pub async fn read_packed(&self, at: u64, place: Compressed, into: &IoVec<'_>) -> IoResult {
        let shape: Shape = self.mapping.shape;
        let grain = at >> shape.cluster_bits;
        let (packing, first) = (self.layout.packing, (grain << shape.cluster_bits) / SECTOR);
        let work = move |stored: &[u8], into: &mut [u8]| unpack(packing, first, stored, into);
        let stored = place.host..place.host + place.len;
        let (number, len) = ((self.number as u64) << 48 | grain, shape.cluster_size() as usize);
        let read = self.shared.chunks.get(number, &file(self), stored, (len, 0), work).await;
        let chunk = read.inspect_err(|_| {
            self.shared.report(format_args!(
                "the compressed grain of offset {at:#x} of extent {}, at {:#x}, cannot be unpacked",
                self.number, place.host
            ));
        })?;
        into.copy_from(&chunk[shape.offset_in_cluster(at) as usize..]);
        Ok(())
    }

    /// Stores what was packed, from offset `at` on.
    pub async fn store_units(&self, at: u64, units: &[&[u8]]) -> IoResult {
        let grain = self.layout.grain_size();
        let marked: Vec<Vec<u8>> =
            (0..).zip(units).map(|(n, unit)| self.mark(at + n * grain, unit)).collect();
        let marked: Vec<&[u8]> = marked.iter().map(Vec::as_slice).collect();
        store_packed(self, at, &marked).await
    }

    /// A packed grain as it is stored: whole sectors.
    fn mark(&self, at: u64, unit: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((MARKER + unit.len()).next_multiple_of(SECTOR as usize));
        if self.layout.packing == Packed::Marked {
            bytes.extend((at / SECTOR).to_le_bytes());
            bytes.extend((unit.len() as u32).to_le_bytes());
        }
        bytes.extend(unit);
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        bytes
    }

    /// Writes whole grains, compressed, and the rest of the last one of the disk.
    ///
    /// # Errors
    /// EINVAL for a part of a grain, EIO where something is stored, both as in QEMU.
    pub async fn write_packed(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        let grain = self.layout.grain_size();
        let mut done = 0;
        while done < from.len() {
            let inside = (at + done) % grain;
            let len = (from.len() - done).min(grain - inside);
            // Nothing is packed in vain.
            let found = {
                let _visit = self.mapping.visits.enter();
                lookup(self, at + done, 1).await?.found
            };
            if matches!(found, crate::cow::Found::Compressed(_)) {
                return Err(Errno::EIO);
            }
            if inside > 0 || len < grain && at + done + len < self.len() {
                return Err(Errno::EINVAL);
            }
            let mut bytes = vec![0; grain as usize];
            from.slice(done, len).copy_to(&mut bytes);
            let unit = self.shared.blocking.compute(move || deflate::pack_zlib(&bytes)).await;
            self.store_units(at + done, &[&unit]).await?;
            done += len;
        }
        Ok(())
    }
}

/// What packs grains: also those that do not get smaller, as there is no other way to store them.
pub fn packer() -> Packer {
    Arc::new(|grain| Some(deflate::pack_zlib(grain)))
}

/// Unpacks a stored grain, whose first sector is `first` in its extent. One that has less than a grain is the last one of
/// the disk.
fn unpack(packing: Packed, first: u64, stored: &[u8], into: &mut [u8]) -> IoResult {
    let stream = match packing {
        Packed::Bare => stored,
        _ => {
            let len = u32_at(stored, 8) as usize;
            // Some programs count from the beginning of the disk, which differs in disks of several extents.
            let is_grain = len > 0 && u64_at(stored, 0) >= first;
            let stream = stored.get(MARKER..MARKER + len).filter(|_| is_grain);
            stream.ok_or(Errno::EIO)?
        }
    };
    deflate::unpack_zlib(stream, into).map(drop)
}

impl Packing for Sparse {
    async fn place(&self, units: &[&[u8]]) -> IoResult<(u64, usize)> {
        let sectors = units.iter().map(|unit| unit.len() as u64 / SECTOR).sum();
        let taken = take_at_end(self, sectors, sectors).await?;
        let host = taken.host();
        // If it is not written the place is leaked: an entry may name it.
        taken.keep();
        Ok((host, units.len()))
    }

    fn packed_entry(&self, place: Compressed) -> Option<Grain> {
        let sector = place.host / SECTOR;
        u32::try_from(sector).ok().map(|sector| Grain(sector.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_that_makes_no_sense_unpacks_to_nothing() {
        let stream = deflate::pack_zlib(&[7; 4096]);
        let stored = |sector: u64, len: usize| {
            [&sector.to_le_bytes()[..], &(len as u32).to_le_bytes(), &stream].concat()
        };
        let mut grain = [0; 4096];
        assert_eq!(unpack(Packed::Marked, 8, &stored(8, stream.len()), &mut grain), Ok(()));
        assert_eq!(grain, [7; 4096]);
        assert_eq!(unpack(Packed::Bare, 8, &stream, &mut grain), Ok(()));
        for bad in [
            stored(0, stream.len()),
            stored(8, 0),
            stored(8, stream.len() + 1),
            stored(8, stream.len() - 5),
            vec![0; 12],
        ] {
            assert_eq!(unpack(Packed::Marked, 8, &bad, &mut grain), Err(Errno::EIO));
        }
        assert_eq!(
            unpack(Packed::Marked, 8, &stored(8, stream.len()), &mut [0; 512]),
            Err(Errno::EIO)
        );
    }
}
