//! Claims, which decide which changes of the graph run concurrently and which wait for each other.
//!
//! A change claims the nodes that it touches before it looks at them, and has them until it ends. The rules:
//!
//! * A change of a node may also write to what the node keeps its data in. So it *changes* the node, all below it
//!   but for backing files, and everything that stands on one of these. It *keeps* all other nodes below: they
//!   stay open and where they are.
//! * Two claims meet if one of them changes a node that the other changes or keeps. Two that keep the same node do
//!   not: disks that share a backing file change independently of each other.
//! * Claims that meet are served first come, first served: a claim waits for those that are served and for those
//!   that wait since before it. Claims that do not meet never wait for each other.
//! * A claim that is served never waits for another one, so no circle of waiting changes can form. Nodes that it
//!   opens are its own. A node that an opening finds by name while it is served is added if no other claim
//!   changes it. If one does, the opening gives everything back, and begins again with a claim that has the node
//!   from the start.
//! * While a claim waits, its nodes are worked out from the graph as it is; when it is served, nobody else changes
//!   what is around them.
//! * A node that a change no longer uses is ended within the claim of that change ([`super::endings`]).
//!
//! Claims are part of the graph's state, under its mutex, which is never held across an await.

use super::permissions::release_locks;
use super::{By, Graph, State};
use crate::io::sync::Waiters;
use std::collections::BTreeSet;

/// A node that a change is about.
#[derive(Clone)]
pub(super) enum Part {
    /// It changes, by the rule for changes.
    Change(u64),
    /// It alone changes.
    Alone(u64),
    /// It and all below it change.
    Below(u64),
    /// The node that has this name then is kept, with all below it.
    Keep(String),
}

/// The claims of all changes, in the order in which they came.
#[derive(Default)]
pub(super) struct Claims {
    all: Vec<Record>,
    /// Tasks that look again whenever a claim or the use of a node has ended.
    waiting: Waiters,
    /// How many nodes were looked at to find out what claims have.
    #[cfg(test)]
    pub looked_at: std::cell::Cell<usize>,
}

struct Record {
    id: u64,
    parts: Vec<Part>,
    /// The claim that this one is a part of: the two do not meet.
    within: Option<u64>,
    /// The node that it is to end.
    ends: Option<u64>,
    served: bool,
    nodes: Nodes,
    /// Nodes that were opened under it.
    opened: Vec<u64>,
    /// A node that it needs and that another claim changes.
    missed: Option<String>,
    /// Nodes whose locks stay while requests to them may be in flight.
    locked: BTreeSet<u64>,
}

#[derive(Default)]
struct Nodes {
    changed: BTreeSet<u64>,
    kept: BTreeSet<u64>,
}

/// The end of a node, which has a place in the order of claims.
pub(super) struct End(u64);

/// The claim of a change, until it is dropped.
pub(super) struct Claim {
    graph: Graph,
    pub(super) id: u64,
}

impl Graph {
    /// Waits until nobody else changes these nodes.
    pub(super) async fn claim(&self, parts: Vec<Part>) -> Claim {
        let id = self.0.state.lock().enqueue(parts, None, None);
        let claim = Claim { graph: self.clone(), id };
        claim.served().await;
        claim
    }

    /// The claim under which a node is ended.
    pub(super) fn claim_of_end(&self, End(id): End) -> Claim {
        Claim { graph: self.clone(), id }
    }

    /// Keeps the node of this name too, with all below it, unless another claim changes one of them.
    pub(in crate::block) fn keep_too(&self, claim: u64, name: &str) -> bool {
        let mut state = self.0.state.lock();
        let wanted = state.nodes_of(&[Part::Keep(name.to_owned())]);
        let mut others = state.claims.all.iter().filter(|other| other.id != claim && other.served);
        let is_free = others.all(|other| other.nodes.changed.is_disjoint(&wanted.kept));
        if let Some(record) = state.claims.find(claim) {
            match is_free {
                true => record.nodes.kept.extend(wanted.kept),
                false => record.missed = Some(name.to_owned()),
            }
        }
        is_free
    }

    /// Makes all tasks look again that wait for claims or for ends of nodes.
    pub(super) fn retry_waiting(&self) {
        let waiting = self.0.state.lock().claims.waiting.take();
        waiting.wake();
    }

    /// Waits until `is_so`; [`Graph::retry_waiting`] is called whenever it may have become so.
    pub(super) async fn wait_until(&self, mut is_so: impl FnMut(&mut State) -> bool) {
        self.0
            .state
            .wait_for(|state| match is_so(state) {
                true => Ok(()),
                false => Err(&mut state.claims.waiting),
            })
            .await;
    }
}

