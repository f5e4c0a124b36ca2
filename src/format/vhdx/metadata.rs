//! The metadata of an image ([MS-VHDX] 2.6): a table of items, which describe the disk's layout.

use super::bytes::{GUID_LEN, guid_at, put, u16_at, u32_at, u64_at};
use super::regions::Region;
use crate::block::{Error, Node};
use crate::cow::read_padded;
use crate::io::{Errno, IoVec};
use uuid::{Uuid, uuid};

/// Bytes of the table; items lie behind it.
pub const TABLE_LEN: usize = 64 << 10;
/// Bytes that an item has at most.
const MOST_ITEM_LEN: u32 = 1 << 20;
const MOST_ENTRIES: u16 = 2047;
const ENTRY_LEN: usize = 32;
const SIGNATURE: &[u8; 8] = b"metadata";

const IS_VIRTUAL_DISK: u32 = 1 << 1;
const IS_REQUIRED: u32 = 1 << 2;

const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

/// Known items, and how many bytes each has, if that is always the same.
const KNOWN: [(Uuid, &str, Option<u32>); 6] = [
    (FILE_PARAMETERS, "file parameters", Some(8)),
    (SIZE, "virtual disk size", Some(8)),
    (DISK_ID, "virtual disk ID", Some(GUID_LEN as u32)),
    (LOGICAL_SECTOR, "logical sector size", Some(4)),
    (PHYSICAL_SECTOR, "physical sector size", Some(4)),
    (PARENT_LOCATOR, "parent locator", None),
];

/// Logarithms of the smallest and of the largest block.
pub const BLOCK_BITS: std::ops::RangeInclusive<u32> = 20..=28;
/// Bytes of the largest disk.
pub const MAX_SIZE: u64 = 64 << 40;

/// How a disk is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub block_bits: u32,
    /// The logarithm of the logical sector size, 9 or 12.
    pub sector_bits: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    /// Blocks that are not present are those of another disk.
    pub has_parent: bool,
}

impl Geometry {
    pub fn block_size(&self) -> u64 {
        1 << self.block_bits
    }

    /// The logarithm of the blocks whose sectors one sector bitmap counts.
    pub fn chunk_bits(&self) -> u32 {
        // A bitmap of 1 MiB has 2^23 bits.
        23 + self.sector_bits - self.block_bits
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size())
    }

    /// The index of a block's entry in the block allocation table: the entry of a sector bitmap follows those of each
    /// whole chunk.
    pub fn entry_of(&self, block: u64) -> u64 {
        block + (block >> self.chunk_bits())
    }

    /// The index of the entry of a chunk's sector bitmap.
    pub fn bitmap_entry_of(&self, chunk: u64) -> u64 {
        (chunk + 1) * ((1 << self.chunk_bits()) + 1) - 1
    }

    /// Whether the entry of this index is that of a sector bitmap.
    pub fn is_bitmap_entry(&self, index: u64) -> bool {
        let chunk = 1 << self.chunk_bits();
        index % (chunk + 1) == chunk
    }

    /// Entries that the block allocation table has.
    pub fn entries(&self) -> u64 {
        match self.blocks().checked_sub(1) {
            None => 0,
            Some(last) if self.has_parent => {
                ((last >> self.chunk_bits()) + 1) * ((1 << self.chunk_bits()) + 1)
            }
            Some(last) => self.entry_of(last) + 1,
        }
    }
}

/// What the items say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    pub geometry: Geometry,
    /// Blocks stay allocated whatever is in them: an image of fixed size.
    pub is_fixed: bool,
    pub disk_id: Uuid,
    /// The logarithm of the physical sector size, 9 or 12.
    pub physical_bits: u32,
    /// The item that names the parent, as it is stored.
    pub locator: Option<Vec<u8>>,
    /// Where that is in the file.
    pub locator_place: Option<Region>,
}

