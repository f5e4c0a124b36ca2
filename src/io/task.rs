//! Tasks of the slow path: futures that stay on their worker, run when they are woken.
//!
//! A task is never cancelled: once started it runs to its end, so that nothing it has submitted is
//! left without an owner.

use super::SourceId;
use super::turn_share::{self, moved_so_far};
use super::worker::Io;
use async_task::Runnable;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A future that stays on the worker it was made on.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Tasks are run round robin by flow: a source's tasks and the tasks that they start are one flow.
const FLOWS: u32 = 64;

/// The flow of tasks that are no source's.
const COMMON: u32 = 0;

/// The flow of a source's tasks. More sources than flows share them.
fn flow_of(source: SourceId) -> u32 {
    1 + source.0 % (FLOWS - 1)
}

/// The tasks of a worker that are to be run.
#[derive(Default)]
pub(super) struct RunQueue {
    flows: RefCell<Flows>,
    /// What became runnable while tasks were run: for the next turn.
    later: RefCell<Vec<(u32, Runnable)>>,
    /// The flow of the task that is run now.
    running: Cell<Option<u32>>,
}

struct Flows {
    tasks: [VecDeque<Runnable>; FLOWS as usize],
    /// A bit for each flow with tasks.
    filled: u64,
    /// Where to look first.
    next: u32,
    count: usize,
}

impl Default for Flows {
    fn default() -> Flows {
        Flows { tasks: std::array::from_fn(|_| VecDeque::new()), filled: 0, next: 0, count: 0 }
    }
}

impl Flows {
    fn push(&mut self, flow: u32, task: Runnable) {
        self.tasks[flow as usize].push_back(task);
        self.filled |= 1 << flow;
        self.count += 1;
    }

    /// The first task of the next flow that has one.
    fn pop(&mut self) -> Option<(u32, Runnable)> {
        if self.filled == 0 {
            return None;
        }
        let flow = (self.next + self.filled.rotate_right(self.next).trailing_zeros()) % FLOWS;
        let tasks = &mut self.tasks[flow as usize];
        let task = tasks.pop_front()?;
        if tasks.is_empty() {
            self.filled &= !(1 << flow);
        }
        self.next = (flow + 1) % FLOWS;
        self.count -= 1;
        Some((flow, task))
    }
}

impl RunQueue {
    pub(super) fn push(&self, flow: u32, task: Runnable) {
        match self.running.get() {
            Some(_) => self.later.borrow_mut().push((flow, task)),
            None => self.flows.borrow_mut().push(flow, task),
        }
    }

    /// The flow of what is started now.
    fn current_flow(&self) -> u32 {
        self.running.get().unwrap_or(COMMON)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flows.borrow().count == 0
    }

    /// Runs what is runnable now, up to a turn's share; what becomes so meanwhile waits for the next turn.
    pub(super) fn run(&self) {
        let began = moved_so_far();
        for _ in 0..turn_share::TASKS {
            let next = self.flows.borrow_mut().pop();
            let Some((flow, task)) = next else { break };
            self.running.set(Some(flow));
            task.run();
            if moved_so_far().wrapping_sub(began) >= turn_share::BYTES {
                break;
            }
        }
        self.running.set(None);
        let mut flows = self.flows.borrow_mut();
        self.later.borrow_mut().drain(..).for_each(|(flow, task)| flows.push(flow, task));
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

/// What [`either`] came to.
pub enum Either<A, B> {
    First(A),
    Second(B),
}

/// Waits for one of two futures: for the first if both are done. The other one is dropped.
pub async fn either<A, B>(
    first: impl Future<Output = A>,
    second: impl Future<Output = B>,
) -> Either<A, B> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|cx| match first.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Either::First(done)),
        Poll::Pending => second.as_mut().poll(cx).map(Either::Second),
    })
    .await
}

