//! Permission transactions: a change of who uses what is worked out for the whole graph, checked,
//! prepared with the storage's locks, and only then made; or it leaves nothing behind.
//!
//! Permissions run downwards: what all uses of a node hold and allow together decides, through
//! [`Driver::child_perms`](crate::block::Driver::child_perms), what the node holds on its children.

use super::{By, Entry, State, Use};
use crate::block::open::DEPTH_LIMIT;
use crate::block::{Error, Perm, Perms};
use std::collections::{BTreeMap, BTreeSet};

/// A change that is being worked out; nothing happens before [`Plan::apply`].
pub(super) struct Plan<'a> {
    state: &'a mut State,
    /// The uses of nodes as they will be, where that differs.
    uses: BTreeMap<u64, Vec<Use>>,
    /// The children of nodes as they will be, where that differs.
    children: BTreeMap<u64, Vec<u64>>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(state: &'a mut State) -> Plan<'a> {
        Plan { state, uses: BTreeMap::new(), children: BTreeMap::new() }
    }

    // ---- What changes

    pub(super) fn add(&mut self, node: u64, new: Use) {
        self.uses_mut(node).push(new);
    }

    /// Removes all uses that `unwanted` picks.
    pub(super) fn remove(&mut self, unwanted: impl Fn(&By) -> bool) {
        let nodes: Vec<u64> = self.state.nodes.keys().copied().collect();
        for node in nodes {
            if self.uses(node).iter().any(|one| unwanted(&one.by)) {
                self.uses_mut(node).retain(|one| !unwanted(&one.by));
            }
        }
    }

    /// Removes the edges from a node to its children.
    pub(super) fn remove_edges(&mut self, parent: u64) {
        self.remove(|by| matches!(by, By::Node { id, .. } if *id == parent));
        self.children.insert(parent, Vec::new());
    }

    /// Adds the edges from a new node to its children.
    pub(super) fn add_edges(&mut self, parent: u64) {
        for (child, id) in self.children(parent).to_vec().into_iter().enumerate() {
            self.add(id, edge(parent, child));
        }
        self.uses_mut(parent);
    }

    /// Turns the edge from a node to its child at an index to another node.
    pub(super) fn turn_edge(&mut self, parent: u64, child: usize, to: u64) {
        self.remove(|by| matches!(by, By::Node { id, child: at } if (*id, *at) == (parent, child)));
        self.add(to, edge(parent, child));
        let mut children = self.children(parent).to_vec();
        children[child] = to;
        self.children.insert(parent, children);
        self.uses_mut(parent);
    }

    /// Turns all uses of a node to another, but for those by that other.
    pub(super) fn move_uses(&mut self, from: u64, to: u64) {
        let by_other = |by: &By| matches!(by, By::Node { id, .. } if *id == to);
        let uses = self.uses_mut(from);
        let moved: Vec<Use> = uses.extract_if(.., |one| !by_other(&one.by)).collect();
        for one in moved {
            match one.by {
                By::Node { id, child } => self.turn_edge(id, child, to),
                _ => self.add(to, one),
            }
        }
    }

    /// Asks a node anew what it needs of its children.
    pub(super) fn settle_again(&mut self, node: u64) {
        self.uses_mut(node);
    }

    /// Changes what a user that is no node holds.
    pub(super) fn change_user(&mut self, user: u64, perms: Perms) {
        let is_it = |by: &By| matches!(by, By::User { id, .. } if *id == user);
        let nodes: Vec<u64> = self.state.nodes.keys().copied().collect();
        for node in nodes {
            if let Some(at) = self.uses(node).iter().position(|one| is_it(&one.by)) {
                self.uses_mut(node)[at].perms = perms;
            }
        }
    }

    // ---- Making it happen

    /// Makes the change, or changes nothing.
    pub(super) fn apply(self) -> Result<(), Error> {
        self.make(|_, perms| perms)
    }

    /// Makes the change, or changes nothing. What it gives up stays locked until
    /// [`release_locks`]: requests may still be on their way there.
    pub(super) fn apply_keeping_locks(self) -> Result<(), Error> {
        self.make(|locked, perms| locked.and(perms))
    }

    /// Makes the change; `locks` says from what a node's locks stand for, and what it needs, for
    /// what they shall stand.
    fn make(mut self, locks: impl Fn(Perms, Perms) -> Perms) -> Result<(), Error> {
        let mut wanted = Vec::new();
        for node in self.order()? {
            let perms = self.settle(node);
            self.check(node, perms)?;
            let entry = self.state.entry(node);
            let locks = entry.wanted_locks(locks(entry.locked, perms));
            wanted.push(Wanted { node, perms, locks });
        }
        // Locks talk to the file system with the list of nodes locked. They are few, local and
        // quick, and whoever waits is a control thread.
        for (at, one) in wanted.iter().enumerate() {
            if let Err(error) = prepare(self.state.entry(one.node), one.locks) {
                for one in wanted[..at].iter().rev() {
                    rollback(self.state.entry(one.node), one.locks);
                }
                return Err(error);
            }
        }
        self.commit(&wanted);
        Ok(())
    }

    /// Makes a change that only gives up. It cannot fail: what stays locked against all
    /// expectation is logged.
    pub(super) fn loosen(mut self) {
        let mut wanted = Vec::new();
        for node in self.order().expect("nothing was added") {
            let perms = self.settle(node);
            let entry = self.state.entry(node);
            let locks = entry.wanted_locks(perms);
            let locks = match prepare(entry, locks) {
                Ok(()) => locks,
                Err(error) => {
                    log::error!("{}: giving up permissions: {error}", entry.node.name());
                    entry.locked
                }
            };
            wanted.push(Wanted { node, perms, locks });
        }
        self.commit(&wanted);
    }

    /// What all uses of a node hold and allow together; its children learn what that means to them.
    fn settle(&mut self, node: u64) -> Perms {
        let perms = self.uses(node).iter().fold(Perms::NONE, |all, one| all.and(one.perms));
        let driver_node = self.state.entry(node).node.clone();
        for (child, id) in self.children(node).to_vec().into_iter().enumerate() {
            let mut needed = driver_node.driver().child_perms(child, perms);
            if driver_node.options().force_share {
                needed.shared = Perms::NONE.shared;
            }
            let edge = self.uses_mut(id).iter_mut().find(
                |one| matches!(one.by, By::Node { id, child: at } if (id, at) == (node, child)),
            );
            edge.expect("a child knows its parents").perms = needed;
        }
        perms
    }

    fn commit(self, wanted: &[Wanted]) {
        for (node, uses) in self.uses {
            self.state.entry_mut(node).uses = uses;
        }
        for (node, children) in self.children {
            self.state.entry_mut(node).children = children;
        }
        for one in wanted {
            let entry = self.state.entry_mut(one.node);
            entry.perms = one.perms;
            entry.node.set_perms(one.perms);
            commit(entry, one.locks);
        }
    }

    // ---- Checks

    /// Whether all uses of a node go together, and with the node.
    fn check(&self, node: u64, all: Perms) -> Result<(), Error> {
        let changes = Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        let entry = self.state.entry(node);
        if entry.node.is_read_only() && all.held.intersects(changes) {
            return Err(Error::new("Block node is read-only"));
        }
        let uses = self.uses(node);
        // Newest first: of two that exclude each other, the one that came is said to object.
        for (a, one) in uses.iter().enumerate().rev() {
            for (b, other) in uses.iter().enumerate().rev() {
                let conflict = other.perms.held - one.perms.shared;
                if a != b && !conflict.is_empty() {
                    return Err(self.conflict(node, conflict, other, one));
                }
            }
        }
        Ok(())
    }

    fn conflict(&self, node: u64, perms: Perm, required: &Use, unshared: &Use) -> Error {
        let name = self.name(node);
        let perms = perms.names().collect::<Vec<_>>().join(", ");
        let (who, role) = self.describe(&required.by);
        let (objector, other_role) = self.describe(&unshared.by);
        Error::new(format!(
            "Permission conflict on node '{name}': permissions '{perms}' are both required by \
             {who} (uses node '{name}' as '{role}' child) and unshared by {objector} (uses node \
             '{name}' as '{other_role}' child)."
        ))
    }

    fn describe(&self, by: &By) -> (String, &'static str) {
        match by {
            By::Node { id, child } => {
                let role = self.state.entry(*id).node.driver().children()[*child].role();
                (format!("node '{}'", self.name(*id)), role)
            }
            By::Opening { name, role, .. } => (format!("node '{name}'"), role),
            By::User { what, .. } => (what.to_string(), "root"),
        }
    }

    // ---- The graph as it will be

    fn uses(&self, node: u64) -> &[Use] {
        self.uses.get(&node).unwrap_or_else(|| &self.state.entry(node).uses)
    }

    fn uses_mut(&mut self, node: u64) -> &mut Vec<Use> {
        let state = &self.state;
        self.uses.entry(node).or_insert_with(|| state.entry(node).uses.clone())
    }

    fn children(&self, node: u64) -> &[u64] {
        self.children.get(&node).unwrap_or_else(|| &self.state.entry(node).children)
    }

    fn name(&self, node: u64) -> &str {
        self.state.entry(node).node.name()
    }

    /// The nodes whose uses change and all below them, parents before children.
    fn order(&self) -> Result<Vec<u64>, Error> {
        let mut walk = Walk::default();
        for &node in self.uses.keys() {
            self.visit(node, &mut walk)?;
        }
        walk.done.reverse();
        Ok(walk.done)
    }

    fn visit(&self, node: u64, walk: &mut Walk) -> Result<usize, Error> {
        if let Some(&height) = walk.heights.get(&node) {
            return Ok(height);
        }
        if !walk.open.insert(node) {
            return Err(Error::new(format!("Making '{}' stand on itself", self.name(node))));
        }
        let mut height = 1;
        for &child in self.children(node) {
            height = height.max(1 + self.visit(child, walk)?);
        }
        if height > DEPTH_LIMIT {
            let name = self.name(node);
            return Err(Error::new(format!("'{name}' is more than {DEPTH_LIMIT} nodes deep")));
        }
        walk.open.remove(&node);
        walk.heights.insert(node, height);
        walk.done.push(node);
        Ok(height)
    }
}