/// Where another locator of the parent can go, in bytes from the beginning of the region on.
pub struct Room {
    pub item: u64,
    /// Where the table has the offset of the locator, and its length behind that.
    pub field: u64,
}

/// Where items are, from the beginning of the region on.
struct Table {
    items: Vec<(Uuid, Region)>,
}

fn invalid(what: impl std::fmt::Display) -> Error {
    Error::new(format!("VHDX metadata: {what}"))
}

impl Table {
    /// Reads the table of a region of `region_len` bytes: the items that are known.
    fn parse(bytes: &[u8], region_len: u64) -> Result<Table, Error> {
        if !bytes.starts_with(SIGNATURE) {
            return Err(invalid("the table has no signature"));
        }
        let count = u16_at(bytes, 10);
        if count > MOST_ENTRIES {
            return Err(invalid(format_args!("{count} entries, more than {MOST_ENTRIES}")));
        }
        let mut items: Vec<(Uuid, Region)> = Vec::new();
        for entry in bytes[ENTRY_LEN..].chunks_exact(ENTRY_LEN).take(count.into()) {
            let (guid, len, flags) = (guid_at(entry, 0), u32_at(entry, 20), u32_at(entry, 24));
            let Some((_, name, wanted)) = KNOWN.iter().find(|(known, ..)| *known == guid) else {
                match flags & IS_REQUIRED {
                    0 => continue,
                    _ => {
                        return Err(invalid(format_args!(
                            "the item {guid} is required and unknown"
                        )));
                    }
                }
            };
            let offset = u32_at(entry, 16);
            let place = Region { offset: offset.into(), len: len.into() };
            if place.offset < TABLE_LEN as u64 || place.end() > region_len || len > MOST_ITEM_LEN {
                return Err(invalid(format_args!(
                    "the {name} at {offset:#x} of {len:#x} bytes is not inside the region"
                )));
            }
            if wanted.is_some_and(|wanted| len != wanted) {
                return Err(invalid(format_args!("the {name} has {len} bytes")));
            }
            if items.iter().any(|(known, _)| *known == guid) {
                return Err(invalid(format_args!("the {name} is there twice")));
            }
            items.push((guid, place));
        }
        Ok(Table { items })
    }

    fn place(&self, guid: Uuid) -> Option<Region> {
        self.items.iter().find(|(item, _)| *item == guid).map(|&(_, place)| place)
    }

    /// The bytes of an item, if there is one.
    async fn item(
        &self,
        file: &Node,
        region: Region,
        guid: Uuid,
    ) -> Result<Option<Vec<u8>>, Error> {
        let Some(place) = self.place(guid) else { return Ok(None) };
        let mut bytes = vec![0; place.len as usize];
        if !bytes.is_empty() {
            let at = region.offset + place.offset;
            let read = read_padded(file, at, &IoVec::from_mut(&mut bytes)).await;
            read.map_err(|errno| Error::os("Could not read VHDX metadata", errno))?;
        }
        Ok(Some(bytes))
    }
}

