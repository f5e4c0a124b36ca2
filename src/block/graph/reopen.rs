//! Reopening nodes with other options while they are in use.
//!
//! The rules held here:
//!
//! * A node itself never changes. A successor of its name is opened on the same storage, and then all users of the
//!   node use the successor ([`super::succession`]). What users know of the node, such as what its requests should
//!   look like, they ask the successor for as they are moved.
//! * All nodes of one call are replaced, or none, and none is seen half done: their users are paused.
//! * At any time one of the two writes at most. The node is flushed, and finished as if it was closed, before its
//!   successor reads the image ([`Driver::freeze`](crate::block::Driver::freeze)); if the successor fails, the node
//!   continues ([`Driver::thaw`](crate::block::Driver::thaw)). So a node that is now below an overlay can be
//!   written to again: its successor knows nothing of the image but what it reads.
//! * A child that is defined within the options of its parent is opened again with it. A child that is named stays
//!   as it is, or is replaced by another.
//! * Which disk a node is stays: what a driver says of that ([`Driver::own_options`](crate::block::Driver)) has to
//!   be given as it was, but for what a format reads of its file.

use super::claims::Part;
use super::overlay::Above;
use super::permissions::{Plan, release_locks};
use super::succession::Stage;
use super::{By, Drained, Graph, State, not_found};
use crate::block::depth::Depth;
use crate::block::open::at;
use crate::block::{Abilities, Child, Error, Kind, Node, Perm, Role};
use crate::options::{Map, Value};
use std::cell::Cell;
use std::sync::Arc;

/// The options of a node that is to be opened again, and where they are in the user's.
pub struct Reopening {
    pub path: String,
    pub options: Map,
}

/// What is to be done, as the graph is now.
struct Task {
    /// To be opened by themselves, children before parents.
    tops: Vec<Top>,
    /// All nodes that leave, parents before children.
    leaving: Vec<Arc<Node>>,
    /// The nodes that options name.
    named: Vec<String>,
}

struct Top {
    node: Arc<Node>,
    path: String,
    /// With the names of all nodes that are opened again.
    options: Map,
}

/// What has been done to nodes that leave, for the case that they stay.
#[derive(Default)]
struct Done {
    frozen: Vec<Arc<Node>>,
    thawed: Vec<Arc<Node>>,
}

impl Graph {
    /// Opens nodes again with other options, while their users are paused. Options that are not given have their
    /// defaults.
    ///
    /// # Errors
    /// In QEMU's words: options that are wrong, that cannot be changed, or do not suit the users of the node; all
    /// nodes are as before then.
    pub async fn reopen(&self, wanted: &[Reopening]) -> Result<(), Error> {
        let mut task = self.0.state.lock().task(wanted)?;
        loop {
            let parts = {
                let state = self.0.state.lock();
                let ids = task.leaving.iter().map(|node| Ok(Part::Change(state.id(node)?)));
                let named = task.named.iter().map(|name| Ok(Part::Keep(name.clone())));
                ids.chain(named).collect::<Result<_, Error>>()?
            };
            let claim = self.claim_in_time(parts, task.leaving.first()).await?;
            // Others may have changed the graph meanwhile.
            let now = self.0.state.lock().task(wanted)?;
            let is_same = now.leaving.len() == task.leaving.len()
                && now.leaving.iter().zip(&task.leaving).all(|(a, b)| Arc::ptr_eq(a, b));
            task = now;
            if is_same {
                let drained = self.drain_claimed(&task.leaving, claim).await?;
                let name = task.tops.first().map_or("", |top| top.node.name());
                let (graph, what) = (self.clone(), format!("Opening node '{name}' again"));
                let rest = async move |drained: &Drained, is_late: &Cell<bool>| {
                    graph.reopen_drained(drained, task, is_late).await
                };
                return drained.in_time(what, rest).await;
            }
        }
    }

