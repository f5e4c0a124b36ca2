//! Active and inactive nodes: the ownership of an image while its guest migrates between hosts.
//!
//! An inactive node stands for an image that another process owns. It is open and has its users and
//! permissions, but no locks on its storage, nothing can be written to it, and what is known of the
//! image may be out of date. (QEMU's `active=off`.)
//!
//! The rules held here:
//!
//! * All nodes below an active node are active.
//! * A node is activated with all below it: all their locks are taken, or none is; then each driver
//!   looks at its storage again, children first.
//! * A node is inactive when the last of its users says so. Drivers bring everything to the storage,
//!   parents first, and only then locks are given up. What cannot be brought there stays ours.

use super::claims::{Claim, Part};
use super::permissions::{commit, prepare, rollback};
use super::{Attachment, By, Graph, State};
use crate::block::{Error, Node};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A user's word on whether it needs its node active, while the user is attached.
#[derive(Clone)]
pub struct Activity {
    graph: Graph,
    user: u64,
}

impl Attachment {
    pub fn activity(&self) -> Activity {
        Activity { graph: self.graph.clone(), user: self.id }
    }
}

impl Activity {
    /// The node that the user has now.
    fn node(&self) -> Result<Arc<Node>, Error> {
        let mut state = self.graph.0.state.lock();
        let found = state.user(self.user).map(|(node, _)| node);
        found.ok_or_else(|| Error::new("The user has given its node back"))
    }

    /// That node, which nobody else changes, nor what is below it. It may change as long as others do.
    async fn claim(&self) -> Result<(Arc<Node>, Claim), Error> {
        loop {
            let node = self.node()?;
            let id = self.graph.0.state.lock().id(&node)?;
            let claim = self.graph.claim(vec![Part::Below(id)]).await;
            if Arc::ptr_eq(&self.node()?, &node) {
                return Ok((node, claim));
            }
        }
    }

    /// Whether this user needs the node, which is active then. A user that came to an inactive node
    /// does not until it says so.
    pub fn is_active(&self) -> bool {
        let mut state = self.graph.0.state.lock();
        state.user(self.user).is_some_and(|(_, active)| *active)
    }

    /// Makes the node active, unless it is.
    ///
    /// # Errors
    /// Locks that other processes hold (EAGAIN), or storage that is not what it was; nothing has
    /// changed then.
    pub async fn activate(&self) -> Result<(), Error> {
        let (node, _claim) = self.claim().await?;
        self.graph.activate_claimed(&node).await?;
        if let Some((_, active)) = self.graph.0.state.lock().user(self.user) {
            *active = true;
        }
        Ok(())
    }

    /// Says that the user needs the node no more. If nobody does, it becomes inactive, and the nodes below it too.
    /// The user has nothing in flight and starts nothing.
    ///
    /// # Errors
    /// What could not be brought to the storage, or a driver that cannot hand its image over. The
    /// node is active and the user needs it then, as before.
    pub async fn inactivate(&self) -> Result<(), Error> {
        let (node, _claim) = self.claim().await?;
        let unneeded = {
            let mut state = self.graph.0.state.lock();
            if let Some((_, active)) = state.user(self.user) {
                *active = false;
            }
            state.unneeded(&node)?
        };
        let result = bring_to_rest(&unneeded).await;
        let mut state = self.graph.0.state.lock();
        if result.is_err() {
            if let Some((_, active)) = state.user(self.user) {
                *active = true;
            }
            return result;
        }
        // Somebody may have come meanwhile.
        let unneeded = state.unneeded(&node)?;
        state.give_locks_back(&unneeded);
        Ok(())
    }
}

/// Everything to the storage, parents before the nodes below them.
async fn bring_to_rest(nodes: &[Arc<Node>]) -> Result<(), Error> {
    if let Some(node) = nodes.iter().find(|node| node.driver().hand_over().is_none()) {
        let (name, driver) = (node.name(), node.driver().name());
        return Err(Error::new(format!("'{name}': driver '{driver}' cannot hand its image over")));
    }
    let failed = |node: &Node, errno| {
        Error::os(format!("'{}': its image cannot be handed over", node.name()), errno)
    };
    for node in nodes {
        if let Some(driver) = node.driver().hand_over() {
            driver.inactivate().await.map_err(|errno| failed(node, errno))?;
        }
        node.flush().await.map_err(|errno| failed(node, errno))?;
    }
    Ok(())
}