impl Metadata {
    /// Reads the table and the items.
    ///
    /// # Errors
    /// I/O failed, or what they say makes no sense or is not supported.
    pub async fn read(file: &Node, region: Region) -> Result<Metadata, Error> {
        let mut table = vec![0; TABLE_LEN];
        let read = read_padded(file, region.offset, &IoVec::from_mut(&mut table)).await;
        read.map_err(|errno| Error::os("Could not read VHDX metadata table", errno))?;
        let table = Table::parse(&table, region.len)?;
        let mut fixed = [FILE_PARAMETERS, SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR]
            .map(|guid| (guid, Vec::new()));
        for (guid, bytes) in &mut fixed {
            let name = KNOWN.iter().find(|(known, ..)| known == guid).map_or("", |known| known.1);
            let item = table.item(file, region, *guid).await?;
            *bytes = item.ok_or_else(|| invalid(format_args!("there is no {name}")))?;
        }
        let [parameters, size, disk_id, logical, physical] = fixed.map(|(_, bytes)| bytes);
        let flags = u32_at(&parameters, 4);
        let has_parent = flags & 2 != 0;
        let geometry = Geometry {
            block_bits: block_bits(u32_at(&parameters, 0))?,
            sector_bits: sector_bits("logical", u32_at(&logical, 0))?,
            size: u64_at(&size, 0),
            has_parent,
        };
        if geometry.size > MAX_SIZE || !geometry.size.is_multiple_of(1 << geometry.sector_bits) {
            return Err(invalid(format_args!(
                "virtual disk size {:#x} is not whole sectors of at most 64 TiB",
                geometry.size
            )));
        }
        let place = table.place(PARENT_LOCATOR);
        let locator_place =
            place.map(|place| Region { offset: region.offset + place.offset, ..place });
        Ok(Metadata {
            geometry,
            is_fixed: flags & 1 != 0,
            disk_id: guid_at(&disk_id, 0),
            physical_bits: sector_bits("physical", u32_at(&physical, 0))?,
            locator: match has_parent {
                true => table.item(file, region, PARENT_LOCATOR).await?,
                false => None,
            },
            locator_place,
        })
    }

    /// Finds room for a locator of `len` bytes, beside all items that the table has.
    ///
    /// # Errors
    /// I/O failed, or there is no room or no locator.
    pub async fn room(file: &Node, region: Region, len: u64) -> Result<Room, Error> {
        let mut bytes = vec![0; TABLE_LEN];
        let read = read_padded(file, region.offset, &IoVec::from_mut(&mut bytes)).await;
        read.map_err(|errno| Error::os("Could not read VHDX metadata table", errno))?;
        let count = usize::from(u16_at(&bytes, 10).min(MOST_ENTRIES));
        let entries = bytes[ENTRY_LEN..].chunks_exact(ENTRY_LEN).take(count);
        let index = entries.clone().position(|entry| guid_at(entry, 0) == PARENT_LOCATOR);
        let index = index.ok_or_else(|| invalid("there is no parent locator"))?;
        let mut items: Vec<_> = entries
            .map(|entry| (u64::from(u32_at(entry, 16)), u64::from(u32_at(entry, 20))))
            .collect();
        items.sort_unstable();
        // No sector has parts of two items.
        let mut item = TABLE_LEN as u64;
        for (start, used) in items {
            if item + len <= start {
                break;
            }
            item = item.max((start + used).next_multiple_of(4096));
        }
        match item + len <= region.len {
            true => Ok(Room { item, field: ((index + 1) * ENTRY_LEN + 16) as u64 }),
            false => Err(Error::new("There is no room for another VHDX parent locator")
                .with_errno(Errno::ENOSPC)),
        }
    }

    /// The table and the items behind it, as they are stored at the beginning of the region.
    pub fn encode(&self) -> Vec<u8> {
        let Geometry { block_bits, sector_bits, size, has_parent } = self.geometry;
        let flags = u32::from(self.is_fixed) | u32::from(has_parent) << 1;
        let parameters = [(1u32 << block_bits).to_le_bytes(), flags.to_le_bytes()].concat();
        let of_disk = IS_VIRTUAL_DISK | IS_REQUIRED;
        let mut items = vec![
            (FILE_PARAMETERS, parameters, IS_REQUIRED),
            (SIZE, size.to_le_bytes().to_vec(), of_disk),
            (DISK_ID, self.disk_id.to_bytes_le().to_vec(), of_disk),
            (LOGICAL_SECTOR, (1u32 << sector_bits).to_le_bytes().to_vec(), of_disk),
            (PHYSICAL_SECTOR, (1u32 << self.physical_bits).to_le_bytes().to_vec(), of_disk),
        ];
        items.extend(self.locator.clone().map(|locator| (PARENT_LOCATOR, locator, IS_REQUIRED)));
        let mut bytes = vec![0; TABLE_LEN];
        put(&mut bytes, 0, SIGNATURE);
        put(&mut bytes, 10, &(items.len() as u16).to_le_bytes());
        for (n, (guid, item, flags)) in items.iter().enumerate() {
            let at = (n + 1) * ENTRY_LEN;
            put(&mut bytes, at, &guid.to_bytes_le());
            let offset = bytes.len() as u32;
            put(&mut bytes, at + 16, &offset.to_le_bytes());
            put(&mut bytes, at + 20, &(item.len() as u32).to_le_bytes());
            put(&mut bytes, at + 24, &flags.to_le_bytes());
            bytes.extend_from_slice(item);
        }
        bytes
    }
}

