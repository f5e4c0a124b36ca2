//! What an open node is called: the file name that opens the same disk again, as listings show it and
//! overlays record it.
//!
//! The rule held here: a name says all that decides which data the disk has. Where no plain name does, it is
//! `json:{…}` with the options that do, in QEMU's order; how the node is cached, locked and the like is not
//! in it.

use super::{Child, Kind, Node, Registry};
use crate::options::{Map, Value, filename, json};

/// Those that are told before `driver`.
const FIRST: [&str; 4] = ["backing", "image", "offset", "read-zeroes"];

/// A plain name, or `json:{…}`.
pub fn name_of(node: &Node, registry: &Registry) -> String {
    plain_name(node, registry).unwrap_or_else(|| json_name(options_of(node, registry)))
}

/// The name of an image that was opened without its backing file, which it has all the same. Values stand in it
/// as they are `given`, where they are.
pub fn name_without_backing(node: &Node, registry: &Registry, given: &Map) -> String {
    plain(node, registry, None).unwrap_or_else(|| {
        let mut options = options(node, registry, None);
        // Nothing is read from it, so that another node may stand in its place.
        options.take("data-file");
        as_given(&mut options, given);
        json_name(options)
    })
}

fn json_name(options: Map) -> String {
    format!("json:{}", json::to_text(&options.into()))
}

fn as_given(options: &mut Map, given: &Map) {
    let keys: Vec<String> = options.iter().map(|(key, _)| key.to_owned()).collect();
    for key in keys {
        // Keys may be dotted.
        match (options.get_mut(&key), given.get_path(&key)) {
            (Some(Value::Map(options)), Some(Value::Map(given))) => as_given(options, given),
            (Some(Value::Map(_)), _) | (_, None | Some(Value::Map(_) | Value::List(_))) => {}
            (Some(slot), Some(value)) => *slot = value.clone(),
            (None, _) => {}
        }
    }
}

/// The plain name of a node, if there is one.
pub fn plain_name(node: &Node, registry: &Registry) -> Option<String> {
    plain(node, registry, backing(node, registry))
}

fn plain(node: &Node, registry: &Registry, backing: Option<Value>) -> Option<String> {
    let driver = node.driver();
    let below = driver.children().first().map(Child::node);
    let name = below.as_ref().and_then(|below| plain_name(below, registry));
    if let Some(own) = driver.name_over(name.as_deref()) {
        return Some(own);
    }
    let is_format = |node: &Node| kind(node, registry) == Some(Kind::Format);
    let says_no_more = driver.own_options().is_empty() && backing.is_none();
    // Two formats in one another have no name of their own, nor has a filter.
    let below = below?;
    (is_format(node) && says_no_more && !is_format(&below)).then_some(name).flatten()
}

/// The options that say which disk a node is.
pub fn options_of(node: &Node, registry: &Registry) -> Map {
    options(node, registry, backing(node, registry))
}

fn options(node: &Node, registry: &Registry, backing: Option<Value>) -> Map {
    let driver = node.driver();
    let mut options = driver.own_options();
    options.insert("driver", driver.name());
    for child in driver.children().iter().filter(|child| child.role() != "backing") {
        options.insert(child.role(), options_of(&child.node(), registry));
    }
    if let Some(backing) = backing {
        options.insert("backing", backing);
    }
    sorted(options)
}

/// Options in the order in which they are told, at every depth.
fn sorted(options: Map) -> Map {
    let place = |key: &str| match key {
        "driver" => FIRST.len(),
        "file" => usize::MAX,
        _ => FIRST.iter().position(|first| *first == key).unwrap_or(FIRST.len() + 1),
    };
    let mut entries: Vec<_> = options.into_iter().collect();
    entries.sort_by_key(|(key, _)| place(key));
    let nested = |value| match value {
        Value::Map(options) => Value::Map(sorted(options)),
        plain => plain,
    };
    entries.into_iter().map(|(key, value)| (key, nested(value))).collect()
}

fn kind(node: &Node, registry: &Registry) -> Option<Kind> {
    registry.get(node.driver().name()).map(|entry| entry.kind)
}

/// The options of what a node reads where it has no data, unless it is what the image records.
fn backing(node: &Node, registry: &Registry) -> Option<Value> {
    let driver = node.driver();
    let child = driver.children().iter().find(|child| child.role() == "backing");
    let info = driver.image().map(|image| image.info()).unwrap_or_default();
    let recorded = info.backing_filename.as_deref();
    let Some(child) = child.map(Child::node) else { return recorded.map(|_| Value::Null) };
    let options = options_of(&child, registry);
    let format = info.backing_format.as_deref().unwrap_or(child.driver().name());
    let is_recorded = recorded.is_some_and(|recorded| {
        let own = driver.filename().unwrap_or_default();
        let name = filename::resolve(&own, recorded).ok();
        let named = name.and_then(|name| {
            registry.recorded_options(&name, Some(format), Map::new()).ok().map(Map::into_text)
        });
        named.is_some_and(|named| sorted(named) == options.clone().into_text())
    });
    (!is_recorded).then_some(Value::Map(options))
}