/// Runs a future as a task of its own, and waits for its end. Futures that wait for others of their kind need
/// no stack for them then, however many there are.
pub async fn apart<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let slot = Rc::new(RefCell::new((None, None::<Waker>)));
    let clone = slot.clone();
    super::current().spawn(async move {
        let result = future.await;
        let waker = {
            let mut slot = clone.borrow_mut();
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
    /// Starts a task on this worker. It has its turns with the task that starts it.
    pub fn spawn(self: &Rc<Io>, future: impl Future<Output = ()> + 'static) {
        self.spawn_in(self.run_queue.current_flow(), future);
    }

    /// Starts a task on this worker for a source. Sources' tasks have their turns one by one, however many
    /// each has.
    pub fn spawn_for(self: &Rc<Io>, source: SourceId, future: impl Future<Output = ()> + 'static) {
        self.spawn_in(flow_of(source), future);
    }

    /// Starts a task on this worker that has its turns as one of a source of that number would, with the tasks that it
    /// starts: of a connection that is no source.
    pub fn spawn_apart(self: &Rc<Io>, number: u64, future: impl Future<Output = ()> + 'static) {
        self.spawn_in(flow_of(SourceId((number % u64::from(FLOWS)) as u32)), future);
    }

    fn spawn_in(self: &Rc<Io>, flow: u32, future: impl Future<Output = ()> + 'static) {
        self.tasks.set(self.tasks.get() + 1);
        let io = self.clone();
        let counted = async move {
            future.await;
            io.tasks.set(io.tasks.get() - 1);
        };
        let shared = self.shared.clone();
        let (runnable, task) =
            async_task::spawn_local(counted, move |task| shared.schedule(flow, task));
        task.detach();
        self.run_queue.push(flow, runnable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::IoVec;
    use crate::io::sim::{Disorder, SimRing};
    use std::rc::Rc;

    /// Runs what `start` starts on a worker, and gives what was noted by then.
    fn noted(start: impl FnOnce(&Rc<Io>, &Rc<RefCell<Vec<u32>>>) + 'static) -> Vec<u32> {
        let ring = SimRing::new(Disorder::wild(1)).unwrap();
        crate::io::run_on(Box::new(ring), async move {
            let notes = Rc::new(RefCell::new(Vec::new()));
            let io = crate::io::current();
            start(&io, &notes);
            while io.tasks.get() > 1 {
                yield_now().await;
            }
            notes.take()
        })
    }

    #[test]
    fn a_source_with_many_tasks_does_not_delay_the_tasks_of_another() {
        let notes = noted(|io, notes| {
            for source in [1, 1, 1, 1, 2, 2, 3] {
                let notes = notes.clone();
                io.spawn_for(SourceId(source), async move { notes.borrow_mut().push(source) });
            }
        });
        assert_eq!(notes, [1, 2, 3, 1, 2, 1, 1]);
    }

    #[test]
    fn a_task_that_goes_on_at_once_waits_until_all_others_have_had_their_turn() {
        let notes = noted(|io, notes| {
            for source in [1, 2, 2, 2] {
                let notes = notes.clone();
                io.spawn_for(SourceId(source), async move {
                    notes.borrow_mut().push(source);
                    yield_now().await;
                    notes.borrow_mut().push(10 * source);
                });
            }
        });
        assert_eq!(notes[..4], [1, 2, 2, 2]);
    }

    #[test]
    fn tasks_that_copy_much_end_the_turn() {
        let notes = noted(|io, notes| {
            for n in 0..4 {
                let notes = notes.clone();
                io.spawn_for(SourceId(1), async move {
                    let mut bytes = vec![0; turn_share::BYTES as usize];
                    IoVec::from_mut(&mut bytes).zero();
                    notes.borrow_mut().push(n);
                });
            }
            // In the turn after each of these tasks, not after the last.
            let notes = notes.clone();
            io.spawn_for(SourceId(2), async move {
                yield_now().await;
                notes.borrow_mut().push(9);
            });
        });
        let place = notes.iter().position(|&n| n == 9).unwrap();
        assert!(place < 4, "{notes:?}");
    }
}