    async fn reopen_drained(
        &self,
        drained: &Drained,
        task: Task,
        is_late: &Cell<bool>,
    ) -> Result<(), Error> {
        let claim = drained.claim().id;
        let mut done = Done::default();
        let mut result = self.bring_to_end(drained, &task.leaving, &mut done).await;
        if result.is_ok() {
            result = self.open_successors(claim, &task).await;
        }
        let moved = match result {
            // The caller has been told that it failed.
            Ok(()) if is_late.get() => Err(Error::new("the nodes stay as they were")),
            Ok(()) => self.0.state.lock().succeed(claim, &task),
            Err(error) => Err(error),
        };
        let moved = match moved {
            Ok(moved) => moved,
            Err(error) => {
                self.stay(drained, &task.leaving, done).await;
                return Err(error);
            }
        };
        for Moved { old, new, above } in moved {
            self.move_up(drained, &old, &new, above).await;
        }
        drop((task, done));
        release_locks(&mut self.0.state.lock(), claim);
        Ok(())
    }

    /// Finishes what nodes that leave have begun, parents first.
    async fn bring_to_end(
        &self,
        drained: &Drained,
        leaving: &[Arc<Node>],
        done: &mut Done,
    ) -> Result<(), Error> {
        for node in leaving {
            if node.driver().is_poisoned() {
                return Err(Error::new(format!(
                    "Node '{}' has lost what was written to it: this has to be accepted before it \
                     is opened again",
                    node.name()
                )));
            }
            if node.is_frozen() {
                let stored = self.0.state.lock().stored_in(node)?;
                for node in stored.iter().skip(1).filter(|node| node.is_frozen()) {
                    node.driver().thaw();
                    node.set_frozen(false);
                    done.thawed.push(node.clone());
                }
                continue;
            }
            if !node.traits().abilities.contains(Abilities::READ_ONLY) {
                drained.flush(node).await?;
            }
            finish(node).await?;
            done.frozen.push(node.clone());
        }
        Ok(())
    }

    async fn open_successors(&self, claim: u64, task: &Task) -> Result<(), Error> {
        {
            let mut state = self.0.state.lock();
            for node in &task.leaving {
                let id = state.id(node)?;
                state.entry_mut(id).stage = Stage::Leaving(claim);
            }
        }
        for Top { options, path, .. } in &task.tops {
            self.open_node(options.clone(), path.clone(), None, Depth::TOP, claim).await?;
        }
        Ok(())
    }

    /// Makes all nodes that were to leave stay as they were, and ends what was to succeed them.
    async fn stay(&self, drained: &Drained, leaving: &[Arc<Node>], done: Done) {
        let claim = drained.claim().id;
        {
            let mut state = self.0.state.lock();
            let ids: Vec<u64> = leaving.iter().filter_map(|node| state.id(node).ok()).collect();
            for (&id, node) in ids.iter().zip(leaving) {
                match state.coming(claim, node.name()) {
                    Some(new) => state.end_succession(id, new),
                    None => state.entry_mut(id).stage = Stage::Named,
                }
            }
        }
        self.end_changed(drained).await;
        for node in &done.frozen {
            node.driver().thaw();
        }
        for node in &done.thawed {
            if let Err(errno) = node.driver().freeze().await {
                log::error!("{}: finishing it as before: {errno}", node.name());
            }
            node.set_frozen(true);
        }
        let mut state = self.0.state.lock();
        let all = leaving.iter().chain(&done.thawed);
        let ids: Vec<u64> = all.filter_map(|node| state.id(node).ok()).collect();
        let mut plan = Plan::new(&mut state);
        ids.into_iter().for_each(|id| plan.settle_again(id));
        plan.loosen();
    }
}

/// Brings all that a node has to do to the storage.
async fn finish(node: &Arc<Node>) -> Result<(), Error> {
    let failed = |errno| Error::os(format!("Error flushing '{}'", node.name()), errno);
    let is_kept = |node: &Node| node.bitmaps().all().iter().any(|bitmap| bitmap.flags().persistent);
    if !node.traits().abilities.contains(Abilities::READ_ONLY) {
        node.flush().await.map_err(failed)?;
        if let Some(store) = node.driver().bitmap_store().filter(|_| is_kept(node)) {
            store.store().await?;
        }
    }
    node.driver().freeze().await.map_err(failed)
}

/// A node, its successor, and its users.
struct Moved {
    old: Arc<Node>,
    new: Arc<Node>,
    above: Above,
}

impl State {
    // ---- What is to be done

