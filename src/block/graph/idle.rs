//! Watching for images that have been idle ([`crate::block::idle`]).

use super::Graph;
use crate::block::{Error, Node};
use std::sync::Arc;

impl Graph {
    /// Makes this worker follow a node that has just been opened, if its driver does something when the image is left
    /// alone.
    pub(in crate::block) fn follow_idleness(&self, node: &Arc<Node>) {
        let Some(signal) = node.driver().idle().and_then(|idle| idle.signal()) else { return };
        self.on_signal(node, signal, |graph, node| {
            Box::pin(async move {
                if let Err(error) = graph.let_rest(&node).await {
                    log::warn!("{}: left alone: {error}", node.name());
                }
            })
        });
    }

    /// Makes a driver do what it does when its image is left alone. The node does not end meanwhile.
    async fn let_rest(&self, node: &Arc<Node>) -> Result<(), Error> {
        let Some(idle) = node.driver().idle() else { return Ok(()) };
        let rested = self.undisturbed(node, &[], async || idle.rest().await).await;
        // A node that has left the graph has done it when it was closed.
        let Ok(rested) = rested else { return Ok(()) };
        rested.map_err(|errno| Error::os("its image could not be brought to rest", errno))
    }
}
