//! Watching for storage whose length changes by itself ([`crate::block::length`]).

use super::Graph;
use super::drain::Used;
use crate::block::{Error, Node};
use crate::io::epoch;
use std::sync::Arc;

impl Graph {
    /// Makes this worker follow the length of a node that has just been opened, if that has one of its own.
    pub(in crate::block) fn follow_length(&self, node: &Arc<Node>) {
        let Some(own) = node.driver().own_length() else { return };
        self.on_signal(node, own.signal(), |graph, node| {
            Box::pin(async move {
                if let Err(error) = graph.take_length(&node).await {
                    log::error!(
                        "{}: its length has changed, which its users do not see: {error}",
                        node.name()
                    );
                }
            })
        });
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
