//! The journal of the disk's image, in the memory that the front end keeps for us ([`Journaled`]).
//!
//! An export attaches it before the first ring of a connection starts, goes over to the image that is put over
//! another, and detaches it when the connection has ended. If I/O of the connection still may land then, that is
//! left to the next one, which begins nothing before.
//!
//! Only one of these is done at a time: nothing of an export begins in a drained graph, and the disk goes over to
//! another node only there.
//!
//! [`Journaled`]: crate::block::Journaled

use super::kept::Kept;
use crate::block::{Error, Node, Survivor};
use crate::io::IoResult;
use crate::io::sync::Mutex;
use std::sync::Arc;

/// The memory of the connection, and the image that keeps its journal there.
#[derive(Default)]
pub struct Journal(Mutex<State>);

#[derive(Clone, Default)]
struct State {
    memory: Option<Arc<dyn Kept>>,
    image: Option<Arc<Node>>,
}

impl Journal {
    /// Makes the image below `node` keep its journal in `memory`, after what a daemon that was killed has left there.
    ///
    /// # Errors
    /// What was left cannot be taken up, and stays there.
    pub async fn attach(
        &self,
        name: &str,
        node: &Arc<Node>,
        memory: &Arc<dyn Kept>,
    ) -> Result<(), Error> {
        let image = node.journaled().filter(|_| memory.has_journal());
        let State { memory: old, image: attached } = self.0.lock().clone();
        let is_same_image = match (&attached, &image) {
            (Some(attached), Some(image)) => Arc::ptr_eq(attached, image),
            (attached, image) => attached.is_none() && image.is_none(),
        };
        if is_same_image && old.is_some_and(|old| Arc::ptr_eq(&old, memory)) {
            return Ok(());
        }
        self.detach(name).await;
        if let Some(image) = &image {
            attach(image, memory).await?;
        }
        *self.0.lock() = State { memory: Some(memory.clone()), image };
        Ok(())
    }

    /// As [`Journal::attach`], after the operator has accepted the loss of what cannot be taken up: it is forgotten.
    ///
    /// # Errors
    /// The memory cannot be used.
    pub async fn attach_and_forget(
        &self,
        name: &str,
        node: &Arc<Node>,
        memory: &Arc<dyn Kept>,
    ) -> Result<(), Error> {
        let image = node.journaled();
        if let Some(journaled) = image.as_ref().and_then(|image| image.driver().journaled()) {
            let memory: Arc<dyn Survivor> = memory.clone();
            let count = journaled.forget(&*memory);
            log::warn!(
                export = name;
                "loss accepted: {count} clusters that were written before the daemon was killed are given up"
            );
        }
        self.attach(name, node, memory).await
    }

    /// The disk is on `node` from now on, whose image keeps its journal where the one before it did. Nothing is in
    /// flight.
    ///
    /// # Errors
    /// The memory cannot be used for it.
    pub async fn follow(&self, name: &str, node: &Arc<Node>) -> Result<(), Error> {
        let memory = self.0.lock().memory.clone();
        match memory {
            Some(memory) => self.attach(name, node, &memory).await,
            None => Ok(()),
        }
    }

    /// Lets go of memory that no image uses. True if there is nothing left to detach.
    pub fn is_unused(&self) -> bool {
        let mut state = self.0.lock();
        if state.image.is_none() {
            state.memory = None;
        }
        state.memory.is_none()
    }

    /// Hands all of it over, and releases the memory. If that fails the next flush fails.
    pub async fn detach(&self, name: &str) {
        let State { memory: Some(memory), image: Some(image) } =
            std::mem::take(&mut *self.0.lock())
        else {
            return;
        };
        if let Err(errno) = detach(&image, memory).await {
            let image = image.name();
            log::error!(
                export = name;
                "node '{image}': what the guest has written could not be handed over: {errno}"
            );
        }
    }
}

async fn attach(image: &Node, memory: &Arc<dyn Kept>) -> Result<(), Error> {
    let memory: Arc<dyn Survivor> = memory.clone();
    match image.driver().journaled() {
        Some(journaled) => journaled.attach(memory).await,
        None => Ok(()),
    }
}

async fn detach(image: &Node, memory: Arc<dyn Kept>) -> IoResult {
    let memory: Arc<dyn Survivor> = memory;
    match image.driver().journaled() {
        Some(journaled) => journaled.detach(memory).await,
        None => Ok(()),
    }
}
