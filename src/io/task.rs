//! Tasks of the slow road: futures that stay on their worker, run when they are woken.
//!
//! A task is never cancelled: once started it runs to its end, so that nothing it has submitted is
//! left without an owner.

use super::worker::Io;
use async_task::Runnable;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Poll, Waker};

#[derive(Default)]
pub(super) struct RunQueue {
    runnable: RefCell<VecDeque<Runnable>>,
}

impl RunQueue {
    pub(super) fn push(&self, task: Runnable) {
        self.runnable.borrow_mut().push_back(task);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runnable.borrow().is_empty()
    }

    /// Runs what is runnable now; what becomes so meanwhile waits for the next turn.
    pub(super) fn run(&self) {
        let count = self.runnable.borrow().len();
        for _ in 0..count {
            let Some(task) = self.runnable.borrow_mut().pop_front() else { break };
            task.run();
        }
    }
}

/// Lets all else on this worker have its turn.
pub async fn yield_now() {
    let mut has_waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Runs a future as a task of its own, and waits for its end. Futures that wait for others of their kind need
/// no stack for them then, however many there are.
pub async fn apart<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let slot = Rc::new(RefCell::new((None, None::<Waker>)));
    let theirs = slot.clone();
    super::current().spawn(async move {
        let result = future.await;
        let waker = {
            let mut slot = theirs.borrow_mut();
            slot.0 = Some(result);
            slot.1.take()
        };
        waker.into_iter().for_each(Waker::wake);
    });
    poll_fn(|cx| {
        let mut slot = slot.borrow_mut();
        match slot.0.take() {
            Some(result) => Poll::Ready(result),
            None => {
                slot.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    })
    .await
}

impl Io {
    /// Starts a task on this worker.
    pub fn spawn(self: &Rc<Io>, future: impl Future<Output = ()> + 'static) {
        self.tasks.set(self.tasks.get() + 1);
        let io = self.clone();
        let counted = async move {
            future.await;
            io.tasks.set(io.tasks.get() - 1);
        };
        let shared = self.shared.clone();
        let (runnable, task) = async_task::spawn_local(counted, move |task| shared.schedule(task));
        task.detach();
        self.run_queue.push(runnable);
    }
}