impl Graph {
    /// Makes a node active, with all below it.
    ///
    /// # Errors
    /// [`Activity::activate`].
    pub async fn activate(&self, node: &Arc<Node>) -> Result<(), Error> {
        let id = self.0.state.lock().id(node)?;
        let _claim = self.claim(vec![Part::Below(id)]).await;
        self.activate_claimed(node).await
    }

    async fn activate_claimed(&self, node: &Arc<Node>) -> Result<(), Error> {
        let nodes = {
            let mut state = self.0.state.lock();
            let nodes = state.inactive_below(node)?;
            state.take_locks(&nodes)?;
            nodes
        };
        for node in &nodes {
            let Some(driver) = node.driver().hand_over() else { continue };
            if let Err(error) = driver.activate().await {
                self.0.state.lock().give_locks_back(&nodes);
                return Err(error.at(format!("'{}'", node.name())));
            }
        }
        Ok(())
    }
}

impl State {
    /// The node that a user has, and whether the user needs it active.
    fn user(&mut self, user: u64) -> Option<(Arc<Node>, &mut bool)> {
        self.nodes.values_mut().find_map(|entry| {
            let mut uses = entry.uses.iter_mut();
            uses.find(|one| matches!(one.by, By::User { id, .. } if id == user))
                .map(|one| (entry.node.clone(), &mut one.active))
        })
    }

    /// The inactive nodes from this one down, children before parents.
    fn inactive_below(&self, node: &Arc<Node>) -> Result<Vec<Arc<Node>>, Error> {
        let mut found = BTreeSet::new();
        let mut pending = vec![self.id(node)?];
        while let Some(id) = pending.pop() {
            let entry = self.entry(id);
            if !entry.node.is_active() && found.insert((entry.height.edges, id)) {
                pending.extend(&entry.children);
            }
        }
        Ok(found.into_iter().map(|(_, id)| self.entry(id).node.clone()).collect())
    }

    /// The active nodes from this one down that nobody needs active, parents before children.
    fn unneeded(&self, node: &Arc<Node>) -> Result<Vec<Arc<Node>>, Error> {
        let place = |id: u64| (Reverse(self.entry(id).height.edges), id);
        // Parents come first, so that all users of a node have been visited before it.
        let (mut pending, mut found) = (BTreeSet::from([place(self.id(node)?)]), BTreeSet::new());
        let mut nodes = Vec::new();
        while let Some((_, id)) = pending.pop_first() {
            let entry = self.entry(id);
            let needed = entry.uses.iter().any(|one| match &one.by {
                By::Node { id, .. } => self.entry(*id).node.is_active() && !found.contains(id),
                By::User { .. } | By::Opening { .. } => one.active,
            });
            if !needed && entry.node.is_active() {
                found.insert(id);
                nodes.push(entry.node.clone());
                pending.extend(entry.children.iter().map(|&child| place(child)));
            }
        }
        Ok(nodes)
    }

    /// Makes all of the nodes active and takes their locks, or none.
    fn take_locks(&mut self, nodes: &[Arc<Node>]) -> Result<(), Error> {
        let ids = nodes.iter().map(|node| self.id(node)).collect::<Result<Vec<_>, _>>()?;
        for (at, &id) in ids.iter().enumerate() {
            let entry = self.entry(id);
            if let Err(error) = prepare(entry, entry.perms) {
                for &id in ids[..at].iter().rev() {
                    let entry = self.entry(id);
                    rollback(entry, entry.perms);
                }
                return Err(error);
            }
        }
        for id in ids {
            let entry = self.entry_mut(id);
            entry.node.set_active(true);
            commit(entry, entry.perms);
        }
        Ok(())
    }

    /// Makes all of the nodes inactive and gives up their locks. It cannot fail: what stays locked is logged.
    fn give_locks_back(&mut self, nodes: &[Arc<Node>]) {
        for node in nodes {
            node.set_active(false);
            let Ok(id) = self.id(node) else { continue };
            let entry = self.entry_mut(id);
            let none = entry.wanted_locks(entry.perms);
            match prepare(entry, none) {
                Ok(()) => commit(entry, none),
                Err(error) => log::error!("{}: giving up locks: {error}", node.name()),
            }
        }
    }
}
