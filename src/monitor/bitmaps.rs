//! Dirty bitmaps: the commands that add, remove and change them, and their listings.

use super::reply::{CommandError, Outcome, done, object};
use crate::block::{BitmapInfo, Error, NewBitmap, Node};
use crate::options::{self, Map, Value};
use crate::service::Service;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// `BlockDirtyInfo` of QEMU's schema.
pub fn describe(info: BitmapInfo) -> Value {
    let BitmapInfo { name, flags, granularity, count } = info;
    let mut map = Map::from_iter([
        ("name", Value::from(name)),
        ("recording", Value::from(flags.recording)),
        ("persistent", Value::from(flags.persistent)),
        ("busy", Value::from(flags.busy)),
        ("granularity", Value::from(granularity)),
        ("count", Value::from(count)),
    ]);
    if flags.inconsistent {
        map.insert("inconsistent", true);
    }
    Value::Map(map)
}

fn find(service: &Service, node: &str) -> Result<Arc<Node>, CommandError> {
    let missing = |_| CommandError::new(format!("Node '{}' not found", node.escape_debug()));
    service.graph().find(node).map_err(missing)
}

/// The node and the bitmap that arguments describe.
pub(super) fn parse_add(arguments: Map) -> Result<(String, NewBitmap), options::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        node: String,
        name: String,
        granularity: Option<u32>,
        #[serde(default)]
        persistent: bool,
        #[serde(default)]
        disabled: bool,
    }
    let Arguments { node, name, granularity, persistent, disabled } = options::from_map(arguments)?;
    let granularity = granularity.map(u64::from);
    Ok((node, NewBitmap { name, granularity, persistent, disabled }))
}

pub async fn add(service: &Service, arguments: Map) -> Outcome {
    let (node, new) = parse_add(arguments)?;
    let missing = |_| {
        let node = node.escape_debug();
        CommandError::new(format!("Cannot find device='{node}' nor node-name='{node}'"))
    };
    let node = service.graph().find(&node).map_err(missing)?;
    let change = async move |node: &Arc<Node>| node.add_bitmap(new).await;
    done(service.change_bitmaps(&node, &[], change).await)
}

/// A bitmap of a node, by their names.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    pub node: String,
    pub name: String,
}

pub async fn remove(service: &Service, arguments: Map) -> Outcome {
    let Named { node, name } = options::from_map(arguments)?;
    let node = find(service, &node)?;
    let change = async move |node: &Arc<Node>| node.remove_bitmap(&name).await;
    done(service.change_bitmaps(&node, &[], change).await)
}

pub async fn clear(service: &Service, arguments: Map) -> Outcome {
    let Named { node, name } = options::from_map(arguments)?;
    let node = find(service, &node)?;
    let change = async move |node: &Arc<Node>| node.clear_bitmap(&name).await;
    done(service.change_bitmaps(&node, &[], change).await)
}

pub async fn record(service: &Service, arguments: Map, enable: bool) -> Outcome {
    let Named { node, name } = options::from_map(arguments)?;
    let node = find(service, &node)?;
    let change = async move |node: &Arc<Node>| node.enable_bitmap(&name, enable).await;
    done(service.change_bitmaps(&node, &[], change).await)
}

/// A node, the bitmap of it that is merged into, and what is merged: nodes and their bitmaps.
pub(super) struct Merge {
    pub node: String,
    pub target: String,
    pub sources: Vec<(String, String)>,
}

pub(super) fn parse_merge(arguments: Map) -> Result<Merge, options::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        node: String,
        target: String,
        bitmaps: Vec<Value>,
    }
    let Arguments { node, target, bitmaps } = options::from_map(arguments)?;
    let mut sources = Vec::with_capacity(bitmaps.len());
    for bitmap in bitmaps {
        sources.push(match bitmap {
            Value::Str(name) => (node.clone(), name),
            Value::Map(map) => {
                let Named { node, name } = options::from_map(map)?;
                (node, name)
            }
            _ => {
                let text = "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr";
                return Err(options::Error::message(text));
            }
        });
    }
    Ok(Merge { node, target, sources })
}

pub async fn merge(service: &Service, arguments: Map) -> Outcome {
    let Merge { node, target, sources } = parse_merge(arguments)?;
    let node = find(service, &node)?;
    // As in QEMU, the target is looked for first.
    node.bitmaps().find(&target).map_err(CommandError::from)?;
    let find = |(node, name): (String, String)| Ok((find(service, &node)?, name));
    let sources = sources.into_iter().map(find).collect::<Result<Vec<_>, CommandError>>()?;
    let read: Vec<Arc<Node>> = sources.iter().map(|(node, _)| node.clone()).collect();
    let change = async move |node: &Arc<Node>| node.merge_bitmaps(&target, &sources).await;
    done(service.change_bitmaps(&node, &read, change).await)
}

/// What a bitmap has recorded, as a number that tests can compare with QEMU's: of its bits in whole
/// words of 64, the first the lowest, at least one.
pub async fn sha256(service: &Service, arguments: Map) -> Outcome {
    let Named { node, name } = options::from_map(arguments)?;
    let bitmap = find(service, &node)?.bitmaps().find(&name);
    let bits = bitmap.map_err(|error: Error| CommandError::from(error))?.bits();
    let mut hash = Sha256::new();
    bits.words().for_each(|word| hash.update(word.to_le_bytes()));
    if bits.is_empty() {
        hash.update([0; 8]);
    }
    let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(object([("sha256", Value::from(digits))]))
}
