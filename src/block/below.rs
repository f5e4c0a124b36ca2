//! Properties that a node and all nodes below it determine together.
//!
//! The nodes are visited one after another, without recursion, however long the chain is.

use super::{Child, Fence, Kind, Node};
use crate::options::bytes;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

impl Node {
    /// The node that has its data or its metadata: the first child that is no backing file.
    pub fn primary(&self) -> Option<Arc<Node>> {
        self.driver().children().iter().find(|child| !child.is_backing()).map(Child::node)
    }

    /// The first node from this one downwards that is no filter.
    pub fn below_filters(self: &Arc<Node>) -> Arc<Node> {
        let mut node = self.clone();
        while node.driver().entry().kind == Kind::Filter
            && let Some(below) = node.primary()
        {
            node = below;
        }
        node
    }

    /// All nodes below this one, each once.
    pub fn below(&self) -> Vec<Arc<Node>> {
        let mut seen = HashSet::new();
        let mut pending = children(self);
        let mut found = Vec::new();
        while let Some(node) = pending.pop() {
            if seen.insert(Arc::as_ptr(&node)) {
                pending.extend(children(&node));
                found.push(node);
            }
        }
        found
    }

    /// What this node, and then each below it, answers to `ask`, as far as they have an answer.
    pub fn ask_all<T>(&self, mut ask: impl FnMut(&Node) -> Option<T>) -> Vec<T> {
        let own = ask(self);
        own.into_iter().chain(self.below().iter().filter_map(|node| ask(node))).collect()
    }

    /// The files and devices that the disk is in, by their real names: of each node without children that is wanted.
    pub fn files(&self, is_wanted: impl Fn(&Node) -> bool) -> Vec<PathBuf> {
        let file = |node: &Node| bytes::path_of(&node.driver().filename()?).canonicalize().ok();
        let mut found = self
            .ask_all(|node| if node.is_bottom() && is_wanted(node) { file(node) } else { None });
        found.sort();
        found.dedup();
        found
    }

    /// How the next process knows that all of this one's I/O of the node has ended
    /// ([`Driver::fence`](super::Driver::fence)).
    pub fn fence(&self) -> Fence {
        let own = |node: &Node| node.driver().fence(node.perms());
        let fences = self.ask_all(|node| node.is_bottom().then(|| own(node)));
        fences.into_iter().reduce(Fence::and).unwrap_or(Fence::Never)
    }

    /// Whether no node is below this one.
    fn is_bottom(&self) -> bool {
        self.driver().children().is_empty()
    }

    /// Whether a flush has failed permanently, so that all later ones will, until the storage is opened again:
    /// retrying has no effect.
    pub fn is_poisoned(&self) -> bool {
        self.driver().is_poisoned() || self.below().iter().any(|node| node.driver().is_poisoned())
    }

    /// An operator accepts what failed flushes have lost: later ones are done again.
    pub fn forgive(&self) {
        self.driver().forgive();
        self.below().iter().for_each(|node| node.driver().forgive());
    }
}

/// The last child first.
fn children(node: &Node) -> Vec<Arc<Node>> {
    node.driver().children().iter().map(|child| child.node()).rev().collect()
}
