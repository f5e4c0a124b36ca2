//! The header of a hosted sparse extent, and the footer that takes its place at the end of a streamOptimized one.

use super::layout::{Kind, Layout, Packing, SeAreas, u32_at, u64_at};
use crate::block::{Error, SECTOR};

pub const MAGIC: &[u8] = b"KDMV";
pub const LEN: usize = 512;

/// Sectors of a grain and entries of a table, in new extents.
const GRAIN: u64 = 128;
const TABLE_ENTRIES: u32 = 512;
/// Sectors of the descriptor in new extents, and where it begins.
pub const DESCRIPTOR_SECTORS: u64 = 20;
pub const DESCRIPTOR_AT: u64 = 1;
/// The footer says where the grain directory is.
const AT_END: u64 = u64::MAX;
/// Most entries of a grain table.
const MOST_ENTRIES: u32 = 512;

mod flag {
    /// The line ends in the header tell whether something has changed those of the file.
    pub const LINE_ENDS: u32 = 1;
    /// There is a copy of the directory and its tables.
    pub const COPY: u32 = 1 << 1;
    pub const ZERO_GRAINS: u32 = 1 << 2;
    pub const COMPRESSED: u32 = 1 << 16;
    pub const MARKERS: u32 = 1 << 17;
}

const LINE_ENDS: [u8; 4] = *b"\n \r\n";
const DEFLATE: u16 = 1;

/// The fields; places and lengths are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    version: u32,
    flags: u32,
    pub capacity: u64,
    grain: u64,
    pub descriptor_at: u64,
    pub descriptor_len: u64,
    table_entries: u32,
    copy: u64,
    directory: u64,
    overhead: u64,
    compression: u16,
}

impl Header {
    /// Reads the fields.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Header, Error> {
        if !bytes.starts_with(MAGIC) {
            return Err(Error::new("Image not in VMDK format"));
        }
        let header = Header {
            version: u32_at(bytes, 4),
            flags: u32_at(bytes, 8),
            capacity: u64_at(bytes, 12),
            grain: u64_at(bytes, 20),
            descriptor_at: u64_at(bytes, 28),
            descriptor_len: u64_at(bytes, 36),
            table_entries: u32_at(bytes, 44),
            copy: u64_at(bytes, 48),
            directory: u64_at(bytes, 56),
            overhead: u64_at(bytes, 64),
            compression: u16::from_le_bytes([bytes[77], bytes[78]]),
        };
        if header.version > 3 {
            return Err(Error::new(format!("Unsupported VMDK version {}", header.version)));
        }
        if header.flags & flag::LINE_ENDS != 0 && bytes[73..77] != LINE_ENDS {
            return Err(Error::new(
                "VMDK header: its line ends have been changed, as by a transfer of the file as text",
            ));
        }
        if header.flags & flag::COMPRESSED != 0 && header.compression != DEFLATE {
            let method = header.compression;
            return Err(Error::new(format!("VMDK header: unknown compression method {method}")));
        }
        Ok(header)
    }

    /// Whether a footer says where the grain directory is.
    pub fn has_footer(&self) -> bool {
        self.directory == AT_END
    }

    /// Reads the footer out of the last bytes of the file: its marker, the footer and the mark of the stream's end.
    ///
    /// # Errors
    /// They are none.
    pub fn parse_footer(end: &[u8; 3 * LEN]) -> Result<Header, Error> {
        const FOOTER: u32 = 3;
        let (marker, rest) = end.split_at(LEN);
        let (footer, last) = rest.split_at(LEN);
        let is_marker =
            |bytes: &[u8], kind: u32| u32_at(bytes, 8) == 0 && u32_at(bytes, 12) == kind;
        let is_footer = is_marker(marker, FOOTER) && footer.starts_with(MAGIC);
        let footer = footer.first_chunk().filter(|_| is_footer && is_marker(last, 0));
        let footer = footer.ok_or_else(|| Error::new("The VMDK image has no footer at its end"))?;
        match Header::parse(footer)? {
            footer if footer.has_footer() => {
                Err(Error::new("VMDK footer: it does not say where the grain directory is"))
            }
            footer => Ok(footer),
        }
    }

    /// What the fields come to, in a file of so many bytes.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn layout(&self, file_len: u64, has_footer: bool) -> Result<Layout, Error> {
        if self.table_entries > MOST_ENTRIES {
            return Err(Error::new("L2 table size too big"));
        }
        let (capacity, grain_bits, table_bits) =
            Layout::sizes(self.capacity, self.grain, self.table_entries.into())?;
        let is_compressed = self.flags & flag::COMPRESSED != 0;
        let data_start = self.overhead.saturating_mul(SECTOR);
        if file_len < data_start {
            return Err(Error::new(format!(
                "File truncated, expecting at least {data_start} bytes"
            )));
        }
        let read_only = match self.version {
            _ if has_footer => {
                Some("The tables of this VMDK image lie behind its data, so it must be read only")
            }
            3 if !is_compressed => Some("VMDK version 3 must be read only"),
            _ => None,
        };
        let has_copy = self.flags & flag::COPY != 0 && self.copy != 0;
        let layout = Layout {
            kind: Kind::Hosted,
            capacity,
            grain_bits,
            table_bits,
            directory: self.directory.saturating_mul(SECTOR),
            tables: Layout::tables_for(capacity, grain_bits, table_bits),
            copy: has_copy.then(|| self.copy.saturating_mul(SECTOR)),
            // Streams may say nothing of it.
            data_start: if is_compressed { SECTOR } else { data_start.max(SECTOR) },
            packing: match (is_compressed, self.flags & flag::MARKERS != 0) {
                (false, _) => Packing::No,
                (true, true) => Packing::Marked,
                (true, false) => Packing::Bare,
            },
            has_zero_grains: self.flags & flag::ZERO_GRAINS != 0,
            read_only,
            se: SeAreas { tables: 0, grains: 0 },
        };
        layout.check(file_len)?;
        Ok(layout)
    }
}

