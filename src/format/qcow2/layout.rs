//! The layout of an image: sizes, indices, table entries, and limits against hostile images.
//!
//! Names: a *guest* offset is in the disk that a machine sees, a *host* offset in the image file
//! (or its external data file); both are in bytes. All tables are big-endian.

use crate::cow::{Compressed, Run, Shape, TableEntry, TopEntry};

/// Cluster sizes from 512 bytes to 2 MiB.
pub const MIN_CLUSTER_BITS: u32 = 9;
pub const MAX_CLUSTER_BITS: u32 = 21;
/// With extended L2 entries: a subcluster has at least 512 bytes.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Subclusters of a cluster, with extended L2 entries.
pub const SUBCLUSTERS: u64 = 32;
/// Refcounts of 16 bits, if nothing else is asked for, and of up to 64 bits.
pub const DEFAULT_REFCOUNT_ORDER: u32 = 4;
pub const MAX_REFCOUNT_ORDER: u32 = 6;

// QEMU's own limits. Images beyond them cannot be opened by anybody.
pub const MAX_L1_BYTES: u64 = 32 << 20;
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
pub const MAX_SNAPSHOTS: u32 = 65536;
pub const MAX_BITMAPS: u32 = 65535;
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * 1024;

/// Host offsets have 56 bits, of which the lower 9 are zero: in L1, L2 and bitmap table entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Of refcount table entries, which have no flags.
pub const REFTABLE_OFFSET_MASK: u64 = !0x1ff;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET_MASK | ZERO);

/// What tells how tables are to be read. Made by
/// [`Header::geometry`](super::header::Header::geometry), whose checks bound the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub extended_l2: bool,
    /// Bit 0 of standard L2 entries means zeroes: not in version 2.
    pub zero_flag: bool,
    /// Guest data is in another file, at its guest offset.
    pub external_data: bool,
}

