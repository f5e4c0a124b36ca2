//! What the graph tells of changes below the disk: to pause, to go over to another node, to have another size.

use super::{Shared, lock};
use crate::block::graph::User;
use crate::block::{LocalFuture, Node, SECTOR};
use crate::io::offload;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Shared {
    /// Has the session go over to the node that the disk is on now. Blocks: not to be called on a worker.
    fn change_node(&self) {
        let current = self.current.lock();
        if let Some((stream, session)) = &current.front_end
            && let Err(error) = lock(session).change_node()
        {
            log::warn!(export = &*self.name; "connection closed: {error}");
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The sessions' word for it blocks: not to be called on a worker.
    fn pause(&self) {
        self.disk.lingering.wait(&self.name);
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
        // The graph has it until all workers have passed.
        drop(self.disk.root.replace(node.clone()));
        if let Some(metrics) = &self.disk.metrics {
            node.name().clone_into(&mut metrics.node.lock());
        }
        let Some(shared) = self.me.upgrade() else { return Box::pin(std::future::ready(())) };
        Box::pin(offload(move || {
            shared.change_node();
            if shared.disk.options.writable {
                shared.disk.losses.follow(&shared.name, &shared.disk.node());
            }
        }))
    }

    fn resized(&self) {
        let sectors = self.disk.node().len() / SECTOR;
        self.disk.capacity.store(sectors, Ordering::SeqCst);
        if let Some(metrics) = &self.disk.metrics {
            metrics.size.store(sectors * SECTOR, Ordering::Relaxed);
        }
        self.notices.config_changed();
    }
}
