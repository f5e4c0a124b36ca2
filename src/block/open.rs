//! Opening nodes: common options, the children that a driver asks for, and inherited options.
//!
//! The rule held here: user input is checked before anything is opened, unknown options are
//! refused, and a tree of nodes comes up whole or not at all.

mod backing;

pub use backing::RecordedBacking;

use super::depth::Depth;
use super::graph::{By, Graph};
use super::policy::OpenPolicy;
use super::registry::DriverEntry;
use super::{Child, DetectZeroes, Error, LocalFuture, Node, NodeOptions, Notices, Perms, Role};
use crate::io::{Blocking, task};
use crate::options::{self, Map, NodeRef, similar};
use backing::Chain;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Error as _};
use std::sync::Arc;

/// Longest node name, in bytes.
pub const NAME_LIMIT: usize = 31;
/// A node that is being opened: what its driver may ask for meanwhile. Children opened for a node that then fails to
/// open vanish with this.
pub struct Opening {
    graph: Graph,
    /// Identifies the uses of the children to the graph until the node exists.
    id: u64,
    name: String,
    /// Where in the user's tree of options the node is defined: empty at the top, `file`, …
    path: String,
    options: NodeOptions,
    auto_read_only: bool,
    active: bool,
    depth: Depth,
    /// The graph's claim that it is opened under.
    claim: u64,
    /// The images above this one that led here by recorded names.
    chain: Option<Arc<Chain>>,
    /// The disk's share of the threads for work that blocks.
    blocking: Blocking,
    /// There is a child with the node's data, and the share is that child's.
    has_storage: bool,
}

/// The options that an inline child inherits unless it has its own.
pub(super) struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    force_share: bool,
    discard: bool,
    direct: bool,
    no_flush: bool,
    active: bool,
    chain: Option<Arc<Chain>>,
    blocking: Blocking,
    /// Its first use, from its creation on, so that the permissions on a long chain below it are taken once.
    first: Option<(By, Perms)>,
}

impl Default for Inherited {
    fn default() -> Inherited {
        Inherited {
            read_only: false,
            auto_read_only: false,
            force_share: false,
            discard: false,
            direct: false,
            no_flush: false,
            active: true,
            chain: None,
            blocking: Blocking::default(),
            first: None,
        }
    }
}

impl Inherited {
    /// Nothing but the defaults: of a node that no other node asks for, and that is used from the start.
    pub(super) fn by(first: By, perms: Perms) -> Inherited {
        Inherited { first: Some((first, perms)), ..Inherited::default() }
    }
}

impl Opening {
    /// The name of the new node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The common options as they were asked for.
    pub fn options(&self) -> NodeOptions {
        self.options
    }

    /// Whether a node that is not [`NodeOptions::read_only`] may come up read-only all the same,
    /// where writing is not possible. Its driver then has
    /// [`Abilities::READ_ONLY`](super::Abilities::READ_ONLY).
    pub fn auto_read_only(&self) -> bool {
        self.auto_read_only
    }

    /// Whether an image in this file may be written: `read-only` does not forbid it, or leaves it to what the file can.
    pub fn is_writable_over(&self, file: &Node) -> bool {
        let is_file_writable = !file.traits().abilities.contains(super::Abilities::READ_ONLY);
        !self.options.read_only && (!self.auto_read_only || is_file_writable)
    }

    /// Whether the image will be ours when it is open; else it is another process's, which may be
    /// changing it.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The policy of the graph that the node will be in.
    pub fn policy(&self) -> &OpenPolicy {
        self.graph.policy()
    }

    /// The threads for the node's blocking work. All nodes of a disk have one share of the threads: those that are
    /// opened with it, and storage that was opened by itself before. Another image that is named as a backing file
    /// has its own, for it may be many disks'. To be asked for when the children are there.
    pub fn blocking(&self) -> Blocking {
        self.blocking.clone()
    }

    /// The notices of the graph, for the node's events.
    pub fn notices(&self) -> Arc<Notices> {
        self.graph.notices().clone()
    }

    /// Reads the driver's options, whole.
    ///
    /// # Errors
    /// In QEMU's words, with the parameter's whole path.
    pub fn parse<T: DeserializeOwned>(&self, options: Map) -> Result<T, Error> {
        let parsed = options::from_map(options);
        parsed.map_err(|error| self.error(error.meant(Common::NAMES)))
    }

    /// An error about one of the driver's options, with its whole path.
    pub fn error(&self, error: options::Error) -> Error {
        at(&self.path, error)
    }