impl Geometry {
    /// What the layer of tables has to know.
    pub fn shape(&self) -> Shape {
        Shape {
            cluster_bits: self.cluster_bits,
            table_bits: self.l2_bits(),
            entry_bytes: self.l2_entry_size(),
        }
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn is_cluster_start(&self, offset: u64) -> bool {
        self.offset_in_cluster(offset) == 0
    }

    pub fn offset_in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// How many clusters hold this many bytes.
    pub fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Bytes of an L2 entry: 8, or 16 of extended ones.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of an L2 table: a power of two.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// The logarithm of [`Geometry::l2_entries`].
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Bytes of a subcluster; without extended L2 entries, a whole cluster.
    pub fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    pub fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 5 } else { 0 }
    }

    /// L1 entries that a disk of this many bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    pub fn l1_index(&self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    pub fn l2_index(&self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    pub fn subcluster_index(&self, guest: u64) -> u64 {
        self.offset_in_cluster(guest) >> self.subcluster_bits()
    }

    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount that there is room for.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Refcounts of a refcount block: a power of two.
    pub fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// The logarithm of [`Geometry::refcount_block_entries`].
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Index into the refcount table for a host offset.
    pub fn refcount_table_index(&self, host: u64) -> u64 {
        host >> self.cluster_bits >> self.refcount_block_bits()
    }

    /// Index into the refcount block for a host offset.
    pub fn refcount_block_index(&self, host: u64) -> u64 {
        (host >> self.cluster_bits) & (self.refcount_block_entries() - 1)
    }

    /// Where the number of sectors begins in a compressed cluster's entry: "x" of the
    /// specification.
    fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// What an L2 entry says.
    ///
    /// # Errors
    /// When reserved bits are set, or the offset is none that the kind of cluster can have.
    pub fn decode(&self, entry: L2Entry) -> Result<Cluster, BadEntry> {
        let L2Entry { word, bitmap } = entry;
        if word & COMPRESSED != 0 {
            return Ok(Cluster::Compressed(self.decode_compressed(word)));
        }
        // With extended entries, bit 0 is of no meaning: QEMU does not look at it.
        if word & L2_RESERVED != 0 || word & ZERO != 0 && !self.zero_flag {
            return Err(BadEntry::Reserved);
        }
        let host = word & OFFSET_MASK;
        if !self.is_cluster_start(host) {
            return Err(BadEntry::Unaligned);
        }
        // Only in an external data file can a cluster be at 0.
        let is_allocated = host != 0 || self.external_data && word & COPIED != 0;
        if self.extended_l2 {
            let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            if allocated & zero != 0 || allocated != 0 && !is_allocated {
                return Err(BadEntry::Bitmap);
            }
            let host = is_allocated.then_some(host);
            return Ok(Cluster::Subclusters { host, allocated, zero });
        }
        Ok(match (is_allocated, word & ZERO != 0) {
            (false, false) => Cluster::Unallocated,
            (false, true) => Cluster::Zero { host: None },
            (true, false) => Cluster::Normal { host },
            (true, true) => Cluster::Zero { host: Some(host) },
        })
    }

    /// The one cluster at a host offset.
    pub fn run_of(&self, host: u64) -> Run {
        Run { first: host >> self.cluster_bits, count: 1, is_fresh: false }
    }

    /// The clusters of the image's file that an entry refers to.
    pub fn clusters_of(&self, entry: L2Entry) -> Option<Run> {
        if self.external_data {
            return None;
        }
        match self.decode(entry).ok()? {
            Cluster::Normal { host } | Cluster::Zero { host: Some(host) } => {
                Some(self.run_of(host))
            }
            Cluster::Subclusters { host: Some(host), .. } => Some(self.run_of(host)),
            Cluster::Compressed(place) => {
                let first = place.host >> self.cluster_bits;
                let last = (place.host + place.len - 1) >> self.cluster_bits;
                Some(Run { first, count: last + 1 - first, is_fresh: false })
            }
            _ => None,
        }
    }

    fn decode_compressed(&self, word: u64) -> Compressed {
        let shift = self.compressed_shift();
        let host = word & ((1 << shift) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> shift) + 1;
        Compressed { host, len: sectors * 512 - host % 512 }
    }

    /// The entry of a compressed cluster: `len` bytes at `host`, anywhere in the file.
    ///
    /// None when the place or the length cannot be told in an entry.
    pub fn encode_compressed(&self, host: u64, len: u64) -> Option<L2Entry> {
        let shift = self.compressed_shift();
        let more = (host % 512 + len).div_ceil(512).checked_sub(1)?;
        // Where the field is wide, its upper bits must be zero.
        if host >> shift.min(56) != 0 || more >> (62 - shift) != 0 {
            return None;
        }
        Some(L2Entry { word: COMPRESSED | more << shift | host, bitmap: 0 })
    }
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl TopEntry for L1Entry {
    fn from_word(word: u64) -> L1Entry {
        L1Entry(word)
    }

    fn word(self) -> u64 {
        self.0
    }
}

impl L1Entry {
    /// The entries of a table as it is stored.
    pub fn parse_all(bytes: &[u8]) -> Vec<L1Entry> {
        bytes.as_chunks().0.iter().map(|&word| L1Entry(u64::from_be_bytes(word))).collect()
    }

    pub fn new(l2_table: u64, copied: bool) -> L1Entry {
        L1Entry(l2_table & OFFSET_MASK | if copied { COPIED } else { 0 })
    }

    /// Where the L2 table is; 0 if there is none.
    pub fn l2_table(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// Whether there is an L2 table that may be changed where it is.
    pub fn has_own_table(self) -> bool {
        self.l2_table() != 0 && self.is_copied()
    }

    /// Whether the L2 table's refcount is exactly one: true in the active L1 table alone.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    pub fn with_copied(self, copied: bool) -> L1Entry {
        L1Entry(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }

    pub fn has_reserved_bits(self) -> bool {
        self.0 & L1_RESERVED != 0
    }
}

/// An entry of an L2 table as it is stored: the 16 bytes of an extended one, or 8 with no bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct L2Entry {
    pub word: u64,
    pub bitmap: u64,
}

impl TableEntry for L2Entry {
    fn from_words(first: u64, second: u64) -> L2Entry {
        L2Entry { word: first, bitmap: second }
    }

