//! Where things lie in a sparse extent, whatever its kind: what its header comes to, inside limits.

use crate::block::{Error, SECTOR};
use std::ops::RangeInclusive;

/// Logarithms of the grain size, in bytes: one sector to 32 MiB.
const GRAIN_BITS: RangeInclusive<u32> = 9..=25;
/// Logarithms of the entries of a grain table.
const TABLE_BITS: RangeInclusive<u32> = 6..=13;
/// Most bytes of a grain directory.
const MOST_DIRECTORY: u64 = 64 << 20;

/// The kind of a sparse extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// That of VMware's hosted products.
    Hosted,
    /// That of VMFS on ESX, and of VMware 3.
    Cowd,
    /// Space-efficient sparse: that of ESXi 6.5 and later. It is only read.
    SeSparse,
}

/// Where a seSparse extent has what its entries count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeAreas {
    /// Where grain tables begin, and grains, in bytes.
    pub tables: u64,
    pub grains: u64,
}

/// Grains as they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// As they are.
    No,
    /// Each behind a marker, which says how long it is.
    Marked,
    /// As streams of zlib.
    Bare,
}

/// See the module's text. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub kind: Kind,
    /// Bytes of the disk.
    pub capacity: u64,
    pub grain_bits: u32,
    pub table_bits: u32,
    /// The grain directory, of which all entries are read.
    pub directory: u64,
    /// Entries of it.
    pub tables: u64,
    /// The copy of the directory, whose tables are copies, too.
    pub copy: Option<u64>,
    /// No grain lies before this.
    pub data_start: u64,
    pub packing: Packing,
    /// The entry 1 says that a grain reads as zeroes.
    pub has_zero_grains: bool,
    /// Why it cannot be written, if it cannot.
    pub read_only: Option<&'static str>,
    pub se: SeAreas,
}

impl Layout {
    /// Sizes out of a header, in sectors but for `table_entries`.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn sizes(capacity: u64, grain: u64, table_entries: u64) -> Result<(u64, u32, u32), Error> {
        if grain == 0 || table_entries == 0 {
            return Err(Error::new("L1 entry size is invalid"));
        }
        let grain_bits = logarithm(grain).and_then(|bits| bits.checked_add(SECTOR.ilog2()));
        let Some(grain_bits) = grain_bits.filter(|bits| GRAIN_BITS.contains(bits)) else {
            return Err(Error::new(format!("VMDK header: grains of {grain} sectors")));
        };
        if table_entries > 1 << TABLE_BITS.end() {
            return Err(Error::new("L2 table size too big"));
        }
        let table_bits = logarithm(table_entries).filter(|bits| TABLE_BITS.contains(bits));
        let Some(table_bits) = table_bits else {
            let text = format!("VMDK header: grain tables of {table_entries} entries");
            return Err(Error::new(text));
        };
        let len = capacity.checked_mul(SECTOR).filter(|&len| i64::try_from(len).is_ok());
        match len {
            Some(len) => Ok((len, grain_bits, table_bits)),
            None => Err(Error::new(format!("VMDK header: a capacity of {capacity} sectors"))),
        }
    }

    pub fn grain_size(&self) -> u64 {
        1 << self.grain_bits
    }

    /// Bytes of an entry of a grain table or the directory.
    pub fn entry_bytes(&self) -> u64 {
        match self.kind {
            Kind::Hosted | Kind::Cowd => 4,
            Kind::SeSparse => 8,
        }
    }

    /// Bytes of a grain table.
    pub fn table_bytes(&self) -> u64 {
        self.entry_bytes() << self.table_bits
    }

    /// Tables that the disk needs.
    pub fn tables_for(capacity: u64, grain_bits: u32, table_bits: u32) -> u64 {
        capacity.div_ceil(1 << (grain_bits + table_bits))
    }

    /// Checks that the directories lie in a file of so many bytes.
    ///
    /// # Errors
    /// They do not, begin in the header, or are too large.
    pub fn check(&self, file_len: u64) -> Result<(), Error> {
        let len = self.tables.checked_mul(self.entry_bytes());
        let Some(len) = len.filter(|&len| len <= MOST_DIRECTORY) else {
            return Err(Error::new("L1 size too big"));
        };
        for (what, place) in
            [("grain directory", Some(self.directory)), ("copy of the grain directory", self.copy)]
        {
            let Some(place) = place else { continue };
            if place < SECTOR {
                return Err(Error::new(format!("VMDK header: the {what} begins in the header")));
            }
            if place.checked_add(len).is_none_or(|end| end > file_len) {
                return Err(Error::new(format!(
                    "VMDK header: the {what}, {len:#x} bytes at {place:#x}, is not in the file of {file_len:#x} bytes"
                )));
            }
        }
        Ok(())
    }
}

/// Of a power of two.
fn logarithm(n: u64) -> Option<u32> {
    n.is_power_of_two().then(|| n.ilog2())
}

/// Numbers of a header, which lie inside it.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]))
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]))
}
