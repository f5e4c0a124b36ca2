//! The header of a QED image (QEMU's docs/interop/qed_spec, "Header"): checked when it is read.
//!
//! Everything that leaves [`Header::parse`] is inside the limits of the specification, and the L1 table
//! lies inside the file.

use crate::block::Error;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QED\0";
/// Bytes of the fixed fields.
pub const LEN: usize = 64;
/// Longest name of a backing file that is opened, in bytes.
pub const BACKING_NAME_LIMIT: usize = 1023;

/// Logarithms of the smallest and the largest cluster.
const MIN_CLUSTER_BITS: u32 = 12;
const MAX_CLUSTER_BITS: u32 = 26;
/// Clusters of an L1 or L2 table: a power of two up to this.
const MAX_TABLE_CLUSTERS: u32 = 16;

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

/// The fixed fields, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub geometry: Geometry,
    /// Clusters before the first regular one.
    pub header_clusters: u32,
    pub features: Features,
    pub l1_offset: u64,
    /// Of the disk, in bytes.
    pub size: u64,
    /// Where the name of the backing file lies, in bytes: used if there is the feature.
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
            l1_offset: u64_at(40),
            size: u64_at(48),
            backing_offset: u32_at(56),
            backing_len: u32_at(60),
        };
        if !header.has_room_for_table(header.l1_offset, header.whole_clusters(file_len)) {
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

    /// Bytes before the first regular cluster.
    pub fn len(&self) -> u64 {
        u64::from(self.header_clusters) << self.geometry.cluster_bits
    }

    /// Bytes of the clusters that a file of so many bytes has: one that is cut off at its end is none ("QED Image
    /// File Format Specification": it may not be preserved).
    pub fn whole_clusters(&self, file_len: u64) -> u64 {
        file_len & !(self.geometry.cluster_size() - 1)
    }

    /// Whether a whole table that begins at an offset lies in a file of so many bytes, behind the header
    /// ("Consistency checking").
    pub fn has_room_for_table(&self, offset: u64, file_len: u64) -> bool {
        let end = offset.checked_add(self.geometry.table_size());
        self.geometry.is_aligned(offset)
            && offset >= self.len().max(1)
            && end.is_some_and(|end| end <= file_len)
    }

    /// Whether a cluster of the guest's data that begins at an offset lies in a file of so many bytes,
    /// behind the header.
    pub fn has_room_for_data(&self, offset: u64, file_len: u64) -> bool {
        self.geometry.is_aligned(offset) && offset >= self.len().max(1) && offset < file_len
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
