//! The options that only this type of export has, and the export that they make.

use super::export::{Offered, WantedBitmap};
use super::server::Server;
use crate::block::{Error, Graph};
use crate::export::Reading;
use crate::export::core::{Export, Parts, Transport};
use crate::options::{self, Map, Value};
use serde::Deserialize;
use std::path::Path;

/// Workers at most whose requests are counted apart.
const MOST_LANES: u16 = 64;

/// What one export of this type is made with.
pub struct Options {
    pub(super) server: Server,
    /// None: the node's.
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) bitmaps: Vec<WantedBitmap>,
    pub(super) allocation_depth: bool,
}

/// The options of `--export type=nbd,…` that other types do not share.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Given {
    name: Option<String>,
    description: Option<String>,
    bitmaps: Option<Value>,
    #[serde(default)]
    allocation_depth: bool,
}

impl Options {
    /// An export of this name.
    pub fn named(server: &Server, name: String) -> Options {
        Options {
            server: server.clone(),
            name: Some(name),
            description: None,
            bitmaps: Vec::new(),
            allocation_depth: false,
        }
    }

    pub fn with_description(self, description: Option<String>) -> Options {
        Options { description, ..self }
    }

    /// With the bitmaps of these names.
    pub fn with_bitmaps(self, names: Vec<String>) -> Options {
        Options { bitmaps: names.into_iter().map(WantedBitmap::Named).collect(), ..self }
    }

    pub fn with_allocation_depth(self, allocation_depth: bool) -> Options {
        Options { allocation_depth, ..self }
    }
}

/// Reads the options of one export.
pub(super) fn parse(map: Map, reading: &Reading<'_>) -> Result<Box<dyn Transport>, Error> {
    let common = reading.common.iter().copied();
    let given = options::from_map(map).map_err(|e| e.meant(common))?;
    let Given { name, description, bitmaps, allocation_depth } = given;
    let bitmaps = match bitmaps {
        None => Vec::new(),
        Some(Value::List(list)) => {
            let read = |value| bitmap(value, reading.graph);
            list.into_iter().map(read).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(Error::new("Invalid parameter type for 'bitmaps', expected: array")),
    };
    let server = reading.nbd.clone();
    Ok(Box::new(Options { server, name, description, bitmaps, allocation_depth }))
}

/// A bitmap's name, or that of a node with it.
fn bitmap(value: Value, graph: &Graph) -> Result<WantedBitmap, Error> {
    match value {
        Value::Map(mut map) => {
            let at = |error: options::Error| Error::from(error.under("bitmaps"));
            let (node, name) = (
                map.take_required_str("node").map_err(at)?,
                map.take_required_str("name").map_err(at)?,
            );
            map.finish().map_err(at)?;
            Ok(WantedBitmap::Of(graph.find(&node)?, name))
        }
        value => match value.as_str() {
            Some(name) => Ok(WantedBitmap::Named(name.to_owned())),
            None => Err(Error::new("Invalid parameter type for 'bitmaps', expected: string")),
        },
    }
}

impl Transport for Options {
    fn check(&self, _: &str) -> Result<(), Error> {
        self.server.check_running()
    }

    fn queues(&self) -> u16 {
        MOST_LANES
    }

    fn socket(&self) -> Option<&Path> {
        None
    }

    fn create(self: Box<Self>, parts: Parts) -> Result<Box<dyn Export>, Error> {
        Ok(Box::new(Offered::new(parts, *self)?))
    }
}