    fn task(&self, wanted: &[Reopening]) -> Result<Task, Error> {
        let mut task = Task { tops: Vec::new(), leaving: Vec::new(), named: Vec::new() };
        for Reopening { path, options } in wanted {
            let mut options = options.clone();
            let name = options.get("node-name").and_then(Value::as_str);
            let name = name.ok_or_else(|| Error::new("node-name not specified"))?;
            let (_, entry) = self.by_name(name).ok_or_else(|| not_found(name))?;
            let node = entry.node.clone();
            self.add_to(&mut task, &node, path, &mut options)?;
            task.tops.push(Top { node, path: path.clone(), options });
        }
        let height = |node: &Arc<Node>| self.id(node).map_or(0, |id| self.entry(id).height.edges);
        task.tops.sort_by_key(|top| height(&top.node));
        task.leaving.sort_by_key(|node| std::cmp::Reverse(height(node)));
        Ok(task)
    }

    /// Adds a node that is to be opened again, and those that the options define below it. The options get the
    /// names of all.
    fn add_to(
        &self,
        task: &mut Task,
        node: &Arc<Node>,
        path: &str,
        options: &mut Map,
    ) -> Result<(), Error> {
        let (name, driver) = (node.name(), node.driver());
        let given = options.clone().take_required_str("driver").map_err(|e| at(path, e))?;
        if given != driver.name() {
            return Err(cannot_change("driver"));
        }
        if !driver.entry().reopens {
            return Err(Error::new(format!(
                "Block format '{}' used by node '{name}' does not support reopening files",
                driver.name()
            )));
        }
        if !node.is_active() {
            return Err(Error::new(format!("Node '{name}' is inactive")));
        }
        if task.leaving.iter().any(|other| Arc::ptr_eq(other, node)) {
            return Err(Error::new(format!("Node '{name}' is to be opened again twice")));
        }
        if driver.entry().kind != Kind::Format {
            let given = |key: &str| options.get(key).cloned().map(Value::into_text);
            let own = driver.own_options().into_text();
            let changed = own.iter().find(|(key, now)| given(key).is_some_and(|new| new != **now));
            changed.map_or(Ok(()), |(key, _)| Err(cannot_change(key)))?;
        }
        task.leaving.push(node.clone());
        for &role in driver.entry().children {
            let mut children = driver.children().iter();
            let child = children.find(|child| child.role() == role).map(Child::node);
            self.add_child(task, (node, path), role, child, options)?;
        }
        Ok(())
    }

    fn add_child(
        &self,
        task: &mut Task,
        (parent, path): (&Arc<Node>, &str),
        role: Role,
        child: Option<Arc<Node>>,
        options: &mut Map,
    ) -> Result<(), Error> {
        let key = role.name();
        let is_current = |name: &str| child.as_ref().is_some_and(|child| child.name() == name);
        match options.get_mut(key) {
            Some(Value::Map(inline)) => {
                // A node that was defined elsewhere is not changed from here.
                let child = child.filter(|child| self.is_part_of_parent(child));
                let child = child.ok_or_else(|| cannot_change(&format!("{key}.driver")))?;
                let name = inline.get("node-name").and_then(Value::as_str);
                if name.is_some_and(|name| name != child.name()) {
                    return Err(cannot_change("node-name"));
                }
                inline.insert("node-name", child.name());
                let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                self.add_to(task, &child, &path, inline)
            }
            Some(value) => {
                if let Some(name) = value.as_str().filter(|name| !name.is_empty()) {
                    if !matches!(role, Role::File | Role::Backing) && !is_current(name) {
                        return Err(cannot_change(key));
                    }
                    self.check_new_child(parent, role, name)?;
                    task.named.push(name.to_owned());
                }
                Ok(())
            }
            None => match child {
                Some(_) if role.is_backing() => {
                    Err(Error::new(format!("backing is missing for '{}'", parent.name())))
                }
                Some(child) if role != Role::File => {
                    // What only the image names stays.
                    options.insert(key, child.name());
                    Ok(())
                }
                _ => Ok(()),
            },
        }
    }

    /// Whether the node of this name can be a child of a node.
    fn check_new_child(&self, parent: &Arc<Node>, role: Role, name: &str) -> Result<(), Error> {
        let missing = || {
            let name = name.escape_debug();
            Error::new(format!("Cannot find device='' nor node-name='{name}'"))
        };
        let (child, _) = self.by_name(name).ok_or_else(missing)?;
        match self.all_below(&[child]).contains(&self.id(parent)?) {
            false => Ok(()),
            true => Err(Error::new(format!(
                "Making '{name}' a {role} child of '{}' would create a cycle",
                parent.name()
            ))),
        }
    }

