//! The nodes of a service: opened, listed, changed, closed.

use super::executor::within;
use super::{Service, looks};
use crate::block::graph::{NodeInfo, Reopening};
use crate::block::name::Names;
use crate::block::{Abilities, DriverEntry, Error, Node, TemporaryImage, probe};
use crate::options::{Map, bytes};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What overlays are made in.
const OVERLAY_FORMAT: &str = "qcow2";

impl Service {
    /// `--blockdev`: opens a named node. Warns if it looks like one of another format.
    pub async fn blockdev_add(&self, options: Map) -> Result<Arc<Node>, Error> {
        let graph = self.graph();
        let node = self.patiently(async || graph.open(options.clone()).await).await?;
        let warn = async || looks::warn_of_raw(graph.registry(), &node).await;
        // Somebody may have deleted it since.
        graph.undisturbed(&node, &[], warn).await.ok();
        Ok(node)
    }

    /// The format that the first bytes of a node tell; `filename` is how it is called.
    pub async fn guess_format(
        &self,
        node: &Arc<Node>,
        filename: &str,
    ) -> Result<Option<&'static DriverEntry>, Error> {
        probe::guess(self.graph().registry(), node, filename).await
    }

    /// Opens a node, `name`, over `node`: it takes what is written, in a file that is gone afterwards.
    pub async fn add_overlay(&self, name: &str, node: &Arc<Node>) -> Result<Arc<Node>, Error> {
        let graph = self.graph();
        let image = TemporaryImage::create(graph.registry(), OVERLAY_FORMAT, node.len()).await?;
        graph.open(image.options(graph.registry(), name, node.name())?).await
    }

    /// Deletes a node that was opened by name.
    ///
    /// # Errors
    /// [`Graph::delete`](crate::block::Graph::delete).
    pub async fn blockdev_del(&self, name: &str) -> Result<(), Error> {
        self.graph().delete(name).await
    }

    /// Opens nodes again with other options, under their users. The path of each is `options[0]` and so on.
    ///
    /// # Errors
    /// [`Graph::reopen`](crate::block::Graph::reopen).
    pub async fn blockdev_reopen(&self, all: Vec<Map>) -> Result<(), Error> {
        let at = |(at, options)| Reopening { path: format!("options[{at}]"), options };
        let all: Vec<Reopening> = all.into_iter().enumerate().map(at).collect();
        self.graph().reopen(&all).await
    }

    /// Sets the length of a node, in bytes; its exports see it.
    pub async fn resize(&self, node: &Arc<Node>, len: u64) -> Result<(), Error> {
        self.graph().resize(node, len).await
    }

    /// Changes the bitmaps of a node; the change reads those of `sources`.
    pub async fn change_bitmaps(
        &self,
        node: &Arc<Node>,
        sources: &[Arc<Node>],
        change: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.graph().change_bitmaps(node, sources, change).await
    }

    /// The description of all nodes, newest first, and the bytes that each occupies, as far as the storage tells it
    /// in `time`.
    pub async fn query_nodes(&self, time: Duration) -> Vec<(NodeInfo, Option<u64>)> {
        let graph = self.graph().clone();
        let asked = within(time, async move {
            let (mut all, mut names) = (Vec::new(), Names::new(graph.registry()));
            for node in graph.nodes() {
                let allocated = match node.driver().image() {
                    Some(image) => image.allocated().await.ok(),
                    None => None,
                };
                all.push((NodeInfo::of(&node, &mut names), allocated));
            }
            all
        });
        match asked.await {
            Some(all) => all,
            None => self.graph().query().into_iter().map(|info| (info, None)).collect(),
        }
    }

    /// The files and devices that are open, and whether for writing.
    pub fn files(&self) -> Vec<(PathBuf, bool)> {
        let file = |node: &Arc<Node>| {
            let driver = node.driver();
            let name = if driver.children().is_empty() { driver.filename() } else { None };
            let writable = !node.traits().abilities.contains(Abilities::READ_ONLY);
            name.map(|name| (bytes::path_of(&name).into_owned(), writable))
        };
        self.graph().nodes().iter().filter_map(file).collect()
    }

    /// Whether a node connects to servers while it serves.
    pub fn uses_network(&self) -> bool {
        self.graph().nodes().iter().any(|node| node.driver().uses_network())
    }
}