fn block_bits(size: u32) -> Result<u32, Error> {
    match size.is_power_of_two() && BLOCK_BITS.contains(&size.ilog2()) {
        true => Ok(size.ilog2()),
        false => Err(invalid(format_args!(
            "block size {size:#x} is no power of two from 1 MiB to 256 MiB"
        ))),
    }
}

fn sector_bits(kind: &str, size: u32) -> Result<u32, Error> {
    match size {
        512 | 4096 => Ok(size.ilog2()),
        _ => Err(invalid(format_args!("{kind} sector size {size} is neither 512 nor 4096"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(block_bits: u32, sector_bits: u32, size: u64, has_parent: bool) -> Geometry {
        Geometry { block_bits, sector_bits, size, has_parent }
    }

    #[test]
    fn entries_of_sector_bitmaps_lie_between_those_of_blocks() {
        // 4,096 blocks of 1 MiB to a bitmap.
        let small = geometry(20, 9, 6 << 30, false);
        assert_eq!((small.chunk_bits(), small.blocks(), small.entries()), (12, 6144, 6145));
        assert_eq!((small.entry_of(4095), small.entry_of(4096)), (4095, 4097));
        // A differencing image has an entry for every bitmap, and whole chunks.
        assert_eq!(Geometry { has_parent: true, ..small }.entries(), 2 * 4097);
        // A bitmap's entry comes with the first block behind it.
        assert_eq!(geometry(20, 9, 4 << 30, false).entries(), 4096);
        let large = geometry(28, 12, MAX_SIZE, false);
        assert_eq!((large.chunk_bits(), large.entries()), (7, (1 << 18) + (1 << 11) - 1));
        assert_eq!(geometry(20, 9, 0, false).entries(), 0);
    }

    #[test]
    fn the_table_is_read_in_any_order_and_what_is_unknown_is_refused_if_required() {
        let metadata = Metadata {
            geometry: geometry(21, 9, 1 << 30, false),
            is_fixed: false,
            disk_id: Uuid::new_v4(),
            physical_bits: 12,
            locator: None,
            locator_place: None,
        };
        let bytes = metadata.encode();
        let parse = |bytes: &[u8]| Table::parse(bytes, 1 << 20).map(|table| table.items.len());
        assert_eq!(parse(&bytes).unwrap(), 5);
        let mut swapped = bytes.clone();
        let (first, last) = (32..64, 160..192);
        swapped[first.clone()].copy_from_slice(&bytes[last.clone()]);
        swapped[last].copy_from_slice(&bytes[first]);
        assert_eq!(parse(&swapped).unwrap(), 5);
        let changes: &[(usize, &[u8], &str)] = &[
            (0, b"x", "no signature"),
            (10, &[0, 8], "2048 entries"),
            (32, b"x", "required and unknown"),
            (32 + 16, &[0, 0, 0], "not inside the region"),
            (32 + 19, &[1], "not inside the region"),
            (32 + 20, &[7], "has 7 bytes"),
            (64, &FILE_PARAMETERS.to_bytes_le(), "there twice"),
        ];
        for (at, change, wanted) in changes {
            let mut bytes = bytes.clone();
            put(&mut bytes, *at, change);
            let error = parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(wanted), "{wanted}: {error}");
        }
    }
}