    fn words(self) -> [u64; 2] {
        [self.word, self.bitmap]
    }
}

impl L2Entry {
    /// An entry out of its 8 or 16 bytes on the disk.
    pub fn parse(bytes: &[u8]) -> L2Entry {
        let mut words = bytes.as_chunks().0.iter().map(|&word| u64::from_be_bytes(word));
        L2Entry { word: words.next().unwrap_or(0), bitmap: words.next().unwrap_or(0) }
    }

    /// Its bytes on the disk: 16, or 8 of a standard entry.
    pub fn store(self, bytes: &mut [u8]) {
        let words = [self.word.to_be_bytes(), self.bitmap.to_be_bytes()];
        bytes.copy_from_slice(&words.as_flattened()[..bytes.len()]);
    }

    /// Nothing is allocated: the backing file decides.
    pub const UNALLOCATED: L2Entry = L2Entry { word: 0, bitmap: 0 };

    /// A cluster with data, or some subclusters of it.
    pub fn normal(host: u64, copied: bool, bitmap: u64) -> L2Entry {
        L2Entry { word: L1Entry::new(host, copied).0, bitmap }
    }

    /// A standard entry that reads as zeroes, with or without a cluster of its own.
    pub fn zero(host: Option<u64>, copied: bool) -> L2Entry {
        let word = host.map_or(0, |host| L1Entry::new(host, copied).0);
        L2Entry { word: word | ZERO, bitmap: 0 }
    }

    /// Whether the cluster's refcount is exactly one.
    pub fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// Where its host cluster is, if it has one of its own.
    pub fn place(self, geometry: &Geometry) -> Option<u64> {
        match geometry.decode(self).ok()? {
            Cluster::Normal { host } => Some(host),
            Cluster::Zero { host } | Cluster::Subclusters { host, .. } => host,
            Cluster::Unallocated | Cluster::Compressed(_) => None,
        }
    }

    /// Whether the flag is set that makes a standard entry read as zeroes.
    pub fn reads_zero(self) -> bool {
        self.word & ZERO != 0
    }

    /// The field of the host cluster, of all but compressed ones.
    pub fn offset(self) -> u64 {
        self.word & OFFSET_MASK
    }

    pub fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    pub fn with_copied(self, copied: bool) -> L2Entry {
        L2Entry { word: self.word & !COPIED | if copied { COPIED } else { 0 }, ..self }
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    Unallocated,
    /// Reads as zeroes; the host cluster, if there is one, is kept for writes to come.
    Zero {
        host: Option<u64>,
    },
    Normal {
        host: u64,
    },
    Compressed(Compressed),
    /// An extended entry. No subcluster is in both masks; those in neither are the backing file's.
    Subclusters {
        host: Option<u64>,
        allocated: u32,
        zero: u32,
    },
}

/// The error in an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    Reserved,
    /// A host cluster that does not begin at a cluster's start.
    Unaligned,
    /// A subcluster is allocated and reads as zeroes, or is allocated nowhere.
    Bitmap,
}

/// The refcount at `index` of a refcount block, `1 << order` bits wide. Narrow ones begin at the
/// lowest bit of a byte.
pub fn refcount(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let (byte, shift) = narrow(order, index);
        return (block[byte] >> shift) as u64 & ((1 << (1 << order)) - 1);
    }
    let width = 1 << (order - 3);
    let bytes = &block[index * width..][..width];
    bytes.iter().fold(0, |value, &byte| value << 8 | byte as u64)
}

/// Sets the refcount at `index`; `value` is at most what the width holds.
pub fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    debug_assert!(value <= u64::MAX >> (64 - (1 << order)));
    if order < 3 {
        let (byte, shift) = narrow(order, index);
        let mask = ((1u8 << (1 << order)) - 1) << shift;
        block[byte] = block[byte] & !mask | (value as u8) << shift;
        return;
    }
    let width = 1 << (order - 3);
    block[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// The byte and the lowest bit of a refcount narrower than a byte.
fn narrow(order: u32, index: usize) -> (usize, usize) {
    let bits = index << order;
    (bits / 8, bits % 8)
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
