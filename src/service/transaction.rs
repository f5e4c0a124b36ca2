//! Transactions: changes of several disks made at one moment, or none of them.
//!
//! The rule held here: all users of the disks are paused from before the first step until all are made or taken back,
//! the last one first. What cannot be taken back, the removal of a bitmap, is done last.

use super::overlays::{NewOverlay, prepare};
use super::{Service, snapshots};
use crate::block::graph::{self, Drained, Graph, Meanwhile, Over};
use crate::block::{Bitmap, Error, NewBitmap, Node, Snapshots};
use crate::options::Map;
use std::sync::Arc;

/// One of the changes.
pub enum Step {
    Abort,
    AddBitmap {
        node: String,
        new: NewBitmap,
    },
    RemoveBitmap {
        node: String,
        name: String,
    },
    ClearBitmap {
        node: String,
        name: String,
    },
    EnableBitmap {
        node: String,
        name: String,
        enable: bool,
    },
    /// From pairs of a node and a bitmap.
    MergeBitmaps {
        node: String,
        target: String,
        sources: Vec<(String, String)>,
    },
    /// An internal snapshot.
    Snapshot {
        node: Arc<Node>,
        name: String,
    },
    /// An external one, with a node that is open.
    PutOver {
        base: String,
        overlay: String,
    },
    /// With a new node. `device` is what the base may be called besides.
    AddOver {
        device: String,
        base: String,
        new: NewOverlay,
    },
}

/// How a step is taken back.
enum Undo {
    AddBitmap(Arc<Node>, String),
    RemoveBitmap(Arc<Node>, Arc<Bitmap>),
    Bits(Arc<Bitmap>, Vec<u64>),
    EnableBitmap(Arc<Node>, String, bool),
    Snapshot(Arc<Node>, String),
    Over(Over),
}

impl Service {
    /// Makes all of the changes, or none.
    pub async fn transaction(&self, steps: Vec<Step>) -> Result<(), Error> {
        run(self.graph(), steps).await
    }
}

