//! The header of an image that grows: where the block allocation table is, and how large blocks are.

use super::bytes::{id_at, is_sealed, put, seal, u32_at, u64_at};
use super::footer;
use crate::block::{Error, Node, SECTOR};
use crate::cow::read_padded;
use crate::format::parent_name::text_of;
use crate::io::IoVec;
use std::ops::Range;
use uuid::Uuid;

pub const LEN: usize = 1024;
/// Bytes of a block of new images, as everybody makes them.
pub const BLOCK_SIZE: u32 = 2 << 20;
/// Bytes of an entry of the table.
pub const ENTRY_BYTES: u64 = 4;
const MAGIC: &[u8; 8] = b"cxsparse";
const VERSION: u32 = 0x0001_0000;
const CHECKSUM: usize = 36;
/// Entries that QEMU opens.
const MAX_ENTRIES: u32 = 0x1fff_ffff;
/// Where the name of the parent is, and how many bytes it has at most.
const NAME: Range<usize> = 64..64 + 512;
/// Where the locators of the parent are, how many, and their bytes.
const LOCATORS: usize = 576;
pub const LOCATOR_COUNT: usize = 8;
const LOCATOR_LEN: usize = 24;

/// Says where the name of the parent is, in the form of one platform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Locator {
    /// The platform; zeroes where there is no locator.
    pub code: [u8; 4],
    pub len: u32,
    /// In the file, in bytes.
    pub offset: u64,
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of the block allocation table, in bytes.
    pub table_at: u64,
    /// Entries of the table.
    pub entries: u32,
    /// The logarithm of the bytes of a block.
    pub block_bits: u32,
    pub parent_id: Uuid,
    /// When the parent was last changed, in seconds since 2000. Copying a file changes that, so nothing relies on it.
    pub parent_time: u32,
    /// The parent's file name, without a folder.
    pub parent_name: Option<String>,
    pub locators: [Locator; LOCATOR_COUNT],
}

