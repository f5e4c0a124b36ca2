//! Following the lengths of storage that changes by itself ([`crate::block::length`]).

use super::drain::Used;
use super::{Graph, Inner};
use crate::block::length::LengthNotice;
use crate::block::{Error, Node};
use crate::io::{self, Io, IoResult, Polled, Source, SourceId, epoch};
use std::rc::Rc;
use std::sync::{Arc, Weak};

impl Graph {
    /// Has this worker follow the length of a node that has just been opened, if that has one of its own.
    pub(in crate::block) fn follow_length(&self, node: &Arc<Node>) {
        let Some(own) = node.driver().own_length() else { return };
        let notice = own.notice();
        let event = notice.event();
        let (graph, node) = (Arc::downgrade(&self.0), Arc::downgrade(node));
        io::current().attach_device(Box::new(Follower { graph, node, notice }), Some(event));
    }

    /// Makes known the length that a node's storage has now.
    ///
    /// # Errors
    /// Somebody works on a bitmap of the node, or of one above it; the old length stays.
    async fn take_length(&self, node: &Arc<Node>) -> Result<(), Error> {
        let Some(own) = node.driver().own_length() else { return Ok(()) };
        if own.found() == node.len() {
            return Ok(());
        }
        let drained = self.drain(node).await?;
        let above = self.above(node)?;
        above.iter().try_for_each(|used| used.node.check_bitmaps_for_resize())?;
        let members = node.members();
        epoch::synchronize(&members).await;
        let before: Vec<u64> = above.iter().map(|used| used.node.len()).collect();
        own.take();
        for (Used { node, users }, before) in above.iter().zip(before) {
            if node.len() != before {
                node.bitmaps().resize(node.len(), &node.members());
                users.iter().for_each(|user| user.resized());
            }
        }
        drop(drained);
        Ok(())
    }
}

/// Waits for notices on the worker that the node was opened on. Keeps neither it nor the graph.
struct Follower {
    graph: Weak<Inner>,
    node: Weak<Node>,
    notice: Arc<LengthNotice>,
}

impl Source for Follower {
    fn poll(&mut self, io: &Rc<Io>, _: SourceId) -> Polled {
        let (Some(graph), Some(node)) = (self.graph.upgrade(), self.node.upgrade()) else {
            return Polled::Ended;
        };
        if !self.notice.take() {
            return Polled::Idle;
        }
        io.spawn(async move {
            if let Err(error) = Graph(graph).take_length(&node).await {
                log::error!(
                    "{}: its length has changed, which its users do not see: {error}",
                    node.name()
                );
            }
        });
        Polled::Busy
    }

    fn has_work(&self) -> bool {
        self.notice.is_told()
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {}

    fn publish(&mut self) {}

    fn arm(&mut self) -> bool {
        self.notice.arm()
    }

    fn disarm(&mut self) {}

    fn may_be_left(&self) -> bool {
        true
    }
}
