//! The header of an image: 64 bytes of little-endian fields, followed by the catalogue.
//!
//! The catalogue has an entry of 32 bits for each cluster of the disk.
//!
//! Everything that leaves [`Header::parse`] is inside the limits of the format.

use crate::block::{Error, SECTOR};

/// Bytes of the header.
pub const LEN: usize = 64;
/// Where the fields begin that change while an image is used, and their bytes.
pub const STATE_AT: u64 = 44;
pub const STATE_LEN: usize = 20;
pub const DEFAULT_CLUSTER: u64 = 1 << 20;

const VERSION: u32 = 2;
/// An image that a program has open for writing.
const IN_USE: u32 = 0x746f_6e59;
/// Heads, and sectors of a track, of the geometry that is recorded.
const HEADS: u32 = 16;
const TRACK: u64 = 32;
/// The image has no data, and its catalogue may be anything.
const EMPTY_FLAG: u32 = 1;
/// Sectors of a cluster, and entries of a catalogue, that QEMU opens.
const MAX_SECTORS: u32 = (i32::MAX / 513) as u32;
const MAX_ENTRIES: u32 = (i32::MAX / 4) as u32;

/// What the catalogue counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Sectors: the older kind.
    Sectors,
    /// Clusters.
    Clusters,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::Sectors, Kind::Clusters];

    fn magic(self) -> &'static [u8; 16] {
        match self {
            Kind::Sectors => b"WithoutFreeSpace",
            Kind::Clusters => b"WithouFreSpacExt",
        }
    }

    fn of(head: &[u8]) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| head.starts_with(kind.magic()))
    }
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    /// Of a cluster.
    pub sectors: u32,
    /// Of the catalogue.
    pub entries: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    /// Where data begins, in sectors; zero: right behind the catalogue.
    data_off: u32,
    pub state: State,
}

/// What of the header changes while an image is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    in_use: u32,
    flags: u32,
    /// Where the extension is, in sectors; zero: there is none.
    pub extension: u64,
}

impl State {
    /// The image was not closed since a program wrote to it.
    pub fn is_in_use(&self) -> bool {
        self.in_use == IN_USE
    }

    /// Of an image that is written, or was. An extension does not know what is written, so there is none any more.
    pub fn written(&self, is_open: bool) -> State {
        let in_use = if is_open { IN_USE } else { 0 };
        State { in_use, flags: self.flags & !EMPTY_FLAG, extension: 0 }
    }
}

impl Header {
    /// Whether a file that begins so is an image of this format.
    pub fn probe(head: &[u8]) -> bool {
        Kind::of(head).is_some()
            && head.get(16..20).is_some_and(|version| version == VERSION.to_le_bytes())
    }

