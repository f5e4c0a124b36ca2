//! New images: qemu-img's options, their rules in QEMU's words, and the writing.
//!
//! The order: an empty L1 table, made durable, and the header last, so that what was not finished is no
//! image.

use super::header::{self, Features, Geometry, Header};
use crate::block::create::{
    CreateEntry, CreateOption, Creation, Made, MakeFn, ValueType, check_backing_format,
};
use crate::block::new_file::{make_in_file, make_on_node};
use crate::block::{Error, Graph, Node, Registry, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use crate::options::{self, Map, NodeRef, Size, Value, bytes};
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
    CreateOption::new("backing_file", ValueType::Str, "File name of a base image"),
    CreateOption::new("backing_fmt", ValueType::Str, "Image format of the base image"),
    CreateOption {
        default: Some("65536"),
        ..CreateOption::new("cluster_size", ValueType::Size, "Cluster size (in bytes)")
    },
    CreateOption::new("table_size", ValueType::Size, "L1/L2 table size (in clusters)"),
];

/// An image that is asked for, as `blockdev-create` has it (BlockdevCreateOptionsQed).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OnNode {
    file: NodeRef,
    size: Size,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    cluster_size: Option<Size>,
    table_size: Option<u64>,
}

/// What is asked for, in types.
struct Wanted {
    /// Bytes.
    size: u64,
    backing_file: Option<String>,
    backing_format: Option<String>,
    /// Bytes.
    cluster_size: Option<u64>,
    /// Clusters.
    table_size: Option<u64>,
}

impl Wanted {
    fn of_options(options: &Map) -> Wanted {
        let number = |name: &str| match options.get(name) {
            Some(Value::Int(n)) => u64::try_from(*n).ok(),
            _ => None,
        };
        let text = |name: &str| options.get(name).and_then(Value::as_str).map(str::to_owned);
        Wanted {
            // One that is too large to be rounded is refused as it is.
            size: number("size").map_or(0, |n| n.checked_next_multiple_of(SECTOR).unwrap_or(n)),
            backing_file: text("backing_file"),
            backing_format: text("backing_fmt"),
            cluster_size: number("cluster_size"),
            table_size: number("table_size"),
        }
    }

    /// The new image's header, and what follows it in its cluster.
    ///
    /// # Errors
    /// In QEMU's words.
    fn header(&self) -> Result<(Header, Vec<u8>), Error> {
        let cluster_size = self.cluster_size.unwrap_or(1 << header::DEFAULT_CLUSTER_BITS);
        let bits = header::MIN_CLUSTER_BITS..=header::MAX_CLUSTER_BITS;
        if !cluster_size.is_power_of_two() || !bits.contains(&cluster_size.ilog2()) {
            return Err(Error::new(format!(
                "QED cluster size must be within range [{}, {}] and power of 2",
                1u64 << bits.start(),
                1u64 << bits.end()
            )));
        }
        let most = u64::from(header::MAX_TABLE_CLUSTERS);
        let table = self.table_size.unwrap_or(header::DEFAULT_TABLE_CLUSTERS.into());
        if !table.is_power_of_two() || table > most {
            return Err(Error::new(format!(
                "QED table size must be within range [1, {most}] and power of 2"
            )));
        }
        let geometry =
            Geometry { cluster_bits: cluster_size.ilog2(), table_clusters: table as u32 };
        let size = self.size;
        if !geometry.is_size(size) {
            return Err(Error::new(format!(
                "QED image size must be a non-zero multiple of cluster size and less than {} bytes",
                geometry.max_size()
            )));
        }
        let name = self.backing_file.as_deref().map(|name| bytes::bytes_of(name).into_owned());
        let name = name.unwrap_or_default();
        let header = Header {
            geometry,
            header_clusters: 1,
            features: Features::empty(),
            compatible: 0,
            autoclear: 0,
            l1_offset: cluster_size,
            size,
            backing_offset: 0,
            backing_len: 0,
        };
        let header = header.with_backing(&name, self.backing_format.as_deref())?;
        Ok((header, name))
    }
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let (header, name) = Wanted::of_options(&options).header()?;
    let write = async |file: &Node, is_empty: bool| write_to(file, &header, &name, is_empty).await;
    make_in_file(creation, options, file_len(&header), write).await?;
    Ok(Made { reads_zeroes: true })
}

/// How long the file of a new image is, in bytes.
fn file_len(header: &Header) -> u64 {
    header.l1_offset + header.geometry.table_size()
}

/// Writes an image without data to a file that is long enough. `is_empty`: the file reads as zeroes; one that was there
/// before, or a disk, may have anything.
async fn write_to(file: &Node, header: &Header, name: &[u8], is_empty: bool) -> Result<(), Error> {
    let write = async || -> IoResult {
        if !is_empty {
            file.zero(0, header.l1_offset, ZeroFlags::UNMAP).await?;
        }
        file.zero(header.l1_offset, header.geometry.table_size(), ZeroFlags::empty()).await?;
        file.flush().await?;
        let bytes = [&header.encode()[..], name].concat();
        file.write(0, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        file.flush().await
    };
    write().await.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
}

fn prepare(registry: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let OnNode { file, size, backing_file, backing_fmt, cluster_size, table_size } =
        options::from_map(map)?;
    check_backing_format(registry, backing_fmt.as_deref())?;
    let wanted = Wanted {
        size: size.0,
        backing_file,
        backing_format: backing_fmt,
        cluster_size: cluster_size.map(|size| size.0),
        table_size,
    };
    Ok(Box::new(move |graph| Box::pin(make_on(graph, file, wanted))))
}

async fn make_on(graph: &Graph, file: NodeRef, wanted: Wanted) -> Result<Made, Error> {
    let (header, name) = wanted.header()?;
    let write = async |file: &Node| write_to(file, &header, &name, false).await;
    make_on_node(graph, file, file_len(&header), write).await?;
    Ok(Made { reads_zeroes: true })
}
