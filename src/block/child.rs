//! The edge from a node or an export to a node below it. Graph changes can retarget it.
//!
//! The fast path reads the edge without a lock or a reference count. Its in-flight record keeps the node alive: a change
//! drops the old node only after all workers have passed an epoch ([`crate::io::epoch`]).

use super::{Node, Role};
use crate::io::InFlight;
use crate::io::epoch::Announcer;
use crate::io::sync::Mutex;
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

/// An edge of the graph, owned by the parent's driver, or by the user that is no node.
pub struct Child {
    role: Role,
    /// What `owner` holds, for readers that do not lock.
    node: AtomicPtr<Node>,
    /// Taken out when the edge is dropped, and never before.
    owner: Mutex<ManuallyDrop<Arc<Node>>>,
}

impl Child {
    pub fn new(role: Role, node: Arc<Node>) -> Child {
        let pointer = Arc::as_ptr(&node).cast_mut();
        let owner = Mutex::new(ManuallyDrop::new(node));
        Child { role, node: AtomicPtr::new(pointer), owner }
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether the node is what the parent reads where it has no data.
    pub fn is_backing(&self) -> bool {
        self.role.is_backing()
    }

    /// The node, for the slow path and the control plane.
    pub fn node(&self) -> Arc<Node> {
        Arc::clone(&self.owner.lock())
    }

    /// The node, for the fast path.
    pub fn fast<'a>(&'a self, _inflight: &'a InFlight) -> &'a Node {
        // SAFETY: the pointer is what `owner` held when it was stored. A replaced node is dropped only after every
        // in-flight record older than the replacement has ended, and `_inflight` is this record or a younger one,
        // which sees the new pointer.
        unsafe { &*self.node.load(Ordering::Acquire) }
    }

    /// Turns the edge to another node and gives back the old one.
    ///
    /// The caller lets [`crate::io::epoch::synchronize`] pass before it drops the old node.
    #[must_use = "the old node may be dropped only after all workers have passed"]
    pub fn replace(&self, node: Arc<Node>) -> Arc<Node> {
        let mut owner = self.owner.lock();
        self.node.store(Arc::as_ptr(&node).cast_mut(), Ordering::Release);
        std::mem::replace(&mut **owner, node)
    }
}

impl Node {
    /// An announcer for requests on the fast path through this node and all nodes below it. A change of one of them
    /// waits for it.
    pub fn announcer(&self) -> Announcer {
        // SAFETY: it is listed with every node on the paths down from here; a node that replaces another later takes
        // over its list.
        let announcer = unsafe { Announcer::new() };
        self.add_member(announcer.member());
        announcer
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the edge is being dropped, so this is the only time that the node is taken out, and nobody
        // looks at it later.
        let_go(unsafe { ManuallyDrop::take(&mut *self.owner.lock()) });
    }
}

thread_local! {
    /// Nodes that wait to be dropped by a [`let_go`] that is running further up the stack.
    static WAITING: RefCell<Option<Vec<Arc<Node>>>> = const { RefCell::new(None) };
}

/// Drops a node. The last hold on a long chain drops one node after another, not one inside another, which
/// would need a stack as deep as the chain.
fn let_go(node: Arc<Node>) {
    let mut node = Some(node);
    let starts = WAITING.try_with(|waiting| match &mut *waiting.borrow_mut() {
        Some(list) => {
            list.extend(node.take());
            false
        }
        waiting => {
            *waiting = Some(Vec::new());
            true
        }
    });
    if starts != Ok(true) {
        return;
    }
    while node.is_some() {
        drop(node);
        node = WAITING.with_borrow_mut(|waiting| waiting.as_mut().and_then(Vec::pop));
    }
    WAITING.set(None);
}
