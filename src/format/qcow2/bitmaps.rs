//! The bitmap directory.

use super::layout::{Geometry, MAX_BITMAPS};

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

/// Reads a whole directory.
///
/// # Errors
/// The name of the entry that breaks a rule, or none if there is no such entry.
pub fn parse_directory(
    mut bytes: &[u8],
    n: u32,
    geometry: &Geometry,
) -> Result<Vec<StoredBitmap>, Option<String>> {
    let mut found = Vec::new();
    for _ in 0..n.min(MAX_BITMAPS) {
        let (bitmap, len) = StoredBitmap::parse(bytes).ok_or(None)?;
        if !bitmap.is_sane(geometry) {
            return Err(Some(String::from_utf8_lossy(&bitmap.name).escape_debug().to_string()));
        }
        found.push(bitmap);
        bytes = bytes.get(len..).unwrap_or_default();
    }
    if bytes.is_empty() { Ok(found) } else { Err(None) }
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
            name: bytes.get(name_at..end)?.to_vec(),
            extra: bytes.get(FIXED..name_at)?.to_vec(),
        };
        Some((bitmap, end.next_multiple_of(8)))
    }

    fn is_sane(&self, geometry: &Geometry) -> bool {
        let known = BitmapFlags::all().contains(self.flags);
        let name = !self.name.is_empty() && self.name.len() <= NAME_LIMIT;
        let table = geometry.is_cluster_start(self.table_offset)
            && self.table_offset != 0
            && (1..=MAX_TABLE).contains(&self.table_size);
        known && name && table && GRANULARITY_BITS.contains(&self.granularity_bits)
    }
}
