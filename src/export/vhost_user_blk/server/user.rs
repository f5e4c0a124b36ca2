//! What the graph tells of changes below the disk: to pause, to go over to another node, to have another size.

use super::{Shared, lock};
use crate::block::graph::User;
use crate::block::{LocalFuture, Node};
use crate::io::offload;
use std::sync::Arc;
use std::time::Duration;

impl Shared {
    /// Has the session go over to the node that the disk is on now. Blocks: not to be called on a worker.
    fn change_node(&self) {
        let Some((stream, session)) = self.current.lock().front_end.clone() else { return };
        if let Err(error) = lock(&session).change_node() {
            log::warn!(export = &*self.disk.name; "connection closed: {error}");
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
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
        self.disk.change_node(node);
        let Some(shared) = self.me.upgrade() else { return Box::pin(std::future::ready(())) };
        Box::pin(offload(move || {
            shared.change_node();
            if shared.disk.options.writable {
                shared.disk.losses.follow(&shared.disk.name, &shared.disk.node());
            }
        }))
    }

    fn resized(&self) {
        self.disk.take_size();
        self.notices.resized();
    }
}
