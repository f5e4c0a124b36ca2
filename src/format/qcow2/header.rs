//! The header of an image: the fields of both versions, their checks, and their encoding.
//!
//! Everything that leaves [`Header::parse`] is inside the limits of [`super::layout`]; whether tables are inside the
//! file is checked when they are read. What we do not know is kept as it is: extensions, fields behind the known ones,
//! compatible bits. `header_cluster` says how a header is changed; [`Header::encode`] is for new images.

use super::extensions::{self, Extension, FeatureKind};
use super::fields::{Fields, be32};
use super::layout::{self, Geometry};
use crate::block::Error;
use crate::options::bytes::until_nul;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes from the start of the file that tell the cluster size ([`Header::cluster_bits`]) and
/// hold every fixed field.
pub const FIXED_LEN: usize = 112;
/// Of version 2, whose fields end there.
const V2_LEN: usize = 72;
/// The least of version 3, and the end of the last field that we know.
const V3_LEN: usize = 104;
const KNOWN_LEN: usize = 105;
/// Longest name of a backing file, in bytes.
pub const BACKING_NAME_LIMIT: usize = 1023;

/// A header, without what follows from other fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// 9 to 21.
    pub cluster_bits: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    pub l1_table_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub nb_snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: Incompatible,
    pub compatible: Compatible,
    pub autoclear: Autoclear,
    /// 0 to 6: a refcount has `1 << refcount_order` bits.
    pub refcount_order: u32,
    pub compression: Compression,
    /// As it is stored: relative to the image, or with a protocol, or `json:`.
    pub backing_file: Option<Vec<u8>>,
    pub extensions: Vec<Extension>,
    /// Where the name is stored; set by `encode`.
    backing_file_offset: u64,
    /// Of the structure on disk; set by `encode`.
    header_length: u32,
    /// What follows the compression type, which is the last field that we know: to a multiple of 8.
    unknown_fields: Vec<u8>,
}

bitflags::bitflags! {
    /// Who does not know a bit of these must not open the image.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong, but for references counted too often.
        const DIRTY = 1;
        /// Nothing may be written but repairs.
        const CORRUPT = 1 << 1;
        const DATA_FILE = 1 << 2;
        const COMPRESSION = 1 << 3;
        const EXTENDED_L2 = 1 << 4;
    }

    /// Bits that may be ignored. Unknown ones are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Compatible: u64 {
        const LAZY_REFCOUNTS = 1;
        const _ = !0;
    }

    /// Who does not know a bit of these clears it before the first write.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1;
        const RAW_DATA_FILE = 1 << 1;
        const _ = !0;
    }
}

impl Autoclear {
    /// The bits whose promises we keep.
    pub const KNOWN: Autoclear = Autoclear::BITMAPS.union(Autoclear::RAW_DATA_FILE);
}

/// How compressed clusters are packed; one way for the whole image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream.
    Zlib,
    Zstd,
}

impl Compression {
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// Values of [`Header::crypt_method`].
pub const CRYPT_NONE: u32 = 0;
pub const CRYPT_AES: u32 = 1;
pub const CRYPT_LUKS: u32 = 2;

impl Header {
    /// A header of version 3 without tables, extensions or features, for whoever makes an image.
    pub fn new(cluster_bits: u32, size: u64) -> Header {
        Header {
            version: 3,
            cluster_bits,
            size,
            crypt_method: CRYPT_NONE,
            l1_size: 0,
            l1_table_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: layout::DEFAULT_REFCOUNT_ORDER,
            compression: Compression::Zlib,
            backing_file: None,
            extensions: Vec::new(),
            backing_file_offset: 0,
            header_length: FIXED_LEN as u32,
            unknown_fields: vec![0; FIXED_LEN - KNOWN_LEN],
        }
    }

    /// Whether a file that begins so is meant to be an image of this format, also of a version that
    /// opening it refuses. Version 1 is another format.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(&MAGIC) && be32(head, 4).is_some_and(|version| version >= 2)
    }

