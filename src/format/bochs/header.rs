//! The header of a Bochs redolog, versions 1 and 2: little-endian fields in the first 512 bytes.
//!
//! Everything that leaves [`Header::parse`] is inside the limits below, and the catalog has an entry for each extent
//! of the disk.

use crate::block::{Error, SECTOR};

/// Bytes that hold all fields.
pub const LEN: usize = 512;

const MAGIC: &[u8] = b"Bochs Virtual HD Image";
const TYPE: &[u8] = b"Redolog";
const SUBTYPE: &[u8] = b"Growing";
const VERSIONS: [u32; 2] = [0x1_0000, 0x2_0000];

/// Entries of a catalog at most.
const MAX_CATALOG: u32 = 1 << 20;
/// Bytes of an extent at most.
const MAX_EXTENT: u32 = 8 << 20;

/// Where things are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of the catalog, in bytes.
    pub catalog_offset: u32,
    /// Entries.
    pub catalog_len: u32,
    /// Bytes of the bitmap in front of each extent, in whole sectors.
    pub bitmap_size: u64,
    /// Bytes of an extent: a power of two.
    pub extent_size: u32,
    /// Of the disk, in bytes: whole sectors.
    pub size: u64,
}

impl Header {
    /// Whether a file that begins so is a disk of Bochs, of any kind.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(MAGIC)
    }

    /// Reads the first bytes of an image.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Header, Error> {
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
        let is_text = |at: usize, len: usize, text: &[u8]| {
            let field = &bytes[at..at + len];
            field.starts_with(text) && field.get(text.len()).is_none_or(|&end| end == 0)
        };
        let refused = |text: String| Err(Error::new(text));
        let version = u32_at(64);
        let is_ours = is_text(0, 32, MAGIC) && is_text(32, 16, TYPE) && is_text(48, 16, SUBTYPE);
        if !is_ours || !VERSIONS.contains(&version) {
            return Err(Error::new("Image not in Bochs format"));
        }
        // Version 2 has a time before the size.
        let size = u64_at(if version == VERSIONS[0] { 84 } else { 88 }) / SECTOR * SECTOR;
        let (catalog_len, bitmap, extent_size) = (u32_at(72), u32_at(76), u32_at(80));
        if catalog_len > MAX_CATALOG {
            return refused("Catalog size is too large".to_owned());
        }
        if u64::from(extent_size) < SECTOR {
            return refused("Extent size must be at least 512".to_owned());
        }
        if !extent_size.is_power_of_two() {
            return refused(format!("Extent size {extent_size} is not a power of two"));
        }
        if extent_size > MAX_EXTENT {
            return refused(format!("Extent size {extent_size} is too large"));
        }
        if size > u64::from(catalog_len) * u64::from(extent_size) {
            return refused("Catalog size is too small for this disk size".to_owned());
        }
        let header = Header {
            catalog_offset: u32_at(68),
            catalog_len,
            bitmap_size: u64::from(bitmap).next_multiple_of(SECTOR),
            extent_size,
            size,
        };
        if header.bitmap_size < header.bitmap_used() {
            return refused(format!(
                "The bitmap size {bitmap} is too small for extents of {extent_size} bytes"
            ));
        }
        Ok(header)
    }

    /// Bytes of a bitmap that say something: a bit for each sector.
    pub fn bitmap_used(&self) -> u64 {
        (u64::from(self.extent_size) / SECTOR).div_ceil(8)
    }

    /// Where the catalog ends, in bytes: extents follow, each behind its bitmap.
    pub fn catalog_end(&self) -> u64 {
        u64::from(self.catalog_offset) + u64::from(self.catalog_len) * 4
    }

    /// Where an extent's bitmap begins, in bytes.
    pub fn bitmap_of(&self, place: u32) -> u64 {
        self.catalog_end() + u64::from(place) * (self.bitmap_size + u64::from(self.extent_size))
    }
}
