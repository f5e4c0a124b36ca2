//! The nodes of a service: opened, listed, changed, closed.

use super::{Pending, Service, looks};
use crate::block::graph::{Graph, NodeInfo};
use crate::block::name::Names;
use crate::block::registry::Guess;
use crate::block::{Abilities, Error, Node, TemporaryImage, probe};
use crate::options::{Map, bytes};
use std::path::PathBuf;
use std::sync::Arc;

/// What overlays are made in.
const OVERLAY_FORMAT: &str = "qcow2";

/// Opens a named node, and warns if it looks like one of another format.
async fn open_disk(graph: Graph, options: Map) -> Result<Arc<Node>, Error> {
    let node = graph.open(options).await?;
    looks::warn_of_raw(graph.registry(), &node).await;
    Ok(node)
}

impl Service {
    /// `--blockdev`: opens a named node. Warns if it looks like one of another format.
    pub fn blockdev_add(&self, options: Map) -> Result<Arc<Node>, Error> {
        self.patiently(|| {
            let (graph, options) = (self.graph.clone(), options.clone());
            self.control.block_on(move || open_disk(graph, options))
        })
    }

    /// The format that the first bytes of a node tell; `filename` is how it is called.
    pub fn look_at(&self, node: &Arc<Node>, filename: &str) -> Result<Option<Guess>, Error> {
        let (registry, node, filename) = (self.graph.registry(), node.clone(), filename.to_owned());
        self.control.block_on(move || async move { probe::look(registry, &node, &filename).await })
    }

    /// Opens a node, `name`, over `node`: it takes what is written, in a file that is gone afterwards.
    pub fn add_overlay(&self, name: &str, node: &Arc<Node>) -> Result<Arc<Node>, Error> {
        let (graph, name, node) = (self.graph.clone(), name.to_owned(), node.clone());
        self.control.block_on(move || async move {
            let image =
                TemporaryImage::create(graph.registry(), OVERLAY_FORMAT, node.len()).await?;
            graph.open(image.options(graph.registry(), &name, node.name())?).await
        })
    }

    /// Deletes a node that was opened by name.
    ///
    /// # Errors
    /// [`Graph::delete`](crate::block::Graph::delete).
    pub fn blockdev_del(&self, name: &str) -> Pending<Result<(), Error>> {
        let (graph, name) = (self.graph.clone(), name.to_owned());
        Pending::start(&self.control, move || async move { graph.delete(&name).await })
    }

    /// [`Service::blockdev_add`], but an image that is locked is not waited for.
    pub fn blockdev_open(&self, options: Map) -> Pending<Result<Arc<Node>, Error>> {
        let graph = self.graph.clone();
        Pending::start(&self.control, move || open_disk(graph, options))
    }

    /// Sets the length of a node, in bytes; its exports see it.
    pub fn resize(&self, node: &Arc<Node>, len: u64) -> Pending<Result<(), Error>> {
        let (graph, node) = (self.graph.clone(), node.clone());
        Pending::start(&self.control, move || async move { graph.resize(&node, len).await })
    }

    /// Changes the bitmaps of a node.
    pub fn change_bitmaps<F>(&self, node: Arc<Node>, change: F) -> Pending<Result<(), Error>>
    where
        F: AsyncFnOnce(&Arc<Node>) -> Result<(), Error> + Send + 'static,
    {
        let graph = self.graph.clone();
        Pending::start(
            &self.control,
            move || async move { graph.change_bitmaps(&node, change).await },
        )
    }

    /// What there is to tell of all nodes, newest first, and the bytes that each occupies.
    pub fn query_nodes(&self) -> Pending<Vec<(NodeInfo, Option<u64>)>> {
        let graph = self.graph.clone();
        Pending::start(&self.control, move || async move {
            let (mut all, mut names) = (Vec::new(), Names::new(graph.registry()));
            for node in graph.nodes() {
                let allocated = match node.driver().image() {
                    Some(image) => image.allocated().await.ok(),
                    None => None,
                };
                all.push((NodeInfo::of(&node, &mut names), allocated));
            }
            all
        })
    }

    /// The same without asking the storage, which may not answer.
    pub fn list_nodes(&self) -> Vec<(NodeInfo, Option<u64>)> {
        self.graph.query().into_iter().map(|info| (info, None)).collect()
    }

    /// The files and devices that are open, and whether for writing.
    pub fn files(&self) -> Vec<(PathBuf, bool)> {
        let file = |node: &Arc<Node>| {
            let driver = node.driver();
            let name = if driver.children().is_empty() { driver.filename() } else { None };
            let writable = !node.traits().abilities.contains(Abilities::READ_ONLY);
            name.map(|name| (bytes::path_of(&name).into_owned(), writable))
        };
        self.graph.nodes().iter().filter_map(file).collect()
    }

    /// Whether a node connects to servers while it serves.
    pub fn uses_network(&self) -> bool {
        self.graph.nodes().iter().any(|node| node.driver().uses_network())
    }
}
