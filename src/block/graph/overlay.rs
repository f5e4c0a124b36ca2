//! External snapshots: inserting an overlay above a node and below all its users.
//!
//! The node becomes the overlay's backing file and keeps what was written so far.
//!
//! The rule held here: users are paused and the node is flushed before they are moved, so that what is below the
//! overlay is the disk as it was at one moment, and complete for copying. Users whose overlay cannot take them over
//! continue with what they had.

use super::permissions::{Plan, release_locks};
use super::step::{Meanwhile, Step};
use super::{By, Drained, Graph, State, User};
use crate::block::depth::Depth;
use crate::block::{Child, Error, Node, Role};
use crate::io;
use crate::options::{Map, Value};
use std::sync::Arc;

/// An overlay that has taken over, while its users are paused: it is kept ([`Graph::keep`]) or taken back
/// ([`Graph::take_back`]).
pub struct Over {
    base: Arc<Node>,
    overlay: Arc<Node>,
    /// The options that it had before, if it was there.
    asked: Option<Map>,
}

impl Graph {
    /// Puts a node that was opened by name without backing file, and that nobody uses, over `base`, whose users
    /// are paused and have it from then on. Both are drained. It is opened again, with `base` below it.
    ///
    /// # Errors
    /// In QEMU's words: one of the two does not suit, or cannot be had; the users have `base` then, as
    /// before.
    pub async fn insert_overlay(
        &self,
        drained: &Drained,
        base: &Arc<Node>,
        overlay: &str,
    ) -> Result<Over, Error> {
        let asked = {
            let mut state = self.0.state.lock();
            state.check_base(base)?;
            state.check_overlay(overlay)?
        };
        drained.flush(base).await?;
        self.forget(drained, overlay).await;
        let mut options = asked.clone();
        options.insert(Role::Backing.name(), base.name());
        let (graph, before) = (self.clone(), asked.clone());
        let reopen = async move || {
            if let Err(error) = graph.open(before).await {
                log::error!("opening an overlay as it was: {error}");
            }
        };
        let result = match self.open_overlay(drained, base, options.clone(), reopen).await {
            Ok(node) => {
                self.keep_open(&node, options);
                self.take_over(drained, base, &node).await.map(|()| node)
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(node) => Ok(Over { base: base.clone(), overlay: node, asked: Some(asked) }),
            // It is opened as it was when the storage has answered.
            Err(error) if drained.is_late() => Err(error),
            Err(error) => {
                self.open_as_before(drained, overlay, asked).await;
                Err(error)
            }
        }
    }

    /// Opens a node over `base`, whose users are paused and have it from then on, and keep it open. The options
    /// have `base` as what is below it.
    ///
    /// # Errors
    /// As [`Graph::insert_overlay`]; nothing has changed then.
    pub async fn open_over(
        &self,
        drained: &Drained,
        base: &Arc<Node>,
        options: Map,
    ) -> Result<Over, Error> {
        self.check_base(base)?;
        drained.flush(base).await?;
        let node = self.open_overlay(drained, base, options, async || ()).await?;
        self.take_over(drained, base, &node).await?;
        Ok(Over { base: base.clone(), overlay: node, asked: None })
    }

    /// Opens an overlay, as a step of the change. If that takes too long the overlay is closed again, and `late` is
    /// called then.
    async fn open_overlay(
        &self,
        drained: &Drained,
        base: &Arc<Node>,
        options: Map,
        late: impl AsyncFnOnce() + 'static,
    ) -> Result<Arc<Node>, Error> {
        let what = format!("Opening an overlay of node '{}'", base.name());
        let step = Step { node: base, what, meanwhile: Meanwhile::Use };
        let (graph, claim) = (self.clone(), drained.claim().id);
        let open =
            async move { graph.open_node(options, String::new(), None, Depth::TOP, claim).await };
        let graph = self.clone();
        let close = async move |opened: Result<Arc<Node>, Error>| {
            drop(opened);
            graph.tidy().await;
            late().await;
        };
        drained.step(step, open, close).await
    }

    /// Whether a node can be put below an overlay.
    ///
    /// # Errors
    /// In QEMU's words, if it cannot.
    pub fn check_base(&self, base: &Arc<Node>) -> Result<(), Error> {
        self.0.state.lock().check_base(base)
    }

    /// Gives the users of an overlay, to which nothing was written, what they had before.
    pub async fn take_back(&self, drained: &Drained, over: Over) {
        let Over { base, overlay, asked } = over;
        self.give_back(drained, &overlay, &base).await;
        let name = overlay.name().to_owned();
        drop(overlay);
        match asked {
            Some(asked) => self.open_as_before(drained, &name, asked).await,
            None => self.end_changed(drained).await,
        }
    }

    /// Ends a change in which overlays have taken over, or were to. What is below those that stay is finished.
    pub async fn keep(&self, drained: &Drained, overlays: Vec<Over>) {
        for over in &overlays {
            let (graph, base) = (self.clone(), over.base.clone());
            let what = format!("Finishing the image of node '{}'", base.name());
            let step = Step { node: &over.base, what, meanwhile: Meanwhile::Requests };
            let finish = async move {
                graph.freeze(&base).await;
                Ok(())
            };
            if let Err(error) = drained.step(step, finish, async |_| ()).await {
                log::warn!("{error}; until then it stays locked");
            }
        }
        drop(overlays);
        release_locks(&mut self.0.state.lock(), drained.claim().id);
        self.end_changed_in_time(drained).await;
    }

    /// Closes a node, and opens one of its name with these options.
    async fn open_as_before(&self, drained: &Drained, name: &str, asked: Map) {
        self.forget(drained, name).await;
        if let Err(error) = self.open_top(asked, drained.claim()).await {
            log::error!("{name}: opening it as it was: {error}");
        }
    }

    /// Closes a node that was opened by name.
    async fn forget(&self, drained: &Drained, name: &str) {
        if let Some((_, entry)) = self.0.state.lock().by_name_mut(name) {
            entry.monitor = false;
        }
        self.end_changed(drained).await;
    }

    /// Closes what the change that has drained the graph leaves unused.
    pub(super) async fn end_changed(&self, drained: &Drained) {
        self.end_unused(Some(drained.claim()), &drained.claim().changed()).await;
    }

    /// As [`Graph::end_changed`], after a change that is whole: its users do not wait long for storage that they no
    /// longer use. What has not been closed in time is closed later, by a task of its own.
    pub(super) async fn end_changed_in_time(&self, drained: &Drained) {
        let limit = drained.patience();
        if io::in_time(limit, self.end_changed(drained)).await.is_none() {
            let seconds = limit.as_secs_f32();
            log::warn!("what a change of the graph no longer uses is not closed after {seconds} s");
        }
    }

    /// Retargets all users of a node to another node, one of which is above the other. What they give up stays
    /// locked.
    async fn take_over(
        &self,
        drained: &Drained,
        old: &Arc<Node>,
        new: &Arc<Node>,
    ) -> Result<(), Error> {
        let above = {
            let mut state = self.0.state.lock();
            let mut above = state.above_to_move(old)?;
            above.parents.retain(|(parent, _)| !Arc::ptr_eq(parent, new));
            let (from, to) = (state.id(old)?, state.id(new)?);
            // Members with fast requests through the old node have them through the new one from now on.
            old.members().iter().for_each(|member| new.add_member(member));
            let mut plan = Plan::new(&mut state);
            plan.move_uses(from, to, |_| true);
            plan.apply_keeping_locks(drained.claim().id)?;
            above
        };
        self.move_up(drained, old, new, above).await;
        Ok(())
    }

    /// Retargets all users of an overlay back to the node below it, which they had before. Nothing that was right
    /// then is asked again, so that it cannot fail. Users that attached meanwhile and cannot be moved keep the
    /// overlay.
    async fn give_back(&self, drained: &Drained, overlay: &Arc<Node>, base: &Arc<Node>) {
        overlay.members().iter().for_each(|member| base.add_member(member));
        let above = {
            let mut state = self.0.state.lock();
            let (Ok(from), Ok(to)) = (state.id(overlay), state.id(base)) else { return };
            let above = state.directly_above(from);
            let mut plan = Plan::new(&mut state);
            plan.move_uses(from, to, |by| !matches!(by, By::User { .. }) || can_move(by).is_some());
            plan.go_back(drained.claim().id);
            above
        };
        self.move_up(drained, overlay, base, above).await;
    }

    /// Notifies the users of a node whose edges have been retargeted to another node.
    pub(super) async fn move_up(
        &self,
        drained: &Drained,
        old: &Arc<Node>,
        new: &Arc<Node>,
        Above { parents, users, .. }: Above,
    ) {
        let mut replaced = Vec::new();
        for (parent, child) in parents {
            replaced.push(parent.driver().children()[child].replace(new.clone()));
        }
        for user in users {
            let what = format!("Turning a user to node '{}'", new.name());
            let step = Step { node: new, what, meanwhile: Meanwhile::Nothing };
            let node = new.clone();
            let switch = async move {
                user.moved(&node).await;
                Ok(())
            };
            if let Err(error) = drained.step(step, switch, async |_| ()).await {
                log::warn!("{error}; until then the node's users wait");
            }
        }
        let is_new = self.follow(new).unwrap_or(false) || old.traits() != new.traits();
        if is_new || old.len() != new.len() {
            drained.users().iter().for_each(|user| user.resized());
        }
        // Again, for users that attached meanwhile and found the old node.
        let members = old.members();
        members.iter().for_each(|member| new.add_member(member));
        drained.settle(new, members, replaced).await;
    }

    /// Stops writes to a node and to the nodes that only it uses, so that others can read the image. It is below an
    /// overlay, and nothing of it is in flight.
    async fn freeze(&self, base: &Arc<Node>) {
        let nodes = match self.0.state.lock().stored_in(base) {
            Ok(nodes) => nodes,
            Err(error) => return log::error!("{}: {error}", base.name()),
        };
        for node in &nodes {
            if let Err(errno) = node.driver().freeze().await {
                // It is right all the same, but stays locked.
                return log::error!(
                    "{}: finishing the image below an overlay: {errno}",
                    node.name()
                );
            }
        }
        nodes.iter().for_each(|node| node.set_frozen(true));
        let mut state = self.0.state.lock();
        let ids: Vec<u64> = nodes.iter().filter_map(|node| state.id(node).ok()).collect();
        let mut plan = Plan::new(&mut state);
        ids.into_iter().for_each(|id| plan.settle_again(id));
        plan.loosen();
    }
}

/// The direct users of a node.
pub(super) struct Above {
    /// Other nodes, and the index of the child by which they use it.
    pub parents: Vec<(Arc<Node>, usize)>,
    /// Those that are no nodes, and can be moved to another.
    users: Vec<Arc<dyn User>>,
    /// What conflicts call one that cannot be moved.
    stuck: Option<Arc<str>>,
}

/// The user behind a use, if it can be moved to another node.
fn can_move(by: &By) -> Option<Arc<dyn User>> {
    match by {
        By::User { user, .. } => user.as_ref()?.upgrade().filter(|user| user.can_move()),
        _ => None,
    }
}

impl State {
    /// A node and those below it that nobody else uses, but for backing files: parents first.
    pub(super) fn stored_in(&self, base: &Arc<Node>) -> Result<Vec<Arc<Node>>, Error> {
        let mut found = vec![self.id(base)?];
        let mut at = 0;
        while let Some(&id) = found.get(at) {
            let entry = self.entry(id);
            let children = entry.node.driver().children().iter().zip(&entry.children);
            let own = children
                .filter(|(child, id)| !child.is_backing() && self.entry(**id).uses.len() == 1);
            found.extend(own.map(|(_, id)| id));
            at += 1;
        }
        Ok(found.into_iter().map(|id| self.entry(id).node.clone()).collect())
    }

