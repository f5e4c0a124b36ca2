//! The order in which copiers on several workers write.

use crate::io::sync::{Mutex, Waiters};
use std::collections::{BTreeMap, BTreeSet};

/// Lets the holders of tickets 0, 1, 2, … write one after another. Only the next one is woken.
#[derive(Default)]
pub struct WriteOrder(Mutex<State>);

#[derive(Default)]
struct State {
    /// All tickets below it are done.
    next: u64,
    /// Done before tickets with lower numbers.
    early: BTreeSet<u64>,
    waiting: BTreeMap<u64, Waiters>,
}

impl WriteOrder {
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
        let woken = state.waiting.remove(&next);
        drop(state);
        woken.into_iter().for_each(Waiters::wake);
    }
}