async fn run(graph: &Graph, steps: Vec<Step>) -> Result<(), Error> {
    // Guests need not wait for files that are made.
    let mut prepared = Vec::with_capacity(steps.len());
    for step in &steps {
        prepared.push(step.prepare(graph).await?);
    }
    let nodes: Vec<_> = steps.iter().filter_map(|step| step.node(graph)).collect();
    let overlays = steps.iter().filter_map(|step| step.overlay(graph));
    let changed: Vec<_> = nodes.iter().cloned().chain(overlays).collect();
    let sources: Vec<_> = steps.iter().flat_map(|step| step.sources(graph)).collect();
    let drained = graph.drain_reading(&changed, &sources).await?;
    // Overlays that are there are opened again.
    drop(changed);
    let mut done = Vec::new();
    let mut result = Ok(());
    for (step, options) in steps.into_iter().zip(prepared) {
        match step.make(graph, &drained, options).await {
            Ok(undo) => done.extend(undo),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    let mut overlays = Vec::new();
    match result {
        Ok(()) => {
            for undo in done {
                match undo {
                    Undo::Over(over) => overlays.push(over),
                    Undo::RemoveBitmap(node, bitmap) => {
                        bitmap.set_busy(false);
                        let removed = remove_bitmap(&drained, &node, bitmap.name()).await;
                        result = result.and(removed);
                    }
                    _ => {}
                }
            }
        }
        Err(_) => {
            for undo in done.into_iter().rev() {
                undo.run(graph, &drained).await;
            }
        }
    }
    graph.keep(&drained, overlays).await;
    drop(drained);
    for node in nodes {
        node.settle_bitmaps().await;
    }
    result
}

impl Step {
    /// The name of the node that it is about.
    fn name(&self) -> Option<&str> {
        match self {
            Step::Abort => None,
            Step::Snapshot { node, .. } => Some(node.name()),
            Step::PutOver { base: node, .. } | Step::AddOver { base: node, .. } => Some(node),
            Step::AddBitmap { node, .. }
            | Step::RemoveBitmap { node, .. }
            | Step::ClearBitmap { node, .. }
            | Step::EnableBitmap { node, .. }
            | Step::MergeBitmaps { node, .. } => Some(node),
        }
    }

    /// That node, if it exists by now.
    fn node(&self, graph: &Graph) -> Option<Arc<Node>> {
        graph.find(self.name()?).ok()
    }

    /// The node that is to be an overlay, if it exists by now.
    fn overlay(&self, graph: &Graph) -> Option<Arc<Node>> {
        match self {
            Step::PutOver { overlay, .. } => graph.find(overlay).ok(),
            _ => None,
        }
    }

    /// The nodes that it only reads, as far as they are there by now.
    fn sources(&self, graph: &Graph) -> Vec<Arc<Node>> {
        let sources = match self {
            Step::MergeBitmaps { sources, .. } => &sources[..],
            _ => &[],
        };
        sources.iter().filter_map(|(node, _)| graph.find(node).ok()).collect()
    }

    /// The options of a new overlay, whose file is made, if the node below it exists by now.
    async fn prepare(&self, graph: &Graph) -> Result<Option<Map>, Error> {
        match (self, self.node(graph)) {
            (Step::AddOver { new, .. }, Some(base)) => {
                graph.check_base(&base)?;
                prepare(graph, &base, new).await.map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Makes the change. `options` are those of a new overlay.
    async fn make(
        self,
        graph: &Graph,
        drained: &Drained,
        options: Option<Map>,
    ) -> Result<Option<Undo>, Error> {
        let missing = |node: &str| Error::new(format!("Node '{}' not found", node.escape_debug()));
        let find = |node: &str| graph.find(node).map_err(|_| missing(node));
        Ok(Some(match self {
            Step::Abort => return Err(Error::new("Transaction aborted using Abort action")),
            Step::AddBitmap { node, new } => {
                let node = graph.find(&node).map_err(|_| no_device(&node, &node))?;
                let name = new.name.clone();
                add_bitmap(drained, &node, new).await?;
                Undo::AddBitmap(node, name)
            }
            Step::RemoveBitmap { node, name } => {
                let node = find(&node)?;
                let bitmap = node.check_bitmap_removal(&name)?;
                bitmap.set_busy(true);
                Undo::RemoveBitmap(node, bitmap)
            }
            Step::ClearBitmap { node, name } => {
                let node = find(&node)?;
                let undo = kept(&node, &name)?;
                begin_bitmap_change(drained, &node, &name).await?;
                node.clear_bitmap(&name).await?;
                undo
            }
            Step::EnableBitmap { node, name, enable } => {
                let node = find(&node)?;
                let was = node.bitmaps().find(&name)?.flags().recording;
                begin_bitmap_change(drained, &node, &name).await?;
                node.enable_bitmap(&name, enable).await?;
                if was == enable {
                    return Ok(None);
                }
                Undo::EnableBitmap(node, name, was)
            }
            Step::MergeBitmaps { node, target, sources } => {
                let node = find(&node)?;
                let undo = kept(&node, &target)?;
                let find = |(node, name): (String, String)| Ok((find(&node)?, name));
                let sources = sources.into_iter().map(find).collect::<Result<Vec<_>, Error>>()?;
                begin_bitmap_change(drained, &node, &target).await?;
                node.merge_bitmaps(&target, &sources).await?;
                undo
            }
            Step::Snapshot { node, name } => {
                make_snapshot(drained, &node, &name).await?;
                Undo::Snapshot(node, name)
            }
            Step::PutOver { base, overlay } => {
                let base = graph.find(&base).map_err(|_| no_device(&base, &base))?;
                Undo::Over(graph.insert_overlay(drained, &base, &overlay).await?)
            }
            Step::AddOver { device, base, new } => {
                let base = graph.find(&base).map_err(|_| no_device(&device, &base))?;
                let options = match options {
                    Some(options) => options,
                    None => prepare(graph, &base, &new).await?,
                };
                Undo::Over(graph.open_over(drained, &base, options).await?)
            }
        }))
    }
}

fn no_device(device: &str, node: &str) -> Error {
    let (device, node) = (device.escape_debug(), node.escape_debug());
    Error::new(format!("Cannot find device='{device}' nor node-name='{node}'"))
}

/// A step that waits for the storage of a node, whose users may continue before it has ended.
fn step(node: &Arc<Node>, doing: String) -> graph::Step<'_> {
    let what = format!("{doing} node '{}'", node.name());
    graph::Step { node, what, meanwhile: Meanwhile::Requests }
}

async fn add_bitmap(drained: &Drained, node: &Arc<Node>, new: NewBitmap) -> Result<(), Error> {
    let step = step(node, format!("Adding bitmap '{}' to", new.name));
    let (name, clone, late) = (new.name.clone(), node.clone(), node.clone());
    let add = async move { clone.add_bitmap(new).await };
    let remove = async move |added: Result<(), Error>| {
        if added.is_ok() {
            log_failure(late.remove_bitmap(&name).await);
        }
    };
    drained.step(step, add, remove).await
}

/// A bitmap whose removal takes too long is gone when that has ended.
async fn remove_bitmap(drained: &Drained, node: &Arc<Node>, name: &str) -> Result<(), Error> {
    let step = step(node, format!("Removing bitmap '{name}' from"));
    let (clone, name) = (node.clone(), name.to_owned());
    let remove = async move { clone.remove_bitmap(&name).await };
    drained.step(step, remove, async |removed| log_failure(removed)).await
}

/// Makes the image know that a bitmap changes. The change itself is one of memory then.
async fn begin_bitmap_change(drained: &Drained, node: &Arc<Node>, name: &str) -> Result<(), Error> {
    let step = step(node, format!("Changing bitmap '{name}' of"));
    let (clone, name) = (node.clone(), name.to_owned());
    let begin = async move { clone.begin_bitmap_change(&name).await };
    drained.step(step, begin, async |_| ()).await
}

async fn make_snapshot(drained: &Drained, node: &Arc<Node>, name: &str) -> Result<(), Error> {
    let step = step(node, format!("Making snapshot '{name}' of"));
    let (clone, late) = (node.clone(), node.clone());
    let (name, made_name) = (name.to_owned(), name.to_owned());
    let make = async move {
        let work = async |all: &dyn Snapshots| snapshots::make(all, &clone, &name).await;
        let made = graph::with_snapshots(&clone, work).await;
        made.unwrap_or_else(|| Err(snapshots::unsupported(&clone)))
    };
    let delete = async move |made: Result<(), Error>| {
        if made.is_ok() {
            log_failure(delete_snapshot(late, made_name).await);
        }
    };
    drained.step(step, make, delete).await
}

async fn delete_snapshot(node: Arc<Node>, name: String) -> Result<(), Error> {
    let work = async |all: &dyn Snapshots| {
        snapshots::delete(all, &node, None, Some(&name)).await.map(drop)
    };
    graph::with_snapshots(&node, work).await.unwrap_or(Ok(()))
}

fn log_failure(result: Result<(), Error>) {
    if let Err(error) = result {
        log::error!("taking a step of a transaction back: {error}");
    }
}

/// A step that restores the current contents of a bitmap.
fn kept(node: &Node, name: &str) -> Result<Undo, Error> {
    let bitmap = node.bitmaps().find(name)?;
    let words = bitmap.bits().words().collect();
    Ok(Undo::Bits(bitmap, words))
}

impl Undo {
    async fn run(self, graph: &Graph, drained: &Drained) {
        let result = match self {
            Undo::AddBitmap(node, name) => remove_bitmap(drained, &node, &name).await,
            Undo::RemoveBitmap(_, bitmap) => {
                bitmap.set_busy(false);
                Ok(())
            }
            Undo::Bits(bitmap, words) => {
                let bits = bitmap.bits();
                bits.clear();
                bits.set_words(0, words.into_iter());
                Ok(())
            }
            Undo::EnableBitmap(node, name, was) => node.enable_bitmap(&name, was).await,
            Undo::Snapshot(node, name) => {
                let step = step(&node, format!("Deleting snapshot '{name}' of"));
                let delete = delete_snapshot(node.clone(), name);
                drained.step(step, delete, async |_| ()).await
            }
            Undo::Over(over) => {
                graph.take_back(drained, over).await;
                Ok(())
            }
        };
        log_failure(result);
    }
}
