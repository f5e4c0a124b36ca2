//! The file name of an open node, which opens the same disk again.
//!
//! Listings show it, and overlays record it.
//!
//! The rule held here: a name says all that decides which data the disk has. Where no plain name does, it is
//! `json:{…}` with the options that do, in QEMU's order; how the node is cached, locked and the like is not
//! in it.

use super::{Child, Error, Kind, Node, Registry, Role, extents};
use crate::options::{Map, Value, bytes, filename, json};
use std::collections::HashMap;
use std::sync::Arc;

/// Those that are printed before `driver`.
const FIRST: [&str; 4] = ["backing", "image", "offset", "read-zeroes"];

/// A plain name, or `json:{…}`.
pub fn name_of(node: &Node, registry: &Registry) -> String {
    Names::new(registry).of(node)
}

/// The name of an image that was opened without its backing file, which it has all the same. Values stand in it
/// as they are `given`, where they are.
pub fn name_without_backing(node: &Node, registry: &Registry, given: &Map) -> String {
    let mut names = Names::new(registry);
    names.plain(node, None).unwrap_or_else(|| {
        let mut options = names.options(node, None);
        // Nothing is read from it, so that another node may stand in its place.
        options.take(Role::DataFile.name());
        as_given(&mut options, given);
        json_name(options)
    })
}

/// The plain name of a node, if there is one.
pub fn plain_name(node: &Node, registry: &Registry) -> Option<String> {
    Names::new(registry).plain_of(node)
}

/// The options that say which disk a node is.
pub fn options_of(node: &Node, registry: &Registry) -> Map {
    Names::new(registry).options_of(node)
}

/// The names of several nodes. The backing files that the images of a chain record are looked up once.
pub struct Names<'a> {
    registry: &'a Registry,
    known: HashMap<*const Node, Known>,
}

struct Known {
    /// Keeps the address from becoming another node's.
    _node: Arc<Node>,
    /// As [`Names::backing`].
    backing: Option<Value>,
}

impl<'a> Names<'a> {
    pub fn new(registry: &'a Registry) -> Names<'a> {
        Names { registry, known: HashMap::new() }
    }

    /// A plain name, or `json:{…}`.
    pub fn of(&mut self, node: &Node) -> String {
        self.plain_of(node).unwrap_or_else(|| json_name(self.options_of(node)))
    }

    fn plain_of(&mut self, node: &Node) -> Option<String> {
        let backing = self.backing(node);
        self.plain(node, backing)
    }

    fn plain(&mut self, node: &Node, backing: Option<Value>) -> Option<String> {
        let driver = node.driver();
        let below = node.primary();
        let name = below.as_ref().and_then(|below| self.plain_of(below));
        if let Some(own) = driver.name_over(name.as_deref()) {
            return Some(own);
        }
        let is_format = |node: &Node| node.driver().entry().kind == Kind::Format;
        let says_no_more = driver.own_options().is_empty() && backing.is_none();
        // Two formats in one another have no name of their own, nor has a filter.
        let below = below?;
        (is_format(node) && says_no_more && !is_format(&below)).then_some(name).flatten()
    }

    fn options_of(&mut self, node: &Node) -> Map {
        let backing = self.backing(node);
        self.options(node, backing)
    }

    fn options(&mut self, node: &Node, backing: Option<Value>) -> Map {
        let driver = node.driver();
        let mut options = driver.own_options();
        options.insert("driver", driver.name());
        let is_listed = |child: &&Child| child.role().is_given() && !child.is_backing();
        for child in driver.children().iter().filter(is_listed) {
            options.insert(child.role().name(), self.options_of(&child.node()));
        }
        if let Some(backing) = backing {
            options.insert(Role::Backing.name(), backing);
        }
        sorted(options)
    }

    /// The options of what a node reads where it has no data, unless it is what the image records.
    fn backing(&mut self, node: &Node) -> Option<Value> {
        let known = |names: &Self, node: &Node| names.known.contains_key(&std::ptr::from_ref(node));
        // From the bottom up, as each names the nodes below it.
        let mut chain: Vec<Arc<Node>> = Vec::new();
        let mut below = extents::backing(node);
        while let Some(next) = below.filter(|below| !known(self, below)) {
            below = extents::backing(&next);
            chain.push(next);
        }
        while let Some(node) = chain.pop() {
            let backing = self.backing_over_known(&node);
            self.known.insert(Arc::as_ptr(&node), Known { _node: node, backing });
        }
        match self.known.get(&std::ptr::from_ref(node)) {
            Some(known) => known.backing.clone(),
            None => self.backing_over_known(node),
        }
    }

    /// The same, of a node whose backing file is known.
    fn backing_over_known(&mut self, node: &Node) -> Option<Value> {
        let driver = node.driver();
        let info = driver.image().map(|image| image.info()).unwrap_or_default();
        let recorded = info.backing_filename.as_deref();
        let Some(child) = extents::backing(node) else { return recorded.map(|_| Value::Null) };
        let backing = self.known.get(&Arc::as_ptr(&child)).and_then(|known| known.backing.clone());
        let options = self.options(&child, backing);
        let format = info.backing_format.as_deref().unwrap_or(child.driver().name());
        let is_recorded = recorded.is_some_and(|recorded| {
            let own = driver.filename().unwrap_or_default();
            let name = filename::resolve(&own, recorded).ok();
            let named = name.and_then(|name| {
                let given = Map::new();
                let options = self.registry.recorded_options(&name, Some(format), given).ok();
                options.map(Map::into_text)
            });
            named.is_some_and(|named| is_same(named, options.clone().into_text()))
        });
        (!is_recorded).then_some(Value::Map(options))
    }
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

/// Whether what an image records is what a node is, as it was named or as snapshots record it.
fn is_same(recorded: Map, mut node: Map) -> bool {
    let recorded = sorted(recorded);
    if recorded == node {
        return true;
    }
    make_absolute(&mut node).is_ok() && recorded == node
}

/// Turns all file names in options to those that start at the root.
///
/// # Errors
/// [`absolute`]
pub fn make_absolute(options: &mut Map) -> Result<(), Error> {
    let keys: Vec<String> = options.iter().map(|(key, _)| key.to_owned()).collect();
    for key in keys {
        match options.get_mut(&key) {
            Some(Value::Map(map)) => make_absolute(map)?,
            Some(Value::Str(name) | Value::Text(name)) if key == "filename" => {
                *name = absolute(std::mem::take(name))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// The same file's name, wherever it is read. Names that start at the root stay as they are.
///
/// # Errors
/// The current folder is not known.
pub fn absolute(name: String) -> Result<String, Error> {
    // That of another protocol has no folder.
    let path = bytes::path_of(&name);
    if path.is_absolute() || filename::split_protocol(&name).is_some() {
        return Ok(name);
    }
    let folder = std::env::current_dir().map_err(|e| Error::os(&name, e))?;
    Ok(bytes::text_of_name(folder.join(path).as_os_str()))
}

/// Options in the order in which they are printed, at every depth.
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
