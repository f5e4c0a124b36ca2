//! A worker's queue pair of a controller.
//!
//! A source of the worker polls it every turn while anything is in flight, rings one doorbell for all that a turn has
//! started, and sleeps on its interrupt. Requests come from queues, whose sources are notified of the end by the
//! token, and from tasks of this worker and, where there are not enough queue pairs, of others.

use super::shared::Shared;
use crate::block::LocalFuture;
use crate::io::{self, Errno, Io, IoResult, Polled, Source, SourceId, Token, WorkerState};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Waker};
use vublk_vfio::spec::Status;
use vublk_vfio::{Done, PairWaker, QueuePair, Request};

/// Marks the tokens of tasks. Those of queues are made of two numbers that do not reach so far.
const TASK: u64 = 1 << 63;

/// A request of another worker's, and the receiver of its end, also when nobody takes it.
pub struct Remote {
    request: Request,
    done: Option<RemoteDone>,
}

type RemoteDone = Box<dyn FnOnce(Status) + Send>;

impl Remote {
    pub fn new(request: Request, done: RemoteDone) -> Remote {
        Remote { request, done: Some(done) }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(Status::GONE);
        }
    }
}

/// Where other workers send requests to.
#[derive(Clone)]
pub struct Host {
    /// The queue's number.
    pub queue: u16,
    pub requests: Sender<Remote>,
    pub waker: PairWaker,
}

pub struct WorkerQueue {
    shared: Arc<Shared>,
    queue: u16,
    /// None once it has ended.
    pair: RefCell<Option<QueuePair>>,
    tasks: RefCell<Tasks>,
    remotes: Receiver<Remote>,
    /// Known from its first turn on.
    me: Cell<Option<SourceId>>,
    /// It is polled in this turn without being woken.
    awake: Cell<bool>,
    /// When [`QueuePair::tick`] is due, on the ring's clock, while anything is in flight.
    due: Cell<Option<u64>>,
    end: RefCell<End>,
}

#[derive(Default)]
enum End {
    #[default]
    NotAsked,
    /// The source ends when nothing is in flight, and wakes the task that waits for it.
    Asked(Option<Waker>),
    Reached,
}

/// Requests of tasks.
#[derive(Default)]
struct Tasks {
    slots: Vec<Task>,
    free: Vec<u32>,
}

enum Task {
    Free,
    Waiting(Option<Waker>),
    Remote(RemoteDone),
    Done(Status),
}

impl Tasks {
    fn insert(&mut self, task: Task) -> u32 {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = task;
                slot
            }
            None => {
                self.slots.push(task);
                self.slots.len() as u32 - 1
            }
        }
    }

    fn take(&mut self, slot: u32) -> Task {
        self.free.push(slot);
        std::mem::replace(&mut self.slots[slot as usize], Task::Free)
    }
}

pub fn result(status: Status) -> IoResult {
    match status.errno() {
        0 => Ok(()),
        errno => Err(Errno(errno)),
    }
}

impl WorkerQueue {
    /// Gives the worker a queue pair.
    pub fn attach(io: &Io, shared: &Arc<Shared>, pair: QueuePair) -> Rc<WorkerQueue> {
        let (sender, remotes) = mpsc::channel();
        let host = Host { queue: pair.id(), requests: sender, waker: pair.waker() };
        let event = pair.event();
        let worker_queue = Rc::new(WorkerQueue {
            shared: shared.clone(),
            queue: pair.id(),
            pair: RefCell::new(Some(pair)),
            tasks: RefCell::default(),
            remotes,
            me: Cell::new(None),
            awake: Cell::new(true),
            due: Cell::new(None),
            end: RefCell::default(),
        });
        io.attach_device(Box::new(WorkerQueueSource(worker_queue.clone())), Some(event));
        shared.add_host(host);
        worker_queue
    }

    /// Starts a request. The controller is notified at the end of the turn.
    #[inline]
    pub fn submit(&self, io: &Io, request: Request) {
        if let Some(pair) = &mut *self.pair.borrow_mut() {
            pair.submit(request);
            if self.due.get().is_none() {
                self.ask_for_tick(io, pair, io.now());
            }
        }
        self.wake(io);
    }

    /// Requests a poll of the source in this turn.
    #[inline]
    fn wake(&self, io: &Io) {
        if !self.awake.replace(true)
            && let Some(me) = self.me.get()
        {
            io.wake_source(me);
        }
    }

    fn ask_for_tick(&self, io: &Io, pair: &QueuePair, now: u64) {
        let at = now + pair.tick_interval().as_nanos() as u64;
        self.due.set(Some(at));
        io.tick_by(at);
    }

    /// Starts a task's request; the returned number identifies its result.
    pub fn submit_task(&self, io: &Io, make: impl FnOnce(u64) -> Request) -> u32 {
        let slot = self.tasks.borrow_mut().insert(Task::Waiting(None));
        self.submit(io, make(TASK | u64::from(slot)));
        slot
    }

