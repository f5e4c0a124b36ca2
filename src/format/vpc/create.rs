//! New images: qemu-img's options, their rules in QEMU's words, and the writing.
//!
//! The order: header and table, made durable, and the footers last, so that what was not finished is no image.

use super::bytes::put;
use super::footer::{self, Footer, Kind, MAX_SIZE};
use super::geometry::Geometry;
use super::header::{self, BLOCK_SIZE, Header, LOCATOR_COUNT, Locator};
use super::parent;
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
    CreateOption::new("size", ValueType::Size, "Virtual disk size"),
    CreateOption::new(
        "subformat",
        ValueType::Str,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    CreateOption::new(
        "force_size",
        ValueType::Bool,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based \
         calculation",
    ),
    CreateOption {
        is_newer: true,
        ..CreateOption::new("backing_file", ValueType::Str, "File name of the parent, a VHD image")
    },
    CreateOption {
        is_newer: true,
        ..CreateOption::new("backing_fmt", ValueType::Str, "Image format of the parent")
    },
];

/// Bytes of the table that are written at once.
const PIECE: u64 = 1 << 20;
/// Where the name of the parent goes, behind the header.
const LOCATOR_AT: u64 = (footer::LEN + header::LEN) as u64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Subformat {
    #[default]
    Dynamic,
    Fixed,
}

/// An image that is asked for, as `blockdev-create` has it (BlockdevCreateOptionsVpc).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OnNode {
    file: NodeRef,
    size: Size,
    subformat: Option<Subformat>,
    force_size: Option<bool>,
}

/// A new image.
struct New {
    footer: Footer,
    /// Bytes of the disk.
    size: u64,
    /// Of an image that grows.
    header: Option<Header>,
    /// The name of the parent, as its locator has it.
    locator: Vec<u8>,
}

impl New {
    /// The image for a disk of `size` bytes, which has `geometry`.
    ///
    /// # Errors
    /// The name of the parent is not one that would be followed.
    fn for_disk(
        (geometry, size): (Geometry, u64),
        subformat: Subformat,
        is_exact: bool,
        parent: Option<(&str, Uuid)>,
    ) -> Result<New, Error> {
        let kind = match (subformat, parent) {
            (Subformat::Fixed, None) => Kind::Fixed,
            (Subformat::Fixed, Some(_)) => {
                return Err(Error::new("A fixed VHD image cannot have a parent"));
            }
            (Subformat::Dynamic, None) => Kind::Dynamic,
            (Subformat::Dynamic, Some(_)) => Kind::Differencing,
        };
        let footer = Footer::of_new(kind, size, geometry, is_exact);
        if kind == Kind::Fixed {
            return Ok(New { footer, size, header: None, locator: Vec::new() });
        }
        let mut header = Header {
            table_at: LOCATOR_AT,
            // At most 2040 GiB of blocks of 2 MiB.
            entries: size.div_ceil(BLOCK_SIZE.into()) as u32,
            block_bits: BLOCK_SIZE.ilog2(),
            parent_id: Uuid::nil(),
            parent_time: 0,
            parent_name: None,
            locators: [Locator::default(); LOCATOR_COUNT],
        };
        let locator = match parent {
            Some((name, id)) => parent::encode(&mut header, name, id, LOCATOR_AT)?,
            None => Vec::new(),
        };
        header.table_at += (locator.len() as u64).next_multiple_of(SECTOR);
        Ok(New { footer, size, header: Some(header), locator })
    }

    /// Where the footer is that the file ends with.
    fn tail_at(&self) -> u64 {
        match &self.header {
            Some(header) => header.table_at + header.table_len().next_multiple_of(SECTOR),
            None => self.size,
        }
    }

    /// How long the file is, in bytes.
    fn file_len(&self) -> u64 {
        self.tail_at() + footer::LEN as u64
    }