/// A new extent: what its header says, and its directories.
pub struct New {
    header: Header,
    tables: u64,
}

impl New {
    /// An extent for a disk of `len` bytes, or a part of one.
    ///
    /// # Errors
    /// Its tables have no room.
    pub fn of(len: u64, is_compressed: bool, has_zero_grains: bool) -> Result<New, Error> {
        let capacity = len.div_ceil(SECTOR);
        let per_table = GRAIN * u64::from(TABLE_ENTRIES);
        let tables = capacity.div_ceil(per_table);
        let directory = (tables * 4).div_ceil(SECTOR);
        let table = u64::from(TABLE_ENTRIES) * 4 / SECTOR;
        let copy = DESCRIPTOR_AT + DESCRIPTOR_SECTORS;
        let first = copy + directory + tables * table;
        let overhead = (first + directory + tables * table).next_multiple_of(GRAIN);
        let mut flags = flag::LINE_ENDS | flag::COPY;
        let mut version = 1;
        if has_zero_grains {
            (version, flags) = (2, flags | flag::ZERO_GRAINS);
        }
        if is_compressed {
            (version, flags) = (3, flags | flag::COMPRESSED | flag::MARKERS);
        }
        // Entries name sectors in 32 bits, and those of the tables come first.
        if overhead > u64::from(u32::MAX) {
            return Err(Error::new("Image too large"));
        }
        let header = Header {
            version,
            flags,
            capacity,
            grain: GRAIN,
            // Extents in files of their own have room for one, as in QEMU.
            descriptor_at: DESCRIPTOR_AT,
            descriptor_len: DESCRIPTOR_SECTORS,
            table_entries: TABLE_ENTRIES,
            copy,
            directory: first,
            overhead,
            compression: if is_compressed { DEFLATE } else { 0 },
        };
        Ok(New { header, tables })
    }

    /// Bytes of the file.
    pub fn file_len(&self) -> u64 {
        self.header.overhead * SECTOR
    }

    /// Where the directories begin, in bytes, and how they are stored, without what is behind each.
    pub fn directories(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        [self.header.copy, self.header.directory].into_iter().map(|at| {
            let first = at + (self.tables * 4).div_ceil(SECTOR);
            let table = u64::from(TABLE_ENTRIES) * 4 / SECTOR;
            let entries = (0..self.tables).map(|n| (first + n * table) as u32);
            (at * SECTOR, entries.flat_map(u32::to_le_bytes).collect())
        })
    }

    /// The header as it is stored.
    pub fn encode(&self) -> [u8; LEN] {
        let header = &self.header;
        let mut bytes = [0; LEN];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, MAGIC);
        put(4, &header.version.to_le_bytes());
        put(8, &header.flags.to_le_bytes());
        put(12, &header.capacity.to_le_bytes());
        put(20, &header.grain.to_le_bytes());
        put(28, &header.descriptor_at.to_le_bytes());
        put(36, &header.descriptor_len.to_le_bytes());
        put(44, &header.table_entries.to_le_bytes());
        put(48, &header.copy.to_le_bytes());
        put(56, &header.directory.to_le_bytes());
        put(64, &header.overhead.to_le_bytes());
        put(73, &LINE_ENDS);
        put(77, &header.compression.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_header_is_read_again() {
        for (len, compressed, zero) in
            [(1, false, false), (5 << 30, false, true), (3 << 40, true, false)]
        {
            let new = New::of(len, compressed, zero).unwrap();
            let header = Header::parse(&new.encode()).unwrap();
            assert_eq!(header, new.header);
            let layout = header.layout(new.file_len(), false).unwrap();
            assert_eq!(layout.capacity, len.next_multiple_of(SECTOR));
            assert_eq!(layout.has_zero_grains, zero);
            assert_eq!(layout.packing == Packing::Marked, compressed);
            assert!(header.layout(new.file_len() - 1, false).is_err());
            let places: Vec<u64> = new.directories().map(|(at, _)| at).collect();
            assert_eq!(places, [layout.copy.unwrap(), layout.directory]);
        }
    }

    #[test]
    fn fields_outside_their_limits_are_reported() {
        let bytes = New::of(64 << 20, false, false).unwrap().encode();
        for (at, patch) in [
            (0, &b"X"[..]),
            (4, b"\x04"),
            (12, &[0xff; 8]),
            (12, b"\0\0\0\0\0\0\x10\0"),
            (20, b"\0"),
            (20, b"\x81"),
            (20, b"\0\0\x10"),
            (44, b"\0\0"),
            (44, b"\x64\0"),
            (44, b"\0\x04"),
            (48, &[0xff; 7]),
            (56, &[0xff; 7]),
            (56, &[0; 8]),
            (64, &[0xff; 7]),
            (73, b"x"),
        ] {
            let mut bytes = bytes;
            bytes[at..at + patch.len()].copy_from_slice(patch);
            let read = Header::parse(&bytes).and_then(|header| header.layout(1 << 20, false));
            assert!(read.is_err(), "{at} {patch:?}");
        }
    }
}
