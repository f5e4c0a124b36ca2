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
    plain_name(node, registry)
        .unwrap_or_else(|| format!("json:{}", json::to_text(&options_of(node, registry).into())))
}

/// The plain name of a node, if there is one.
pub fn plain_name(node: &Node, registry: &Registry) -> Option<String> {
    let driver = node.driver();
    let below = driver.children().first().map(Child::node);
    let name = below.as_ref().and_then(|below| plain_name(below, registry));
    if let Some(own) = driver.name_over(name.as_deref()) {
        return Some(own);
    }
    let is_format = |node: &Node| kind(node, registry) == Some(Kind::Format);
    let says_no_more = driver.own_options().is_empty() && backing(node, registry).is_none();
    // Two formats in one another have no name of their own, nor has a filter.
    let below = below?;
    (is_format(node) && says_no_more && !is_format(&below)).then_some(name).flatten()
}

/// The options that say which disk a node is.
pub fn options_of(node: &Node, registry: &Registry) -> Map {
    let driver = node.driver();
    let mut options = driver.own_options();
    for child in driver.children().iter().filter(|child| child.role() != "backing") {
        options.insert(child.role(), options_of(&child.node(), registry));
    }
    if let Some(backing) = backing(node, registry) {
        options.insert("backing", backing);
    }
    let mut sorted = Map::new();
    for key in FIRST {
        options.take(key).and_then(|value| sorted.insert(key, value));
    }
    sorted.insert("driver", driver.name());
    let file = options.take("file");
    for (key, value) in options.iter() {
        sorted.insert(key, value.clone());
    }
    file.and_then(|file| sorted.insert("file", file));
    sorted
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
        let named = name.and_then(|name| registry.file_options(&name).ok()).map(Map::into_text);
        named.is_some_and(|named| {
            let file = Value::Map(named.clone());
            let whole =
                Map::from_iter([("driver", Value::Text(format.to_owned())), ("file", file)]);
            let options = options.clone().into_text();
            whole == options || named == options
        })
    });
    (!is_recorded).then_some(Value::Map(options))
}