    /// Writes an image without data to a file that is long enough. `is_empty`: the file reads as zeroes; one that was
    /// there before, or a disk, may have anything.
    async fn write_to(&self, file: &Node, is_empty: bool) -> Result<(), Error> {
        let write = async || -> IoResult {
            let put_at = async |at: u64, bytes: &[u8]| {
                file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await
            };
            if !is_empty {
                file.zero(0, self.file_len(), ZeroFlags::UNMAP).await?;
                // A disk may end with the footer of an earlier image.
                if let Some(end) = file.driver().len().checked_sub(footer::LEN as u64) {
                    file.zero(end, footer::LEN as u64, ZeroFlags::empty()).await?;
                }
                file.flush().await?;
            }
            if let Some(header) = &self.header {
                put_at(footer::LEN as u64, &self.head(header)).await?;
                let (start, end) = (header.table_at, self.tail_at());
                let unused = vec![0xff; (end - start).min(PIECE) as usize];
                for at in (start..end).step_by(PIECE as usize) {
                    put_at(at, &unused[..(end - at).min(PIECE) as usize]).await?;
                }
                file.flush().await?;
                put_at(0, &self.footer.bytes).await?;
            }
            put_at(self.tail_at(), &self.footer.bytes).await?;
            file.flush().await
        };
        write().await.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
    }

    /// What lies between the copy of the footer and the table.
    fn head(&self, header: &Header) -> Vec<u8> {
        let mut bytes = vec![0; header.table_at as usize - footer::LEN];
        put(&mut bytes, 0, &header.encode());
        put(&mut bytes, header::LEN, &self.locator);
        bytes
    }
}

/// The size and the geometry of a disk that is to have at least so many bytes; `is_exact`: no more than a sector more.
///
/// # Errors
/// It is too large for the format; `too_large` says so.
fn layout(size: u64, is_exact: bool, too_large: &str) -> Result<(Geometry, u64), Error> {
    if size > MAX_SIZE {
        return Err(Error::new(too_large));
    }
    Ok(match is_exact {
        true => (Geometry::MAX, size.next_multiple_of(SECTOR)),
        false => Geometry::around(size),
    })
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let size = match options.get("size") {
        // One that is too large to be counted is too large for the format.
        Some(Value::Int(size)) => u64::try_from(*size).unwrap_or(u64::MAX),
        _ => 0,
    };
    let text = |name: &str| options.get(name).and_then(Value::as_str);
    let subformat = match text("subformat") {
        None | Some("dynamic") => Subformat::Dynamic,
        Some("fixed") => Subformat::Fixed,
        Some(other) => {
            let other = other.escape_debug();
            return Err(Error::new(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    let is_forced = options.get("force_size") == Some(&Value::Bool(true));
    let parent = match text("backing_file") {
        Some(name) => Some((name, id_of_parent(creation, name, text("backing_fmt")).await?)),
        None => None,
    };
    // A child is as large as it is asked to be, which is mostly as large as its parent.
    let is_exact =
        is_forced || parent.is_some() && size <= MAX_SIZE && Geometry::around(size).1 != size;
    let layout = layout(size, is_exact, "The image size is too large for file format 'vpc'")?;
    let new = New::for_disk(layout, subformat, is_exact, parent)?;
    let write = async |node: &Node, is_empty: bool| new.write_to(node, is_empty).await;
    make_in_file(creation, options, new.file_len(), write).await?;
    Ok(Made { reads_zeroes: true })
}

/// The identifier of the parent called `name`, which has to be there.
async fn id_of_parent(
    creation: &Creation,
    name: &str,
    format: Option<&str>,
) -> Result<Uuid, Error> {
    let found = creation.with_backing(name, format, async |node| parent::id_of(node).await);
    let found = found.await.map_err(|error| error.with_hint("Could not open backing image."))?;
    found.ok_or_else(|| Error::new("The parent of a VHD image has to be a VHD image"))
}

fn prepare(_: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let wanted: OnNode = options::from_map(map)?;
    Ok(Box::new(move |graph| Box::pin(make_on(graph, wanted))))
}

async fn make_on(graph: &Graph, wanted: OnNode) -> Result<Made, Error> {
    let OnNode { file, size: Size(size), subformat, force_size } = wanted;
    let is_exact = force_size.unwrap_or(false);
    let layout = layout(size, is_exact, "Disk size is too large, max size is 2040 GiB")?;
    if layout.1 != size {
        let text = "The requested image size cannot be represented in CHS geometry";
        return Err(Error::new(text).with_hint(format!(
            "Try size={} or force-size=on (the latter makes the image incompatible with Virtual PC)",
            layout.1
        )));
    }
    let new = New::for_disk(layout, subformat.unwrap_or_default(), is_exact, None)?;
    make_on_node(graph, file, new.file_len(), async |node| new.write_to(node, false).await).await?;
    Ok(Made { reads_zeroes: true })
}
