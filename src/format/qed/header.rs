//! The header of a QED image (QEMU's docs/interop/qed_spec, "Header"): checked when it is read.
//!
//! Everything that leaves [`Header::parse`] is inside the limits of the specification, and the L1 table is inside the
//! file.

use crate::block::{Error, SECTOR};
use crate::cow::Mark;
use crate::io::Errno;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QED\0";
/// Bytes of the fixed fields.
pub const LEN: usize = 64;
/// Longest name of a backing file that is opened, in bytes.
pub const BACKING_NAME_LIMIT: usize = 1023;

/// Logarithms of the smallest and the largest cluster, and of the default.
pub const MIN_CLUSTER_BITS: u32 = 12;
pub const MAX_CLUSTER_BITS: u32 = 26;
pub const DEFAULT_CLUSTER_BITS: u32 = 16;
/// Clusters of an L1 or L2 table: a power of two up to this.
pub const MAX_TABLE_CLUSTERS: u32 = 16;
pub const DEFAULT_TABLE_CLUSTERS: u32 = 4;

bitflags::bitflags! {
    /// An image with an unknown bit of these is not opened.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        const BACKING_FILE = 1;
        /// The tables may name clusters past the end of the file, or one cluster twice: the image is
        /// checked before it is used.
        const NEED_CHECK = 1 << 1;
        /// The backing file is raw, whatever its first bytes look like.
        const RAW_BACKING = 1 << 2;
    }
}

/// Sizes, and how tables are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cluster_bits: u32,
    /// Clusters of each table.
    pub table_clusters: u32,
}

impl Geometry {
    /// In bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of one table.
    pub fn table_size(&self) -> u64 {
        u64::from(self.table_clusters) << self.cluster_bits
    }

    /// Entries of one table.
    pub fn table_entries(&self) -> u64 {
        self.table_size() / 8
    }

    /// Bytes of the disk that one L2 table describes.
    pub fn l2_coverage(&self) -> u64 {
        self.table_entries() << self.cluster_bits
    }

    /// The longest disk that the tables can describe, in bytes: at most 2^80, so it may not fit.
    pub fn max_size(&self) -> u64 {
        self.table_entries().saturating_mul(self.l2_coverage())
    }

    /// Whether a disk can have this many bytes.
    pub fn is_size(&self, len: u64) -> bool {
        len.is_multiple_of(SECTOR) && len <= self.max_size() && i64::try_from(len).is_ok()
    }

    /// Entries of the L1 table that a disk of `len` bytes needs.
    pub fn l1_entries(&self, len: u64) -> u64 {
        len.div_ceil(self.l2_coverage())
    }

    /// Clusters that hold the first `len` bytes.
    pub fn clusters(&self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// Whether a table or a cluster of the data can begin at an offset of the file, as far as its
    /// alignment says.
    pub fn is_aligned(&self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }
}

/// Where tables and clusters may be in the file: behind the header, in whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub geometry: Geometry,
    /// The least offset that is not the header's; never 0, which means that there is nothing.
    first: u64,
}

impl Layout {
    /// Bytes of the clusters that a file of this many bytes has: one that is cut off at its end is none
    /// (specification: it may not be preserved).
    pub fn whole_clusters(&self, file_len: u64) -> u64 {
        file_len & !(self.geometry.cluster_size() - 1)
    }

    /// Whether a whole table that begins at an offset is in whole clusters of this many bytes ("Consistency
    /// checking").
    pub fn has_room_for_table(&self, offset: u64, whole: u64) -> bool {
        let end = offset.checked_add(self.geometry.table_size());
        self.geometry.is_aligned(offset)
            && offset >= self.first
            && end.is_some_and(|end| end <= whole)
    }

    /// Whether a cluster of the guest's data that begins at an offset is in whole clusters of this many bytes.
    pub fn has_room_for_data(&self, offset: u64, whole: u64) -> bool {
        self.geometry.is_aligned(offset) && offset >= self.first && offset < whole
    }
}

/// The fixed fields, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub geometry: Geometry,
    /// Clusters before the first regular one.
    pub header_clusters: u32,
    pub features: Features,
    /// Unknown bits can be ignored, and are kept; all are unknown.
    pub compatible: u64,
    /// Unknown bits are cleared before the first write; all but the mark of an image that is being written are unknown.
    pub autoclear: u64,
    pub l1_offset: u64,
    /// Of the disk, in bytes.
    pub size: u64,
    /// Where the name of the backing file is, in bytes: used if there is the feature.
    pub backing_offset: u32,
    pub backing_len: u32,
}

impl Header {
    /// Whether a file that begins so is meant to be an image of this format.
    pub fn probe(head: &[u8]) -> bool {
        head.len() >= LEN && head.starts_with(&MAGIC)
    }