    /// The cluster size's logarithm, and with it how much of the file is the header's: from the
    /// first [`FIXED_LEN`] bytes, zeroes standing for what is past the end of the file.
    ///
    /// # Errors
    /// In QEMU's words, when it is no image of this format, or none that we support.
    pub fn cluster_bits(head: &[u8; FIXED_LEN]) -> Result<u32, Error> {
        let mut fields = Fields { bytes: head };
        if fields.bytes[..4] != MAGIC {
            return Err(Error::new("Image is not in qcow2 format"));
        }
        fields.skip(4);
        let version = fields.u32();
        if !matches!(version, 2 | 3) {
            return Err(Error::new(format!("Unsupported qcow2 version {version}")));
        }
        fields.skip(12);
        let bits = fields.u32();
        if !(layout::MIN_CLUSTER_BITS..=layout::MAX_CLUSTER_BITS).contains(&bits) {
            return Err(Error::new(format!("Unsupported cluster size: 2^{bits}")));
        }
        Ok(bits)
    }

    /// Reads the first cluster of an image, zeroes standing for what is past the end of the file.
    ///
    /// # Errors
    /// In QEMU's words, also when `cluster` is not as long as it says itself.
    pub fn parse(cluster: &[u8]) -> Result<Header, Error> {
        let head = cluster.first_chunk().ok_or_else(|| Error::new("qcow2 header too short"))?;
        let cluster_bits = Header::cluster_bits(head)?;
        if cluster.len() != 1 << cluster_bits {
            return Err(Error::new("qcow2 header exceeds cluster size"));
        }
        let mut header = Header::parse_fields(head, cluster_bits);
        header.check_length(cluster)?;
        let backing_size = be32(cluster, 16).unwrap_or(0);
        if header.backing_file_offset > cluster.len() as u64 {
            return Err(Error::new("Invalid backing file offset"));
        }
        header.check_compression(head[104])?;
        header.check_features(cluster)?;
        header.check_tables()?;
        let area = header.extension_area(cluster);
        header.extensions = extensions::parse(area)?;
        header.check_extensions()?;
        header.backing_file = header.backing_name(cluster, backing_size)?;
        Ok(header)
    }

    /// The fields as they are, but for those that a version or a length takes away.
    fn parse_fields(head: &[u8; FIXED_LEN], cluster_bits: u32) -> Header {
        let mut fields = Fields { bytes: head };
        let mut header = Header::new(cluster_bits, 0);
        fields.skip(4);
        header.version = fields.u32();
        header.backing_file_offset = fields.u64();
        fields.skip(8);
        header.size = fields.u64();
        header.crypt_method = fields.u32();
        header.l1_size = fields.u32();
        header.l1_table_offset = fields.u64();
        header.refcount_table_offset = fields.u64();
        header.refcount_table_clusters = fields.u32();
        header.nb_snapshots = fields.u32();
        header.snapshots_offset = fields.u64();
        if header.version == 2 {
            header.header_length = V2_LEN as u32;
            return header;
        }
        header.incompatible = Incompatible::from_bits_retain(fields.u64());
        header.compatible = Compatible::from_bits_retain(fields.u64());
        header.autoclear = Autoclear::from_bits_retain(fields.u64());
        header.refcount_order = fields.u32();
        header.header_length = fields.u32();
        header
    }

    fn check_length(&mut self, cluster: &[u8]) -> Result<(), Error> {
        if self.version == 2 {
            return Ok(());
        }
        let len = self.header_length as usize;
        if len < V3_LEN {
            return Err(Error::new("qcow2 header too short"));
        }
        if len > cluster.len() {
            return Err(Error::new("qcow2 header exceeds cluster size"));
        }
        if !len.is_multiple_of(8) {
            return Err(Error::new(format!("qcow2 header length {len} is not a multiple of 8")));
        }
        if let Some(fields) = cluster.get(KNOWN_LEN..len) {
            self.unknown_fields = fields.to_vec();
        }
        Ok(())
    }

    /// Refuses features that we do not know, by the names that the image gives them.
    fn check_features(&self, cluster: &[u8]) -> Result<(), Error> {
        let unknown = self.incompatible.bits() & !Incompatible::all().bits();
        if unknown == 0 {
            return Ok(());
        }
        // Who made the image may have left names, even if not all of the header makes sense to us.
        let mut known = Vec::new();
        let _ = extensions::parse_into(&mut known, self.extension_area(cluster));
        let names = extensions::names_of(&known, FeatureKind::Incompatible, unknown);
        Err(Error::new(format!("Unsupported qcow2 feature(s): {names}")))
    }

