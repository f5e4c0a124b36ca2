//! The commands for external snapshots. Each is a transaction of one step.

use super::kept_out::explained;
use super::reply::{Outcome, done};
use crate::options::{self, Map};
use crate::service::{NewOverlay, Service, Step};
use serde::Deserialize;

/// What is made where nobody names a format, as in QEMU.
const FORMAT: &str = "qcow2";

pub(super) fn parse_snapshot(arguments: Map) -> Result<Step, options::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        node: String,
        overlay: String,
    }
    let Arguments { node: base, overlay } = options::from_map(arguments)?;
    Ok(Step::PutOver { base, overlay })
}

pub async fn snapshot(service: &Service, arguments: Map) -> Outcome {
    let step = parse_snapshot(arguments)?;
    done(service.transaction(vec![step]).await)
}

pub(super) fn parse_snapshot_sync(arguments: Map) -> Result<Step, options::Error> {
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
    let Arguments { device, node_name, snapshot_file, snapshot_node_name, format, mode } =
        options::from_map(arguments)?;
    let new = NewOverlay {
        name: snapshot_node_name,
        filename: snapshot_file,
        format: format.unwrap_or_else(|| FORMAT.to_owned()),
        exists: matches!(mode, Mode::Existing),
    };
    Ok(Step::AddOver { device, base: node_name, new })
}

pub async fn snapshot_sync(service: &Service, arguments: Map) -> Outcome {
    let step = parse_snapshot_sync(arguments.clone())?;
    done(explained(service.transaction(vec![step]).await, &arguments))
}
