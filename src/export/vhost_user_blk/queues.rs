//! The queues of a disk on their workers, and broadcasts to all of them, such as a pause.
//!
//! A queue belongs to them from its start until nothing of it is in flight, also while it stops and when nobody waits
//! for its end any more. So the pause of a disk covers all that the disk has in flight, whatever its front ends do
//! meanwhile. Nobody waits under the lock in here: queues report that they rest by dropping a [`Busy`].
//!
//! I/O of an export that is no queue's (a session that starts its rings, a flush of the write cache) has a [`Busy`]
//! too, which is given only while the disk is not paused. So nothing of an export begins in a drained graph, and
//! a change of the graph needs no session: it turns the queues itself.

use super::device::Device;
use super::queue::Queue;
use crate::block::Node;
use crate::io::sync::{Mutex, Waiters};
use crate::io::{IoResult, Local, SourceId, Worker};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// A queue: the number of its worker, and its source there.
type Place = (usize, SourceId);

#[derive(Default)]
pub struct Queues {
    state: Mutex<State>,
    /// Called when the disk is not paused any more.
    when_free: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct State {
    all: Vec<Place>,
    /// How many want nothing to be taken.
    paused: u32,
    /// How many [`Busy`] there are.
    busy: usize,
    /// Tasks that wait for another count of these two.
    waiting: Waiters,
}

/// Something of a disk that may be in flight, until it is dropped.
pub struct Busy(Arc<Device>);

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.queues.state.lock();
        state.busy -= 1;
        let waiting = state.waiting.take();
        drop(state);
        waiting.wake();
    }
}

/// The requests of a disk that are in flight.
#[derive(Default)]
pub struct InFlight {
    pub count: usize,
    /// The one that is in flight the longest, as far as that is known, and for how long at least.
    pub oldest: Option<(Duration, String)>,
}

impl InFlight {
    /// With those of another queue.
    fn and(self, other: InFlight) -> InFlight {
        let oldest = match (self.oldest, other.oldest) {
            (Some(a), Some(b)) => Some(if b.0 > a.0 { b } else { a }),
            (a, b) => a.or(b),
        };
        InFlight { count: self.count + other.count, oldest }
    }

    /// For errors.
    pub fn describe(&self) -> String {
        let requests = match self.count {
            0 => "requests in flight".to_owned(),
            1 => "1 request in flight".to_owned(),
            count => format!("{count} requests in flight"),
        };
        match &self.oldest {
            Some((_, what)) => format!("{requests}, the oldest a {what}"),
            None => requests,
        }
    }
}

impl Device {
    /// Adds a queue, which takes nothing until it is resumed: at once, unless the disk is paused.
    pub fn add_queue(self: &Arc<Device>, workers: &[Arc<Worker>], queue: Place) {
        let mut state = self.queues.state.lock();
        state.all.push(queue);
        if state.paused == 0 {
            self.notify(workers, queue, Queue::resume);
        }
    }

    /// Nothing of a queue is in flight any more.
    pub fn remove_queue(&self, queue: Place) {
        self.queues.state.lock().all.retain(|one| *one != queue);
    }

    /// Makes every queue do something, soon. Waits for nobody.
    pub fn notify_queues(self: &Arc<Device>, workers: &[Arc<Worker>], work: fn(&mut Queue)) {
        let state = self.queues.state.lock();
        state.all.iter().for_each(|&queue| self.notify(workers, queue, work));
    }

    fn notify(
        self: &Arc<Device>,
        workers: &[Arc<Worker>],
        (worker, source): Place,
        work: impl FnOnce(&mut Queue) + Send + 'static,
    ) {
        let disk = self.disk.clone();
        workers[worker].send(move |local| {
            // By now the number may be that of another source.
            if let Some(queue) = local.source::<Queue>(source)
                && queue.serves(&disk)
            {
                work(queue);
            }
        });
    }

    /// Nothing more is taken until as many [`Device::resume`]s have come, by queues that start meanwhile either.
    pub fn pause(self: &Arc<Device>, workers: &[Arc<Worker>]) {
        let mut state = self.queues.state.lock();
        state.paused += 1;
        if state.paused > 1 {
            return;
        }
        for &queue in &state.all.clone() {
            state.busy += 1;
            let busy = Busy(self.clone());
            self.notify(workers, queue, move |queue| queue.pause(Box::new(move || drop(busy))));
        }
    }

    /// Undoes one [`Device::pause`].
    pub fn resume(self: &Arc<Device>, workers: &[Arc<Worker>]) {
        let mut state = self.queues.state.lock();
        state.paused = state.paused.saturating_sub(1);
        if state.paused > 0 {
            return;
        }
        state.all.iter().for_each(|&queue| self.notify(workers, queue, Queue::resume));
        let waiting = state.waiting.take();
        drop(state);
        waiting.wake();
        if let Some(act) = self.queues.when_free.get() {
            act();
        }
    }