    /// The child in `role`, by reference or opened now. `during` is what the
    /// driver holds on it until its node is there; from then on,
    /// [`Driver::child_perms`](super::Driver::child_perms) says.
    pub async fn child(
        &mut self,
        role: Role,
        options: NodeRef,
        during: Perms,
    ) -> Result<Child, Error> {
        let by = By::Opening { id: self.id, name: self.name.clone(), role };
        let node = match options {
            NodeRef::Name(name) => {
                let node = self.find(&name).ok_or_else(|| no_reference(&name))?;
                if !self.graph.keep_too(self.claim, &name) {
                    return Err(Error::new(format!("Node '{name}' is being changed")));
                }
                self.graph.begin_use(&node, by, during)?;
                node
            }
            NodeRef::Inline(map) => {
                let path = join(&self.path, role.name());
                let inherited = Inherited { first: Some((by, during)), ..self.inherited(role) };
                let (graph, depth) = (self.graph.clone(), self.depth.below(role));
                let claim = self.claim;
                let open =
                    async move { graph.open_node(map, path, Some(inherited), depth, claim).await };
                match role.is_backing() {
                    false => open.await?,
                    // A task of its own, as a chain may be longer than the stack is deep.
                    true => task::apart(open).await?,
                }
            }
        };
        if !role.is_backing() && !std::mem::replace(&mut self.has_storage, true) {
            self.blocking = node.blocking().clone();
        }
        Ok(Child::new(role, node))
    }

    /// The node of this name, if there is one.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.graph.find_within(self.claim, name)
    }

    /// The same caching. Storage is read-only if the parent is, and passes on all discards, because the parent
    /// has decided already what to pass; a backing file is never written.
    fn inherited(&self, role: Role) -> Inherited {
        let backing = role.is_backing();
        Inherited {
            read_only: self.options.read_only || backing,
            auto_read_only: self.auto_read_only && !backing,
            force_share: self.options.force_share,
            discard: !backing,
            direct: self.options.direct,
            no_flush: self.options.no_flush,
            active: self.active,
            chain: self.chain.clone(),
            blocking: self.blocking.clone(),
            first: None,
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.graph.end_opening(self.id);
    }
}

impl Graph {
    /// Opens the node that `options` describe, and those below it. `inherited` is none at the top,
    /// where a name is asked for. The nodes belong to `claim`.
    pub(super) fn open_node<'a>(
        &'a self,
        mut options: Map,
        path: String,
        mut inherited: Option<Inherited>,
        depth: Depth,
        claim: u64,
    ) -> LocalFuture<'a, Result<Arc<Node>, Error>> {
        Box::pin(async move {
            depth.check()?;
            let entry = self.take_driver(&mut options).map_err(|e| at(&path, e))?;
            let common = Common::take(&mut options).map_err(|e| at(&path, e))?;
            if inherited.is_none() && common.node_name.is_none() {
                return Err(Error::new("'node-name' must be specified for the root node"));
            }
            let first = inherited.as_mut().and_then(|parent| parent.first.take());
            let chain = inherited.as_ref().and_then(|parent| parent.chain.clone());
            let blocking = inherited.as_ref().map(|parent| parent.blocking.clone());
            let by_parent = inherited.as_ref().is_none_or(|parent| parent.active);
            let active = common.active.unwrap_or(by_parent);
            let (node_options, auto_read_only) = common.resolve(inherited)?;
            self.policy().check_driver(entry.name, node_options.read_only)?;
            let name = match common.node_name {
                Some(name) if self.succeeds(claim, &name) => name,
                Some(name) => self.check_name(name)?,
                None => self.make_name(),
            };
            let mut opening = Opening {
                graph: self.clone(),
                id: self.next_id(),
                name,
                path,
                options: node_options,
                auto_read_only,
                active,
                depth,
                claim,
                chain,
                blocking: blocking.unwrap_or_default(),
                has_storage: false,
            };
            let driver = (entry.open)(&mut opening, options).await?;
            let mut node_options = opening.options;
            let is_read_only = driver.traits().abilities.contains(super::Abilities::READ_ONLY);
            node_options.read_only |= opening.auto_read_only && is_read_only;
            if !active && driver.hand_over().is_none() {
                let text = format!("Driver '{}' cannot be opened inactive", driver.name());
                return Err(Error::new(text));
            }
            let (name, notices) = (opening.name.clone(), opening.notices());
            let node = Node::with_share(name, driver, node_options, notices, opening.blocking());
            node.set_active(active);
            if let Err(error) = self.insert(node.clone(), opening.id, first, claim) {
                // It has served no request yet, so closing it loses nothing.
                let _ = node.driver().close().await;
                return Err(error);
            }
            self.follow_length(&node);
            self.follow_idleness(&node);
            Ok(node)
        })
    }

    fn take_driver(&self, options: &mut Map) -> Result<&'static DriverEntry, options::Error> {
        let name = options.take_required_str("driver")?;
        let registry = self.registry();
        registry.get(&name).ok_or_else(|| {
            let unknown = options::Error::unknown_variant(&name, &[]).under("driver");
            let known = registry.iter().map(|entry| entry.name);
            unknown.with_advice(similar::did_you_mean(&name, known))
        })
    }

    /// Whether a new node can have the name.
    pub fn check_name(&self, name: String) -> Result<String, Error> {
        if !options::is_identifier(&name) {
            return Err(Error::new(format!("Invalid node-name: '{}'", name.escape_debug())));
        }
        if name.len() > NAME_LIMIT {
            return Err(Error::new("Node name too long"));
        }
        if self.find(&name).is_ok() {
            return Err(duplicate(&name));
        }
        Ok(name)
    }
}

