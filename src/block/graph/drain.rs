//! Changes below running users: pausing them, retargeting an edge, resizing.
//!
//! The invariant: a request runs on the graph that it was mapped on. A change asks registered users to pause, and waits
//! for unregistered requests on the fast path ([`crate::io::epoch`]) before it releases anything that they may use.

use super::claims::{Claim, Part};
use super::permissions::{Plan, release_locks};
use super::rest::{Asked, DEADLINE};
use super::step::{Meanwhile, Step};
use super::{By, Graph, State, Use};
use crate::block::{
    Error, LocalFuture, Node, Perm, Perms, Preallocation, Role, Snapshots, resizable,
};
use crate::io::{self, epoch};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

/// What a user of a node does when the graph changes below it. The graph holds it weakly.
pub trait User: Send + Sync {
    /// Starts no more requests, from this call on, and waits until those it has started have completed.
    /// It blocks no thread meanwhile and holds no lock.
    fn quiesce(&self) -> LocalFuture<'_, ()>;

    /// As [`User::quiesce`], for a user that has just attached and has started nothing yet. Returns at once.
    fn hold(&self);

    /// Resumes. Called once after each [`User::quiesce`], also after one that was not waited for to its end, and
    /// after each [`User::hold`].
    fn resume(&self);

    /// How long its requests are waited for, if that is less than the graph's own time.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// What it has in flight, for errors: `2 requests in flight, the oldest a read of 512 bytes at 0`.
    fn in_flight(&self) -> LocalFuture<'_, String> {
        Box::pin(std::future::ready("requests in flight".to_owned()))
    }

    /// The length of the node has changed, or what its requests should look like; called while the user is
    /// paused.
    fn resized(&self) {}

    /// Another node stands where its own stood, with the same permissions for it; called while the user is
    /// paused. It has forgotten the old one when this ends.
    fn moved<'a>(&'a self, node: &'a Arc<Node>) -> LocalFuture<'a, ()> {
        let _ = node;
        Box::pin(std::future::ready(()))
    }

    /// Whether [`User::moved`] does anything.
    fn can_move(&self) -> bool {
        false
    }
}

/// A node and its registered users.
pub(super) struct Used {
    pub node: Arc<Node>,
    pub users: Vec<Arc<dyn User>>,
}

/// A drain under way: its nodes, and the users that it has paused. Users that come to these nodes, or to nodes above
/// them, are paused too.
pub(super) struct Drain {
    id: u64,
    nodes: Vec<u64>,
    pub users: Vec<Arc<dyn User>>,
}

/// The graph at rest around some nodes, until it is dropped: their users are paused, and nobody else changes these
/// nodes or what is around them ([`super::claims`]).
pub struct Drained {
    graph: Graph,
    // They continue before others may change the graph.
    pause: Pause,
    claim: Claim,
    /// A step has not ended in time.
    pub(super) late: Cell<bool>,
}

impl Drained {
    pub(super) fn is_late(&self) -> bool {
        self.late.get()
    }

    pub(super) fn graph(&self) -> &Graph {
        &self.graph
    }

    pub(super) fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Those that are paused, also those that have come since.
    pub(super) fn users(&self) -> Vec<Arc<dyn User>> {
        let mut state = self.graph.0.state.lock();
        state.drain(self.pause.id).map_or_else(Vec::new, |drain| drain.users.clone())
    }
}

/// The users that a drain has paused continue when this is dropped.
pub(super) struct Pause {
    graph: Graph,
    id: u64,
}

impl Pause {
    /// `id`: of the drain.
    pub(super) fn new(graph: &Graph, id: u64) -> Pause {
        Pause { graph: graph.clone(), id }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        let mut state = self.graph.0.state.lock();
        let mut ended = state.drains.extract_if(.., |drain| drain.id == self.id);
        let users = ended.next().map_or_else(Vec::new, |drain| drain.users);
        drop(ended);
        drop(state);
        users.iter().for_each(|user| user.resume());
    }
}

impl State {
    pub(super) fn drain(&mut self, id: u64) -> Option<&mut Drain> {
        self.drains.iter_mut().find(|drain| drain.id == id)
    }

    /// Keeps the users of a node and of those above it paused, which are at rest, until the drain of this number
    /// has ended.
    pub(super) fn pause_longer(&mut self, node: u64) -> u64 {
        self.next_id += 1;
        let users: Vec<_> = self.asked(&[node]).into_iter().map(|asked| asked.user).collect();
        users.iter().for_each(|user| user.hold());
        self.drains.push(Drain { id: self.next_id, nodes: vec![node], users });
        self.next_id
    }

    /// Pauses a user that has just attached to a node, if the node is above one that is drained.
    pub(super) fn hold_inside(&mut self, node: u64, user: &Arc<dyn User>) {
        if self.drains.is_empty() {
            return;
        }
        let below = self.all_below(&[node]);
        for drain in &mut self.drains {
            if drain.nodes.iter().any(|id| below.contains(id)) {
                user.hold();
                drain.users.push(user.clone());
            }
        }
    }
}