    /// `act`, which does not wait, is called whenever the disk is not paused any more.
    pub fn when_free(&self, act: impl Fn() + Send + Sync + 'static) {
        // Once, when the export is made.
        let _ = self.queues.when_free.set(Box::new(act));
    }

    /// Something that is no queue's begins. None while the disk is paused.
    pub fn try_begin(self: &Arc<Device>) -> Option<Busy> {
        let mut state = self.queues.state.lock();
        if state.paused > 0 {
            return None;
        }
        state.busy += 1;
        Some(Busy(self.clone()))
    }

    /// Something that is no queue's begins, as soon as the disk is not paused.
    pub async fn begin(self: &Arc<Device>) -> Busy {
        self.wait_until(|state| {
            let is_free = state.paused == 0;
            state.busy += usize::from(is_free);
            is_free
        })
        .await;
        Busy(self.clone())
    }

    /// Waits until nothing is in flight on a paused disk.
    pub async fn at_rest(&self) {
        self.wait_until(|state| state.busy == 0).await;
    }

    /// Makes durable all that the guest has been told is written. Waits for writes that have begun, and begins no
    /// others meanwhile.
    pub async fn flush_at_rest(self: &Arc<Device>, workers: &[Arc<Worker>]) -> IoResult {
        let busy = self.begin().await;
        self.pause(workers);
        self.wait_until(|state| state.busy == 1).await;
        let flushed = self.disk.node().flush().await;
        drop(busy);
        self.resume(workers);
        flushed
    }

    async fn wait_until(&self, mut is_so: impl FnMut(&mut State) -> bool) {
        self.queues
            .state
            .wait_for(|state| match is_so(state) {
                true => Ok(()),
                false => Err(&mut state.waiting),
            })
            .await;
    }

    /// What is in flight, of the queues whose workers answer.
    pub async fn in_flight(self: &Arc<Device>, workers: &[Arc<Worker>]) -> InFlight {
        let ask = |local: &mut Local, source| Some(local.source::<Queue>(source)?.in_flight_now());
        let all = self.ask(workers, ask).await;
        all.into_iter().fold(InFlight::default(), InFlight::and)
    }

    /// Makes the kernel keep the locks of the node's image, and no others, while it works for queues whose requests
    /// are tracked.
    ///
    /// # Errors
    /// The kernel does not keep them.
    pub async fn keep_locks_of(
        self: &Arc<Device>,
        workers: &[Arc<Worker>],
        node: &Arc<Node>,
    ) -> std::io::Result<()> {
        let fence = node.fence();
        let keep = move |local: &mut Local, source| {
            let is_tracked = local.source::<Queue>(source)?.is_tracked();
            is_tracked.then(|| local.pin(source, fence.files()))
        };
        self.ask(workers, keep).await.into_iter().collect()
    }

    /// The state of each queue, from its worker.
    async fn ask<T: Send + 'static>(
        self: &Arc<Device>,
        workers: &[Arc<Worker>],
        work: impl Fn(&mut Local, SourceId) -> Option<T> + Send + Clone + 'static,
    ) -> Vec<T> {
        let answers = Arc::new(Answers(Mutex::new((Vec::new(), 0, Waiters::new()))));
        for &(worker, source) in &self.queues.state.lock().all {
            let (answer, disk, work) = (Answer::new(&answers), self.disk.clone(), work.clone());
            workers[worker].send(move |local| {
                // By now the number may be that of another source.
                if local.source::<Queue>(source).is_some_and(|queue| queue.serves(&disk)) {
                    answer.give(work(local, source));
                }
            });
        }
        answers.all().await
    }
}

/// The answers of queues to one question: those so far, the number outstanding, and the waiting task.
struct Answers<T>(Mutex<(Vec<T>, usize, Waiters)>);

/// The answer that one queue owes, until it is dropped.
struct Answer<T>(Arc<Answers<T>>);

impl<T> Answer<T> {
    fn new(answers: &Arc<Answers<T>>) -> Answer<T> {
        answers.0.lock().1 += 1;
        Answer(answers.clone())
    }

    fn give(self, answer: Option<T>) {
        self.0.0.lock().0.extend(answer);
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        let waiting = {
            let mut answers = self.0.0.lock();
            answers.1 -= 1;
            if answers.1 == 0 { answers.2.take() } else { Waiters::new() }
        };
        waiting.wake();
    }
}

impl<T> Answers<T> {
    async fn all(&self) -> Vec<T> {
        self.0
            .wait_for(|(answers, owed, waiting)| match owed {
                0 => Ok(std::mem::take(answers)),
                _ => Err(waiting),
            })
            .await
    }
}
