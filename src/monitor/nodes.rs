//! Listings of nodes: `query-named-block-nodes` and `query-blockstats`, as in QEMU's schema.

mod stats;

pub use stats::query_blockstats;

use super::reply::{Outcome, object};
use crate::block::graph::NodeInfo;
use crate::block::node::DetectZeroes;
use crate::block::{Kind, Listed};
use crate::options::{self, Map, Value, filename};
use crate::service::Service;
use serde::Deserialize;
use std::time::Duration;

/// How long a listing waits for what the storage has to tell.
const STORAGE: Duration = Duration::from_secs(1);

/// All nodes, newest first, and how many bytes each occupies, if that is known.
struct Nodes<'a> {
    service: &'a Service,
    list: Vec<(NodeInfo, Option<u64>)>,
}

/// Asks the storage, too, and does without where it does not answer.
async fn listed(service: &Service, describe: impl FnOnce(Nodes<'_>) -> Vec<Value>) -> Outcome {
    let list = service.query_nodes(STORAGE).await;
    Ok(Value::List(describe(Nodes { service, list })))
}

pub async fn query_named_block_nodes(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        flat: Option<bool>,
    }
    let Arguments { flat } = options::from_map(arguments)?;
    let deep = !flat.unwrap_or(false);
    let describe =
        |nodes: Nodes<'_>| nodes.list.iter().map(|(info, _)| nodes.describe(info, deep)).collect();
    listed(service, describe).await
}

impl Nodes<'_> {
    fn by_name(&self, name: &str) -> Option<&NodeInfo> {
        self.list.iter().map(|(info, _)| info).find(|info| info.name == name)
    }

    fn backing(&self, info: &NodeInfo) -> Option<&NodeInfo> {
        let (_, name) = info.children.iter().find(|(role, _)| role.is_backing())?;
        self.by_name(name)
    }

    /// The node that has its data or its metadata.
    fn primary(&self, info: &NodeInfo) -> Option<&NodeInfo> {
        let (_, name) = info.children.iter().find(|(role, _)| !role.is_backing())?;
        self.by_name(name)
    }

    /// What a filter filters.
    fn filtered(&self, info: &NodeInfo) -> Option<&NodeInfo> {
        match info.kind {
            Kind::Filter => self.primary(info),
            _ => None,
        }
    }

    /// That, or the image that it reads where it has nothing.
    fn below(&self, info: &NodeInfo) -> Option<&NodeInfo> {
        self.filtered(info).or_else(|| self.backing(info))
    }

    /// `BlockDeviceInfo`; with `deep`, the image with all below it.
    fn describe(&self, info: &NodeInfo, deep: bool) -> Value {
        let backing = self.backing(info);
        let chain = std::iter::successors(self.below(info), |info| self.below(info));
        // As in QEMU, flat listings do not look.
        let depth = if deep { chain.count() as u64 } else { 0 };
        let cache = object([
            ("no-flush", Value::from(info.options.no_flush)),
            ("direct", Value::from(info.options.direct)),
            ("writeback", Value::from(true)),
        ]);
        let detect_zeroes = match info.options.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        };
        let mut node = Map::from_iter([
            ("node-name", Value::from(&*info.name)),
            ("drv", Value::from(info.driver)),
            ("file", Value::from(&*info.filename)),
            ("ro", Value::from(info.read_only)),
            ("encrypted", Value::from(false)),
            ("detect_zeroes", Value::from(detect_zeroes)),
            ("backing_file_depth", Value::from(depth)),
            ("image", Value::Map(self.image(info, deep))),
            ("cache", cache),
            ("write_threshold", Value::from(info.write_threshold)),
        ]);
        if let Some(backing) = backing {
            node.insert("backing_file", &*backing.filename);
        }
        // QEMU 7.2 does not know it, and all of its nodes are.
        if !info.active {
            node.insert("active", false);
        }
        for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
            node.insert(limit, 0u64);
        }
        if !info.bitmaps.is_empty() {
            let list = info.bitmaps.iter().cloned().map(super::bitmaps::describe).collect();
            node.insert("dirty-bitmaps", Value::List(list));
        }
        Value::Map(node)
    }

    /// `ImageInfo`.
    fn image(&self, info: &NodeInfo, deep: bool) -> Map {
        let (filename, path) = (&info.filename, info.path.as_deref().unwrap_or("json:"));
        let mut image = info.image.clone().unwrap_or_default();
        if let Some(filtered) = self.filtered(info).and_then(|filtered| filtered.image.as_ref()) {
            image.cluster_size = filtered.cluster_size;
            image.snapshots.clone_from(&filtered.snapshots);
        }
        let full = image
            .backing_filename
            .as_deref()
            .map(|name| filename::resolve(path, name).unwrap_or_else(|_| name.to_owned()));
        let allocated = match info.image {
            Some(_) => {
                let mut all = self.list.iter();
                all.find(|(one, _)| one.name == info.name).and_then(|(_, allocated)| *allocated)
            }
            None => Some(0),
        };
        let listed = Listed {
            filename,
            format: info.driver,
            len: info.len,
            allocated,
            full_backing: full.as_deref(),
            is_known: info.image.is_some(),
            info: &image,
        };
        let mut map = listed.to_value();
        if deep && let Some(below) = self.below(info) {
            map.insert("backing-image", Value::Map(self.image(below, true)));
        }
        map
    }
}