    /// The result of a task's request.
    pub fn poll_task(&self, slot: u32, cx: &mut Context<'_>) -> Poll<Status> {
        let mut tasks = self.tasks.borrow_mut();
        match &mut tasks.slots[slot as usize] {
            Task::Done(status) => {
                let status = *status;
                tasks.take(slot);
                Poll::Ready(status)
            }
            other => {
                *other = Task::Waiting(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }

    /// Waits for a task's abandoned request, whose memory is about to be freed. Blocks.
    pub fn drain_task(&self, io: &Io, slot: u32) {
        let ended = || matches!(self.tasks.borrow().slots[slot as usize], Task::Done(_));
        let mut iterations = 0u32;
        while !ended() {
            if let Some(pair) = &mut *self.pair.borrow_mut() {
                pair.ring();
                pair.reap(|done| self.end(io, done));
                iterations += 1;
                if iterations.is_multiple_of(1 << 16) {
                    pair.tick(|done| self.end(io, done));
                }
            }
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
        self.tasks.borrow_mut().take(slot);
    }

    /// The end of a request.
    #[inline]
    fn end(&self, io: &Io, Done { token, status }: Done) {
        if token & TASK == 0 {
            io.deliver(Token::from_bits(token), result(status));
        } else {
            self.end_task(token as u32, status);
        }
    }

    fn end_task(&self, slot: u32, status: Status) {
        let mut tasks = self.tasks.borrow_mut();
        match std::mem::replace(&mut tasks.slots[slot as usize], Task::Done(status)) {
            Task::Waiting(waker) => {
                drop(tasks);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Task::Remote(done) => {
                tasks.take(slot);
                drop(tasks);
                done(status);
            }
            Task::Free | Task::Done(_) => {}
        }
    }

    /// Takes what other workers have sent. True if there was anything.
    fn take_remotes(&self, io: &Io) -> bool {
        let mut any = false;
        while let Ok(mut remote) = self.remotes.try_recv() {
            let Some(done) = remote.done.take() else { continue };
            let slot = self.tasks.borrow_mut().insert(Task::Remote(done));
            self.submit(io, remote.request.with_token(TASK | u64::from(slot)));
            any = true;
        }
        any
    }
}

struct WorkerQueueSource(Rc<WorkerQueue>);

impl WorkerQueueSource {
    fn in_flight(&self) -> usize {
        self.0.pair.borrow().as_ref().map_or(0, QueuePair::in_flight)
    }

    /// Whether the queue is to end, and nothing keeps it.
    fn has_ended(&self) -> bool {
        if self.in_flight() > 0 {
            return false;
        }
        let mut end = self.0.end.borrow_mut();
        let End::Asked(waiting) = &mut *end else { return false };
        waiting.take().into_iter().for_each(Waker::wake);
        *end = End::Reached;
        true
    }
}

impl Source for WorkerQueueSource {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        let worker_queue = &self.0;
        worker_queue.me.set(Some(me));
        let mut completed = 0;
        if let Some(pair) = &mut *worker_queue.pair.borrow_mut() {
            completed = pair.reap(|done| worker_queue.end(io, done));
        }
        let any = worker_queue.take_remotes(io);
        if self.has_ended() {
            return Polled::Ended;
        }
        if completed > 0 || any { Polled::Busy } else { Polled::Idle }
    }

    fn has_work(&self) -> bool {
        self.0.pair.borrow().as_ref().is_some_and(QueuePair::has_work)
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {}

    fn publish(&mut self) {
        if let Some(pair) = &mut *self.0.pair.borrow_mut() {
            pair.ring();
        }
    }

    fn arm(&mut self) -> bool {
        let armed = self.0.pair.borrow_mut().as_mut().is_none_or(QueuePair::arm);
        // Requests that were sent before the event was read are handled now.
        let is_to_end = matches!(*self.0.end.borrow(), End::Asked(_));
        let armed = armed && !is_to_end && !self.0.take_remotes(&io::current());
        self.0.awake.set(!armed);
        armed
    }

    fn disarm(&mut self) {
        self.0.awake.set(true);
    }

    fn tick(&mut self, io: &Rc<Io>, now: u64) -> bool {
        let worker_queue = &self.0;
        let Some(due) = worker_queue.due.get() else { return false };
        if now < due {
            io.tick_by(due);
            return false;
        }
        worker_queue.due.set(None);
        if let Some(pair) = &mut *worker_queue.pair.borrow_mut()
            && pair.in_flight() > 0
        {
            pair.tick(|done| worker_queue.end(io, done));
            worker_queue.ask_for_tick(io, pair, now);
            return true;
        }
        false
    }

    fn is_detachable(&self) -> bool {
        self.in_flight() == 0
    }
}

impl WorkerState for WorkerQueue {
    /// Waits for what is in flight, and gives the queue pair back: elsewhere, because that blocks.
    fn leave(self: Rc<WorkerQueue>) -> LocalFuture<'static, ()> {
        self.shared.remove_host(self.queue);
        *self.end.borrow_mut() = End::Asked(None);
        self.wake(&io::current());
        Box::pin(async move {
            poll_fn(|cx| match &mut *self.end.borrow_mut() {
                End::Asked(waiting) => {
                    *waiting = Some(cx.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            })
            .await;
            let pair = self.pair.borrow_mut().take();
            io::offload(move || drop(pair)).await;
        })
    }
}
