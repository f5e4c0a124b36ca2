//! The header of a qcow image, version 1: 48 bytes of big-endian fields, checked when it is read.
//!
//! Everything that leaves [`Header::parse`] is inside the limits below, and the L1 table lies inside the file.

use super::entries::L2Entry;
use crate::block::{Error, SECTOR};
use crate::cow::Compressed;

/// The first four bytes of every image, which qcow2 has, too.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 1;
/// Bytes of the fields.
pub const LEN: usize = 48;
/// The fields that say where the name of the backing file is: its offset, and its length.
pub const BACKING_AT: u64 = 8;
/// Longest name of a backing file, in bytes.
pub const BACKING_NAME_LIMIT: u32 = 1023;
/// An L1 table of this many bytes maps 16 TiB of a new image.
pub const MAX_L1_BYTES: u64 = 64 << 20;

/// Logarithms of the cluster size, and of the entries of an L2 table.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=16;
const TABLE_BITS: std::ops::RangeInclusive<u32> = 6..=13;
/// In an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

/// Sizes, and how entries are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cluster_bits: u32,
    /// The logarithm of the entries of an L2 table.
    pub table_bits: u32,
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    Unallocated,
    /// Data at this offset of the file.
    Normal {
        host: u64,
    },
    Compressed(Compressed),
}

impl Geometry {
    /// What new images have. Over a backing file clusters are small: less of it is copied.
    pub fn of_new(has_backing: bool) -> Geometry {
        match has_backing {
            true => Geometry { cluster_bits: 9, table_bits: 12 },
            false => Geometry { cluster_bits: 12, table_bits: 9 },
        }
    }

    /// In bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 table.
    pub fn table_size(&self) -> u64 {
        8 << self.table_bits
    }

    /// Clusters that hold an L2 table.
    pub fn table_clusters(&self) -> u64 {
        self.table_size().div_ceil(self.cluster_size())
    }

    /// Clusters that hold the first `len` bytes.
    pub fn clusters(&self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// Entries of the L1 table of a disk of `len` bytes.
    pub fn l1_entries(&self, len: u64) -> u64 {
        len.div_ceil(1 << (self.cluster_bits + self.table_bits))
    }

    pub fn decode(&self, entry: L2Entry) -> Cluster {
        let L2Entry(word) = entry;
        match word {
            0 => Cluster::Unallocated,
            _ if word & COMPRESSED == 0 => Cluster::Normal { host: word },
            _ => {
                let shift = 63 - self.cluster_bits;
                let len = (word >> shift) & (self.cluster_size() - 1);
                Cluster::Compressed(Compressed { host: word & ((1 << shift) - 1), len })
            }
        }
    }

    /// The entry of a compressed cluster, if it can name the place.
    pub fn encode_compressed(&self, place: Compressed) -> Option<L2Entry> {
        let Compressed { host, len } = place;
        let shift = 63 - self.cluster_bits;
        let fits = host < 1 << shift && (1..self.cluster_size()).contains(&len);
        fits.then_some(L2Entry(COMPRESSED | len << shift | host))
    }
}

/// What of the header says where things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub geometry: Geometry,
    /// Of the disk, in bytes: whole sectors.
    pub size: u64,
    /// Where the name of the backing file lies, in bytes. No backing file: both are 0.
    pub backing_offset: u64,
    pub backing_len: u32,
    pub l1_offset: u64,
}

