//! Removal of unused nodes, and of state that drivers keep for writers that have left.
//!
//! The rule held here: each node is ended by a task of its own, under a claim of its own, so that a node whose
//! storage does not answer delays only the tasks that wait for its end. A change waits for the ends that it has
//! brought about itself, and starts those that others have left. The claim of a node's end goes over to a node that
//! it alone stood on, so that the end of a long chain looks at each node once.

use super::claims::{Claim, End, Part};
use super::permissions::Plan;
use super::{Attachment, By, Entry, Graph, State, Use, not_found};
use crate::block::{Abilities, Error, Node, Perm};
use crate::io::{self, IoResult};
use std::collections::BTreeSet;
use std::sync::Arc;

impl Graph {
    /// Deletes a node that was opened by name, and closes what nobody uses then.
    ///
    /// # Errors
    /// In QEMU's words, for nodes that are in use or belong to others.
    pub async fn delete(&self, name: &str) -> Result<(), Error> {
        let node = self.0.state.lock().check_delete(name)?;
        let claim = self.claim(vec![Part::Alone(node)]).await;
        let ending = {
            let mut state = self.0.state.lock();
            let node = state.check_delete(name)?;
            state.entry_mut(node).monitor = false;
            state.all_below(&[node]).into_iter().collect()
        };
        drop(claim);
        self.end_unused(None, &ending).await;
        Ok(())
    }

    /// Closes everything without users, at the end of the program.
    pub async fn close(&self) {
        let all = {
            let mut state = self.0.state.lock();
            state.nodes.values_mut().for_each(|entry| entry.monitor = false);
            state.nodes.keys().copied().collect()
        };
        self.end_unused(None, &all).await;
    }

    /// Closes what users have left that nobody else has. Ends that have begun before are not waited for.
    pub async fn tidy(&self) {
        let begun = self.begin_ends(None);
        let ending = self.0.state.lock().all_below(&begun).into_iter().collect();
        self.wait_for_ends(None, &ending).await;
    }

    /// Makes drivers undo what they did for writers, where the last has left, and closes nodes that nobody uses,
    /// parents before the nodes below them. Waits for those among `nodes`. `within`: the claim of the change that
    /// brings it about, which changes these nodes.
    pub(super) async fn end_unused(&self, within: Option<&Claim>, nodes: &BTreeSet<u64>) {
        let within = within.map(|claim| claim.id);
        self.begin_ends(within);
        self.wait_for_ends(within, nodes).await;
    }

    /// A change waits for the ends within its own claim alone: others may wait for that claim.
    async fn wait_for_ends(&self, within: Option<u64>, nodes: &BTreeSet<u64>) {
        self.wait_until(|state| !state.claims.ends_any(nodes, within)).await;
    }

    /// The nodes whose end begins now.
    fn begin_ends(&self, within: Option<u64>) -> Vec<u64> {
        let mut unwritten: Vec<_> = {
            let state = self.0.state.lock();
            let all = state.nodes.iter().filter(|(_, entry)| !entry.is_written());
            all.map(|(&id, entry)| (id, entry.node.clone())).collect()
        };
        unwritten.retain(|(_, node)| node.driver().unwritten().is_some());
        let ends = {
            let mut state = self.0.state.lock();
            let mut ends = state.begin_unused(within);
            ends.extend(unwritten.iter().filter_map(|(id, _)| state.begin_end(*id, within)));
            ends
        };
        let nodes = ends.iter().map(|(node, _)| *node).collect();
        ends.into_iter().for_each(|(node, end)| self.spawn_end(node, end, within));
        nodes
    }

    fn spawn_end(&self, mut node: u64, end: End, within: Option<u64>) {
        let (graph, claim) = (self.clone(), self.claim_of_end(end));
        io::current().spawn(async move {
            loop {
                claim.served().await;
                graph.undo_for_writers(node).await;
                let mut unused = graph.close_node(node).await;
                let (others, next) = {
                    let mut state = graph.0.state.lock();
                    // The one that has the most below it, as a rule.
                    let next = unused.pop_if(|id| state.move_end(claim.id, *id));
                    let others = unused.into_iter().filter_map(|id| state.begin_end(id, within));
                    (others.collect::<Vec<_>>(), next)
                };
                others.into_iter().for_each(|(node, end)| graph.spawn_end(node, end, within));
                let Some(next) = next else { break };
                node = next;
                // Some may have waited for the node that is gone.
                graph.retry_waiting();
            }
            drop(claim);
        });
    }

