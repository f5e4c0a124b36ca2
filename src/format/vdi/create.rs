//! New images: qemu-img's options, and the writing.
//!
//! The order: the map, made durable, and the header last, so that what was not finished is no image.

use super::blocks::new_piece;
use super::header::{Header, LEN};
use crate::block::create::{CreateEntry, CreateOption, Creation, Made, MakeFn, ValueType};
use crate::block::new_file::{make_in_file, make_on_node};
use crate::block::{Error, Graph, Node, Preallocation, Registry, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use crate::options::{self, Map, NodeRef, Size, Value};
use serde::Deserialize;

pub(super) static CREATE: CreateEntry = CreateEntry {
    options: OPTIONS,
    create: |creation, map| Box::pin(create(creation, map)),
    measure: None,
    amend: &[],
    on_nodes: Some(prepare),
};

const OPTIONS: &[CreateOption] = &[
    CreateOption::new("size", ValueType::Size, "Virtual disk size"),
    CreateOption {
        default: Some("off"),
        ..CreateOption::new("static", ValueType::Bool, "VDI static (pre-allocated) image")
    },
];

/// An image that is asked for, as `blockdev-create` has it (BlockdevCreateOptionsVdi).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OnNode {
    file: NodeRef,
    size: Size,
    preallocation: Option<Preallocation>,
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let size = match options.get("size") {
        // One that is too large to be rounded is too large for the format.
        Some(Value::Int(size)) => {
            let size = u64::try_from(*size).ok();
            size.and_then(|size| size.checked_next_multiple_of(SECTOR)).unwrap_or(u64::MAX)
        }
        _ => 0,
    };
    let is_static = matches!(options.get("static"), Some(Value::Bool(true)));
    let header = Header::for_new(size, is_static)?;
    let write = async |file: &Node, is_empty: bool| write_to(file, &header, is_empty).await;
    make_in_file(creation, options, file_len(&header), write).await?;
    Ok(Made { reads_zeroes: true })
}

/// How long the file of a new image is, in bytes.
fn file_len(header: &Header) -> u64 {
    header.offset_of(header.allocated.into())
}

/// Writes an image without data to a file that is long enough. `is_empty`: the file reads as zeroes.
async fn write_to(file: &Node, header: &Header, is_empty: bool) -> Result<(), Error> {
    let write = async || -> IoResult {
        if !is_empty {
            file.zero(0, LEN as u64, ZeroFlags::empty()).await?;
            let data = header.offset_of(0)..file_len(header);
            if !data.is_empty() {
                file.zero(data.start, data.end - data.start, ZeroFlags::UNMAP).await?;
            }
        }
        let mut from = 0;
        while let Some(piece) = new_piece(header, from) {
            let at = u64::from(header.map_offset) + u64::from(from) * 4;
            file.write(at, &IoVec::from_ref(&piece), WriteFlags::empty()).await?;
            from += (piece.len() / 4) as u32;
        }
        file.flush().await?;
        file.write(0, &IoVec::from_ref(&header.encode_new()), WriteFlags::empty()).await?;
        file.flush().await
    };
    write().await.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
}

fn prepare(_: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let wanted: OnNode = options::from_map(map)?;
    Ok(Box::new(move |graph| Box::pin(make_on(graph, wanted))))
}

async fn make_on(graph: &Graph, wanted: OnNode) -> Result<Made, Error> {
    let is_static = match wanted.preallocation {
        None | Some(Preallocation::Off) => false,
        Some(Preallocation::Metadata) => true,
        Some(_) => return Err(Error::new("Preallocation mode not supported for vdi")),
    };
    let header = Header::for_new(wanted.size.0, is_static)?;
    let write = async |file: &Node| write_to(file, &header, false).await;
    make_on_node(graph, wanted.file, file_len(&header), write).await?;
    Ok(Made { reads_zeroes: true })
}