impl Graph {
    /// Pauses all users whose requests reach `node`.
    ///
    /// # Errors
    /// The node has been deleted, or requests do not end ([`super::rest`]); all continue then as before.
    pub async fn drain(&self, node: &Arc<Node>) -> Result<Drained, Error> {
        self.drain_all(std::slice::from_ref(node)).await
    }

    /// Pauses all users whose requests reach one of `nodes`, at one moment, and all users that are added before the
    /// drain ends.
    ///
    /// # Errors
    /// As [`Graph::drain`].
    pub async fn drain_all(&self, nodes: &[Arc<Node>]) -> Result<Drained, Error> {
        self.drain_reading(nodes, &[]).await
    }

    /// [`Graph::drain_all`] for a change that reads from `sources`, which nobody changes meanwhile.
    ///
    /// # Errors
    /// As [`Graph::drain`].
    pub async fn drain_reading(
        &self,
        nodes: &[Arc<Node>],
        sources: &[Arc<Node>],
    ) -> Result<Drained, Error> {
        let claim = self.claim_change(nodes, sources).await?;
        self.drain_claimed(nodes, claim).await
    }

    pub(super) async fn drain_claimed(
        &self,
        nodes: &[Arc<Node>],
        claim: Claim,
    ) -> Result<Drained, Error> {
        let (drained, asked) = {
            let mut state = self.0.state.lock();
            let ids = nodes.iter().map(|node| state.id(node)).collect::<Result<Vec<_>, _>>()?;
            let asked = state.asked(&ids);
            (self.begin_drain(&mut state, ids, claim), asked)
        };
        self.bring_to_rest(drained.pause.id, &asked).await?;
        Ok(drained)
    }

    /// With nobody paused yet.
    fn begin_drain(&self, state: &mut State, nodes: Vec<u64>, claim: Claim) -> Drained {
        state.next_id += 1;
        let id = state.next_id;
        state.drains.push(Drain { id, nodes, users: Vec::new() });
        Drained { graph: self.clone(), pause: Pause::new(self, id), claim, late: Cell::new(false) }
    }

    /// Waits until nobody else changes `changed`, nor the nodes that are only to be `kept`.
    pub(super) async fn claim_change(
        &self,
        changed: &[Arc<Node>],
        kept: &[Arc<Node>],
    ) -> Result<Claim, Error> {
        let mut parts = {
            let state = self.0.state.lock();
            let parts = changed.iter().map(|node| Ok(Part::Change(state.id(node)?)));
            parts.collect::<Result<Vec<_>, Error>>()?
        };
        parts.extend(kept.iter().map(|node| Part::Keep(node.name().to_owned())));
        self.claim_in_time(parts, changed.first()).await
    }

    /// Turns the edge from `parent` to its child in `role` to another node, under running users.
    ///
    /// # Errors
    /// A conflict of permissions, a loop, or a node that asks more of its requests than the old one
    /// did; nothing has changed then.
    pub async fn replace(
        &self,
        parent: &Arc<Node>,
        role: Role,
        node: &Arc<Node>,
    ) -> Result<(), Error> {
        let claim = self.claim_change(std::slice::from_ref(parent), std::slice::from_ref(node));
        let drained = self.drain_claimed(std::slice::from_ref(parent), claim.await?).await?;
        let children = parent.driver().children();
        let index = children.iter().position(|child| child.role() == role).ok_or_else(|| {
            Error::new(format!("Node '{}' does not have a '{role}' child", parent.name()))
        })?;
        let child = &children[index];
        if parent.is_active() && !node.is_active() {
            let (parent, node) = (parent.name(), node.name());
            return Err(Error::new(format!(
                "Active node '{parent}' cannot stand on inactive node '{node}'"
            )));
        }
        // Fast requests through the parent go through the new node from now on.
        parent.members().iter().for_each(|member| node.add_member(member));
        {
            let mut state = self.0.state.lock();
            let (from, to) = (state.id(parent)?, state.id(node)?);
            let mut plan = Plan::new(&mut state);
            plan.retarget_edge(from, index, to);
            plan.apply_keeping_locks(drained.claim.id)?;
        }
        let len = parent.len();
        let old = child.replace(node.clone());
        if self.follow(node)? || parent.len() != len {
            drained.users().iter().for_each(|user| user.resized());
        }
        // Again, for users that attached to the parent meanwhile and found the old node below it.
        let members = parent.members();
        members.iter().for_each(|member| node.add_member(member));
        drained.settle(parent, members, old.clone()).await;
        release_locks(&mut self.0.state.lock(), drained.claim.id);
        let left = {
            let state = self.0.state.lock();
            state.id(&old).map_or_else(|_| Vec::new(), |id| state.all_below(&[id]))
        };
        drop((old, drained));
        let left = left.into_iter().collect();
        // The change is whole: what takes longer is closed by a task of its own.
        let _in_time = io::in_time(DEADLINE, self.end_unused(None, &left)).await;
        Ok(())
    }

