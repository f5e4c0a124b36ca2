//! New images on nodes of a graph, as QMP's `blockdev-create` asks for them: its options, and the writing.
//!
//! Nothing that the nodes hold is kept but what is behind the new tables, and the data of a data file.

use super::create::{Layout, Wanted, write_to};
use crate::block::create::{Made, MakeFn, check_backing_format};
use crate::block::{Attachment, Error, Graph, Preallocation, Registry, SECTOR, ZeroFlags};
use crate::options::{self, Map, NodeRef, Size, Value};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    data_file: Option<NodeRef>,
    data_file_raw: Option<bool>,
    extended_l2: Option<bool>,
    size: Size,
    version: Option<Version>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    encrypt: Option<Value>,
    cluster_size: Option<Size>,
    preallocation: Option<Preallocation>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
    compression_type: Option<CompressionType>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Version {
    V2,
    V3,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CompressionType {
    Zlib,
    Zstd,
}

impl Options {
    /// The same as `create -o` has it, in its types and with its defaults.
    fn as_created(&self) -> Map {
        let mut map = Map::from_iter([("size", Value::from(self.size.0))]);
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(name, value);
            }
        };
        put("cluster_size", Some(Value::from(self.cluster_size.map_or(65536, |size| size.0))));
        put("refcount_bits", Some(Value::from(self.refcount_bits.unwrap_or(16))));
        put("extended_l2", self.extended_l2.map(Value::from));
        put("data_file_raw", self.data_file_raw.map(Value::from));
        put("lazy_refcounts", self.lazy_refcounts.map(Value::from));
        put("encryption", self.encrypt.as_ref().map(|_| Value::from(true)));
        put("backing_file", self.backing_file.as_deref().map(Value::from));
        put("backing_fmt", self.backing_fmt.as_deref().map(Value::from));
        put(
            "compat",
            self.version.map(|version| match version {
                Version::V2 => "v2".into(),
                Version::V3 => "v3".into(),
            }),
        );
        put(
            "compression_type",
            self.compression_type.map(|kind| match kind {
                CompressionType::Zlib => "zlib".into(),
                CompressionType::Zstd => "zstd".into(),
            }),
        );
        put("preallocation", self.preallocation.map(|mode| mode.name().into()));
        map
    }
}

pub(super) fn prepare(registry: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let options: Options = options::from_map(map)?;
    check_backing_format(registry, options.backing_fmt.as_deref())?;
    Ok(Box::new(move |graph| Box::pin(make(graph, options))))
}

async fn make(graph: &Graph, options: Options) -> Result<Made, Error> {
    let mut created = options.as_created();
    let file = graph.borrow_for_image(options.file, "options.file").await?;
    let data = match options.data_file {
        Some(data) => match graph.borrow_for_image(data, "options.data-file").await {
            Ok(data) => Some(data),
            Err(error) => {
                give_back(graph, [Some(file), None]).await;
                return Err(error);
            }
        },
        None => None,
    };
    let made = make_on(graph, &file, data.as_ref(), &mut created).await;
    give_back(graph, [Some(file), data]).await;
    made
}

async fn give_back(graph: &Graph, holds: [Option<Attachment>; 2]) {
    for hold in holds.into_iter().flatten() {
        hold.detach().await;
    }
    graph.tidy().await;
}

async fn make_on(
    graph: &Graph,
    file: &Attachment,
    data: Option<&Attachment>,
    created: &mut Map,
) -> Result<Made, Error> {
    if let Some(data) = data {
        let name = data.node().driver().filename();
        let name =
            name.ok_or_else(|| Error::new("The data file has no name that can be stored"))?;
        created.insert("data_file", name);
    }
    let size = created.get("size").cloned();
    let wanted = Wanted::take(graph.registry(), created)?;
    if size != Some(Value::from(wanted.size)) {
        return Err(Error::new(format!("Image size must be a multiple of {SECTOR} bytes")));
    }
    let Layout { header, image, first_cluster } = wanted.layout()?;
    if let Some(data) = data
        && data.node().len() < wanted.size
    {
        graph.resize(data.node(), wanted.size).await?;
    }
    let node = file.node();
    if node.len() < image.file_len() {
        graph.resize(node, image.file_len()).await?;
    }
    let zeroed = match wanted.preallocation {
        // Clusters that have their places show what is there.
        _ if !wanted.is_mapped() || data.is_some() => None,
        Preallocation::Falloc | Preallocation::Full => Some(ZeroFlags::empty()),
        Preallocation::Off | Preallocation::Metadata => Some(ZeroFlags::UNMAP),
    };
    let write = async || {
        if let Some(flags) = zeroed {
            let zeroed = node.zero(0, image.file_len(), flags).await;
            zeroed.map_err(|errno| Error::os("Could not zero the new image's clusters", errno))?;
        }
        write_to(node, &header, &image, &first_cluster).await
    };
    graph.undisturbed(node, &[], write).await??;
    Ok(Made { reads_zeroes: !wanted.is_mapped() || data.is_none() })
}
