//! The named graph: its nodes, their users, and changes to both.
//!
//! The rule held here: a change happens whole or not at all. Changes of the same nodes are made one at a
//! time (`claims`); the list of nodes has a mutex, which is never held across an await. The data path asks
//! neither.

mod activity;
mod borrowed;
mod claims;
mod drain;
mod endings;
mod following;
mod heights;
mod idle;
mod length;
mod overlay;
mod permissions;
mod reopen;
mod rest;
mod step;
mod succession;

#[cfg(test)]
mod tests;

pub use activity::Activity;
pub use drain::{Drained, User, with_snapshots};
pub use overlay::Over;
pub use reopen::Reopening;
pub use step::{Meanwhile, Step};

use super::depth::Depth;
use super::name::Names;
use super::open::duplicate;
use super::policy::OpenPolicy;
use super::registry::Registry;
use super::{
    BitmapInfo, Discards, Error, ImageInfo, Kind, Node, NodeOptions, Notices, Perms, Role,
};
use crate::io::Worker;
use crate::io::sync::Mutex;
use crate::options::Map;
use claims::{Claim, Claims, Part};
use drain::Drain;
use heights::Height;
use permissions::Plan;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use succession::Stage;

/// A graph of block nodes. Clones are the same graph.
#[derive(Clone)]
pub struct Graph(Arc<Inner>);

struct Inner {
    registry: &'static Registry,
    policy: OpenPolicy,
    state: Mutex<State>,
    notices: Arc<Notices>,
}

#[derive(Default)]
pub(super) struct State {
    /// In the order in which the nodes came.
    nodes: BTreeMap<u64, Entry>,
    next_id: u64,
    next_block: u64,
    /// Changes in progress.
    drains: Vec<Drain>,
    claims: Claims,
}

struct Entry {
    node: Arc<Node>,
    /// Opened by a user, and not yet deleted.
    monitor: bool,
    /// The options that the user opened it with.
    asked: Map,
    /// Newest last.
    uses: Vec<Use>,
    /// The nodes below it, in the driver's order.
    children: Vec<u64>,
    height: Height,
    /// It can have no new users.
    closing: bool,
    stage: Stage,
    /// The permissions that all uses hold and share together.
    perms: Perms,
    /// What the driver's locks stand for: `perms`, or more while requests are still in flight; nothing while the node
    /// is inactive.
    locked: Perms,
}

/// One use of a node.
#[derive(Clone)]
struct Use {
    by: By,
    perms: Perms,
    /// A user that is no node: whether it needs the node active.
    active: bool,
}

/// The user of a node.
#[derive(Clone)]
pub(super) enum By {
    /// An edge from a parent: the parent's number, and the index of the child.
    Node { id: u64, child: usize },
    /// A node that is being opened.
    Opening { id: u64, name: String, role: Role },
    /// Something that is no node: an export, a tool, a job.
    User { id: u64, what: Arc<str>, user: Option<Weak<dyn User>> },
}

/// A user's hold on a node, with the permissions that it was given. Ends when dropped; a node that
/// nobody else holds is closed with the next change of the graph.
pub struct Attachment {
    graph: Graph,
    id: u64,
    node: Arc<Node>,
}

/// The listing of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    pub name: String,
    pub driver: &'static str,
    pub kind: Kind,
    /// As requested, or as `auto-read-only` decided.
    pub read_only: bool,
    /// Its image is ours ([`Activity`]).
    pub active: bool,
    pub options: NodeOptions,
    /// Bytes.
    pub len: u64,
    /// As listings show it ([`super::name`]).
    pub filename: String,
    /// The file that it is in; none where there is no file.
    pub path: Option<String>,
    /// Its driver's description, if there is one.
    pub image: Option<ImageInfo>,
    /// Role and name of the nodes below it.
    pub children: Vec<(Role, String)>,
    /// Newest first.
    pub bitmaps: Vec<BitmapInfo>,
    /// Bytes; 0 if there is none ([`Node::set_write_threshold`]).
    pub write_threshold: u64,
    /// The highest offset written since it was opened, in bytes.
    pub write_highest: u64,
    pub discards: Option<Discards>,
}

impl Graph {
    pub fn new(registry: &'static Registry) -> Graph {
        Graph::with_policy(registry, OpenPolicy::default())
    }

    pub fn with_policy(registry: &'static Registry, policy: OpenPolicy) -> Graph {
        let (state, notices) = Default::default();
        Graph(Arc::new(Inner { registry, policy, state, notices }))
    }

    pub fn policy(&self) -> &OpenPolicy {
        &self.0.policy
    }