    /// Sets the length of a node, in bytes, and tells its users.
    ///
    /// # Errors
    /// In QEMU's words: a read-only node, a conflict with a user that does not allow resizing, or
    /// what the driver says.
    pub async fn resize(&self, node: &Arc<Node>, len: u64) -> Result<(), Error> {
        if node.is_read_only() {
            return Err(Error::new("Image is read-only"));
        }
        if !node.is_active() {
            return Err(Error::new(format!("Node '{}' is inactive", node.name())));
        }
        resizable(node)?;
        node.check_bitmaps_for_resize()?;
        let perms = Perms { held: Perm::RESIZE, shared: Perm::all() };
        let hold = self.attach(node, "an unnamed block device", perms, None)?;
        let drained = self.drain(node).await?;
        let members = node.members();
        let (clone, users) = (node.clone(), drained.users());
        let work = async move {
            let _hold = hold;
            epoch::synchronize(&members).await;
            // A device that has grown by more than is asked for is taken as it is.
            match len > clone.len() {
                true => clone.grow(len, Preallocation::Off).await?,
                false => clone.resize(len, true).await?,
            }
            clone.bitmaps().resize(clone.len(), &members);
            users.iter().for_each(|user| user.resized());
            Ok(())
        };
        let what = format!("Resizing node '{}', whose users wait for it,", node.name());
        // While the length changes, it is unknown which requests are inside it.
        let step = Step { node, what, meanwhile: Meanwhile::Nothing };
        drained.step(step, work, async |_| ()).await
    }

    /// Works on the internal snapshots of a node, which its users continue using, while nobody else changes the node
    /// or its length. None if it has none, nor has the only node below it.
    pub async fn with_snapshots<T>(
        &self,
        node: &Arc<Node>,
        work: impl AsyncFnOnce(&dyn Snapshots) -> Result<T, Error>,
    ) -> Option<Result<T, Error>> {
        let worked = self.undisturbed(node, &[], async || with_snapshots(node, work).await);
        worked.await.unwrap_or_else(|error| Some(Err(error)))
    }

    /// Changes a node's bitmaps while nobody else changes the node, nor those of `sources`, which the change reads.
    ///
    /// # Errors
    /// A node has been deleted, or what the change says.
    pub async fn change_bitmaps(
        &self,
        node: &Arc<Node>,
        sources: &[Arc<Node>],
        change: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let changed = async || {
            {
                let state = self.0.state.lock();
                sources.iter().chain([node]).try_for_each(|node| state.id(node).map(drop))?;
            }
            change(node).await
        };
        self.undisturbed(node, sources, changed).await??;
        // Storage that does not answer delays only the requests that wait for it.
        node.settle_bitmaps().await;
        Ok(())
    }

    /// Makes the parents of a node adopt its new limits on requests. Whether that is something new for one of them.
    /// Nothing is in flight there.
    pub(super) fn follow(&self, node: &Arc<Node>) -> Result<bool, Error> {
        let above: Vec<Arc<Node>> = {
            let state = self.0.state.lock();
            let mut above = state.all_above(&[state.id(node)?]);
            above.sort_by_key(|&id| state.entry(id).height.edges);
            above.into_iter().map(|id| state.entry(id).node.clone()).collect()
        };
        Ok(above.iter().fold(false, |is_new, node| node.follow_children() | is_new))
    }

    /// A node and all nodes above it.
    pub(super) fn above(&self, node: &Arc<Node>) -> Result<Vec<Used>, Error> {
        let state = self.0.state.lock();
        Ok(state.above(state.id(node)?))
    }
}

impl State {
    /// The registered users whose requests reach these nodes.
    fn asked(&self, nodes: &[u64]) -> Vec<Asked> {
        let above = self.all_above(nodes);
        let users =
            above.iter().flat_map(|&id| self.entry(id).uses.iter().map(move |one| (id, one)));
        let asked = users.filter_map(|(id, one)| match &one.by {
            By::User { what, user, .. } => {
                let node = self.entry(id).node.name().to_owned();
                Some(Asked { what: what.clone(), node, user: user.as_ref()?.upgrade()? })
            }
            _ => None,
        });
        asked.collect()
    }

    /// A node and all nodes above it.
    fn above(&self, node: u64) -> Vec<Used> {
        let user = |one: &Use| match &one.by {
            By::User { user, .. } => user.as_ref()?.upgrade(),
            By::Node { .. } | By::Opening { .. } => None,
        };
        let used = |id| {
            let entry = self.entry(id);
            Used { node: entry.node.clone(), users: entry.uses.iter().filter_map(user).collect() }
        };
        self.all_above(&[node]).into_iter().map(used).collect()
    }
}

/// Works on the internal snapshots of a node, or of the only node below it, if it has any. A step of a change that
/// has drained the node; others use [`Graph::with_snapshots`].
pub async fn with_snapshots<T>(
    node: &Arc<Node>,
    work: impl AsyncFnOnce(&dyn Snapshots) -> Result<T, Error>,
) -> Option<Result<T, Error>> {
    let mut node = node.clone();
    loop {
        if let Some(snapshots) = node.driver().image().and_then(|image| image.snapshots()) {
            return Some(work(snapshots).await);
        }
        let [only] = node.driver().children() else { return None };
        let below = only.node();
        node = below;
    }
}
