//! The header of a VDI image, version 1.1.
//!
//! It has little-endian fields in the first 512 bytes of the file, behind 64 bytes of text for people.
//!
//! Everything that leaves [`Header::parse`] is inside the limits of the format, and the map has an entry for
//! every block of the disk.

use crate::block::Error;
use uuid::Uuid;

/// Where the signature is.
pub const MAGIC_AT: usize = 64;
/// 0xbeda107f.
pub const MAGIC: [u8; 4] = [0x7f, 0x10, 0xda, 0xbe];
/// Bytes that hold all fields.
pub const LEN: usize = 512;

/// What a new image begins with, for people.
const TEXT: &[u8] = b"<<< vublk Virtual Disk Image >>>\n";
const VERSION: u32 = 0x0001_0001;
/// Bytes of the header from the field that says so to its end.
const HEADER_LEN: u32 = 0x180;
/// Where the number of blocks is that the map names.
const ALLOCATED_AT: usize = 0x184;
const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
/// The logarithm of a block's size, which no image has otherwise.
pub const BLOCK_BITS: u32 = 20;
pub const BLOCK_SIZE: u64 = 1 << BLOCK_BITS;
pub const SECTOR: u32 = 512;
/// Blocks that QEMU opens.
const MAX_BLOCKS: u32 = 0x1fff_ff80;
const MAX_SIZE: u64 = MAX_BLOCKS as u64 * BLOCK_SIZE;

/// What of the header says where the disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// All blocks have their places from the start.
    pub is_static: bool,
    /// Of the block map, in bytes.
    pub map_offset: u32,
    /// Of block 0, in bytes.
    pub data_offset: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    /// Entries of the map.
    pub blocks: u32,
    /// How many of them name a block.
    pub allocated: u32,
}

impl Header {
    /// Whether a file that begins so is meant to be an image of this format.
    pub fn probe(head: &[u8]) -> bool {
        head.get(MAGIC_AT..).is_some_and(|head| head.starts_with(&MAGIC))
    }

    /// Reads the first bytes of an image.
    ///
    /// # Errors
    /// In QEMU's words, when it is no image of this format, or none that we support.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Header, Error> {
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
        let is_null = |at: usize| bytes[at..at + 16].iter().all(|&byte| byte == 0);
        let unsupported = |what: String| Err(Error::new(format!("unsupported VDI image ({what})")));

        // A size that is no multiple of a sector is rounded up.
        let size = u64_at(0x170);
        check_size(size)?;
        let size = size.next_multiple_of(SECTOR.into());
        if !Header::probe(bytes) {
            let found = u32_at(MAGIC_AT);
            return Err(Error::new(format!("Image not in VDI format (bad signature {found:08x})")));
        }
        let version = u32_at(0x44);
        if version != VERSION {
            return unsupported(format!("version {}.{}", version >> 16, version & 0xffff));
        }
        let (map_offset, data_offset) = (u32_at(0x154), u32_at(0x158));
        if !map_offset.is_multiple_of(SECTOR) {
            return unsupported(format!("unaligned block map offset {map_offset:#x}"));
        }
        if !data_offset.is_multiple_of(SECTOR) {
            return unsupported(format!("unaligned data offset {data_offset:#x}"));
        }
        let sector = u32_at(0x168);
        if sector != SECTOR {
            return unsupported(format!("sector size {sector} is not {SECTOR}"));
        }
        let block = u32_at(0x178);
        if u64::from(block) != BLOCK_SIZE {
            return unsupported(format!("block size {block} is not {BLOCK_SIZE}"));
        }
        let blocks = u32_at(0x180);
        let room = u64::from(blocks) * BLOCK_SIZE;
        if size > room {
            return unsupported(format!("disk size {size}, image bitmap has room for {room}"));
        }
        if !is_null(0x1a8) {
            return unsupported("non-NULL link UUID".to_owned());
        }
        if !is_null(0x1b8) {
            return unsupported("non-NULL parent UUID".to_owned());
        }
        if blocks > MAX_BLOCKS {
            return unsupported(format!("too many blocks {blocks}, max is {MAX_BLOCKS}"));
        }
        Ok(Header {
            is_static: u32_at(0x4c) == STATIC,
            map_offset,
            data_offset,
            size,
            blocks,
            allocated: u32_at(ALLOCATED_AT),
        })
    }

    /// The header of a new image for a disk of this many bytes. Blocks begin at whole MiB, as VirtualBox has them, so that a
    /// page of the guest is one of the file; QEMU makes them begin at the first sector behind the map.
    ///
    /// # Errors
    /// The disk is too large.
    pub fn for_new(size: u64, is_static: bool) -> Result<Header, Error> {
        check_size(size)?;
        let blocks = size.div_ceil(BLOCK_SIZE) as u32;
        let map_offset = LEN as u32;
        // At most 2 GiB and a little, which is below 2^32.
        let data_offset = (map_offset + 4 * blocks).next_multiple_of(BLOCK_SIZE as u32);
        let allocated = if is_static { blocks } else { 0 };
        Ok(Header { is_static, map_offset, data_offset, size, blocks, allocated })
    }

    /// The first bytes of a new image, with identifiers that no other image has.
    pub fn encode_new(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, TEXT);
        put(MAGIC_AT, &MAGIC);
        put(0x44, &VERSION.to_le_bytes());
        put(0x48, &HEADER_LEN.to_le_bytes());
        put(0x4c, &(if self.is_static { STATIC } else { DYNAMIC }).to_le_bytes());
        put(0x154, &self.map_offset.to_le_bytes());
        put(0x158, &self.data_offset.to_le_bytes());
        put(0x168, &SECTOR.to_le_bytes());
        put(0x170, &self.size.to_le_bytes());
        put(0x178, &(BLOCK_SIZE as u32).to_le_bytes());
        put(0x180, &self.blocks.to_le_bytes());
        put(ALLOCATED_AT, &self.allocated.to_le_bytes());
        // Of the image, and of the last change of its kind.
        for at in [0x188, 0x198] {
            put(at, &Uuid::new_v4().to_bytes_le());
        }
        bytes
    }

    /// Whether another header says the same but for what is allocated.
    pub fn is_same_disk(&self, other: &Header) -> bool {
        Header { allocated: other.allocated, ..self.clone() } == *other
    }

    /// Bytes of the map.
    pub fn map_len(&self) -> u64 {
        u64::from(self.blocks) * 4
    }

    /// Where the map ends in the file, in bytes.
    pub fn map_end(&self) -> u64 {
        u64::from(self.map_offset) + self.map_len()
    }

    /// Where a block of the file begins, in bytes. The end of all blocks is that of the next one.
    pub fn offset_of(&self, block: u64) -> u64 {
        u64::from(self.data_offset) + (block << BLOCK_BITS)
    }

    /// The block of the file that begins at an offset.
    pub fn block_at(&self, offset: u64) -> u32 {
        ((offset - u64::from(self.data_offset)) >> BLOCK_BITS) as u32
    }
}

/// Puts the number of allocated blocks into the first bytes of an image.
pub fn set_allocated(bytes: &mut [u8; LEN], allocated: u32) {
    bytes[ALLOCATED_AT..ALLOCATED_AT + 4].copy_from_slice(&allocated.to_le_bytes());
}

/// Refuses disks that have more blocks than QEMU opens.
fn check_size(size: u64) -> Result<(), Error> {
    if size > MAX_SIZE {
        return Err(Error::new(format!(
            "Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})"
        )));
    }
    Ok(())
}
