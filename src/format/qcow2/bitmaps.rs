//! Persistent dirty bitmaps: the bitmap directory, and its state on disk and in memory.
//!
//! The rules held here, which a crash at any moment must not break:
//!
//! * Before the first guest write, and before a bitmap of the image changes, the flag IN_USE of all of
//!   them is durable ([`store`]). Who finds it set knows that the bitmap is out of date.
//! * It is cleared by a new directory: first all tables and data are durable, then the directory that
//!   names them, then the header that names it. Only then are the old ones freed.
//! * A bitmap that was found with IN_USE set keeps it: it can be looked at and removed.

mod load;
mod store;

use super::layout::{Geometry, MAX_BITMAPS};
use crate::block::{Bitmaps, Error, Node};
use crate::cow::Lock;
use crate::io::sync::Mutex;
use crate::options::bytes::until_nul;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Bytes of an entry before its extra data.
const FIXED: usize = 24;
/// Longest name, in bytes, and least and largest granularity that QEMU takes.
pub const NAME_LIMIT: usize = 1023;
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Largest bitmap table, in entries: bounds what reading one takes, to 128 MiB.
const MAX_TABLE: u32 = 1 << 24;

/// A stored bitmap, as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBitmap {
    pub table_offset: u64,
    /// Entries.
    pub table_size: u32,
    pub flags: BitmapFlags,
    pub granularity_bits: u8,
    pub name: Vec<u8>,
    pub extra: Vec<u8>,
}

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// Not saved since it was last in use.
        const IN_USE = 1;
        /// It records writes.
        const AUTO = 1 << 1;
        /// It may be used by who does not know the extra data.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// The bitmaps of an open image.
pub(super) struct ImageBitmaps {
    /// Those in memory.
    node: Arc<Bitmaps>,
    stored: Lock<Stored>,
    /// The directory as it is on disk, for those who only look.
    shown: Mutex<Vec<StoredBitmap>>,
    /// The image is open for writing.
    is_writable: bool,
    /// Something was written: there is something to do when the image is closed.
    is_touched: AtomicBool,
}

impl ImageBitmaps {
    /// Those in memory.
    pub fn node(&self) -> &Arc<Bitmaps> {
        &self.node
    }

    /// The directory as it is on disk.
    pub fn shown(&self) -> Vec<StoredBitmap> {
        self.shown.lock().clone()
    }
}

/// What is on disk.
#[derive(Clone, Default)]
struct Stored {
    entries: Vec<StoredBitmap>,
    /// Where the directory is, and how long, in bytes; of no length if there is none.
    directory: (u64, u64),
}

/// Reads a whole directory of `n` bitmaps.
///
/// # Errors
/// In QEMU's words.
pub fn parse_directory(
    mut bytes: &[u8],
    n: u32,
    geometry: &Geometry,
) -> Result<Vec<StoredBitmap>, Error> {
    let broken = || Error::new("Broken bitmap directory");
    let number =
        |more: &str| Error::new(format!("{more} bitmaps found than specified in header extension"));
    let (mut found, mut names) = (Vec::new(), HashSet::new());
    while !bytes.is_empty() {
        if found.len() >= n.min(MAX_BITMAPS) as usize {
            return Err(number("More"));
        }
        let (bitmap, len) = StoredBitmap::parse(bytes).ok_or_else(broken)?;
        bitmap.check(geometry)?;
        if !names.insert(bitmap.name.clone()) {
            return Err(Error::new(format!("Bitmap already exists: {}", bitmap.shown_name())));
        }
        found.push(bitmap);
        bytes = bytes.get(len..).ok_or_else(broken)?;
    }
    if found.len() < n as usize { Err(number("Less")) } else { Ok(found) }
}

/// What the directory looks like on disk.
fn encode_directory(entries: &[StoredBitmap]) -> Vec<u8> {
    entries.iter().flat_map(StoredBitmap::encode).collect()
}

/// The entries of the table of a bitmap for a disk of `len` bytes.
fn table_len(geometry: &Geometry, granularity_bits: u8, len: u64) -> u64 {
    geometry.clusters(len.div_ceil(1 << granularity_bits).div_ceil(8))
}

/// The bytes that the bitmaps of `granularities` (logarithms), with names so long, take in an image of
/// a disk of `len` bytes: data, tables, and the directory. As [`crate::block::Measurement`] has it.
fn stored_bytes(geometry: &Geometry, bitmaps: impl Iterator<Item = (u8, usize)>, len: u64) -> u64 {
    let (mut clusters, mut directory) = (0, 0);
    for (granularity_bits, name) in bitmaps {
        let data = table_len(geometry, granularity_bits, len);
        clusters += data + geometry.clusters(data * 8);
        directory += (FIXED + name).next_multiple_of(8) as u64;
    }
    (clusters + geometry.clusters(directory)) << geometry.cluster_bits
}

/// What the persistent bitmaps of `source` take in an image of this geometry, in bytes, as
/// [`crate::block::Measurement`] has it; none if the source can have no bitmaps.
pub fn measure(geometry: &Geometry, source: &Node) -> Option<u64> {
    source.driver().bitmap_store().filter(|store| store.is_available())?;
    let all = source.bitmaps().all();
    let persistent = all.iter().filter(|bitmap| bitmap.flags().persistent);
    let sizes =
        persistent.map(|bitmap| (bitmap.granularity().trailing_zeros() as u8, bitmap.name().len()));
    Some(stored_bytes(geometry, sizes, source.len()))
}

