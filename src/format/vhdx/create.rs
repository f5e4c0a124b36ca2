//! New images: qemu-img's options, their rules in QEMU's words, and the writing.
//!
//! The order: everything else, made durable, and the mark of the format last, so that what was not finished is no image.

use super::bytes::{MIB, put};
use super::header::{self, Header};
use super::mapping::{ENTRY_BYTES, Entry, state};
use super::metadata::{BLOCK_BITS, Geometry, MAX_SIZE, Metadata};
use super::parent;
use super::regions::{self, Region, Regions};
use crate::block::create::{CreateEntry, CreateOption, Creation, Made, MakeFn, ValueType};
use crate::block::new_file::{make_in_file, make_on_node};
use crate::block::{Error, Graph, Node, Registry, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use crate::options::{self, Map, NodeRef, Size, Value};
use serde::Deserialize;
use uuid::Uuid;

pub(super) static CREATE: CreateEntry = CreateEntry {
    options: OPTIONS,
    create: |creation, map| Box::pin(create(creation, map)),
    measure: None,
    amend: &[],
    on_nodes: Some(prepare),
};

const OPTIONS: &[CreateOption] = &[
    CreateOption::new("size", ValueType::Size, "Virtual disk size; max of 64TB."),
    CreateOption {
        default: Some("1048576"),
        ..CreateOption::new("log_size", ValueType::Size, "Log size; min 1MB.")
    },
    CreateOption {
        default: Some("0"),
        ..CreateOption::new(
            "block_size",
            ValueType::Size,
            "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
        )
    },
    CreateOption::new(
        "subformat",
        ValueType::Str,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
    ),
    CreateOption::new(
        "block_state_zero",
        ValueType::Bool,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when \
         using 'qemu-img convert' with subformat=dynamic.",
    ),
    CreateOption {
        is_newer: true,
        ..CreateOption::new("backing_file", ValueType::Str, "File name of the parent, a VHDX image")
    },
    CreateOption {
        is_newer: true,
        ..CreateOption::new("backing_fmt", ValueType::Str, "Image format of the parent")
    },
];

/// The program that makes the image.
const CREATOR: &str = concat!("vublk ", env!("CARGO_PKG_VERSION"));
/// Sectors are 512 bytes, as QEMU makes them.
const SECTOR_BITS: u32 = 9;
const MAX_LOG: u64 = 1 << 32;
/// Blocks of differencing images are small: a write to one copies the rest of it.
const DIFFERENCING_BLOCK: u64 = 2 << 20;
/// Bytes of the table of a fixed image that are written at once.
const PIECE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Subformat {
    #[default]
    Dynamic,
    Fixed,
}

/// An image that is asked for, as `blockdev-create` has it (BlockdevCreateOptionsVhdx).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OnNode {
    file: NodeRef,
    size: Size,
    log_size: Option<Size>,
    block_size: Option<Size>,
    subformat: Option<Subformat>,
    block_state_zero: Option<bool>,
}

/// What is asked for, in types. Sizes are in bytes.
struct Wanted {
    size: u64,
    log_size: u64,
    /// 0: the size of the disk decides.
    block_size: u64,
    subformat: Subformat,
    /// Blocks of a dynamic image say that they are zero.
    says_zero: bool,
    /// The locator of the parent, for a differencing image.
    locator: Option<Vec<u8>>,
}

/// A new image.
struct New {
    header: Header,
    regions: Regions,
    metadata: Metadata,
    says_zero: bool,
}

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(text))
}

impl Wanted {
    fn of_options(options: &Map) -> Result<Wanted, Error> {
        let number = |name: &str| match options.get(name) {
            Some(Value::Int(n)) => u64::try_from(*n).unwrap_or(0),
            _ => 0,
        };
        let subformat = match options.get("subformat").and_then(Value::as_str) {
            None | Some("dynamic") => Subformat::Dynamic,
            Some("fixed") => Subformat::Fixed,
            Some(other) => {
                let other = other.escape_debug();
                return refused(format!("Parameter 'subformat' does not accept value '{other}'"));
            }
        };
        let whole = |n: u64, unit: u64| n.checked_next_multiple_of(unit).unwrap_or(n);
        Ok(Wanted {
            // One that is too large to be rounded is refused as it is.
            size: whole(number("size"), SECTOR),
            log_size: whole(number("log_size"), MIB),
            block_size: whole(number("block_size"), MIB).min(1 << BLOCK_BITS.end()),
            subformat,
            says_zero: options.get("block_state_zero") != Some(&Value::Bool(false)),
            locator: None,
        })
    }

    /// The new image.
    ///
    /// # Errors
    /// In QEMU's words.
    fn image(&self) -> Result<New, Error> {
        let &Wanted { size, log_size, block_size, .. } = self;
        if size > MAX_SIZE {
            return refused("Image size too large; max of 64TB");
        }
        if log_size >= MAX_LOG {
            return refused("Log size must be smaller than 4 GB");
        }
        if log_size == 0 || !log_size.is_multiple_of(MIB) {
            return refused("Log size must be a multiple of 1 MB");
        }
        let has_parent = self.locator.is_some();
        if has_parent && self.subformat == Subformat::Fixed {
            return refused("A fixed VHDX image cannot have a parent");
        }
        let block_size = match block_size {
            0 if has_parent => DIFFERENCING_BLOCK,
            0 => block_size_for(size),
            size => size,
        };
        if !block_size.is_multiple_of(MIB) {
            return refused("Block size must be a multiple of 1 MB");
        }
        if !block_size.is_power_of_two() {
            return refused("Block size must be a power of two");
        }
        if block_size > 1 << BLOCK_BITS.end() {
            return refused("Block size must not exceed 256 MB");
        }
        let geometry =
            Geometry { block_bits: block_size.ilog2(), sector_bits: SECTOR_BITS, size, has_parent };
        let log = Region { offset: MIB, len: log_size };
        let bat_len = (geometry.entries() * ENTRY_BYTES).max(1).next_multiple_of(MIB);
        let bat = Region { offset: log.end(), len: bat_len };
        let regions = Regions { bat, metadata: Region { offset: bat.end(), len: MIB } };
        let metadata = Metadata {
            geometry,
            is_fixed: self.subformat == Subformat::Fixed,
            disk_id: Uuid::new_v4(),
            physical_bits: SECTOR_BITS,
            locator: self.locator.clone(),
            locator_place: None,
        };
        let says_zero = self.says_zero && !has_parent;
        Ok(New { header: Header::new(log), regions, metadata, says_zero })
    }
}

