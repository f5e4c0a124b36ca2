//! Replacing nodes with others of the same name.
//!
//! The rules held here:
//!
//! * A name means the predecessor until its successor has taken over. Only the change that opens the successor
//!   sees that one.
//! * The locks of the storage go from one to the other with no moment between in which neither has them.
//! * A node that leaves does nothing any more: what it holds on its children stands in nobody's way, but stays
//!   locked.

use super::permissions::Plan;
use super::{By, Entry, Graph, State};
use crate::block::{Error, Node, Perms};
use std::sync::Arc;

/// How a node stands to its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its name means it.
    #[default]
    Named,
    /// The change of this claim opens its successor.
    Leaving(u64),
    /// As before, and the successor has its locks.
    Left(u64),
    /// It is the successor, as long as the change of this claim is not whole.
    Coming(u64),
    /// Its name means another node, and it ends.
    Gone,
}

impl Entry {
    /// Whether its name means it, for all but the change that replaces it.
    pub(super) fn is_named(&self) -> bool {
        matches!(self.stage, Stage::Named | Stage::Leaving(_) | Stage::Left(_))
    }

    fn leaves(&self, claim: u64) -> bool {
        matches!(self.stage, Stage::Leaving(of) | Stage::Left(of) if of == claim)
    }

    /// Whether it does nothing any more.
    fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Leaving(_) | Stage::Left(_) | Stage::Gone)
    }

    /// Whether the locks of the storage are its own to have.
    pub(super) fn may_lock(&self) -> bool {
        !matches!(self.stage, Stage::Left(_) | Stage::Gone)
    }
}

impl Graph {
    /// The node of this name, as the change of a claim sees it.
    pub(in crate::block) fn find_within(&self, claim: u64, name: &str) -> Option<Arc<Node>> {
        let state = self.0.state.lock();
        let found =
            state.by_name(name).map(|(id, _)| id).filter(|&id| !state.entry(id).leaves(claim));
        let found = state.coming(claim, name).or(found);
        found.map(|id| state.entry(id).node.clone())
    }

    /// Whether the change of a claim opens the successor of a node of this name.
    pub(in crate::block) fn succeeds(&self, claim: u64, name: &str) -> bool {
        let state = self.0.state.lock();
        state.coming(claim, name).is_none() && state.leaving(claim, name).is_some()
    }
}

impl State {
    /// A successor of this name that the change of a claim has opened.
    pub(super) fn coming(&self, claim: u64, name: &str) -> Option<u64> {
        let mut all = self.nodes.iter();
        let is_match =
            |entry: &Entry| entry.stage == Stage::Coming(claim) && entry.node.name() == name;
        all.find(|(_, entry)| is_match(entry)).map(|(&id, _)| id)
    }

    /// The node of this name that leaves with the change of a claim.
    pub(super) fn leaving(&self, claim: u64, name: &str) -> Option<u64> {
        self.by_name(name).filter(|(_, entry)| entry.leaves(claim)).map(|(id, _)| id)
    }

    /// Whether what a use asks for stands in the way of others.
    pub(super) fn counts(&self, by: &By) -> bool {
        match by {
            By::Node { id, .. } => !self.entry(*id).is_over(),
            By::Opening { .. } | By::User { .. } => true,
        }
    }

    /// Makes a new node succeed one that leaves with the change of a claim: it takes over the locks, and gives none
    /// of them up before the change ends.
    fn begin_succession(&mut self, from: u64, to: u64, claim: u64) -> Result<(), Error> {
        self.hand_locks(from, to)?;
        self.entry_mut(from).stage = Stage::Left(claim);
        self.entry_mut(to).stage = Stage::Coming(claim);
        self.claims.keep_locks(claim, [to].into_iter());
        Ok(())
    }

    /// Gives a new node its uses, and has it succeed one, if there is one, within a claim.
    pub(super) fn begin(
        &mut self,
        new: u64,
        succeeds: Option<(u64, u64)>,
        uses: impl FnOnce(&mut Plan<'_>),
    ) -> Result<(), Error> {
        if let Some((from, claim)) = succeeds {
            self.begin_succession(from, new, claim)?;
        }
        let mut plan = Plan::new(self);
        uses(&mut plan);
        let result = plan.apply();
        if let (Err(_), Some((from, _))) = (&result, succeeds) {
            self.end_succession(from, new);
        }
        result
    }

    /// Takes [`State::begin_succession`] back.
    pub(super) fn end_succession(&mut self, from: u64, to: u64) {
        if let Err(error) = self.hand_locks(to, from) {
            log::error!("{}: taking its locks back: {error}", self.entry(from).node.name());
        }
        self.entry_mut(from).stage = Stage::Named;
        self.entry_mut(to).stage = Stage::Gone;
    }

    fn hand_locks(&mut self, from: u64, to: u64) -> Result<(), Error> {
        let held = self.entry(from).locked;
        let [old, new] = [from, to].map(|id| self.entry(id).node.clone());
        if let (Some(old), Some(new)) = (old.driver().locks(), new.driver().locks()) {
            new.take_over(old, held)?;
            old.commit(held, Perms::NONE);
        }
        self.entry_mut(from).locked = Perms::NONE;
        self.entry_mut(to).locked = held;
        Ok(())
    }
}
