//! Commands that wait for storage, guests, locks or threads.
//!
//! Each is a task of the service; the monitors' thread serves other clients meanwhile.

use super::bitmaps;
use super::kept_out::explained;
use super::nbd;
use super::nodes;
use super::overlays;
use super::reply::{CommandError, Outcome, done};
use super::snapshots;
use super::transaction;
use crate::block::{Error, LocalFuture};
use crate::io;
use crate::options::{self, Map, Value};
use crate::service::{Service, is_locked};
use serde::Deserialize;
use std::time::{Duration, Instant};

type Task = for<'a> fn(&'a Service, Map) -> LocalFuture<'a, Outcome>;

/// By name.
pub const COMMANDS: &[(&str, Task)] = &[
    ("block-dirty-bitmap-add", |s, a| Box::pin(bitmaps::add(s, a))),
    ("block-dirty-bitmap-clear", |s, a| Box::pin(bitmaps::clear(s, a))),
    ("block-dirty-bitmap-disable", |s, a| Box::pin(bitmaps::record(s, a, false))),
    ("block-dirty-bitmap-enable", |s, a| Box::pin(bitmaps::record(s, a, true))),
    ("block-dirty-bitmap-merge", |s, a| Box::pin(bitmaps::merge(s, a))),
    ("block-dirty-bitmap-remove", |s, a| Box::pin(bitmaps::remove(s, a))),
    ("block-export-add", |s, a| Box::pin(block_export_add(s, a))),
    ("block-export-del", |s, a| Box::pin(block_export_del(s, a))),
    ("block_resize", |s, a| Box::pin(block_resize(s, a))),
    ("blockdev-add", |s, a| Box::pin(blockdev_add(s, a))),
    ("blockdev-del", |s, a| Box::pin(blockdev_del(s, a))),
    ("blockdev-reopen", |s, a| Box::pin(blockdev_reopen(s, a))),
    ("blockdev-snapshot", |s, a| Box::pin(overlays::snapshot(s, a))),
    ("blockdev-snapshot-delete-internal-sync", |s, a| Box::pin(snapshots::delete(s, a))),
    ("blockdev-snapshot-internal-sync", |s, a| Box::pin(snapshots::create(s, a))),
    ("blockdev-snapshot-sync", |s, a| Box::pin(overlays::snapshot_sync(s, a))),
    ("nbd-server-add", |s, a| Box::pin(nbd::add(s, a))),
    ("nbd-server-remove", |s, a| Box::pin(nbd::remove(s, a))),
    ("nbd-server-start", |s, a| Box::pin(nbd::start(s, a))),
    ("nbd-server-stop", |s, a| Box::pin(nbd::stop(s, a))),
    ("object-add", |s, a| Box::pin(async { done(s.object_add(a).await) })),
    ("object-del", |s, a| Box::pin(object_del(s, a))),
    ("query-blockstats", |s, a| Box::pin(nodes::query_blockstats(s, a))),
    ("query-named-block-nodes", |s, a| Box::pin(nodes::query_named_block_nodes(s, a))),
    ("transaction", |s, a| Box::pin(transaction::transaction(s, a))),
    ("x-block-export-accept-loss", |s, a| {
        Box::pin(async { done(s.accept_loss(&export_id(a)?).await) })
    }),
    ("x-debug-block-dirty-bitmap-sha256", |s, a| Box::pin(bitmaps::sha256(s, a))),
];

/// How long a lock is retried whose holder may be about to release it.
const GRACE: Duration = Duration::from_millis(200);

/// From one attempt to the next.
const RETRY: Duration = Duration::from_millis(10);

/// Tries again for a moment while an image is locked.
async fn with_grace(mut attempt: impl AsyncFnMut() -> Result<(), Error>) -> Result<(), Error> {
    let end = Instant::now() + GRACE;
    loop {
        match attempt().await {
            Err(error) if is_locked(&error) && Instant::now() < end => io::sleep(RETRY).await,
            result => return result,
        }
    }
}

async fn blockdev_add(service: &Service, arguments: Map) -> Outcome {
    let attempt = async || service.blockdev_add(arguments.clone()).await.map(drop);
    done(explained(with_grace(attempt).await, &arguments))
}

async fn block_export_add(service: &Service, arguments: Map) -> Outcome {
    // The numbers of descriptors are known to the process and its parent only: a client could name one that is in
    // use.
    if let Some(Value::Str(kind)) = arguments.get_path("addr.type")
        && kind == "fd"
    {
        let name = arguments.get_path("addr.str").and_then(Value::as_str).unwrap_or_default();
        let name = name.escape_debug();
        let text = format!("File descriptor named '{name}' has not been found");
        return Err(CommandError::new(text));
    }
    let attempt = async || service.export_add(arguments.clone()).await;
    done(explained(with_grace(attempt).await, &arguments))
}

async fn block_export_del(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Safe,
        Hard,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
        mode: Option<Mode>,
    }
    let Arguments { id, mode } = options::from_map(arguments)?;
    done(service.export_del(&id, matches!(mode, Some(Mode::Hard))).await)
}

async fn block_resize(service: &Service, arguments: Map) -> Outcome {
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
    done(service.resize(&node, size).await)
}

async fn blockdev_reopen(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        options: Vec<Value>,
    }
    let Arguments { options } = options::from_map(arguments.clone())?;
    let all = options.into_iter().enumerate().map(|(at, one)| {
        transaction::members(one).map_err(|error| error.under(&format!("options[{at}]")))
    });
    let all = all.collect::<Result<Vec<_>, _>>()?;
    let attempt = async || service.blockdev_reopen(all.clone()).await;
    done(explained(with_grace(attempt).await, &arguments))
}

async fn blockdev_del(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        node_name: String,
    }
    let Arguments { node_name } = options::from_map(arguments)?;
    done(service.blockdev_del(&node_name).await)
}

async fn object_del(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
    }
    let Arguments { id } = options::from_map(arguments)?;
    done(service.object_del(&id).await)
}

/// The export that arguments name.
pub(super) fn export_id(arguments: Map) -> Result<String, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
    }
    let Arguments { id } = options::from_map(arguments)?;
    Ok(id)
}
