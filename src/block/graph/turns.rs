//! Whose turn it is to change the graph: a mutex that may be held across an await, first come,
//! first served in the order in which tasks get to run.

use crate::io::sync::Mutex;
use std::task::{Poll, Waker};

#[derive(Default)]
pub(super) struct Turns(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    taken: bool,
    waiting: Vec<Waker>,
}

/// The turn, until it is dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    pub(super) async fn next(&self) -> Turn<'_> {
        std::future::poll_fn(|cx| {
            let mut queue = self.0.lock();
            if queue.taken {
                queue.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            queue.taken = true;
            Poll::Ready(Turn(self))
        })
        .await
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.0.lock();
        queue.taken = false;
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        // All of them: one that is gone must not keep the others from their turn.
        waiting.into_iter().for_each(Waker::wake);
    }
}
