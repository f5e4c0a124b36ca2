//! External snapshots of nodes in use, as QMP makes them.

use crate::block::create::NewBacking;
use crate::block::{Creation, Error, Graph, Node, Registry, Role, name};
use crate::options::{Map, Value, json};
use std::sync::Arc;

/// An overlay that is to be made, or opened if its file `exists`.
pub struct NewOverlay {
    /// Of its node; there has to be one.
    pub name: Option<String>,
    pub filename: String,
    pub format: String,
    pub exists: bool,
}

/// Makes the overlay's file, unless it exists. The options of its node.
pub(super) async fn prepare(
    graph: &Graph,
    base: &Arc<Node>,
    new: &NewOverlay,
) -> Result<Map, Error> {
    let registry = graph.registry();
    let NewOverlay { name, filename, format, exists } = new;
    let missing = || Error::new("New overlay node-name missing");
    let name = name.as_ref().ok_or_else(missing)?;
    if graph.find(name).is_ok() {
        return Err(Error::new("New overlay node-name already in use"));
    }
    let name = graph.check_name(name.clone())?;
    let Some(entry) = registry.get(format) else {
        return Err(Error::new(format!("Unknown file format '{}'", format.escape_debug())));
    };
    let can = if *exists { entry.has_backing() } else { entry.records_backing() };
    if !can {
        return Err(Error::new(match *exists {
            true => "The overlay does not support backing images".to_owned(),
            false => format!("Backing file not supported for file format '{format}'"),
        }));
    }
    let file = registry.file_options(filename)?;
    if !exists {
        // What filters do is not kept.
        let base = &base.below_filters();
        let given = Map::from_iter([
            ("backing_file", Value::Text(recorded(base, registry)?)),
            ("backing_fmt", Value::Text(base.driver().name().to_owned())),
        ]);
        let new =
            Creation::new(registry, format, (filename, file.clone()), given, Some(base.len()))?;
        new.check_backing(NewBacking::Unseen).await?.run().await?;
    }
    let options = base.options();
    let cache = [("direct", options.direct), ("no-flush", options.no_flush)];
    let mut node = Map::from_iter([("driver", &**format), ("node-name", &*name)]);
    node.insert(Role::Backing.name(), base.name());
    node.insert(Role::File.name(), Value::Map(file));
    node.insert("cache", Value::Map(Map::from_iter(cache)));
    node.insert("discard", if options.discard { "unmap" } else { "ignore" });
    Ok(node)
}

/// What an overlay records of the node below it, wherever the overlay's own file is.
fn recorded(base: &Node, registry: &Registry) -> Result<String, Error> {
    match name::plain_name(base, registry) {
        Some(name) => name::absolute(name),
        None => {
            let mut options = name::options_of(base, registry);
            name::make_absolute(&mut options)?;
            Ok(format!("json:{}", json::to_text(&options.into())))
        }
    }
}