impl Claim {
    pub(super) fn new(graph: &Graph, id: u64) -> Claim {
        Claim { graph: graph.clone(), id }
    }

    /// Returns when it is this claim's turn.
    pub async fn served(&self) {
        self.graph.wait_until(|state| state.serve(self.id)).await;
    }

    /// Nodes that were opened under it.
    pub fn opened(&self) -> BTreeSet<u64> {
        let mut state = self.graph.0.state.lock();
        state
            .claims
            .find(self.id)
            .map_or_else(BTreeSet::new, |r| r.opened.iter().copied().collect())
    }

    /// All nodes that it changes.
    pub fn changed(&self) -> BTreeSet<u64> {
        let mut state = self.graph.0.state.lock();
        state.claims.find(self.id).map_or_else(BTreeSet::new, |r| r.nodes.changed.clone())
    }

    /// A node that it needs and could not have.
    pub fn missed(&self) -> Option<String> {
        self.graph.0.state.lock().claims.find(self.id)?.missed.clone()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.graph.0.state.lock();
        release_locks(&mut state, self.id);
        state.claims.all.retain(|record| record.id != self.id);
        drop(state);
        self.graph.retry_waiting();
    }
}

impl Claims {
    fn find(&mut self, id: u64) -> Option<&mut Record> {
        self.all.iter_mut().find(|record| record.id == id)
    }

    /// A node has been opened under a claim.
    pub fn add_opened(&mut self, claim: u64, node: u64) {
        if let Some(record) = self.find(claim) {
            record.opened.push(node);
            record.nodes.changed.insert(node);
        }
    }

    /// Whether a claim changes a node.
    fn changes(&self, claim: u64, node: u64) -> bool {
        self.all.iter().any(|record| record.id == claim && record.nodes.changed.contains(&node))
    }

    /// Whether a node is about to end, within this claim if one is given.
    pub fn ends(&self, node: u64, within: Option<u64>) -> bool {
        let mut ends = self.all.iter().filter(|record| record.ends == Some(node));
        ends.any(|end| within.is_none() || end.within == within)
    }

    /// Whether one of these nodes is about to end, within this claim if one is given.
    pub fn ends_any(&self, nodes: &BTreeSet<u64>, within: Option<u64>) -> bool {
        let mut ends = self.all.iter().filter(|record| within.is_none() || record.within == within);
        ends.any(|end| end.ends.is_some_and(|node| nodes.contains(&node)))
    }

    /// The locks of these nodes stay until [`Claims::take_locked`].
    pub fn keep_locks(&mut self, claim: u64, nodes: impl Iterator<Item = u64>) {
        if let Some(record) = self.find(claim) {
            record.locked.extend(nodes);
        }
    }

    /// Whether a claim keeps the locks of a node.
    pub fn keeps_locks(&self, node: u64) -> bool {
        self.all.iter().any(|record| record.locked.contains(&node))
    }

    /// The nodes whose locks nobody keeps once this claim does not.
    pub fn take_locked(&mut self, claim: u64) -> Vec<u64> {
        let locked = self.find(claim).map(|record| std::mem::take(&mut record.locked));
        let locked = locked.into_iter().flatten();
        locked.filter(|&node| !self.keeps_locks(node)).collect()
    }
}

impl Record {
    fn meets(&self, other: &Record) -> bool {
        if self.within == Some(other.id) || other.within == Some(self.id) {
            return false;
        }
        let (a, b) = (&self.nodes, &other.nodes);
        !a.changed.is_disjoint(&b.changed)
            || !a.changed.is_disjoint(&b.kept)
            || !a.kept.is_disjoint(&b.changed)
    }
}

impl State {
    /// A claim of nodes that another one has, which may be kept when that has ended.
    pub(super) fn claim_within(&mut self, outer: &Claim, parts: Vec<Part>) -> u64 {
        let id = self.enqueue(parts, Some(outer.id), None);
        self.serve(id);
        id
    }

    /// Takes a place in the order of claims.
    fn enqueue(&mut self, parts: Vec<Part>, within: Option<u64>, ends: Option<u64>) -> u64 {
        self.next_id += 1;
        self.claims.all.push(Record {
            id: self.next_id,
            parts,
            within,
            ends,
            served: false,
            nodes: Nodes::default(),
            opened: Vec::new(),
            missed: None,
            locked: BTreeSet::new(),
        });
        self.next_id
    }

