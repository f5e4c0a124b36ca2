//! Waiting across workers: for one's turn, and for something to become true.

use crate::io::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::task::{Poll, Waker};

/// Tells those who wait that it is time to look again.
#[derive(Default)]
pub struct Signal(Mutex<Vec<Waker>>);

impl Signal {
    /// Waits until `ready` is true; whoever makes it so calls [`Signal::notify`].
    pub async fn wait(&self, ready: impl Fn() -> bool) {
        std::future::poll_fn(|cx| {
            if ready() {
                return Poll::Ready(());
            }
            self.0.lock().push(cx.waker().clone());
            // It may have come between the look and the list.
            if ready() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    pub fn notify(&self) {
        let waiting = std::mem::take(&mut *self.0.lock());
        waiting.into_iter().for_each(Waker::wake);
    }
}

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
    waiting: BTreeMap<u64, Waker>,
}

impl Turns {
    /// Waits until all tickets before this one are done.
    pub async fn wait(&self, ticket: u64) {
        std::future::poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.next >= ticket {
                return Poll::Ready(());
            }
            state.waiting.insert(ticket, cx.waker().clone());
            Poll::Pending
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
        turn.into_iter().for_each(Waker::wake);
    }
}
