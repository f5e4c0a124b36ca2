//! The headers of the sparse extents of ESX: COWD, which VMware 3 has too, and seSparse.

use super::layout::{Kind, Layout, Packing, SeAreas, u32_at, u64_at};
use crate::block::{Error, SECTOR};

pub const COWD_MAGIC: &[u8] = b"COWD";
/// Bytes of a COWD header.
pub const COWD_LEN: usize = 2048;
/// Bytes of each of the two headers of a seSparse extent.
pub const SE_LEN: usize = 512;
/// Where a COWD header says which sector comes behind all that is used.
pub const NEXT_FREE_AT: u64 = 28;

const COWD_VERSION: u32 = 1;
const COWD_TABLE_ENTRIES: u64 = 4096;

const SE_MAGIC: u64 = 0xcafe_babe;
const SE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const SE_VERSION: u64 = 0x2_0000_0001;

/// Reads a COWD header, of a file of so many bytes.
///
/// # Errors
/// It is none, or makes no sense.
pub fn cowd(bytes: &[u8; COWD_LEN], file_len: u64) -> Result<Layout, Error> {
    if !bytes.starts_with(COWD_MAGIC) {
        return Err(Error::new("Image not in VMDK format"));
    }
    let version = u32_at(bytes, 4);
    if version != COWD_VERSION {
        return Err(Error::new(format!("Unsupported VMDK version {version}")));
    }
    let field = |at: usize| u64::from(u32_at(bytes, at));
    let (capacity, grain_bits, table_bits) =
        Layout::sizes(field(12), field(16), COWD_TABLE_ENTRIES)?;
    let tables = Layout::tables_for(capacity, grain_bits, table_bits);
    if field(24) < tables {
        return Err(Error::new(format!(
            "VMDK header: a grain directory of {} entries, and the disk needs {tables}",
            field(24)
        )));
    }
    let directory = field(20) * SECTOR;
    let layout = Layout {
        kind: Kind::Cowd,
        capacity,
        grain_bits,
        table_bits,
        directory,
        tables,
        copy: None,
        data_start: directory + (tables * 4).next_multiple_of(SECTOR),
        packing: Packing::No,
        has_zero_grains: false,
        read_only: None,
        se: SeAreas { tables: 0, grains: 0 },
    };
    layout.check(file_len)?;
    Ok(layout)
}

/// Reads the constant header of a seSparse extent, of a file of so many bytes.
///
/// # Errors
/// It is none, or makes no sense.
pub fn se_sparse(bytes: &[u8; SE_LEN], file_len: u64) -> Result<(Layout, u64), Error> {
    let field = |n: usize| u64_at(bytes, 8 * n);
    if field(0) != SE_MAGIC {
        return Err(Error::new(format!("Bad const header magic: {:#018x}", field(0))));
    }
    if field(1) != SE_VERSION {
        return Err(Error::new(format!("Unsupported version: {:#018x}", field(1))));
    }
    let place = |n: usize| {
        let place = field(n).checked_mul(SECTOR).filter(|&place| i64::try_from(place).is_ok());
        place.ok_or_else(|| {
            Error::new(format!("seSparse header: a place at sector {:#x}", field(n)))
        })
    };
    // Sectors of a table, with entries of eight bytes.
    let entries = field(4).saturating_mul(SECTOR / 8);
    let (capacity, grain_bits, table_bits) = Layout::sizes(field(2), field(3), entries)?;
    let tables = Layout::tables_for(capacity, grain_bits, table_bits);
    let directory_len = field(17).saturating_mul(SECTOR);
    if directory_len < tables.saturating_mul(8) {
        return Err(Error::new(format!(
            "seSparse header: a grain directory of {directory_len} bytes for {tables} tables"
        )));
    }
    let layout = Layout {
        kind: Kind::SeSparse,
        capacity,
        grain_bits,
        table_bits,
        directory: place(16)?,
        tables,
        copy: None,
        data_start: SECTOR,
        packing: Packing::No,
        has_zero_grains: false,
        read_only: Some("No write support for seSparse images available"),
        se: SeAreas { tables: place(18)?, grains: place(24)? },
    };
    layout.check(file_len)?;
    Ok((layout, place(10)?))
}

/// Checks the volatile header of a seSparse extent.
///
/// # Errors
/// It is none, or its journal has to be replayed.
pub fn se_volatile(bytes: &[u8; SE_LEN]) -> Result<(), Error> {
    let field = |n: usize| u64_at(bytes, 8 * n);
    if field(0) != SE_VOLATILE_MAGIC {
        return Err(Error::new(format!("Bad volatile header magic: {:#018x}", field(0))));
    }
    if bytes[24] != 0 {
        return Err(Error::new("Image is dirty, Replaying journal not supported"));
    }
    Ok(())
}