    /// Begins the end of a node, unless it has begun. It is within a claim if that changes the node.
    pub(super) fn begin_end(&mut self, node: u64, within: Option<u64>) -> Option<(u64, End)> {
        let within = within.filter(|&claim| self.claims.changes(claim, node));
        if self.claims.ends(node, within) {
            return None;
        }
        let end = self.enqueue(vec![Part::Alone(node)], within, Some(node));
        Some((node, End(end)))
    }

    /// Transfers the claim of the end of a node, which is gone, to the end of a node below it. False if that one has
    /// its own end, or does not belong to the change that the first one was part of.
    pub(super) fn move_end(&mut self, claim: u64, to: u64) -> bool {
        let Some(at) = self.claims.all.iter().position(|record| record.id == claim) else {
            return false;
        };
        let within = self.claims.all[at].within;
        let belongs = within.is_none_or(|change| self.claims.changes(change, to));
        if !belongs || self.claims.ends(to, within) {
            return false;
        }
        let record = &mut self.claims.all[at];
        (record.ends, record.parts) = (Some(to), vec![Part::Alone(to)]);
        // It has kept all that it needs now. Others may keep the node, so that it has to be its turn once more.
        record.nodes.changed = BTreeSet::from([to]);
        record.nodes.kept.remove(&to);
        self.claims.all[at].served = self.is_free(at);
        true
    }

    /// Whether a claim is served, from now on if it is its turn.
    fn serve(&mut self, id: u64) -> bool {
        let Some(at) = self.claims.all.iter().position(|record| record.id == id) else {
            return true;
        };
        for waiting in 0..=at {
            if !self.claims.all[waiting].served {
                self.claims.all[waiting].nodes = self.nodes_of(&self.claims.all[waiting].parts);
            }
        }
        let served = self.claims.all[at].served || self.is_free(at);
        self.claims.all[at].served = served;
        served
    }

    /// Whether a claim, by its place among all, meets none of those that it waits for.
    fn is_free(&self, at: usize) -> bool {
        let mine = &self.claims.all[at];
        // What is done within a claim that is served does not queue behind the tasks that wait for that claim.
        let waits_for = |&(other_at, other): &(usize, &Record)| {
            other_at != at && (other.served || other_at < at && mine.within.is_none())
        };
        let mut others = self.claims.all.iter().enumerate().filter(waits_for);
        others.all(|(_, other)| !mine.meets(other))
    }

    /// What a claim of these parts has, as the graph is now.
    fn nodes_of(&self, parts: &[Part]) -> Nodes {
        let Nodes { mut changed, mut kept } = Nodes::default();
        for part in parts {
            match part {
                Part::Change(node) => {
                    let stored = self.reach(&[*node], |state, id| state.storage_of(id));
                    kept.extend(self.all_below(&stored));
                    changed.extend(self.all_above(&stored));
                }
                Part::Alone(node) => {
                    changed.insert(*node);
                    kept.extend(self.all_below(&[*node]));
                }
                Part::Below(node) => changed.extend(self.all_below(&[*node])),
                Part::Keep(name) => {
                    let node = self.by_name(name).map(|(id, _)| id);
                    kept.extend(self.all_below(node.as_slice()));
                }
            }
        }
        Nodes { changed, kept }
    }

    /// These nodes and all below them.
    pub(super) fn all_below(&self, nodes: &[u64]) -> Vec<u64> {
        self.reach(nodes, |state, id| state.entry(id).children.clone())
    }

    /// These nodes and all above them.
    pub(super) fn all_above(&self, nodes: &[u64]) -> Vec<u64> {
        let parents = |state: &State, id| {
            let parent = |by: &By| match by {
                By::Node { id, .. } => Some(*id),
                _ => None,
            };
            state.entry(id).uses.iter().filter_map(|one| parent(&one.by)).collect()
        };
        self.reach(nodes, parents)
    }

    /// The nodes below this one that it may write to.
    fn storage_of(&self, id: u64) -> Vec<u64> {
        let entry = self.entry(id);
        let children = entry.node.driver().children().iter().zip(&entry.children);
        children.filter(|(child, _)| !child.is_backing()).map(|(_, &id)| id).collect()
    }

    /// These nodes, as far as they are still there, and all that `next` leads to from them.
    fn reach(&self, nodes: &[u64], next: impl Fn(&State, u64) -> Vec<u64>) -> Vec<u64> {
        let mut pending: Vec<u64> = nodes.to_vec();
        let mut seen = BTreeSet::new();
        while let Some(id) = pending.pop() {
            if self.nodes.contains_key(&id) && seen.insert(id) {
                #[cfg(test)]
                self.claims.looked_at.update(|n| n + 1);
                pending.extend(next(self, id));
            }
        }
        seen.into_iter().collect()
    }
}