    fn check_compression(&mut self, stored: u8) -> Result<(), Error> {
        // The field is there only if the header is long enough.
        let kind = if self.header_length as usize > V3_LEN { stored } else { 0 };
        self.compression = match kind {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            _ => return Err(Error::new(format!("qcow2: unknown compression type: {kind}"))),
        };
        let wanted = kind != 0;
        if self.incompatible.contains(Incompatible::COMPRESSION) != wanted {
            let must = if wanted { "must be set" } else { "must not be set" };
            return Err(Error::new(format!(
                "qcow2: Compression type incompatible feature bit {must}"
            )));
        }
        Ok(())
    }

    /// The limits of everything that the header says of tables.
    fn check_tables(&self) -> Result<(), Error> {
        if self.refcount_order > layout::MAX_REFCOUNT_ORDER {
            return Err(Error::new(
                "Reference count entry width too large; may not exceed 64 bits",
            ));
        }
        let crypt = self.crypt_method;
        if !matches!(crypt, CRYPT_NONE | CRYPT_AES | CRYPT_LUKS) {
            return Err(Error::new(format!("Unsupported encryption method {crypt}")));
        }
        let geometry = self.geometry();
        if geometry.extended_l2 && self.cluster_bits < layout::MIN_EXTENDED_CLUSTER_BITS {
            let size = geometry.cluster_size() / layout::SUBCLUSTERS;
            return Err(Error::new(format!("Unsupported subcluster size: {size}")));
        }
        let table_bytes = (self.refcount_table_clusters as u64) << self.cluster_bits;
        let place = |what: &str, offset: u64, bytes: u64| {
            let end = offset.checked_add(bytes).filter(|&end| end <= i64::MAX as u64);
            match end.is_some() && geometry.is_cluster_start(offset) {
                true => Ok(()),
                false => Err(Error::new(format!("{what} offset invalid"))),
            }
        };
        if table_bytes > layout::MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new("Reference count table too large"));
        }
        place("Reference count table", self.refcount_table_offset, table_bytes)?;
        if self.nb_snapshots > layout::MAX_SNAPSHOTS {
            return Err(Error::new("Snapshot table too large"));
        }
        place("Snapshot table", self.snapshots_offset, 0)?;
        let l1_bytes = self.l1_size as u64 * 8;
        if l1_bytes > layout::MAX_L1_BYTES {
            return Err(Error::new("Active L1 table too large"));
        }
        let needed = geometry.l1_entries_for(self.size);
        if self.size > i64::MAX as u64 || needed > i32::MAX as u64 {
            return Err(Error::new("Image is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(Error::new("L1 table is too small"));
        }
        place("Active L1 table", self.l1_table_offset, l1_bytes)
    }

    /// The bytes between the header's structure and the backing file's name, or the cluster's end.
    fn extension_area<'a>(&self, cluster: &'a [u8]) -> &'a [u8] {
        let end = match self.backing_file_offset {
            0 => cluster.len(),
            offset => cluster.len().min(offset as usize),
        };
        cluster.get(self.header_length as usize..end).unwrap_or_default()
    }

    fn check_extensions(&self) -> Result<(), Error> {
        let geometry = self.geometry();
        for extension in &self.extensions {
            extension.check(&geometry, self.crypt_method)?;
        }
        Ok(())
    }

    fn backing_name(&self, cluster: &[u8], len: u32) -> Result<Option<Vec<u8>>, Error> {
        let (at, len) = (self.backing_file_offset as usize, len as usize);
        if at == 0 || len == 0 {
            return Ok(None);
        }
        let name = cluster.get(at..).and_then(|rest| rest.get(..len));
        match name.filter(|_| len <= BACKING_NAME_LIMIT) {
            Some(name) => Ok(Some(until_nul(name).to_vec()).filter(|name| !name.is_empty())),
            None => Err(Error::new("Backing file name too long")),
        }
    }

    /// The format of the backing file, if the image records one.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions
            .iter()
            .find_map(|extension| match extension {
                Extension::BackingFormat(name) if !name.is_empty() => Some(&name[..]),
                _ => None,
            })
            .filter(|_| self.backing_file.is_some())
    }

    /// How the image is laid out.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible.contains(Incompatible::EXTENDED_L2),
            zero_flag: self.version >= 3,
            external_data: self.incompatible.contains(Incompatible::DATA_FILE),
        }
    }

    /// The fixed fields, to be written at offset 0: less than a sector, so that a crash leaves
    /// either the old header or the new one. Extensions and the backing file's name stay as they
    /// are on disk, so these must not have changed since `parse` or `encode`.
    pub fn fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_LEN);
        let name_len = self.backing_file.as_ref().map_or(0, Vec::len);
        out.extend(MAGIC);
        out.extend(self.version.to_be_bytes());
        out.extend(self.backing_file_offset.to_be_bytes());
        out.extend((name_len as u32).to_be_bytes());
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.refcount_table_offset.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.nb_snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend(self.incompatible.bits().to_be_bytes());
            out.extend(self.compatible.bits().to_be_bytes());
            out.extend(self.autoclear.bits().to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(self.header_length.to_be_bytes());
        }
        if self.header_length as usize >= FIXED_LEN {
            out.push(self.compression as u8);
            out.extend(self.unknown_fields.iter().take(FIXED_LEN - KNOWN_LEN));
        }
        out
    }

    /// The whole first cluster: fields, extensions in the order that QEMU writes them, the backing
    /// file's name.
    ///
    /// # Errors
    /// As [`Header::place`].
    pub fn encode(&mut self) -> Result<Vec<u8>, Error> {
        self.place(0)?;
        let mut out = vec![0; 1 << self.cluster_bits];
        for (at, bytes) in self.parts() {
            out[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(out)
    }

    /// Gives everything its place: the extensions behind all fields that are known, and the name behind the
    /// extensions, at `least` this many bytes into the cluster.
    ///
    /// # Errors
    /// ENOSPC when all that does not fit into the cluster; EINVAL when the name is too long for any.
    pub fn place(&mut self, least: usize) -> Result<(), Error> {
        let start = self.full_length();
        self.place_name(start, (start + extensions::encode(&self.extensions).len()).max(least))
    }

    /// Gives the name its place: `at` bytes into the cluster. The structure has `header_length` bytes.
    ///
    /// # Errors
    /// As [`Header::place`].
    pub fn place_name(&mut self, header_length: usize, at: usize) -> Result<(), Error> {
        use crate::io::Errno;
        let name = self.backing_file.as_deref().unwrap_or_default();
        if name.len() > BACKING_NAME_LIMIT {
            return Err(Error::new("Backing file name too long").with_errno(Errno(libc::EINVAL)));
        }
        if at + name.len() > 1 << self.cluster_bits {
            return Err(
                Error::new("qcow2 header exceeds cluster size").with_errno(Errno(libc::ENOSPC))
            );
        }
        self.backing_file_offset = if name.is_empty() { 0 } else { at as u64 };
        self.header_length = header_length as u32;
        Ok(())
    }

    /// Everything is where it is in `other`.
    pub fn take_places(&mut self, other: &Header) {
        self.backing_file_offset = other.backing_file_offset;
        self.header_length = other.header_length;
    }

    /// Of the structure with all fields that are known, in bytes.
    pub fn full_length(&self) -> usize {
        match self.version {
            2 => V2_LEN,
            _ => KNOWN_LEN + self.unknown_fields.len(),
        }
    }

    /// The structure: all fields, also those that we do not know.
    pub fn structure(&self) -> Vec<u8> {
        let mut out = self.fields();
        if self.version >= 3 {
            out.extend(self.unknown_fields.iter().skip(FIXED_LEN - KNOWN_LEN));
        }
        out
    }

    /// What is where in the cluster: the structure with the extensions, and the backing file's name.
    pub fn parts(&self) -> [(usize, Vec<u8>); 2] {
        let extensions = extensions::encode(&self.extensions);
        let name = self.backing_file.clone().unwrap_or_default();
        [(0, [self.structure(), extensions].concat()), (self.name_range().start, name)]
    }

    /// Where the backing file's name is stored, in bytes; empty if there is none.
    pub fn name_range(&self) -> std::ops::Range<usize> {
        let (at, name) = (self.backing_file_offset as usize, self.backing_file.as_deref());
        at..at + name.map_or(0, <[u8]>::len)
    }

    /// Where the extensions end in `cluster`, which this header was read from, in bytes.
    pub fn extensions_end(&self, cluster: &[u8]) -> usize {
        self.header_length as usize + extensions::stored_len(self.extension_area(cluster))
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
