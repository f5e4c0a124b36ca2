//! Reactions to graph changes below the disk: pause, switch to another node, resize.

use super::Shared;
use crate::block::graph::User;
use crate::block::{Error, LocalFuture, Node};
use crate::io::offload;
use std::sync::Arc;
use std::time::Duration;

impl Shared {
    /// Assigns what the front end keeps for us, and what the kernel keeps for queues, to the node's image, and to no
    /// other. No session starts a ring meanwhile, for the disk is paused.
    ///
    /// # Errors
    /// The front end cannot be served on this node.
    async fn retarget(&self, node: &Arc<Node>) -> Result<(), Error> {
        self.disk.journal.follow(&self.disk.name, node).await?;
        let kept = self.device.keep_locks_of(&self.workers, node).await;
        kept.map_err(|e| Error::os("the kernel does not keep the image's locks", e))
    }
}

impl User for Shared {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.device.pause(&self.workers);
        Box::pin(self.device.at_rest())
    }

    /// An export declares requests hung after its own time.
    fn patience(&self) -> Option<Duration> {
        let timeout = self.disk.options.failures.io_timeout;
        (!timeout.is_zero()).then_some(timeout)
    }

    fn in_flight(&self) -> LocalFuture<'_, String> {
        Box::pin(async { self.device.in_flight(&self.workers).await.describe() })
    }

    fn hold(&self) {
        self.device.pause(&self.workers);
    }

    fn resume(&self) {
        self.device.resume(&self.workers);
    }

    fn can_move(&self) -> bool {
        true
    }

    fn moved<'a>(&'a self, node: &'a Arc<Node>) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            self.disk.change_node(node);
            if let Err(error) = self.retarget(node).await {
                log::warn!(export = &*self.disk.name; "connection closed: {error}");
                self.cut_off();
            }
            if self.disk.options.writable {
                let disk = self.disk.clone();
                offload(move || disk.losses.follow(&disk.name, &disk.node())).await;
            }
        })
    }

    fn resized(&self) {
        self.disk.take_size();
        self.server_events.resized();
    }
}
