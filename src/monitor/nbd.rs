//! Commands about the NBD server.

use super::reply::{CommandError, Outcome, done};
use crate::export::nbd::{Options, ServerOptions};
use crate::options::{self, Map, Value};
use crate::service::Service;
use serde::Deserialize;

/// `nbd-server-start`
pub(super) async fn start(service: &Service, arguments: Map) -> Outcome {
    // The numbers of descriptors are between the process and whoever started it.
    if arguments.get_path("addr.type").and_then(Value::as_str) == Some("fd") {
        let name = arguments.get_path("addr.data.str").and_then(Value::as_str).unwrap_or_default();
        let name = name.escape_debug();
        return Err(CommandError::new(format!(
            "File descriptor named '{name}' has not been found"
        )));
    }
    done(service.nbd_start(ServerOptions::read(arguments, true)?).await)
}

/// `nbd-server-stop`
pub(super) async fn stop(service: &Service, arguments: Map) -> Outcome {
    arguments.finish()?;
    done(service.nbd_stop().await)
}

/// `nbd-server-add`, which `block-export-add` has replaced: the export's identifier is its name.
pub(super) async fn add(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        device: String,
        name: Option<String>,
        description: Option<String>,
        #[serde(default)]
        writable: bool,
        bitmap: Option<String>,
    }
    let Arguments { device, name, description, writable, bitmap } = options::from_map(arguments)?;
    service.nbd().check_running()?;
    let node = service.graph().find(&device).map_err(|_| {
        let shown = device.escape_debug();
        CommandError::new(format!("Cannot find device='{shown}' nor node-name='{shown}'"))
    })?;
    let name = name.unwrap_or(device);
    // As QEMU: who asks for too much gets less.
    let writable = writable && !node.is_read_only();
    let options = Options::named(service.nbd(), name.clone()).with_description(description);
    let options = options.with_bitmaps(bitmap.into_iter().collect());
    done(service.nbd_export(name, node, writable, options).await)
}

/// `nbd-server-remove`
pub(super) async fn remove(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Safe,
        Hard,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        name: String,
        mode: Option<Mode>,
    }
    let Arguments { name, mode } = options::from_map(arguments)?;
    let is_there = |export: &crate::service::ExportInfo| export.id == name;
    if !service.exports().iter().any(|export| is_there(export) && export.type_name == "nbd") {
        let name = name.escape_debug();
        return Err(CommandError::new(format!("Export '{name}' is not found")));
    }
    done(service.export_del(&name, matches!(mode, Some(Mode::Hard))).await)
}
