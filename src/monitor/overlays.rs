//! The commands for external snapshots.

use super::commands::CommandError;
use super::slow::{Later, when_done, when_explained};
use crate::block::Node;
use crate::options::{self, Map};
use crate::service::{NewOverlay, Service};
use serde::Deserialize;
use std::sync::Arc;

/// What is made where nobody names a format, as in QEMU.
const FORMAT: &str = "qcow2";

fn find(service: &Service, device: &str, node: &str) -> Result<Arc<Node>, CommandError> {
    // There are no devices, so that only the second can be one's name.
    service.graph().find(node).map_err(|_| {
        let (device, node) = (device.escape_debug(), node.escape_debug());
        CommandError::new(format!("Cannot find device='{device}' nor node-name='{node}'"))
    })
}

pub fn snapshot(service: &mut Service, arguments: Map) -> Result<Later, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        node: String,
        overlay: String,
    }
    let Arguments { node, overlay } = options::from_map(arguments)?;
    let base = find(service, &node, &node)?;
    Ok(when_done(service.put_over(&base, overlay)))
}

pub fn snapshot_sync(service: &mut Service, arguments: Map) -> Result<Later, CommandError> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        #[default]
        AbsolutePaths,
        Existing,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        #[serde(default)]
        device: String,
        #[serde(default)]
        node_name: String,
        snapshot_file: String,
        snapshot_node_name: Option<String>,
        format: Option<String>,
        #[serde(default)]
        mode: Mode,
    }
    let given = arguments.clone();
    let Arguments { device, node_name, snapshot_file, snapshot_node_name, format, mode } =
        options::from_map(arguments)?;
    let base = find(service, &device, &node_name)?;
    let name =
        snapshot_node_name.ok_or_else(|| CommandError::new("New overlay node-name missing"))?;
    if service.graph().find(&name).is_ok() {
        return Err(CommandError::new("New overlay node-name already in use"));
    }
    let new = NewOverlay {
        name,
        filename: snapshot_file,
        format: format.unwrap_or_else(|| FORMAT.to_owned()),
        exists: matches!(mode, Mode::Existing),
    };
    Ok(when_explained(service.add_over(&base, new), given))
}