    /// Reads the first bytes of an image.
    ///
    /// # Errors
    /// In QEMU's words, when it is no image of this format, or none that we support.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Header, Error> {
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
        let kind = Kind::of(bytes).filter(|_| Header::probe(bytes));
        let Some(kind) = kind else { return Err(Error::new("Image not in Parallels format")) };
        let size = match kind {
            Kind::Sectors => u32_at(36).into(),
            Kind::Clusters => u64_at(36),
        };
        let sectors = u32_at(28);
        if sectors == 0 {
            return Err(Error::new("Invalid image: Zero sectors per track"));
        }
        if sectors > MAX_SECTORS {
            return Err(Error::new("Invalid image: Too big cluster"));
        }
        let entries = u32_at(32);
        if entries > MAX_ENTRIES {
            return Err(Error::new("Catalog too large"));
        }
        if size > i64::MAX as u64 / SECTOR {
            return Err(Error::new("Could not refresh total sector count: File too large"));
        }
        let state = State { in_use: u32_at(44), flags: u32_at(52), extension: u64_at(56) };
        let (size, data_off) = (size * SECTOR, u32_at(48));
        Ok(Header { kind, sectors, entries, size, data_off, state })
    }

    /// The header of a new image, for a disk and clusters of so many bytes, which are rounded up to sectors.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn for_new(size: u64, cluster_size: u64) -> Result<Header, Error> {
        if cluster_size > i32::MAX as u64 || cluster_size.div_ceil(SECTOR) > MAX_SECTORS.into() {
            return Err(Error::new("Cluster size is too large"));
        }
        let sectors = cluster_size.div_ceil(SECTOR) as u32;
        let too_large = || Error::new("Image size is too large for this cluster size");
        let size =
            size.checked_next_multiple_of(SECTOR).filter(|&size| i64::try_from(size).is_ok());
        let entries = size.and_then(|size| {
            let entries = size.checked_div(u64::from(sectors) * SECTOR)?;
            let is_whole = size.is_multiple_of(u64::from(sectors) * SECTOR);
            Some(entries + u64::from(!is_whole))
        });
        let (size, entries) = size.zip(entries).ok_or_else(too_large)?;
        if entries > MAX_ENTRIES.into() {
            return Err(too_large());
        }
        let state = State { in_use: 0, flags: 0, extension: 0 };
        let kind = Kind::Clusters;
        let mut header =
            Header { kind, sectors, entries: entries as u32, size, data_off: 0, state };
        // At most 2 GiB and a cluster, in sectors.
        header.data_off = (header.data_start() / SECTOR) as u32;
        Ok(header)
    }

    /// The first bytes of an image.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let size = self.size / SECTOR;
        put(0, self.kind.magic());
        put(16, &VERSION.to_le_bytes());
        put(20, &HEADS.to_le_bytes());
        // As many as fit into the field.
        put(24, &((size / (u64::from(HEADS) * TRACK)) as u32).to_le_bytes());
        put(28, &self.sectors.to_le_bytes());
        put(32, &self.entries.to_le_bytes());
        put(36, &size.to_le_bytes());
        put(STATE_AT as usize, &self.encode_state(&self.state));
        bytes
    }

    /// The bytes at [`STATE_AT`] of an image in another state.
    pub fn encode_state(&self, state: &State) -> [u8; STATE_LEN] {
        let mut bytes = [0; STATE_LEN];
        bytes[..4].copy_from_slice(&state.in_use.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.data_off.to_le_bytes());
        bytes[8..12].copy_from_slice(&state.flags.to_le_bytes());
        bytes[12..].copy_from_slice(&state.extension.to_le_bytes());
        bytes
    }

    /// Whether another header says the same but for its state.
    pub fn is_same_disk(&self, other: &Header) -> bool {
        Header { state: other.state.clone(), ..self.clone() } == *other
    }

    /// Bytes.
    pub fn cluster_size(&self) -> u64 {
        u64::from(self.sectors) * SECTOR
    }

    /// Where the catalogue ends in the file, in bytes.
    pub fn catalogue_end(&self) -> u64 {
        LEN as u64 + u64::from(self.entries) * 4
    }

    /// Where the part of the disk ends that the catalogue has entries for, in bytes.
    pub fn mapped_end(&self) -> u64 {
        u64::from(self.entries) * self.cluster_size()
    }

    /// Where the first cluster of the file is, in bytes: new ones are so many clusters behind it.
    pub fn data_start(&self) -> u64 {
        let least = self.catalogue_end().next_multiple_of(SECTOR);
        let start = least.max(u64::from(self.data_off) * SECTOR);
        // Entries can name no others.
        start.next_multiple_of(self.unit())
    }

    /// Bytes of what the catalogue counts.
    fn unit(&self) -> u64 {
        match self.kind {
            Kind::Sectors => SECTOR,
            Kind::Clusters => self.cluster_size(),
        }
    }

    /// Where a cluster is that an entry names, in bytes; none where the entry leads into header or catalogue.
    pub fn offset_of(&self, entry: u32) -> Option<u64> {
        let offset = u64::from(entry) * self.unit();
        (offset >= self.catalogue_end()).then_some(offset)
    }

    /// The entry that names the cluster at an offset.
    pub fn entry_at(&self, offset: u64) -> u32 {
        (offset / self.unit()) as u32
    }

    /// Where a cluster of the file begins, in bytes.
    pub fn place_of(&self, cluster: u64) -> u64 {
        self.data_start() + cluster * self.cluster_size()
    }

    /// How many clusters of the file lie before an offset, the last of them maybe in part.
    pub fn clusters_before(&self, offset: u64) -> u64 {
        offset.saturating_sub(self.data_start()).div_ceil(self.cluster_size())
    }

    /// How many clusters of the file entries can name.
    pub fn most_clusters(&self) -> u64 {
        (u64::from(u32::MAX) * self.unit()).saturating_sub(self.data_start()) / self.cluster_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_header_is_read_as_it_was_made() {
        for (size, cluster) in [(0, 1 << 20), (1, 512), (10 << 20, 63 << 9), (1 << 40, 1 << 20)] {
            let header = Header::for_new(size, cluster).unwrap();
            assert_eq!(Header::parse(&header.encode()).unwrap(), header);
            assert!(header.data_start() >= header.catalogue_end());
            assert!(header.mapped_end() >= header.size);
        }
        assert!(Header::for_new(u64::MAX, 1 << 20).is_err());
        assert!(Header::for_new(1 << 20, 0).is_err());
    }

    #[test]
    fn entries_count_sectors_or_clusters() {
        let mut header = Header::for_new(10 << 20, 1 << 20).unwrap();
        assert_eq!(header.offset_of(2), Some(2 << 20));
        assert_eq!(header.entry_at(3 << 20), 3);
        header.kind = Kind::Sectors;
        assert_eq!(header.offset_of(0), None);
        assert_eq!(header.offset_of(2), Some(1024));
        assert_eq!(header.entry_at(3 << 20), 3 << 11);
    }
}