/// Larger disks have larger blocks, as QEMU chooses them.
fn block_size_for(size: u64) -> u64 {
    match size {
        _ if size > 32 << 40 => 64 * MIB,
        _ if size > 100 << 30 => 32 * MIB,
        _ if size > 1 << 30 => 16 * MIB,
        _ => 8 * MIB,
    }
}

impl New {
    /// Where blocks begin.
    fn data_start(&self) -> u64 {
        self.regions.metadata.end()
    }

    /// How long the file is, in bytes.
    fn file_len(&self) -> u64 {
        match self.metadata.is_fixed {
            true => self.data_start() + self.metadata.geometry.size,
            false => self.data_start(),
        }
    }

    /// Entries of the table, from this one on.
    fn entries(&self, first: u64, count: u64) -> Vec<u8> {
        let geometry = &self.metadata.geometry;
        let chunk = (1 << geometry.chunk_bits()) + 1;
        let entry = |index: u64| match self.metadata.is_fixed {
            _ if geometry.is_bitmap_entry(index) => Entry(state::NOT_PRESENT),
            // Before it are the entries of so many bitmaps.
            true => {
                let block = index - index / chunk;
                Entry::present(self.data_start() + (block << geometry.block_bits))
            }
            false if self.says_zero => Entry(state::ZERO),
            false => Entry(state::NOT_PRESENT),
        };
        (first..first + count).flat_map(|index| entry(index).0.to_le_bytes()).collect()
    }

    /// Writes an image without data to a file that is long enough. `is_empty`: the file reads as zeroes; one that was
    /// there before, or a disk, may have anything.
    async fn write_to(&self, file: &Node, is_empty: bool) -> Result<(), Error> {
        let write = async || -> IoResult {
            if !is_empty {
                file.zero(0, self.file_len(), ZeroFlags::UNMAP).await?;
                file.flush().await?;
            }
            let put_at = async |at: u64, bytes: &[u8]| {
                file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await
            };
            for (n, place) in header::PLACES.into_iter().enumerate() {
                let header = Header { sequence: n as u64, ..self.header.clone() };
                put_at(place, &header.encode()).await?;
            }
            let table = self.regions.encode();
            for place in regions::PLACES {
                put_at(place, &table).await?;
            }
            put_at(self.regions.metadata.offset, &self.metadata.encode()).await?;
            if self.metadata.is_fixed || self.says_zero {
                let entries = self.metadata.geometry.entries();
                let at_once = PIECE / ENTRY_BYTES;
                for first in (0..entries).step_by(at_once as usize) {
                    let bytes = self.entries(first, at_once.min(entries - first));
                    put_at(self.regions.bat.offset + first * ENTRY_BYTES, &bytes).await?;
                }
            }
            file.flush().await?;
            put_at(0, &identifier()).await?;
            file.flush().await
        };
        write().await.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
    }
}

/// The mark of the format, and the program that makes the image.
fn identifier() -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    put(&mut bytes, 0, header::MAGIC);
    for (n, unit) in CREATOR.encode_utf16().enumerate() {
        put(&mut bytes, header::MAGIC.len() + 2 * n, &unit.to_le_bytes());
    }
    bytes
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let mut wanted = Wanted::of_options(&options)?;
    let text = |name: &str| options.get(name).and_then(Value::as_str);
    if let Some(name) = text("backing_file") {
        wanted.locator = Some(locator_of(creation, name, text("backing_fmt")).await?);
    }
    let new = wanted.image()?;
    let write = async |node: &Node, is_empty: bool| new.write_to(node, is_empty).await;
    make_in_file(creation, options, new.file_len(), write).await?;
    Ok(Made { reads_zeroes: true })
}

/// The locator of the parent called `name`, which has to be there.
async fn locator_of(
    creation: &Creation,
    name: &str,
    format: Option<&str>,
) -> Result<Vec<u8>, Error> {
    let found = creation.with_backing(name, format, async |node| parent::data_write(node).await);
    match found.await.map_err(|error| error.with_hint("Could not open backing image."))? {
        Some(data_write) => parent::encode(name, data_write),
        None => Err(parent::is_no_vhdx()),
    }
}

fn prepare(_: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let OnNode { file, size, log_size, block_size, subformat, block_state_zero } =
        options::from_map(map)?;
    let wanted = Wanted {
        size: size.0,
        log_size: log_size.map_or(MIB, |size| size.0),
        block_size: block_size.map_or(0, |size| size.0),
        subformat: subformat.unwrap_or_default(),
        says_zero: block_state_zero.unwrap_or(true),
        locator: None,
    };
    Ok(Box::new(move |graph| Box::pin(make_on(graph, file, wanted))))
}

async fn make_on(graph: &Graph, file: NodeRef, wanted: Wanted) -> Result<Made, Error> {
    let new = wanted.image()?;
    make_on_node(graph, file, new.file_len(), async |node| new.write_to(node, false).await).await?;
    Ok(Made { reads_zeroes: true })
}
