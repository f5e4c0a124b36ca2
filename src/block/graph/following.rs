//! Sources that carry the signals of drivers, from any thread, to the worker that opened the node.

use super::{Graph, Inner};
use crate::block::{LocalFuture, Node, Signal};
use crate::io::{self, Io, IoResult, Polled, Source, SourceId};
use std::rc::Rc;
use std::sync::{Arc, Weak};

/// The reaction to a signal.
type Work = fn(Graph, Arc<Node>) -> LocalFuture<'static, ()>;

impl Graph {
    /// Makes this worker run `work` whenever the node's driver raises the signal.
    pub(super) fn on_signal(&self, node: &Arc<Node>, signal: Arc<Signal>, work: Work) {
        let event = signal.event();
        let (graph, node) = (Arc::downgrade(&self.0), Arc::downgrade(node));
        let follower = Follower { graph, node, signal, work };
        io::current().attach_device(Box::new(follower), Some(event));
    }
}

/// Waits for a node's signal on the worker that opened the node. Keeps neither node nor graph alive.
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
        self.signal.is_raised()
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {}

    fn publish(&mut self) {}

    fn arm(&mut self) -> bool {
        self.signal.arm()
    }

    fn disarm(&mut self) {}

    fn is_detachable(&self) -> bool {
        true
    }
}