    /// Makes a driver undo what it did for writers, if there are none any more.
    async fn undo_for_writers(&self, id: u64) {
        let unwritten = |state: &State| {
            let entry = state.nodes.get(&id).filter(|entry| !entry.is_written());
            entry.map(|entry| entry.node.clone())
        };
        let Some(node) = unwritten(&self.0.state.lock()) else { return };
        let Some(undo) = node.driver().unwritten() else { return };
        if let Err(errno) = undo.await {
            log::error!("{}: after its last writer: {errno}", node.name());
        }
        let mut state = self.0.state.lock();
        let mut plan = Plan::new(&mut state);
        plan.settle_again(id);
        plan.loosen();
    }

    /// Closes a node, unless somebody uses it by now. The nodes that it stood on and that nobody uses then.
    async fn close_node(&self, id: u64) -> Vec<u64> {
        let node = {
            let mut state = self.0.state.lock();
            let entry = state.nodes.get_mut(&id).filter(|entry| entry.is_unused());
            let Some(entry) = entry else { return Vec::new() };
            entry.closing = true;
            entry.node.clone()
        };
        if let Err(errno) = close_driver(&node).await {
            log::error!("{}: closing: {errno}", node.name());
        }
        let mut state = self.0.state.lock();
        let children = state.entry(id).children.clone();
        let mut plan = Plan::new(&mut state);
        plan.remove_edges(id);
        plan.loosen();
        let gone = state.nodes.remove(&id);
        let mut unused = children;
        unused.retain(|id| state.nodes.get(id).is_some_and(Entry::is_unused));
        drop(state);
        // Dropping it closes files, which needs no lock.
        drop((gone, node));
        unused
    }
}

impl State {
    /// Whether a node can be deleted by its name; its number.
    fn check_delete(&self, name: &str) -> Result<u64, Error> {
        let (id, entry) = self.by_name(name).ok_or_else(|| not_found(name))?;
        if entry.uses.iter().any(|one| matches!(one.by, By::User { .. })) {
            return Err(Error::new(format!("Node {name} is in use")));
        }
        if !entry.monitor {
            return Err(Error::new(format!("Node {name} is not owned by the monitor")));
        }
        if !entry.uses.is_empty() {
            self.check_not_backing(&entry.node)?;
            return Err(Error::new(format!("Block device {name} is in use")));
        }
        Ok(id)
    }

    /// Begins the end of all nodes that nobody uses, unless it has begun.
    fn begin_unused(&mut self, within: Option<u64>) -> Vec<(u64, End)> {
        let unused = self.nodes.iter().filter(|(_, entry)| entry.is_unused());
        let unused: Vec<u64> = unused.map(|(&id, _)| id).collect();
        unused.into_iter().filter_map(|id| self.begin_end(id, within)).collect()
    }

    /// The node that a user has.
    fn node_of_user(&self, user: u64) -> Option<u64> {
        let is_match = |one: &Use| matches!(one.by, By::User { id, .. } if id == user);
        let mut all = self.nodes.iter();
        all.find(|(_, entry)| entry.uses.iter().any(is_match)).map(|(&id, _)| id)
    }
}

impl Entry {
    fn is_unused(&self) -> bool {
        !self.monitor && self.uses.is_empty()
    }

    fn is_written(&self) -> bool {
        self.perms.held.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE)
    }
}

impl Attachment {
    /// Gives the node back, and closes it if nobody else uses it. Dropping does the same, but for
    /// the closing, which then begins with the next change of the graph.
    pub async fn detach(self) {
        let graph = self.graph.clone();
        let ending = {
            let state = graph.0.state.lock();
            state.all_below(state.node_of_user(self.id).as_slice())
        };
        drop(self);
        graph.end_unused(None, &ending.into_iter().collect()).await;
    }
}

/// Metadata and data to the storage, then the driver's own end.
async fn close_driver(node: &Arc<Node>) -> IoResult {
    // Its image is another's, and has had what was to be written.
    if !node.is_active() {
        return Ok(());
    }
    let flushed = match node.traits().abilities.contains(Abilities::READ_ONLY) {
        true => Ok(()),
        false => node.flush().await,
    };
    node.driver().close().await.and(flushed)
}
