//! Waiting across workers for one's turn.

use crate::io::sync::{Mutex, Waiters};
use std::collections::{BTreeMap, BTreeSet};

/// Who may write: the holders of tickets 0, 1, 2, … one after the other. Only the one whose turn has
/// come is woken.
#[derive(Default)]
pub struct Turns(Mutex<State>);

#[derive(Default)]
struct State {
    /// All tickets below it are done.
    next: u64,
    /// Done already, but not in their turn.
    early: BTreeSet<u64>,
    waiting: BTreeMap<u64, Waiters>,
}

impl Turns {
    /// Waits until all tickets before this one are done.
    pub async fn wait(&self, ticket: u64) {
        self.0
            .wait_for(|state| match state.next >= ticket {
                true => Ok(()),
                false => Err(state.waiting.entry(ticket).or_default()),
            })
            .await;
    }

    pub fn done(&self, ticket: u64) {
        let mut state = self.0.lock();
        state.early.insert(ticket);
        let mut next = state.next;
        while state.early.remove(&next) {
            next += 1;
        }
        state.next = next;
        let turn = state.waiting.remove(&next);
        drop(state);
        turn.into_iter().for_each(Waiters::wake);
    }
}
