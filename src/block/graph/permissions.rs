//! Permission transactions: changes of who uses what, made as a whole or not at all.
//!
//! A change is computed for the whole graph, checked, and prepared with the storage's locks before it is made.
//!
//! Permissions run downwards: what all uses of a node hold and allow together decides, through
//! [`Driver::child_perms`](crate::block::Driver::child_perms), what the node holds on its children.

use super::heights::Height;
use super::{By, Entry, State, Use};
use crate::block::{Child, Error, Perm, Perms, Role};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A change that is being worked out; nothing happens before [`Plan::apply`].
pub(super) struct Plan<'a> {
    state: &'a mut State,
    /// The uses of nodes as they will be, where that differs.
    uses: BTreeMap<u64, Vec<Use>>,
    /// The children of nodes as they will be, where that differs.
    children: BTreeMap<u64, Vec<u64>>,
    /// The heights of nodes as they will be, where that differs.
    heights: BTreeMap<u64, Height>,
    /// A node that would be below itself.
    in_loop: Option<u64>,
}

/// Nodes that are still to be looked at, highest first.
type Pending = BTreeSet<(Reverse<usize>, u64)>;

impl<'a> Plan<'a> {
    pub(super) fn new(state: &'a mut State) -> Plan<'a> {
        Plan {
            state,
            uses: BTreeMap::new(),
            children: BTreeMap::new(),
            heights: BTreeMap::new(),
            in_loop: None,
        }
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
        for child in self.children(parent).to_vec() {
            let by_parent = |one: &Use| matches!(one.by, By::Node { id, .. } if id == parent);
            self.uses_mut(child).retain(|one| !by_parent(one));
        }
        self.children.insert(parent, Vec::new());
    }

    /// Adds the edges from a new node to its children.
    pub(super) fn add_edges(&mut self, parent: u64) {
        for (child, id) in self.children(parent).to_vec().into_iter().enumerate() {
            self.add(id, edge(parent, child));
        }
        self.uses_mut(parent);
        self.measure(parent);
    }

    /// Turns the edge from a node to its child at an index to another node.
    pub(super) fn retarget_edge(&mut self, parent: u64, child: usize, to: u64) {
        if self.stands_on(to, parent) {
            self.in_loop = Some(parent);
            return;
        }
        self.remove(|by| matches!(by, By::Node { id, child: at } if (*id, *at) == (parent, child)));
        self.add(to, edge(parent, child));
        let mut children = self.children(parent).to_vec();
        children[child] = to;
        self.children.insert(parent, children);
        self.uses_mut(parent);
        self.measure(parent);
    }

    /// Turns those uses of a node that `which` picks to another, but for those by that other.
    pub(super) fn move_uses(&mut self, from: u64, to: u64, which: impl Fn(&By) -> bool) {
        let by_other = |by: &By| matches!(by, By::Node { id, .. } if *id == to);
        let uses = self.uses_mut(from);
        let moved: Vec<Use> =
            uses.extract_if(.., |one| !by_other(&one.by) && which(&one.by)).collect();
        for one in moved {
            match one.by {
                By::Node { id, child } => self.retarget_edge(id, child, to),
                _ => self.add(to, one),
            }
        }
    }

    /// Asks a node again what it needs of its children.
    pub(super) fn settle_again(&mut self, node: u64) {
        self.uses_mut(node);
    }

    /// Changes what a user that is no node holds.
    pub(super) fn change_user(&mut self, user: u64, perms: Perms) {
        let is_match = |by: &By| matches!(by, By::User { id, .. } if *id == user);
        let nodes: Vec<u64> = self.state.nodes.keys().copied().collect();
        for node in nodes {
            if let Some(at) = self.uses(node).iter().position(|one| is_match(&one.by)) {
                self.uses_mut(node)[at].perms = perms;
            }
        }
    }

    // ---- Making it happen

    /// Makes the change, or changes nothing.
    pub(super) fn apply(self) -> Result<(), Error> {
        self.make(None)
    }

    /// Makes the change, or changes nothing. What it gives up stays locked until [`release_locks`] for the claim:
    /// requests may still be in flight to it.
    pub(super) fn apply_keeping_locks(self, claim: u64) -> Result<(), Error> {
        self.make(Some(claim))
    }

    /// Makes the change, or changes nothing.
    fn make(mut self, keep_for: Option<u64>) -> Result<(), Error> {
        if let Some(node) = self.in_loop {
            return Err(Error::new(format!("Making '{}' stand on itself", self.name(node))));
        }
        self.check_heights()?;
        let mut wanted = Vec::new();
        for (node, perms) in self.settle_all() {
            self.check(node, perms)?;
            let locks = self.locks(node, perms, keep_for);
            wanted.push(Wanted { node, perms, locks });
        }
        // Locks talk to the file system with the list of nodes locked. They are few, local and quick, and only a
        // control thread waits.
        for (at, one) in wanted.iter().enumerate() {
            if let Err(error) = prepare(self.state.entry(one.node), one.locks) {
                for one in wanted[..at].iter().rev() {
                    rollback(self.state.entry(one.node), one.locks);
                }
                return Err(error);
            }
        }
        self.commit(&wanted, keep_for);
        Ok(())
    }

    /// What a node's locks shall stand for when its uses need `perms`: nothing is given up as long as it is kept.
    fn locks(&self, node: u64, perms: Perms, keep_for: Option<u64>) -> Perms {
        let entry = self.state.entry(node);
        let keeps = keep_for.is_some() || self.state.claims.keeps_locks(node);
        entry.wanted_locks(if keeps { entry.locked.and(perms) } else { perms })
    }

    /// Makes a change that only gives up. It cannot fail: what stays locked against all
    /// expectation is logged.
    pub(super) fn loosen(self) {
        self.force(None);
    }

    /// Makes a change that leads back to what was before. It cannot fail; what it gives up stays locked until
    /// [`release_locks`] for the claim.
    pub(super) fn go_back(self, claim: u64) {
        self.force(Some(claim));
    }

    /// Makes the change without asking whether it may be made.
    fn force(mut self, keep_for: Option<u64>) {
        let mut wanted = Vec::new();
        for (node, perms) in self.settle_all() {
            let (locks, entry) = (self.locks(node, perms, keep_for), self.state.entry(node));
            let locks = match prepare(entry, locks) {
                Ok(()) => locks,
                Err(error) => {
                    log::error!("{}: changing its locks: {error}", entry.node.name());
                    entry.locked
                }
            };
            wanted.push(Wanted { node, perms, locks });
        }
        self.commit(&wanted, keep_for);
    }

    /// What all uses of a node hold and allow together, for each node whose uses change: parents before children.
    fn settle_all(&mut self) -> Vec<(u64, Perms)> {
        let place = |plan: &Plan<'_>, node| (Reverse(plan.height(node).edges), node);
        let mut pending: Pending = self.uses.keys().map(|&node| place(self, node)).collect();
        let mut settled = Vec::new();
        while let Some((_, node)) = pending.pop_first() {
            let perms = self.uses(node).iter().fold(Perms::NONE, |all, one| all.and(one.perms));
            for child in self.settle(node, perms) {
                pending.insert(place(self, child));
            }
            settled.push((node, perms));
        }
        settled
    }

    /// Tells the children of a node what it means to them that all its uses together are `perms`. Those for which
    /// it means something new.
    fn settle(&mut self, node: u64, perms: Perms) -> Vec<u64> {
        let mut changed = Vec::new();
        let driver_node = self.state.entry(node).node.clone();
        for (child, id) in self.children(node).to_vec().into_iter().enumerate() {
            let mut needed = driver_node.driver().child_perms(child, perms);
            if driver_node.options().force_share {
                needed.shared = Perms::NONE.shared;
            }
            let is_edge = |one: &Use| matches!(one.by, By::Node { id, child: at } if (id, at) == (node, child));
            let place = self.uses(id).iter().position(is_edge);
            if let Some(place) = place.filter(|&place| self.uses(id)[place].perms != needed) {
                self.uses_mut(id)[place].perms = needed;
                changed.push(id);
            }
        }
        changed
    }

    fn commit(self, wanted: &[Wanted], keep_for: Option<u64>) {
        if let Some(claim) = keep_for {
            self.state.claims.keep_locks(claim, wanted.iter().map(|one| one.node));
        }
        for (node, uses) in self.uses {
            self.state.entry_mut(node).uses = uses;
        }
        for (node, children) in self.children {
            self.state.entry_mut(node).children = children;
        }
        for (node, height) in self.heights {
            self.state.entry_mut(node).height = height;
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
        let uses = self.uses(node).iter().filter(|one| self.state.counts(&one.by));
        let uses: Vec<&Use> = uses.collect();
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

    fn describe(&self, by: &By) -> (String, Role) {
        match by {
            By::Node { id, child } => {
                let role = self.state.entry(*id).node.driver().children()[*child].role();
                (format!("node '{}'", self.name(*id)), role)
            }
            By::Opening { name, role, .. } => (format!("node '{name}'"), *role),
            By::User { what, .. } => (what.to_string(), Role::Root),
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

    // ---- Heights

    fn height(&self, node: u64) -> Height {
        self.heights.get(&node).copied().unwrap_or_else(|| self.state.entry(node).height)
    }

    /// Works out the height of a node whose children have changed, and of its ancestors.
    fn measure(&mut self, node: u64) {
        let mut pending = vec![node];
        while let Some(node) = pending.pop() {
            let roles = self.state.entry(node).node.clone();
            let is_backing = roles.driver().children().iter().map(Child::is_backing);
            let below = self.children(node).iter().map(|&child| self.height(child));
            let height = Height::over(below.zip(is_backing));
            if height != self.height(node) {
                self.heights.insert(node, height);
                pending.extend(self.uses(node).iter().filter_map(parent));
            }
        }
    }

    /// Whether a node is the same as another or above it, at any distance.
    fn stands_on(&self, node: u64, below: u64) -> bool {
        let mut seen = BTreeSet::from([below]);
        let mut pending = vec![below];
        while let Some(at) = pending.pop() {
            if at == node {
                return true;
            }
            pending.extend(self.uses(at).iter().filter_map(parent).filter(|id| seen.insert(*id)));
        }
        false
    }

    /// Whether one more image fits between a node and those above it.
    pub(super) fn check_backing_more(mut self, node: u64) -> Result<(), Error> {
        let higher = Height::over([(self.height(node), true)].into_iter());
        self.heights.insert(node, higher);
        let parents: Vec<u64> = self.uses(node).iter().filter_map(parent).collect();
        parents.into_iter().for_each(|parent| self.measure(parent));
        self.check_heights()
    }

    /// Refuses graphs that are too deep, in the name of the highest node.
    fn check_heights(&self) -> Result<(), Error> {
        let too_high = self.heights.iter().filter_map(|(&node, height)| {
            height.excess().map(|excess| (height.edges, node, excess))
        });
        match too_high.max() {
            Some((_, node, excess)) => Err(Error::new(format!("'{}' {excess}", self.name(node)))),
            None => Ok(()),
        }
    }
}

/// The node that a use is by.
fn parent(one: &Use) -> Option<u64> {
    match one.by {
        By::Node { id, .. } => Some(id),
        _ => None,
    }
}

/// A node's use of its child.
fn edge(parent: u64, child: usize) -> Use {
    // Whether the child is needed active, the parent's own state tells.
    Use { by: By::Node { id: parent, child }, perms: Perms::NONE, active: false }
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

/// Gives up the locks that [`Plan::apply_keeping_locks`] has kept for a claim.
pub(super) fn release_locks(state: &mut State, claim: u64) {
    for node in state.claims.take_locked(claim) {
        let Some(entry) = state.nodes.get_mut(&node) else { continue };
        let wanted = entry.wanted_locks(entry.perms);
        match prepare(entry, wanted) {
            Ok(()) => commit(entry, wanted),
            Err(error) => log::error!("{}: giving up locks: {error}", entry.node.name()),
        }
    }
}