    /// Whether a node was defined within the options of its parent, or by the parent's image.
    fn is_part_of_parent(&self, node: &Arc<Node>) -> bool {
        self.id(node).is_ok_and(|id| !self.entry(id).monitor)
    }

    // ---- Taking over

    /// Makes the successors take over all users of the nodes that leave.
    fn succeed(&mut self, claim: u64, task: &Task) -> Result<Vec<Moved>, Error> {
        let mut moved = Vec::new();
        for old in &task.leaving {
            let new = self.coming(claim, old.name()).ok_or_else(|| {
                Error::new(format!("Node '{}' was not opened with those above it", old.name()))
            })?;
            let new = self.entry(new).node.clone();
            let above = self.check_successor(old, &new)?;
            moved.push(Moved { old: old.clone(), new, above });
        }
        let ids: Vec<(u64, u64)> = moved
            .iter()
            .map(|Moved { old, new, .. }| Ok((self.id(old)?, self.id(new)?)))
            .collect::<Result<_, Error>>()?;
        for Moved { old, new, .. } in &moved {
            // Members with fast requests through the old node have them through the new one from now on.
            old.members().iter().for_each(|member| new.add_member(member));
        }
        let mut plan = Plan::new(self);
        ids.iter().for_each(|&(from, _)| plan.remove_edges(from));
        ids.iter().for_each(|&(from, to)| plan.move_uses(from, to, |_| true));
        plan.apply_keeping_locks(claim)?;
        for (&(from, to), Moved { old, new, .. }) in ids.iter().zip(&moved) {
            new.continue_from(old);
            let monitor = std::mem::take(&mut self.entry_mut(from).monitor);
            let asked = std::mem::take(&mut self.entry_mut(from).asked);
            self.entry_mut(from).stage = Stage::Gone;
            let top = task.tops.iter().find(|top| Arc::ptr_eq(&top.node, old));
            let entry = self.entry_mut(to);
            entry.stage = Stage::Named;
            entry.monitor = monitor;
            entry.asked = top.map_or(asked, |top| top.options.clone());
        }
        Ok(moved)
    }

    /// Whether all users of a node can use its successor.
    fn check_successor(&self, old: &Arc<Node>, new: &Arc<Node>) -> Result<Above, Error> {
        check_same_disk(old, new)?;
        let id = self.id(old)?;
        let changes = Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        let mut uses = self.entry(id).uses.iter().filter(|one| self.counts(&one.by));
        if new.is_read_only() && uses.any(|one| one.perms.held.intersects(changes)) {
            let name = new.name();
            return Err(Error::new(format!(
                "Read-only block node '{name}' cannot support read-write users"
            )));
        }
        let mut above = self.above_to_move(old)?;
        let stays = |parent: &Arc<Node>| {
            let id = self.id(parent).unwrap_or_default();
            self.counts(&By::Node { id, child: 0 })
        };
        above.parents.retain(|(parent, _)| stays(parent));
        Ok(above)
    }
}

/// Refuses a successor that would be another disk.
fn check_same_disk(old: &Node, new: &Node) -> Result<(), Error> {
    if old.options().force_share != new.options().force_share {
        return Err(cannot_change("force-share"));
    }
    let (before, after) = (old.driver().own_options(), new.driver().own_options());
    if before == after {
        return Ok(());
    }
    if old.driver().entry().kind == Kind::Format {
        return match old.bitmaps().all().is_empty() {
            true => Ok(()),
            false => Err(Error::new(format!(
                "Node '{}' has dirty bitmaps, which say nothing of another part of its file",
                old.name()
            ))),
        };
    }
    for (key, value) in before.iter() {
        match after.get(key) {
            None => {
                let text = format!("Option '{key}' cannot be reset to its default value");
                return Err(Error::new(text));
            }
            Some(now) if now != value => return Err(cannot_change(key)),
            Some(_) => {}
        }
    }
    let new = after.iter().find(|(key, _)| before.get(key).is_none());
    new.map_or(Ok(()), |(key, _)| Err(cannot_change(key)))
}

fn cannot_change(key: &str) -> Error {
    Error::new(format!("Cannot change the option '{key}'"))
}
