//! The queues of a disk, on their workers, and what all of them are told: above all to pause.
//!
//! A queue belongs to them from its start until nothing of it is in flight, also while it stops and when nobody
//! waits for its end any more. So the pause of a disk covers all that the disk has in flight, whatever its front
//! ends do meanwhile. Nobody waits under the lock in here: queues tell of their rest by dropping a [`Busy`].
//!
//! The locks of an export, in the order in which they may be taken: a session, `Shared::current`, the list in
//! here. A drain takes the last alone, so that it waits for no front end and no front end for it.

use super::device::Device;
use super::queue::Queue;
use crate::io::sync::Mutex;
use crate::io::{SourceId, Worker};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// A queue: the number of its worker, and its source there.
type Place = (usize, SourceId);

#[derive(Default)]
pub struct Queues(Mutex<State>);

#[derive(Default)]
struct State {
    all: Vec<Place>,
    /// How many want nothing to be taken.
    paused: u32,
    /// How many [`Busy`] there are.
    busy: usize,
    waiting: Vec<Waker>,
}

/// Something of a disk that may be in flight, until it is dropped.
pub struct Busy(Arc<Device>);

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.queues.0.lock();
        state.busy -= 1;
        let waiting = if state.busy == 0 { std::mem::take(&mut state.waiting) } else { Vec::new() };
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
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
    /// A queue has come, which takes nothing until it is told to go on: at once, unless the disk is paused.
    pub fn add_queue(self: &Arc<Device>, workers: &[Arc<Worker>], queue: Place) {
        let mut state = self.queues.0.lock();
        state.all.push(queue);
        if state.paused == 0 {
            self.tell(workers, queue, Queue::resume);
        }
    }

    /// Nothing of a queue is in flight any more.
    pub fn remove_queue(&self, queue: Place) {
        self.queues.0.lock().all.retain(|one| *one != queue);
    }

    /// Has every queue do something, soon. Waits for nobody.
    pub fn tell_queues(self: &Arc<Device>, workers: &[Arc<Worker>], work: fn(&mut Queue)) {
        let state = self.queues.0.lock();
        state.all.iter().for_each(|&queue| self.tell(workers, queue, work));
    }

    fn tell(
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
        let mut state = self.queues.0.lock();
        state.paused += 1;
        if state.paused > 1 {
            return;
        }
        for &queue in &state.all.clone() {
            state.busy += 1;
            let busy = Busy(self.clone());
            self.tell(workers, queue, move |queue| queue.pause(Box::new(move || drop(busy))));
        }
    }

    /// Undoes one [`Device::pause`].
    pub fn resume(self: &Arc<Device>, workers: &[Arc<Worker>]) {
        let mut state = self.queues.0.lock();
        state.paused = state.paused.saturating_sub(1);
        if state.paused == 0 {
            state.all.iter().for_each(|&queue| self.tell(workers, queue, Queue::resume));
        }
    }

    /// Something that is no queue's is in flight.
    pub fn busy(self: &Arc<Device>) -> Busy {
        self.queues.0.lock().busy += 1;
        Busy(self.clone())
    }

    /// Waits until nothing is in flight on a paused disk.
    pub async fn at_rest(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.queues.0.lock();
            if state.busy == 0 {
                return Poll::Ready(());
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// What is in flight, of the queues whose workers answer.
    pub async fn in_flight(self: &Arc<Device>, workers: &[Arc<Worker>]) -> InFlight {
        let answers = Arc::new(Answers::default());
        for &queue in &self.queues.0.lock().all {
            let answer = Answer::new(&answers);
            self.tell(workers, queue, move |queue| answer.give(queue.in_flight_now()));
        }
        answers.all().await
    }
}

/// What queues answer that were all asked the same.
#[derive(Default)]
struct Answers(Mutex<(InFlight, usize, Option<Waker>)>);

/// The answer that one queue owes, until it is dropped.
struct Answer(Arc<Answers>);

impl Answer {
    fn new(answers: &Arc<Answers>) -> Answer {
        answers.0.lock().1 += 1;
        Answer(answers.clone())
    }

    fn give(self, in_flight: InFlight) {
        let mut answers = self.0.0.lock();
        answers.0 = std::mem::take(&mut answers.0).and(in_flight);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let waker = {
            let mut answers = self.0.0.lock();
            answers.1 -= 1;
            if answers.1 == 0 { answers.2.take() } else { None }
        };
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Answers {
    async fn all(&self) -> InFlight {
        std::future::poll_fn(|cx| {
            let mut answers = self.0.lock();
            if answers.1 == 0 {
                return Poll::Ready(std::mem::take(&mut answers.0));
            }
            answers.2 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}