pub(super) fn duplicate(name: &str) -> Error {
    Error::new(format!("Duplicate nodes with node-name='{name}'"))
}

pub(super) fn no_reference(name: &str) -> Error {
    let name = name.escape_debug();
    Error::new(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

pub(super) fn at(path: &str, error: options::Error) -> Error {
    let error = if path.is_empty() { error } else { error.under(path) };
    Error::from(error)
}

fn join(path: &str, role: &str) -> String {
    if path.is_empty() { role.to_owned() } else { format!("{path}.{role}") }
}

impl From<options::Error> for Error {
    fn from(error: options::Error) -> Error {
        let reported = Error::new(error.to_string()).with_advice(error.advice().map(str::to_owned));
        match error.hint() {
            Some(hint) => reported.with_hint(hint),
            None => reported,
        }
    }
}

/// The options that every node has, as given.
struct Common {
    node_name: Option<String>,
    read_only: Option<bool>,
    auto_read_only: Option<bool>,
    force_share: Option<bool>,
    active: Option<bool>,
    discard: Option<Discard>,
    detect_zeroes: Option<Detect>,
    cache: Cache,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Cache {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Discard {
    Ignore,
    Unmap,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Detect {
    Off,
    On,
    Unmap,
}

impl Common {
    const NAMES: [&str; 9] = [
        "driver",
        "node-name",
        "read-only",
        "auto-read-only",
        "force-share",
        "active",
        "discard",
        "detect-zeroes",
        "cache",
    ];

    fn take(options: &mut Map) -> Result<Common, options::Error> {
        Ok(Common {
            node_name: options.take_str("node-name")?,
            read_only: options.take_opt_bool("read-only")?,
            auto_read_only: options.take_opt_bool("auto-read-only")?,
            force_share: options.take_opt_bool("force-share")?,
            active: options.take_opt_bool("active")?,
            discard: options.take_as("discard")?,
            detect_zeroes: options.take_as("detect-zeroes")?,
            cache: options.take_as("cache")?.unwrap_or_default(),
        })
    }

    /// The options with defaults filled in, and `auto-read-only`.
    fn resolve(&self, inherited: Option<Inherited>) -> Result<(NodeOptions, bool), Error> {
        let base = inherited.unwrap_or_default();
        let options = NodeOptions {
            read_only: self.read_only.unwrap_or(base.read_only),
            discard: self.discard.map_or(base.discard, |discard| discard == Discard::Unmap),
            detect_zeroes: match self.detect_zeroes.unwrap_or(Detect::Off) {
                Detect::Off => DetectZeroes::Off,
                Detect::On => DetectZeroes::On,
                Detect::Unmap => DetectZeroes::Unmap,
            },
            direct: self.cache.direct.unwrap_or(base.direct),
            no_flush: self.cache.no_flush.unwrap_or(base.no_flush),
            force_share: self.force_share.unwrap_or(base.force_share),
        };
        if options.force_share && !options.read_only {
            return Err(Error::new("force-share=on can only be used with read-only images"));
        }
        if options.detect_zeroes == DetectZeroes::Unmap && !options.discard {
            return Err(Error::new(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            ));
        }
        Ok((options, self.auto_read_only.unwrap_or(base.auto_read_only)))
    }
}
