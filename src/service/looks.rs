//! The warning about an image that is opened as raw and looks like another format.

use crate::block::{DriverEntry, Kind, Node, Registry, probe};
use crate::io::{self, Worker, WorkerOptions};
use std::sync::Arc;

/// Warns of a new node, with or without filters over it, that gives the bytes of a file or device as they are
/// although they look like an image, or are none. A window of them is one that somebody has chosen, and what is over
/// `blkdebug` is left alone, because a read could set it off.
pub(super) async fn warn_of_raw(registry: &'static Registry, node: &Arc<Node>) {
    let Some((raw, file)) = raw_over_file(node) else { return };
    let Some(name) = file.driver().filename() else { return };
    let name = name.escape_debug();
    if raw.is_empty() {
        log::warn!("{name} is empty: the guest finds a disk of no bytes");
        return;
    }
    if let Some(guess) = guess(registry, &file).await
        && !guess.is_raw()
    {
        let format = guess.name;
        log::warn!(
            "{name} looks like {format} but is served as raw: the guest finds the {format} file itself as \
             its disk, and destroys the image if it writes"
        );
    }
}

/// What the file looks like. If it cannot be read, the guest's requests will fail.
///
/// Each worker that reads from a drive of our own takes one of its queues, of which there may be few: a worker
/// that ends afterwards gives it back. A sandbox has no rings to spare for such workers.
async fn guess(registry: &'static Registry, file: &Arc<Node>) -> Option<&'static DriverEntry> {
    if file.driver().drive().is_none() {
        return probe::guess(registry, file, "").await.ok()?;
    }
    if !io::may_make_rings() {
        return None;
    }
    let file = file.clone();
    let guess = move || {
        let worker = Worker::start("look", WorkerOptions::default()).ok()?;
        worker.block_on(move || async move { probe::guess(registry, &file, "").await }).ok()?
    };
    io::offload(guess).await
}

/// The raw node that a node is, below filters, and the protocol's below it.
fn raw_over_file(node: &Arc<Node>) -> Option<(Arc<Node>, Arc<Node>)> {
    let node = node.below_filters();
    let driver = node.driver();
    let file = node.primary()?;
    let is_whole_raw = driver.entry().is_raw() && driver.own_options().is_empty();
    let is_on_storage = file.driver().entry().kind == Kind::Protocol;
    (is_whole_raw && is_on_storage).then_some((node, file))
}
