//! Following the signals of nodes: what a driver tells from any thread is heard on the worker that its node was opened
//! on.

use super::{Graph, Inner};
use crate::block::{LocalFuture, Node, Signal};
use crate::io::{self, Io, IoResult, Polled, Source, SourceId};
use std::rc::Rc;
use std::sync::{Arc, Weak};

/// What is done about a signal.
type Work = fn(Graph, Arc<Node>) -> LocalFuture<'static, ()>;

impl Graph {
    /// Has this worker do `work` whenever the node's driver tells the signal.
    pub(super) fn hear(&self, node: &Arc<Node>, signal: Arc<Signal>, work: Work) {
        let event = signal.event();
        let (graph, node) = (Arc::downgrade(&self.0), Arc::downgrade(node));
        let follower = Follower { graph, node, signal, work };
        io::current().attach_device(Box::new(follower), Some(event));
    }
}

/// Waits for signals on the worker that the node was opened on. Keeps neither it nor the graph.
struct Follower {
    graph: Weak<Inner>,
    node: Weak<Node>,
    signal: Arc<Signal>,
    work: Work,
}

impl Source for Follower {
    fn poll(&mut self, io: &Rc<Io>, _: SourceId) -> Polled {
        let (Some(graph), Some(node)) = (self.graph.upgrade(), self.node.upgrade()) else {
            return Polled::Ended;
        };
        if !self.signal.take() {
            return Polled::Idle;
        }
        io.spawn((self.work)(Graph(graph), node));
        Polled::Busy
    }

    fn has_work(&self) -> bool {
        self.signal.is_told()
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {}

    fn publish(&mut self) {}

    fn arm(&mut self) -> bool {
        self.signal.arm()
    }

    fn disarm(&mut self) {}

    fn may_be_left(&self) -> bool {
        true
    }
}
