//! The journal of the disk's image, in the memory that the front end keeps for us ([`Journaled`]).
//!
//! An export attaches it before the first ring of a connection starts, goes over to the image that is put over
//! another, and detaches it when the connection has ended. If I/O of the connection still may land then, that is left to the next one, which
//! begins nothing before.
//!
//! [`Journaled`]: crate::block::Journaled

use super::kept::Kept;
use crate::block::{Error, Node, Survivor};
use crate::io::Worker;
use crate::io::sync::Mutex;
use std::sync::Arc;

/// What an export has attached: the image, and the memory.
#[derive(Default)]
pub struct Journal(Mutex<Option<Attached>>);

#[derive(Clone)]
struct Attached {
    node: Arc<Node>,
    memory: Arc<dyn Kept>,
}

impl Journal {
    /// Has the image below `node` keep its journal in `memory`, after what a daemon that was killed has
    /// left there. Not to be called on a worker.
    ///
    /// # Errors
    /// What was left cannot be taken up, and stays there.
    pub fn attach(
        &self,
        name: &str,
        node: &Arc<Node>,
        memory: &Arc<dyn Kept>,
        worker: &Worker,
    ) -> Result<(), Error> {
        let node = node.journaled().filter(|_| memory.has_journal());
        let is_attached = |it: &Attached| {
            let is_same = node.as_ref().is_some_and(|node| Arc::ptr_eq(node, &it.node));
            is_same && Arc::ptr_eq(&it.memory, memory)
        };
        if self.0.lock().as_ref().is_some_and(is_attached) {
            return Ok(());
        }
        self.detach(name, worker);
        let Some(node) = node else { return Ok(()) };
        let attached = Attached { node, memory: memory.clone() };
        let theirs = attached.clone();
        worker.block_on(move || async move {
            let memory: Arc<dyn Survivor> = theirs.memory;
            match theirs.node.driver().journaled() {
                Some(journaled) => journaled.attach(memory).await,
                None => Ok(()),
            }
        })?;
        *self.0.lock() = Some(attached);
        Ok(())
    }

    /// Has all of it handed over, and lets go of the memory. If that fails the next flush fails. Not to
    /// be called on a worker.
    pub fn detach(&self, name: &str, worker: &Worker) {
        let Some(Attached { node, memory }) = self.0.lock().take() else { return };
        let image = node.name().to_owned();
        let detached = worker.block_on(move || async move {
            let memory: Arc<dyn Survivor> = memory;
            match node.driver().journaled() {
                Some(journaled) => journaled.detach(memory).await,
                None => Ok(()),
            }
        });
        if let Err(errno) = detached {
            log::error!(
                export = name;
                "node '{image}': what the guest has written could not be handed over: {errno}"
            );
        }
    }
}
