//! Commands that wait for storage, for guests, or for a lock: begun by the monitors' thread, which
//! looks now and then whether they have ended and serves other clients meanwhile.

use super::bitmaps;
use super::commands::{CommandError, Outcome, done};
use super::nodes;
use super::overlays;
use super::snapshots;
use super::transaction;
use crate::block::Error;
use crate::io::Errno;
use crate::options::{self, Map, Value, bytes};
use crate::sandbox::files;
use crate::service::{Pending, Service, is_locked};
use serde::Deserialize;
use std::borrow::Cow;
use std::path::Path;
use std::time::{Duration, Instant};

/// What is left of a command: gives its outcome once there is one.
pub type Later = Box<dyn FnMut(&mut Service) -> Option<Outcome>>;

type Begin = fn(&mut Service, Map) -> Result<Later, CommandError>;

/// By name.
pub const COMMANDS: &[(&str, Begin)] = &[
    ("block-dirty-bitmap-add", bitmaps::add),
    ("block-dirty-bitmap-clear", bitmaps::clear),
    ("block-dirty-bitmap-disable", bitmaps::disable),
    ("block-dirty-bitmap-enable", bitmaps::enable),
    ("block-dirty-bitmap-merge", bitmaps::merge),
    ("block-dirty-bitmap-remove", bitmaps::remove),
    ("block-export-add", block_export_add),
    ("block_resize", block_resize),
    ("blockdev-add", blockdev_add),
    ("blockdev-del", blockdev_del),
    ("blockdev-snapshot", overlays::snapshot),
    ("blockdev-snapshot-delete-internal-sync", snapshots::delete),
    ("blockdev-snapshot-internal-sync", snapshots::create),
    ("blockdev-snapshot-sync", overlays::snapshot_sync),
    ("query-blockstats", nodes::query_blockstats),
    ("query-named-block-nodes", nodes::query_named_block_nodes),
    ("transaction", transaction::transaction),
    ("x-debug-block-dirty-bitmap-sha256", bitmaps::sha256),
];

/// How long the thread itself waits. Nearly all commands take less.
pub(super) const AT_ONCE: Duration = Duration::from_millis(20);

/// How long a lock is tried that is held by somebody else, who may be about to give it up.
const GRACE: Duration = Duration::from_millis(200);

/// The outcome of something that is under way.
pub(super) fn when_done(pending: Pending<Result<(), Error>>) -> Later {
    when_explained(pending, Map::new())
}

/// The same of a command whose arguments name files.
pub(super) fn when_explained(pending: Pending<Result<(), Error>>, arguments: Map) -> Later {
    let mut wait = AT_ONCE;
    Box::new(move |_| {
        let result = pending.poll(std::mem::take(&mut wait))?;
        Some(done(explained(result, &arguments)))
    })
}

fn blockdev_add(service: &mut Service, arguments: Map) -> Result<Later, CommandError> {
    let end = Instant::now() + GRACE;
    let mut wait = AT_ONCE;
    let mut opening = Some(service.blockdev_open(arguments.clone()));
    Ok(Box::new(move |service| {
        let opening_now =
            opening.take().unwrap_or_else(|| service.blockdev_open(arguments.clone()));
        match opening_now.poll(std::mem::take(&mut wait)) {
            Some(Err(error)) if is_locked(&error) && Instant::now() < end => None,
            Some(result) => Some(done(explained(result.map(drop), &arguments))),
            None => {
                opening = Some(opening_now);
                None
            }
        }
    }))
}

/// Says of what was refused for want of permission that it was the sandbox, if it was.
fn explained(result: Result<(), Error>, arguments: &Map) -> Result<(), Error> {
    let Err(error) = &result else { return result };
    if error.errno() != Some(Errno(libc::EACCES)) {
        return result;
    }
    let mut paths = Vec::new();
    paths_in(arguments, &mut paths);
    let kept_out = paths.into_iter().find(|(path, is_socket)| {
        let place = if *is_socket { path.parent().unwrap_or(path) } else { &**path };
        files::keeps_out(place, true, *is_socket)
    });
    let Some((path, _)) = kept_out else { return result };
    let place = path.parent().unwrap_or(&path).display();
    Err(Error::new(format!(
        "{error}: the sandbox keeps it out, unless --sandbox-path {place} is given"
    )))
}

/// The files that arguments name, and whether each is a socket.
fn paths_in<'a>(arguments: &'a Map, found: &mut Vec<(Cow<'a, Path>, bool)>) {
    for (key, value) in arguments.iter() {
        match value {
            Value::Map(map) => paths_in(map, found),
            Value::Str(path) | Value::Text(path)
                if ["filename", "snapshot-file", "path"].contains(&key) =>
            {
                found.push((bytes::path_of(path), key == "path"));
            }
            _ => {}
        }
    }
}

fn block_export_add(_: &mut Service, arguments: Map) -> Result<Later, CommandError> {
    // The numbers of descriptors are between the process and whoever started it: a client could name
    // one that is in use.
    if let Some(Value::Str(kind)) = arguments.get_path("addr.type")
        && kind == "fd"
    {
        let name = arguments.get_path("addr.str").and_then(Value::as_str).unwrap_or_default();
        let name = name.escape_debug();
        let text = format!("File descriptor named '{name}' has not been found");
        return Err(CommandError::new(text));
    }
    let end = Instant::now() + GRACE;
    Ok(Box::new(move |service| match service.export_add(arguments.clone()) {
        Err(error) if is_locked(&error) && Instant::now() < end => None,
        result => Some(done(explained(result, &arguments))),
    }))
}

fn block_resize(service: &mut Service, arguments: Map) -> Result<Later, CommandError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        device: Option<String>,
        node_name: Option<String>,
        size: i64,
    }
    let Arguments { device, node_name, size } = options::from_map(arguments)?;
    let node = node_name.as_deref().and_then(|name| service.graph().find(name).ok());
    let Some(node) = node else {
        let [device, name] = [device, node_name].map(|name| name.unwrap_or_default());
        let (device, name) = (device.escape_debug(), name.escape_debug());
        let text = format!("Cannot find device='{device}' nor node-name='{name}'");
        return Err(CommandError::new(text));
    };
    let size =
        u64::try_from(size).map_err(|_| CommandError::new("Parameter 'size' expects a >0 size"))?;
    Ok(when_done(service.resize(&node, size)))
}

fn blockdev_del(service: &mut Service, arguments: Map) -> Result<Later, CommandError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        node_name: String,
    }
    let Arguments { node_name } = options::from_map(arguments)?;
    Ok(when_done(service.blockdev_del(&node_name)))
}
