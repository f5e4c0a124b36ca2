//! New images: qemu-img's options, and the writing.
//!
//! The order: an empty catalogue, made durable, and the header last, so that what was not finished is no image.

use super::header::{DEFAULT_CLUSTER, Header};
use crate::block::create::{CreateEntry, CreateOption, Creation, Made, MakeFn, ValueType};
use crate::block::new_file::{make_in_file, make_on_node};
use crate::block::{Error, Graph, Node, Registry, WriteFlags, ZeroFlags};
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
        default: Some("1048576"),
        ..CreateOption::new("cluster_size", ValueType::Size, "Parallels image cluster size")
    },
];

/// An image that is asked for, as `blockdev-create` has it (BlockdevCreateOptionsParallels).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OnNode {
    file: NodeRef,
    size: Size,
    cluster_size: Option<Size>,
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let number = |name: &str| match options.get(name) {
        Some(Value::Int(n)) => Some(u64::try_from(*n).unwrap_or(u64::MAX)),
        _ => None,
    };
    let cluster_size = number("cluster_size").unwrap_or(DEFAULT_CLUSTER);
    let header = Header::for_new(number("size").unwrap_or(0), cluster_size)?;
    let write = async |file: &Node, is_empty: bool| write_to(file, &header, is_empty).await;
    make_in_file(creation, options, header.data_start(), write).await?;
    Ok(Made { reads_zeroes: true })
}

/// Writes an image without data to a file that is long enough. `is_empty`: the file reads as zeroes.
async fn write_to(file: &Node, header: &Header, is_empty: bool) -> Result<(), Error> {
    let write = async || -> IoResult {
        if !is_empty {
            file.zero(0, header.data_start(), ZeroFlags::empty()).await?;
        }
        file.flush().await?;
        file.write(0, &IoVec::from_ref(&header.encode()), WriteFlags::empty()).await?;
        file.flush().await
    };
    write().await.map_err(|errno| Error::os("Failed to create Parallels image", errno))
}

fn prepare(_: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let wanted: OnNode = options::from_map(map)?;
    Ok(Box::new(move |graph| Box::pin(make_on(graph, wanted))))
}

async fn make_on(graph: &Graph, wanted: OnNode) -> Result<Made, Error> {
    let cluster_size = wanted.cluster_size.map_or(DEFAULT_CLUSTER, |size| size.0);
    let header = Header::for_new(wanted.size.0, cluster_size)?;
    let write = async |file: &Node| write_to(file, &header, false).await;
    make_on_node(graph, wanted.file, header.data_start(), write).await?;
    Ok(Made { reads_zeroes: true })
}