impl Header {
    /// Reads a header, for a disk of so many bytes.
    ///
    /// # Errors
    /// In QEMU's words, where it has some.
    pub fn parse(bytes: &[u8; LEN], disk_size: u64) -> Result<Header, Error> {
        if !bytes.starts_with(MAGIC) {
            return Err(Error::new("Invalid header magic"));
        }
        if !is_sealed(bytes, CHECKSUM) {
            return Err(Error::new("VHD dynamic header: the checksum is wrong"));
        }
        let version = u32_at(bytes, 24);
        if version >> 16 != VERSION >> 16 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(Error::new(format!(
                "VHD dynamic header: version {major}.{minor} is not supported"
            )));
        }
        let block_size = u32_at(bytes, 32);
        if !block_size.is_power_of_two() || u64::from(block_size) < SECTOR {
            return Err(Error::new(format!("Invalid block size {block_size}")));
        }
        let entries = u32_at(bytes, 28);
        if entries > MAX_ENTRIES {
            return Err(Error::new(format!("Max Table Entries too large ({entries})")));
        }
        if u64::from(entries) * u64::from(block_size) < disk_size {
            return Err(Error::new("Page table too small"));
        }
        let table_at = u64_at(bytes, 16);
        if table_at > i64::MAX as u64 / 2 {
            return Err(Error::new(format!(
                "VHD dynamic header: table offset {table_at:#x} is no place for a table"
            )));
        }
        let locator = |n: usize| {
            let entry = &bytes[LOCATORS + n * LOCATOR_LEN..][..LOCATOR_LEN];
            let code = *entry.first_chunk().unwrap_or(&[0; 4]);
            Locator { code, len: u32_at(entry, 8), offset: u64_at(entry, 16) }
        };
        let name = &bytes[NAME];
        let end =
            name.chunks_exact(2).position(|unit| unit == [0, 0]).map_or(name.len(), |n| 2 * n);
        Ok(Header {
            table_at,
            entries,
            block_bits: block_size.ilog2(),
            parent_id: Uuid::from_bytes(id_at(bytes, 40)),
            parent_time: u32_at(bytes, 56),
            parent_name: text_of(&name[..end], u16::from_be_bytes).filter(|name| !name.is_empty()),
            locators: std::array::from_fn(locator),
        })
    }

    /// Reads the header at an offset of a file.
    ///
    /// # Errors
    /// I/O failed, or those of [`Header::parse`].
    pub async fn read(file: &Node, at: u64, disk_size: u64) -> Result<Header, Error> {
        let end = at.checked_add(LEN as u64);
        if end.is_none_or(|end| end > file.driver().len()) {
            return Err(Error::new(format!(
                "Error reading dynamic VHD header: it is said to be at {at:#x}, past the end of the file"
            )));
        }
        let mut bytes = [0; LEN];
        let read = read_padded(file, at, &IoVec::from_mut(&mut bytes)).await;
        read.map_err(|errno| Error::os("Error reading dynamic VHD header", errno))?;
        Header::parse(&bytes, disk_size)
    }

    /// The header as it is stored.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &u64::MAX.to_be_bytes());
        put(&mut bytes, 16, &self.table_at.to_be_bytes());
        put(&mut bytes, 24, &VERSION.to_be_bytes());
        put(&mut bytes, 28, &self.entries.to_be_bytes());
        put(&mut bytes, 32, &(1u32 << self.block_bits).to_be_bytes());
        put(&mut bytes, 40, self.parent_id.as_bytes());
        put(&mut bytes, 56, &self.parent_time.to_be_bytes());
        let name = self.parent_name.iter().flat_map(|name| name.encode_utf16());
        // The last unit is zero.
        let name: Vec<u8> = name.take(NAME.len() / 2 - 1).flat_map(u16::to_be_bytes).collect();
        put(&mut bytes, NAME.start, &name);
        for (n, locator) in self.locators.iter().enumerate() {
            let at = LOCATORS + n * LOCATOR_LEN;
            let space = locator.len.next_multiple_of(SECTOR as u32);
            put(&mut bytes, at, &locator.code);
            put(&mut bytes, at + 4, &space.to_be_bytes());
            put(&mut bytes, at + 8, &locator.len.to_be_bytes());
            put(&mut bytes, at + 16, &locator.offset.to_be_bytes());
        }
        seal(&mut bytes, CHECKSUM);
        bytes
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        1 << self.block_bits
    }

    /// Bytes of the sector bitmap that lies before each block.
    pub fn bitmap_len(&self) -> u64 {
        (self.block_size() / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }

    /// Bytes of a block with its bitmap.
    pub fn unit_len(&self) -> u64 {
        self.bitmap_len() + self.block_size()
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        u64::from(self.entries) * ENTRY_BYTES
    }

    /// What no block may be over: the footer at the head, the header, the table, and the parent's names.
    pub fn taken(&self, header_at: u64) -> Vec<Range<u64>> {
        let region = |at: u64, len: u64| at..at.saturating_add(len);
        let mut taken = vec![
            region(0, footer::LEN as u64),
            region(header_at, LEN as u64),
            region(self.table_at, self.table_len()),
        ];
        let used = self.locators.iter().filter(|locator| locator.code != [0; 4]);
        taken.extend(used.map(|locator| region(locator.offset, locator.len.into())));
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            table_at: 1536,
            entries: 5,
            block_bits: 21,
            parent_id: Uuid::new_v4(),
            parent_time: 77,
            parent_name: Some("Größe.vhd".to_owned()),
            locators: [Locator { code: *b"W2ru", len: 24, offset: 4096 }; LOCATOR_COUNT],
        }
    }

    #[test]
    fn a_header_says_what_was_put_into_it() {
        let header = header();
        assert_eq!(Header::parse(&header.encode(), 10 << 20).unwrap(), header);
        assert_eq!((header.bitmap_len(), header.table_len()), (512, 20));
        let large = Header { block_bits: 31, ..header };
        assert_eq!(large.bitmap_len(), 512 << 10);
    }

    #[test]
    fn fields_that_make_no_sense_are_named() {
        let changes: [(usize, &[u8], &str); 7] = [
            (0, b"x", "Invalid header magic"),
            (16, &[0x80], "table offset"),
            (24, &[0, 2], "version 2.0"),
            (28, &[0x20], "Max Table Entries"),
            (31, &[4], "Page table too small"),
            (32, &[0, 0x30], "Invalid block size 3145728"),
            (32, &[0, 0, 1, 0], "Invalid block size 256"),
        ];
        for (at, field, wanted) in changes {
            let mut bytes = header().encode();
            put(&mut bytes, at, field);
            seal(&mut bytes, CHECKSUM);
            let error = Header::parse(&bytes, 10 << 20).unwrap_err().to_string();
            assert!(error.contains(wanted) && !error.contains('\n'), "{wanted}: {error}");
        }
        let mut bytes = header().encode();
        bytes[1000] = 1;
        let error = Header::parse(&bytes, 10 << 20).unwrap_err().to_string();
        assert_eq!(error, "VHD dynamic header: the checksum is wrong");
    }
}