/// A node's use of its child.
fn edge(parent: u64, child: usize) -> Use {
    // Whether the child is needed active, the parent's own state tells.
    Use { by: By::Node { id: parent, child }, perms: Perms::NONE, active: false }
}

#[derive(Default)]
struct Walk {
    /// On the way from the root to here.
    open: BTreeSet<u64>,
    heights: BTreeMap<u64, usize>,
    /// Children before parents.
    done: Vec<u64>,
}

/// What becomes of a node.
struct Wanted {
    node: u64,
    perms: Perms,
    /// What its locks shall stand for: the same or more.
    locks: Perms,
}

pub(super) fn prepare(entry: &Entry, new: Perms) -> Result<(), Error> {
    match entry.node.driver().locks() {
        Some(locks) if entry.locked != new => locks.prepare(entry.locked, new),
        _ => Ok(()),
    }
}

pub(super) fn rollback(entry: &Entry, new: Perms) {
    if let Some(locks) = entry.node.driver().locks()
        && entry.locked != new
    {
        locks.rollback(entry.locked, new);
    }
}

pub(super) fn commit(entry: &mut Entry, new: Perms) {
    if let Some(locks) = entry.node.driver().locks()
        && entry.locked != new
    {
        locks.commit(entry.locked, new);
    }
    entry.locked = new;
}

/// Gives up the locks that [`Plan::apply_keeping_locks`] has kept.
pub(super) fn release_locks(state: &mut State) {
    for entry in state.nodes.values_mut() {
        let wanted = entry.wanted_locks(entry.perms);
        match prepare(entry, wanted) {
            Ok(()) => commit(entry, wanted),
            Err(error) => log::error!("{}: giving up locks: {error}", entry.node.name()),
        }
    }
}