impl Header {
    /// Whether a file that begins so is meant to be an image of this format.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(&MAGIC) && head[MAGIC.len()..].starts_with(&VERSION.to_be_bytes())
    }

    /// The header of a new image, whose name of the backing file follows the fields.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn of_new(size: u64, backing_name_len: usize) -> Result<Header, Error> {
        if size == 0 {
            return Err(Error::new("Image size is too small, cannot be zero length"));
        }
        if backing_name_len as u64 > u64::from(BACKING_NAME_LIMIT) {
            return Err(Error::new("Backing file name too long"));
        }
        let geometry = Geometry::of_new(backing_name_len > 0);
        if i64::try_from(size).is_err() || geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
            return Err(Error::new("Image too large"));
        }
        Ok(Header {
            geometry,
            size: size.next_multiple_of(SECTOR),
            backing_offset: if backing_name_len > 0 { LEN as u64 } else { 0 },
            backing_len: backing_name_len as u32,
            l1_offset: (LEN + backing_name_len).next_multiple_of(8) as u64,
        })
    }

    /// Reads the fields. `file_len`: of the file, in bytes.
    ///
    /// # Errors
    /// When it is no image of this format, or none that we support; in QEMU's words, where it has them.
    pub fn parse(bytes: &[u8; LEN], file_len: u64) -> Result<Header, Error> {
        let u32_at = |at: usize| u32::from_be_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
        let u64_at = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
        let refused = |text: &str| Err(Error::new(text));
        if !bytes.starts_with(&MAGIC) {
            return refused("Image not in qcow format");
        }
        let version = u32_at(4);
        if version != VERSION {
            let error = format!("qcow (v{VERSION}) does not support qcow version {version}");
            return Err(match version {
                2 | 3 => Error::new(error).with_hint("Try the 'qcow2' driver instead."),
                _ => Error::new(error),
            });
        }
        let size = u64_at(24);
        if size < 2 {
            return refused("Image size is too small (must be at least 2 bytes)");
        }
        let geometry = Geometry { cluster_bits: bytes[32].into(), table_bits: bytes[33].into() };
        if !CLUSTER_BITS.contains(&geometry.cluster_bits) {
            return refused("Cluster size must be between 512 and 64k");
        }
        if !TABLE_BITS.contains(&geometry.table_bits) {
            return refused("L2 table size must be between 512 and 64k");
        }
        match u32_at(36) {
            0 => {}
            1 => return refused("Encrypted qcow images are not supported"),
            _ => return refused("invalid encryption method in qcow header"),
        }
        let size = size / SECTOR * SECTOR;
        if i64::try_from(size).is_err() || geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
            return refused("Image too large");
        }
        let mut header = Header {
            geometry,
            size,
            backing_offset: u64_at(8),
            backing_len: u32_at(16),
            l1_offset: u64_at(40),
        };
        if header.backing_offset == 0 || header.backing_len == 0 {
            (header.backing_offset, header.backing_len) = (0, 0);
        }
        if header.backing_len > BACKING_NAME_LIMIT {
            return refused("Backing file name too long");
        }
        header.check_l1(file_len)?;
        Ok(header)
    }

    fn check_l1(&self, file_len: u64) -> Result<(), Error> {
        let place = self.l1_offset;
        if place < LEN as u64 {
            return Err(Error::new(format!("The L1 table begins at {place:#x}, in the header")));
        }
        match place.checked_add(self.l1_bytes()) {
            Some(end) if end <= file_len => Ok(()),
            _ => Err(Error::new(format!(
                "The L1 table begins at {place:#x} and has {:#x} bytes, but the file ends at {file_len:#x}",
                self.l1_bytes()
            ))),
        }
    }

    /// Bytes of the L1 table.
    pub fn l1_bytes(&self) -> u64 {
        self.geometry.l1_entries(self.size) * 8
    }

    /// Where the L1 table ends, in bytes: tables and data lie behind it.
    pub fn l1_end(&self) -> u64 {
        self.l1_offset + self.l1_bytes()
    }

    /// Where the name of the backing file is, in bytes.
    pub fn backing_place(&self) -> std::ops::Range<u64> {
        self.backing_offset..self.backing_offset.saturating_add(self.backing_len.into())
    }

    /// The fields as they are stored.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&VERSION.to_be_bytes());
        bytes[8..20].copy_from_slice(&self.encode_backing());
        bytes[24..32].copy_from_slice(&self.size.to_be_bytes());
        bytes[32] = self.geometry.cluster_bits as u8;
        bytes[33] = self.geometry.table_bits as u8;
        bytes[40..].copy_from_slice(&self.l1_offset.to_be_bytes());
        bytes
    }

    /// The fields from [`BACKING_AT`] on that say where the name of the backing file is.
    pub fn encode_backing(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.backing_offset.to_be_bytes());
        bytes[8..].copy_from_slice(&self.backing_len.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_clusters_fit_their_entries_exactly() {
        for cluster_bits in CLUSTER_BITS {
            let geometry = Geometry { cluster_bits, table_bits: 9 };
            let most = geometry.cluster_size() - 1;
            for place in [(1, 1), (0x1234, most), ((1 << (63 - cluster_bits)) - 1, 7)] {
                let place = Compressed { host: place.0, len: place.1 };
                let entry = geometry.encode_compressed(place).unwrap();
                assert_eq!(geometry.decode(entry), Cluster::Compressed(place));
            }
            for (host, len) in [(1 << (63 - cluster_bits), 1), (0, most + 1), (0, 0)] {
                assert_eq!(geometry.encode_compressed(Compressed { host, len }), None);
            }
        }
    }

    #[test]
    fn a_header_that_was_written_is_read_again() {
        for (size, name) in [(1, 0), (5 << 20, 0), (7 << 20, 5), (512, 1023)] {
            let header = Header::of_new(size, name).unwrap();
            assert_eq!(Header::parse(&header.encode(), header.l1_end()), Ok(header.clone()));
            assert!(Header::parse(&header.encode(), header.l1_end() - 1).is_err());
        }
        assert!(Header::of_new(MAX_L1_BYTES / 8 * (2 << 20), 0).is_ok());
        for (size, name) in [(0, 0), (MAX_L1_BYTES / 8 * (2 << 20) + 1, 0), (512, 1024)] {
            assert!(Header::of_new(size, name).is_err());
        }
    }
}