    /// Whether a node can be put below an overlay.
    fn check_base(&mut self, base: &Arc<Node>) -> Result<(), Error> {
        let name = base.name();
        if !base.is_active() {
            return Err(Error::new(format!("Node '{name}' is inactive")));
        }
        self.check_not_backing(base)?;
        self.above_to_move(base)?;
        let id = self.id(base)?;
        let fits = Plan::new(self).check_backing_more(id);
        fits.map_err(|error| error.at(format!("Cannot put an overlay over '{name}'")))
    }

    /// Refuses a node that others read where they have no data.
    pub(super) fn check_not_backing(&self, node: &Arc<Node>) -> Result<(), Error> {
        for one in &self.entry(self.id(node)?).uses {
            let By::Node { id, child } = &one.by else { continue };
            let above = &self.entry(*id).node;
            if above.driver().children()[*child].is_backing() {
                let (name, above) = (node.name(), above.name());
                return Err(Error::new(format!(
                    "Node '{name}' is busy: node is used as backing hd of '{above}'"
                )));
            }
        }
        Ok(())
    }

    /// Whether a node can be put over another; the options by which it was opened.
    fn check_overlay(&self, name: &str) -> Result<Map, Error> {
        let refused = |why: &str| Err(Error::new(why));
        let Some((_, entry)) = self.by_name(name) else {
            let name = name.escape_debug();
            return refused(&format!("Cannot find device='{name}' nor node-name='{name}'"));
        };
        let driver = entry.node.driver();
        if !entry.uses.is_empty() || !entry.monitor {
            return refused("The overlay is already in use");
        }
        if driver.children().iter().any(Child::is_backing) {
            return refused("The overlay already has a backing image");
        }
        if !driver.entry().has_backing() {
            return refused("The overlay does not support backing images");
        }
        if !entry.node.is_active() {
            return refused(&format!("Node '{name}' is inactive"));
        }
        for child in driver.children() {
            let (node, named) = (child.node(), entry.asked.get(child.role().name()));
            if named.and_then(Value::as_str).is_some_and(|name| name != node.name()) {
                return refused(&format!(
                    "Node '{name}' stands on '{}' since a snapshot of what it was opened with: it \
                     cannot be opened again over another",
                    node.name()
                ));
            }
        }
        Ok(entry.asked.clone())
    }

    /// The direct users of a node, if all of them can be moved to another.
    pub(super) fn above_to_move(&self, node: &Arc<Node>) -> Result<Above, Error> {
        let above = self.directly_above(self.id(node)?);
        match &above.stuck {
            Some(what) => Err(Error::new(format!("Node '{}' is in use by {what}", node.name()))),
            None => Ok(above),
        }
    }

    fn directly_above(&self, node: u64) -> Above {
        let (mut parents, mut users, mut stuck) = (Vec::new(), Vec::new(), None);
        for one in &self.entry(node).uses {
            match &one.by {
                By::Node { id, child } => parents.push((self.entry(*id).node.clone(), *child)),
                By::User { what, .. } => match can_move(&one.by) {
                    Some(user) => users.push(user),
                    None => stuck = stuck.or_else(|| Some(what.clone())),
                },
                By::Opening { .. } => {}
            }
        }
        Above { parents, users, stuck }
    }
}
