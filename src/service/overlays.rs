//! External snapshots of nodes in use, as QMP makes them.

use super::{Pending, Service};
use crate::block::create::NewBacking;
use crate::block::{Creation, Error, Graph, Node};
use crate::options::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// An overlay that is to be made, or opened if its file `exists`.
pub struct NewOverlay {
    /// Of its node.
    pub name: String,
    pub filename: String,
    pub format: String,
    pub exists: bool,
}

impl Service {
    /// Puts a node that is open over another, whose users have it from then on.
    pub fn put_over(&self, base: &Arc<Node>, overlay: String) -> Pending<Result<(), Error>> {
        let (graph, base) = (self.graph.clone(), base.clone());
        Pending::start(&self.control, move || async move { graph.put_over(&base, &overlay).await })
    }

    /// Puts a new node over another, whose users have it from then on, and keep it open.
    pub fn add_over(&self, base: &Arc<Node>, new: NewOverlay) -> Pending<Result<(), Error>> {
        let (graph, base) = (self.graph.clone(), base.clone());
        Pending::start(&self.control, move || async move {
            graph.open_over(&base, async || prepare(&graph, &base, new).await).await
        })
    }
}

/// Makes the overlay's file, unless it exists. The options of its node.
async fn prepare(graph: &Graph, base: &Node, new: NewOverlay) -> Result<Map, Error> {
    let registry = graph.registry();
    let NewOverlay { name, filename, format, exists } = new;
    let Some(entry) = registry.get(&format) else {
        return Err(Error::new(format!("Unknown file format '{}'", format.escape_debug())));
    };
    if !entry.has_backing() {
        return Err(Error::new(match exists {
            true => "The overlay does not support backing images".to_owned(),
            false => format!("Backing file not supported for file format '{format}'"),
        }));
    }
    let name = graph.check_name(name)?;
    let file = registry.file_options(&filename)?;
    if !exists {
        let given = Map::from_iter([
            ("backing_file", Value::Text(name_of(base)?)),
            ("backing_fmt", Value::Text(base.driver().name().to_owned())),
        ]);
        let new =
            Creation::new(registry, &format, (&filename, file.clone()), given, Some(base.len()))?;
        new.check_backing(NewBacking::Unseen).await?.run().await?;
    }
    let options = base.options();
    let cache = [("direct", options.direct), ("no-flush", options.no_flush)];
    let mut node = Map::from_iter([("driver", &*format), ("node-name", &name)]);
    node.insert("backing", base.name());
    node.insert("file", Value::Map(file));
    node.insert("cache", Value::Map(Map::from_iter(cache)));
    node.insert("discard", if options.discard { "unmap" } else { "ignore" });
    Ok(node)
}

/// What an overlay records of the node that it stands on, wherever the overlay's own file is.
fn name_of(base: &Node) -> Result<String, Error> {
    let unnamed = || Error::new(format!("Node '{}' has no file that could be named", base.name()));
    let name = base.driver().filename().ok_or_else(unnamed)?;
    let path = std::path::absolute(Path::new(&name)).map_err(|e| Error::os(name, e))?;
    path.into_os_string().into_string().map_err(|_| unnamed())
}