    /// Reads the fixed fields. `file_len`: of the file, in bytes.
    ///
    /// # Errors
    /// In QEMU's words, when it is no image of this format, or none that we support.
    pub fn parse(bytes: &[u8; LEN], file_len: u64) -> Result<Header, Error> {
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
        let invalid = |what: &str| Err(Error::new(format!("QED {what} is invalid")));
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::new("Image not in QED format"));
        }
        let features = Features::from_bits_retain(u64_at(16));
        let unknown = features.bits() & !Features::all().bits();
        if unknown != 0 {
            return Err(Error::new(format!("Unsupported QED features: {unknown:x}")));
        }
        let Some(cluster_bits) = log2_in(u32_at(4), MIN_CLUSTER_BITS, MAX_CLUSTER_BITS) else {
            return invalid("cluster size");
        };
        let table_clusters = u32_at(8);
        if log2_in(table_clusters, 0, MAX_TABLE_CLUSTERS.ilog2()).is_none() {
            return invalid("table size");
        }
        let geometry = Geometry { cluster_bits, table_clusters };
        let header = Header {
            geometry,
            header_clusters: u32_at(12),
            features,
            compatible: u64_at(24),
            autoclear: u64_at(32),
            l1_offset: u64_at(40),
            size: u64_at(48),
            backing_offset: u32_at(56),
            backing_len: u32_at(60),
        };
        let layout = header.layout();
        if !layout.has_room_for_table(header.l1_offset, layout.whole_clusters(file_len)) {
            return invalid("table offset");
        }
        if !header.size.is_multiple_of(512) || header.size > geometry.max_size() {
            return invalid("image size");
        }
        if features.contains(Features::BACKING_FILE) {
            let end = u64::from(header.backing_offset) + u64::from(header.backing_len);
            if end > header.len() {
                return invalid("backing filename offset");
            }
        }
        Ok(header)
    }

    /// The mark of an image that is being written.
    pub fn mark(&self) -> Option<Mark> {
        Mark::in_bits(self.autoclear)
    }

    /// Puts a mark into the header, or takes it away.
    pub fn with_mark(self, mark: Option<Mark>) -> Header {
        Header { autoclear: mark.map_or(0, Mark::bits), ..self }
    }

    /// Bytes before the first regular cluster.
    pub fn len(&self) -> u64 {
        u64::from(self.header_clusters) << self.geometry.cluster_bits
    }

    pub fn layout(&self) -> Layout {
        Layout { geometry: self.geometry, first: self.len().max(1) }
    }

    /// The fixed fields as they are stored.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        put(&(1u32 << self.geometry.cluster_bits).to_le_bytes());
        put(&self.geometry.table_clusters.to_le_bytes());
        put(&self.header_clusters.to_le_bytes());
        put(&self.features.bits().to_le_bytes());
        put(&self.compatible.to_le_bytes());
        put(&self.autoclear.to_le_bytes());
        put(&self.l1_offset.to_le_bytes());
        put(&self.size.to_le_bytes());
        put(&self.backing_offset.to_le_bytes());
        put(&self.backing_len.to_le_bytes());
        bytes
    }

    /// The same header with another backing file, whose name is stored right behind the fixed fields; an empty name
    /// is none.
    ///
    /// # Errors
    /// The name has no room, or could not be opened again.
    pub fn with_backing(&self, name: &[u8], format: Option<&str>) -> Result<Header, Error> {
        let room = self.len().saturating_sub(LEN as u64).min(BACKING_NAME_LIMIT as u64);
        if name.len() as u64 > room {
            let len = name.len();
            let text = format!("The name of the backing file has {len} bytes, more than {room}");
            return Err(Error::new(text).with_errno(Errno(libc::ENOSPC)));
        }
        let backing = Features::BACKING_FILE | Features::RAW_BACKING;
        let mut features = self.features - backing;
        features.set(Features::BACKING_FILE, !name.is_empty());
        features.set(Features::RAW_BACKING, !name.is_empty() && format == Some("raw"));
        let backing_offset = if name.is_empty() { 0 } else { LEN as u32 };
        Ok(Header { features, backing_offset, backing_len: name.len() as u32, ..self.clone() })
    }

    /// What is recorded of the backing file's format: that it is raw, or nothing.
    pub fn backing_format(&self) -> Option<&'static str> {
        let raw = Features::BACKING_FILE | Features::RAW_BACKING;
        self.features.contains(raw).then_some("raw")
    }
}

/// The logarithm of a power of two, if it is one and within these.
fn log2_in(value: u32, least: u32, most: u32) -> Option<u32> {
    let log2 = value.checked_ilog2()?;
    (value.is_power_of_two() && (least..=most).contains(&log2)).then_some(log2)
}
