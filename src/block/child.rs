//! The edge to a node from what stands on it, a node or an export, which graph changes can turn to another
//! node.
//!
//! The fast road reads the edge without a lock or a count: the in-flight record that it must show
//! keeps the node alive, because whoever replaces a node drops the old one only after all workers
//! have passed ([`crate::io::epoch`]).

use super::Node;
use crate::io::InFlight;
use crate::io::sync::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

/// An edge of the graph, owned by the parent's driver, or by the user that is no node.
pub struct Child {
    role: &'static str,
    /// What `owner` holds, for readers that do not lock.
    node: AtomicPtr<Node>,
    owner: Mutex<Arc<Node>>,
}

impl Child {
    /// `role` is the option's name: `file`, `backing`, …; users that are no node call it `root`.
    pub fn new(role: &'static str, node: Arc<Node>) -> Child {
        let pointer = Arc::as_ptr(&node).cast_mut();
        Child { role, node: AtomicPtr::new(pointer), owner: Mutex::new(node) }
    }

    pub fn role(&self) -> &'static str {
        self.role
    }

    /// The node, for the slow road and the control plane.
    pub fn node(&self) -> Arc<Node> {
        self.owner.lock().clone()
    }

    /// The node, for the fast road.
    pub fn fast<'a>(&'a self, _inflight: &'a InFlight) -> &'a Node {
        // SAFETY: the pointer is what `owner` held when it was stored. A replaced node is dropped
        // only after every in-flight record older than the replacement has ended, and `_inflight`
        // is such a record or a younger one, which sees the new pointer.
        unsafe { &*self.node.load(Ordering::Acquire) }
    }

    /// Turns the edge to another node and gives back the old one.
    ///
    /// The caller lets [`crate::io::epoch::synchronize`] pass before it drops the old node.
    #[must_use = "the old node may be dropped only after all workers have passed"]
    pub fn replace(&self, node: Arc<Node>) -> Arc<Node> {
        let mut owner = self.owner.lock();
        self.node.store(Arc::as_ptr(&node).cast_mut(), Ordering::Release);
        std::mem::replace(&mut *owner, node)
    }
}