    pub fn registry(&self) -> &'static Registry {
        self.0.registry
    }

    /// The notices of its nodes.
    pub fn notices(&self) -> &Arc<Notices> {
        &self.0.notices
    }

    /// The node of this name.
    pub fn find(&self, name: &str) -> Result<Arc<Node>, Error> {
        let state = self.0.state.lock();
        let (_, entry) = state.by_name(name).ok_or_else(|| not_found(name))?;
        Ok(entry.node.clone())
    }

    /// All nodes, newest first.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        let state = self.0.state.lock();
        let named = state.nodes.values().rev().filter(|entry| entry.is_named());
        named.map(|entry| entry.node.clone()).collect()
    }

    /// The description of all nodes, newest first.
    pub fn query(&self) -> Vec<NodeInfo> {
        let mut names = Names::new(self.registry());
        self.nodes().iter().map(|node| NodeInfo::of(node, &mut names)).collect()
    }

    // ---- Opening

    /// Opens a node by its options, with all that they define below it; it stays until it is
    /// deleted ([`Graph::delete`]). Runs on a worker.
    pub async fn open(&self, options: Map) -> Result<Arc<Node>, Error> {
        self.opening(async |claim| self.open_top(options.clone(), claim).await).await
    }

    /// Opens something under a claim, again with more of the graph if it needs nodes that others change.
    async fn opening<T>(&self, open: impl AsyncFn(&Claim) -> Result<T, Error>) -> Result<T, Error> {
        let mut found = Vec::new();
        loop {
            let claim = self.claim(found.clone()).await;
            let result = open(&claim).await;
            let (opened, missed) = (claim.opened(), claim.missed());
            drop(claim);
            // The nodes left by a failed opening.
            self.end_unused(None, &opened).await;
            match missed.filter(|_| result.is_err()) {
                Some(name) => found.push(Part::Keep(name)),
                None => return result,
            }
        }
    }

    /// [`Graph::open`] under a claim.
    async fn open_top(&self, options: Map, claim: &Claim) -> Result<Arc<Node>, Error> {
        let node =
            self.open_node(options.clone(), String::new(), None, Depth::TOP, claim.id).await?;
        self.keep_open(&node, options);
        Ok(node)
    }

    /// A node that was opened with these options stays open until it is deleted.
    fn keep_open(&self, node: &Node, asked: Map) {
        if let Some((_, entry)) = self.0.state.lock().by_name_mut(node.name()) {
            entry.monitor = true;
            entry.asked = asked;
        }
    }

    /// [`Graph::open`] for threads that may wait. Not to be called on a worker.
    pub fn open_on(&self, worker: &Worker, options: Map) -> Result<Arc<Node>, Error> {
        let graph = self.clone();
        worker.block_on(move || async move { graph.open(options).await })
    }

    // ---- Users

    /// Takes permissions on a node for something that is not a node. `what` is how conflicts call it: `export 'e0'`,
    /// `an unnamed block device`. `user` is asked to pause when the graph changes below it, at once if it is
    /// changing; without one, nothing of it may be in flight while others change the graph.
    ///
    /// # Errors
    /// A conflict with other users, a read-only node, or locks that other processes hold; nothing
    /// has changed then.
    pub fn attach(
        &self,
        node: &Arc<Node>,
        what: &str,
        perms: Perms,
        user: Option<Arc<dyn User>>,
    ) -> Result<Attachment, Error> {
        let id = self.next_id();
        let user = user.map(|user| Arc::downgrade(&user));
        self.begin_use(node, By::User { id, what: what.into(), user }, perms)?;
        Ok(Attachment { graph: self.clone(), id, node: node.clone() })
    }

    pub(super) fn begin_use(&self, node: &Arc<Node>, by: By, perms: Perms) -> Result<(), Error> {
        let mut state = self.0.state.lock();
        let id = state.id(node)?;
        if state.entry(id).closing {
            return Err(not_found(node.name()));
        }
        let user = match &by {
            By::User { user, .. } => user.as_ref().and_then(Weak::upgrade),
            By::Node { .. } | By::Opening { .. } => None,
        };
        let mut plan = Plan::new(&mut state);
        plan.add(id, Use { by, perms, active: node.is_active() });
        plan.apply()?;
        if let Some(user) = user {
            state.hold_inside(id, &user);
        }
        Ok(())
    }

    // ---- For opening

    pub(super) fn next_id(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.next_id += 1;
        state.next_id
    }

    /// A name for a node that was given none. No user can give a name that begins so.
    pub(super) fn make_name(&self) -> String {
        let mut state = self.0.state.lock();
        state.next_block += 1;
        format!("#block{:03}", state.next_block)
    }

    /// Puts a node that has just been opened into the graph: what its opening held on the children
    /// becomes what the node itself needs of them for its `first` use.
    pub(super) fn insert(
        &self,
        node: Arc<Node>,
        opening: u64,
        first: Option<(By, Perms)>,
        claim: u64,
    ) -> Result<(), Error> {
        let mut state = self.0.state.lock();
        let leaving = state.leaving(claim, node.name());
        if leaving.is_none() && state.by_name(node.name()).is_some() {
            return Err(duplicate(node.name()));
        }
        let children = node.driver().children().iter().map(|child| state.id(&child.node()));
        let children = children.collect::<Result<Vec<_>, _>>()?;
        let inactive = |id: &&u64| !state.entry(**id).node.is_active();
        if node.is_active()
            && let Some(child) = children.iter().find(inactive)
        {
            let (name, child) = (node.name(), state.entry(*child).node.name());
            return Err(Error::new(format!(
                "Active node '{name}' cannot stand on inactive node '{child}'"
            )));
        }
        let active = node.is_active();
        let (uses, perms) = (Vec::new(), Perms::NONE);
        let (monitor, asked) = (false, Map::new());
        let (height, closing, stage) = Default::default();
        let locked = perms;
        let entry =
            Entry { node, monitor, asked, uses, children, height, closing, stage, perms, locked };
        // A number of its own, because children that were opened with it are older.
        state.next_id += 1;
        let id = state.next_id;
        state.nodes.insert(id, entry);
        state.claims.add_opened(claim, id);
        let result = state.begin(id, leaving.map(|from| (from, claim)), |plan| {
            plan.remove(by_opening(opening));
            plan.add_edges(id);
            if let Some((by, perms)) = first {
                plan.add(id, Use { by, perms, active });
            }
        });
        if result.is_err() {
            state.nodes.remove(&id);
        }
        result
    }

    /// Takes back what an opening still holds.
    pub(super) fn end_opening(&self, id: u64) {
        let mut state = self.0.state.lock();
        let mut plan = Plan::new(&mut state);
        plan.remove(by_opening(id));
        plan.loosen();
    }
}