/// Where the data of an entry of a bitmap table is; none if it is not a valid one.
fn decode_table_entry(geometry: &Geometry, entry: u64) -> Option<TableEntry> {
    const OFFSET: u64 = super::layout::OFFSET_MASK;
    match entry {
        0 => Some(TableEntry::Zeroes),
        1 => Some(TableEntry::Ones),
        _ if entry & !OFFSET == 0 && geometry.is_cluster_start(entry) => {
            Some(TableEntry::Data(entry))
        }
        _ => None,
    }
}

/// What a cluster of bitmap data holds, or where it is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TableEntry {
    Zeroes,
    Ones,
    Data(u64),
}

impl StoredBitmap {
    /// Reads the entry at the start of `bytes`, and how long it is.
    fn parse(bytes: &[u8]) -> Option<(StoredBitmap, usize)> {
        let fixed = bytes.get(..FIXED)?;
        let be = |at: usize, n: usize| fixed[at..at + n].iter().fold(0, |v, &b| v << 8 | b as u64);
        let (name_len, extra_len) = (be(18, 2) as usize, be(20, 4) as usize);
        let name_at = FIXED.checked_add(extra_len)?;
        let end = name_at.checked_add(name_len)?;
        // The kind of bitmap is told by flags that we know, or it is none of ours.
        let (flags, kind) = (be(12, 4) as u32, be(16, 1));
        let bitmap = StoredBitmap {
            table_offset: be(0, 8),
            table_size: be(8, 4) as u32,
            flags: BitmapFlags::from_bits_retain(flags),
            granularity_bits: if kind == 1 { be(17, 1) as u8 } else { 0 },
            name: until_nul(bytes.get(name_at..end)?).to_vec(),
            extra: bytes.get(FIXED..name_at)?.to_vec(),
        };
        Some((bitmap, end.next_multiple_of(8)))
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.extra.len() + self.name.len());
        out.extend(self.table_offset.to_be_bytes());
        out.extend(self.table_size.to_be_bytes());
        out.extend(self.flags.bits().to_be_bytes());
        // A dirty tracking bitmap.
        out.extend([1, self.granularity_bits]);
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend((self.extra.len() as u32).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    fn check(&self, geometry: &Geometry) -> Result<(), Error> {
        let shown = self.shown_name();
        let flags = self.flags;
        if !self.extra.is_empty() && !flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE) {
            return Err(Error::new("Bitmap extra data is not supported"));
        }
        let known = BitmapFlags::all().contains(flags);
        let name = !self.name.is_empty() && self.name.len() <= NAME_LIMIT;
        let table = geometry.is_cluster_start(self.table_offset)
            && self.table_offset != 0
            && (1..=MAX_TABLE).contains(&self.table_size);
        match known && name && table && GRANULARITY_BITS.contains(&self.granularity_bits) {
            true => Ok(()),
            false => Err(Error::new(format!("Bitmap '{shown}' doesn't satisfy the constraints"))),
        }
    }

    fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).escape_debug().to_string()
    }

    /// As users name it.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::qcow2::header::Header;

    #[test]
    fn a_directory_comes_out_as_it_went_in() {
        let geometry = Header::new(16, 1 << 30).geometry();
        let entry = |name: &str, flags, extra: &[u8]| StoredBitmap {
            table_offset: 0x50000,
            table_size: 1,
            flags,
            granularity_bits: 16,
            name: name.into(),
            extra: extra.into(),
        };
        let both = BitmapFlags::IN_USE | BitmapFlags::AUTO;
        let compatible = BitmapFlags::EXTRA_DATA_COMPATIBLE;
        let entries = [
            entry("a", both, b""),
            entry("names", BitmapFlags::empty(), b""),
            entry("c", compatible, b"unknown"),
        ];
        let bytes = encode_directory(&entries);
        assert_eq!(parse_directory(&bytes, 3, &geometry).unwrap(), entries);
        let error = |bytes: &[u8], n| parse_directory(bytes, n, &geometry).unwrap_err().to_string();
        assert_eq!(error(&bytes, 2), "More bitmaps found than specified in header extension");
        assert_eq!(error(&bytes, 4), "Less bitmaps found than specified in header extension");
        assert_eq!(error(&bytes[..bytes.len() - 8], 3), "Broken bitmap directory");
        assert_eq!(error(&bytes[..40], 3), "Broken bitmap directory");
        let bad = encode_directory(&[entry("d", BitmapFlags::from_bits_retain(8), b"")]);
        assert_eq!(error(&bad, 1), "Bitmap 'd' doesn't satisfy the constraints");
        let bad = encode_directory(&[entry("d", BitmapFlags::empty(), b"x")]);
        assert_eq!(error(&bad, 1), "Bitmap extra data is not supported");
    }

    #[test]
    fn table_entries_are_an_offset_or_all_one_value() {
        let geometry = Header::new(16, 1 << 30).geometry();
        for (entry, wanted) in [
            (0, Some(TableEntry::Zeroes)),
            (1, Some(TableEntry::Ones)),
            (0x50000, Some(TableEntry::Data(0x50000))),
            (0x50001, None),
            (0x50200, None),
            (2, None),
            (1 << 56 | 0x50000, None),
        ] {
            assert_eq!(decode_table_entry(&geometry, entry), wanted, "{entry:#x}");
        }
    }
}
