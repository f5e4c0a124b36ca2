//! What the graph tells of changes below the disk: to pause, to go over to another node, to have another size.

use super::{Shared, lock};
use crate::block::graph::User;
use crate::block::{LocalFuture, Node};
use crate::io::offload;
use std::sync::Arc;

impl Shared {
    /// Has the session go over to the node that the disk is on now. Blocks: not to be called on a worker.
    fn change_node(&self) {
        let current = self.current.lock();
        if let Some((stream, session)) = &current.front_end
            && let Err(error) = lock(session).change_node()
        {
            log::warn!(export = &*self.disk.name; "connection closed: {error}");
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The sessions' word for it blocks: not to be called on a worker.
    fn pause(&self) {
        self.disk.lingering.wait(&self.disk.name);
        let mut current = self.current.lock();
        current.paused += 1;
        if let Some((_, session)) = &current.front_end {
            lock(session).pause();
        }
    }
}

impl User for Shared {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        let Some(shared) = self.me.upgrade() else { return Box::pin(std::future::ready(())) };
        Box::pin(offload(move || shared.pause()))
    }

    /// No front end is let in before the export has its node ([`Export::start`]).
    fn hold(&self) {
        self.current.lock().paused += 1;
    }

    fn resume(&self) {
        let mut current = self.current.lock();
        current.paused = current.paused.saturating_sub(1);
        if let Some((_, session)) = &current.front_end {
            lock(session).resume();
        }
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