fn by_opening(opening: u64) -> impl Fn(&By) -> bool {
    move |by| matches!(by, By::Opening { id, .. } if *id == opening)
}

fn not_found(name: &str) -> Error {
    Error::new(format!("Failed to find node with node-name='{}'", name.escape_debug()))
}

impl State {
    fn by_name(&self, name: &str) -> Option<(u64, &Entry)> {
        let mut all = self.nodes.iter().filter(|(_, entry)| entry.is_named());
        all.find(|(_, entry)| entry.node.name() == name).map(|(&id, entry)| (id, entry))
    }

    fn by_name_mut(&mut self, name: &str) -> Option<(u64, &mut Entry)> {
        let mut all = self.nodes.iter_mut().filter(|(_, entry)| entry.is_named());
        all.find(|(_, entry)| entry.node.name() == name).map(|(&id, entry)| (id, entry))
    }

    /// The number of a node of this graph.
    fn id(&self, node: &Arc<Node>) -> Result<u64, Error> {
        let mut all = self.nodes.iter();
        let found = all.find(|(_, entry)| Arc::ptr_eq(&entry.node, node));
        found.map(|(&id, _)| id).ok_or_else(|| not_found(node.name()))
    }

    fn entry(&self, id: u64) -> &Entry {
        self.nodes.get(&id).expect("a node stays as long as it is used")
    }

    fn entry_mut(&mut self, id: u64) -> &mut Entry {
        self.nodes.get_mut(&id).expect("a node stays as long as it is used")
    }
}

impl Entry {
    /// What its locks shall stand for when its uses hold and allow `perms`.
    fn wanted_locks(&self, perms: Perms) -> Perms {
        if self.node.is_active() && self.may_lock() { perms } else { Perms::NONE }
    }
}

impl NodeInfo {
    pub fn of(node: &Node, names: &mut Names<'_>) -> NodeInfo {
        let children = node.driver().children().iter();
        NodeInfo {
            name: node.name().to_owned(),
            driver: node.driver().name(),
            kind: node.driver().entry().kind,
            read_only: node.options().read_only || node.is_frozen(),
            active: node.is_active(),
            options: node.options(),
            len: node.len(),
            filename: names.of(node),
            path: node.driver().filename(),
            image: node.driver().image().map(|image| image.info()),
            children: children.map(|c| (c.role(), c.node().name().to_owned())).collect(),
            write_threshold: node.write_threshold(),
            write_highest: node.write_highest(),
            discards: node.driver().entry().counts_discards.then(|| node.discards()),
            bitmaps: node.bitmaps().all().iter().rev().map(|bitmap| bitmap.info()).collect(),
        }
    }
}

impl Attachment {
    /// The node that it was made for; a registered user may have been moved to another since
    /// ([`User::moved`]).
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Changes what is held. Nothing has changed if it fails.
    pub fn change(&self, perms: Perms) -> Result<(), Error> {
        let mut state = self.graph.0.state.lock();
        let mut plan = Plan::new(&mut state);
        plan.change_user(self.id, perms);
        plan.apply()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut state = self.graph.0.state.lock();
        let mut plan = Plan::new(&mut state);
        plan.remove(|by| matches!(by, By::User { id, .. } if *id == self.id));
        plan.loosen();
    }
}
