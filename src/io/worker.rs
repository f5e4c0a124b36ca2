//! A worker: one thread, one ring, a slab of operations, and the queues dealt to it.
//!
//! A turn of its loop: reap completions, let every active source take what has arrived and start
//! it, run the tasks that were woken, let the sources publish their results, enter the ring once.
//! When there is nothing to do it spins for a while that follows how soon work came lately, bounded
//! by `poll-max-ns`, then asks all sources for kicks and sleeps in the ring. Idle costs nothing.

use super::ring::{Completion, Kind, Ring, Submission, Uring, Wait};
use super::slots::{Ops, Owner};
use super::sync::Mutex;
use super::task::RunQueue;
use super::timer::Timers;
use super::unwind::AbortOnPanic;
use super::{Errno, IoResult};
use async_task::Runnable;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// A source's number on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceId(u32);

/// Something that brings requests to a worker: a virtqueue.
pub trait Source: Any {
    /// Takes what has arrived, up to a share that is fair to the other sources, and starts it.
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled;

    /// Whether `poll` would find something. Called while the worker spins.
    fn has_work(&self) -> bool;

    /// An operation started with this source's token is done.
    fn complete(&mut self, io: &Rc<Io>, tag: u32, result: IoResult);

    /// The end of a turn: makes results visible, and notifies at most once.
    fn publish(&mut self);

    /// Asks for kicks, because the worker is about to sleep. False if something has arrived
    /// meanwhile: kicks are not to be relied upon then.
    fn arm(&mut self) -> bool;

    /// Says that kicks are not needed for now.
    fn disarm(&mut self);

    /// Whether `poll` finds nothing until a message or a completion has come, so that a source
    /// without kicks need not be looked at.
    fn rests(&self) -> bool {
        false
    }
}

/// What [`Source::poll`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    Idle,
    /// It took something.
    Busy,
    /// It has come to its end, with nothing in flight: the worker drops it.
    Ended,
}

/// How a worker behaves.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// The longest that an idle worker spins before it sleeps. Zero: it never spins.
    pub poll_max: Duration,
    /// The processor that it is pinned to.
    pub cpu: Option<usize>,
}

impl Default for WorkerOptions {
    fn default() -> WorkerOptions {
        WorkerOptions { poll_max: Duration::from_nanos(32_768), cpu: None }
    }
}

/// Completions taken from the ring at a time.
pub(super) const BATCH: usize = 256;
/// Operations that the slab has room for without growing.
const OPERATIONS: usize = 1024;
/// Turns without work after which one source among busy ones goes back to kicks.
const LAZY_TURNS: u32 = 256;

/// How often an idle worker looks at sources that give no kicks.
const LOOK_NS: u64 = 200_000;

/// What user data means: the kind in the low byte, 24 bits of its own, and a number.
pub(super) mod tag {
    pub const OP: u8 = 1;
    pub const KICK: u8 = 2;
    pub const WAKE: u8 = 3;
    pub const NONE: u8 = 4;

    pub fn pack(kind: u8, extra: u32, number: u32) -> u64 {
        kind as u64 | (extra as u64 & 0xff_ffff) << 8 | (number as u64) << 32
    }
    pub fn unpack(user_data: u64) -> (u8, u32, u32) {
        (user_data as u8, (user_data >> 8) as u32 & 0xff_ffff, (user_data >> 32) as u32)
    }
}

/// What other threads see of a worker.
pub(super) struct Shared {
    name: String,
    inbox: Mutex<Vec<Message>>,
    /// The inbox is not empty.
    mail: AtomicBool,
    /// The worker sleeps, or is about to.
    asleep: AtomicBool,
    wake: EventFd,
    stopping: AtomicBool,
    poll_max_ns: AtomicU64,
}

enum Message {
    Run(Box<dyn FnOnce(&mut Local) + Send>),
    Task(Runnable),
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Io>>> = const { RefCell::new(None) };
}

/// The worker that this thread is.
///
/// # Panics
/// On a thread that is no worker.
pub fn current() -> Rc<Io> {
    CURRENT.with_borrow(|io| io.clone()).expect("called on a worker's thread")
}

impl Shared {
    pub(super) fn schedule(&self, task: Runnable) {
        let here = CURRENT.with_borrow(|io| match io {
            Some(io) if std::ptr::eq(&*io.shared, self) => Some(io.clone()),
            _ => None,
        });
        match here {
            Some(io) => io.run_queue.push(task),
            None => self.send(Message::Task(task)),
        }
    }

    fn send(&self, message: Message) {
        self.inbox.lock().push(message);
        self.mail.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            // The counter of an eventfd that nobody reads cannot overflow in any lifetime.
            let _ = self.wake.write(1);
        }
    }
}

/// A worker's ring and everything that starts operations on it. Reached by [`current`] from tasks.
pub struct Io {
    pub(super) ring: RefCell<Box<dyn Ring>>,
    pub(super) ops: RefCell<Ops>,
    /// Sources that asked to be polled.
    ready: RefCell<Vec<SourceId>>,
    /// Completions reaped by somebody who waited for one of his own.
    pub(super) stash: RefCell<Vec<Completion>>,
    pub(super) run_queue: RunQueue,
    pub(super) tasks: Cell<usize>,
    pub(super) timers: Timers,
    pub(super) shared: Arc<Shared>,
}

impl Io {
    fn new(ring: Box<dyn Ring>, shared: Arc<Shared>) -> Io {
        Io {
            ring: RefCell::new(ring),
            ops: RefCell::new(Ops::with_capacity(OPERATIONS)),
            ready: RefCell::new(Vec::with_capacity(64)),
            stash: RefCell::default(),
            run_queue: RunQueue::default(),
            tasks: Cell::new(0),
            timers: Timers::default(),
            shared,
        }
    }

    /// Nanoseconds on the ring's clock.
    pub fn now(&self) -> u64 {
        self.ring.borrow().now()
    }

    /// Whether simulated files can be operated on ([`super::sim`]).
    pub fn is_simulated(&self) -> bool {
        self.ring.borrow().is_simulated()
    }

    /// Starts what is queued now, rather than at the end of the turn.
    pub fn submit(&self) {
        let mut ring = self.ring.borrow_mut();
        if ring.must_enter() {
            ring.enter(Wait::No);
        }
    }

    /// Asks that `source` be polled in this turn or the next.
    pub fn wake_source(&self, source: SourceId) {
        self.ready.borrow_mut().push(source);
    }
}

/// A worker as seen from its own thread: what a message from outside may use.
pub struct Local {
    io: Rc<Io>,
    sources: Vec<Option<Entry>>,
    free: Vec<u32>,
    /// Sources that are polled each turn and need no kicks.
    active: Vec<u32>,
    completions: Vec<Completion>,
    /// A number for each poll of a kick descriptor, so that a late completion of an old one is
    /// known.
    watches: u32,
    spin: Spin,
}

struct Entry {
    source: Box<dyn Source>,
    /// The number of the poll of its kick descriptor; `None` without one.
    watch: Option<(u32, RawFd)>,
    active: bool,
    idle_turns: u32,
}

impl Local {
    pub fn io(&self) -> &Rc<Io> {
        &self.io
    }

    /// Adds a source, polls it at once, and from then on whenever `kick` becomes readable. Without
    /// a kick descriptor it is polled all the time.
    pub fn attach(&mut self, source: Box<dyn Source>, kick: Option<RawFd>) -> SourceId {
        let entry = Entry { source, watch: None, active: false, idle_turns: 0 };
        let index = match self.free.pop() {
            Some(index) => {
                self.sources[index as usize] = Some(entry);
                index
            }
            None => {
                self.sources.push(Some(entry));
                self.sources.len() as u32 - 1
            }
        };
        let id = SourceId(index);
        self.watch(id, kick);
        id
    }

    /// Gives a source another kick descriptor, or none. The ring holds the file, so the descriptor
    /// may be closed as soon as another one has taken its place.
    pub fn watch(&mut self, id: SourceId, kick: Option<RawFd>) {
        self.unwatch(id.0);
        self.watches = (self.watches + 1) & 0xff_ffff;
        let number = self.watches;
        if let Some(Some(entry)) = self.sources.get_mut(id.0 as usize) {
            entry.watch = kick.map(|fd| (number, fd));
            if let Some(fd) = kick {
                self.poll_many(tag::pack(tag::KICK, number, id.0), fd);
            }
        }
        self.activate(id.0);
    }

    /// The source, for messages that know its type.
    pub fn source<T: Source>(&mut self, id: SourceId) -> Option<&mut T> {
        let entry = self.sources.get_mut(id.0 as usize)?.as_mut()?;
        self.io.wake_source(id);
        (&mut *entry.source as &mut dyn Any).downcast_mut()
    }

    fn unwatch(&mut self, index: u32) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        if let Some((number, _)) = entry.watch.take() {
            let user_data = tag::pack(tag::NONE, 0, 0);
            let kind = Kind::PollEnd(tag::pack(tag::KICK, number, index));
            // SAFETY: names no memory.
            unsafe { self.io.ring.borrow_mut().push(Submission { user_data, fd: -1, kind }) };
        }
    }

    fn poll_many(&self, user_data: u64, fd: RawFd) {
        // SAFETY: names no memory.
        unsafe {
            self.io.ring.borrow_mut().push(Submission { user_data, fd, kind: Kind::PollMany })
        };
    }

    fn activate(&mut self, index: u32) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        entry.idle_turns = 0;
        if !entry.active {
            entry.active = true;
            entry.source.disarm();
            self.active.push(index);
        }
    }

    /// One turn. True if anything was done.
    fn turn(&mut self) -> bool {
        let mut busy = self.read_mail();
        busy |= self.dispatch();
        let io = self.io.clone();
        let mut at = 0;
        while at < self.active.len() {
            let index = self.active[at];
            let Some(Some(entry)) = self.sources.get_mut(index as usize) else {
                self.active.swap_remove(at);
                continue;
            };
            match entry.source.poll(&io, SourceId(index)) {
                Polled::Busy => {
                    busy = true;
                    entry.idle_turns = 0;
                }
                Polled::Idle => entry.idle_turns += 1,
                Polled::Ended => {
                    entry.source.publish();
                    self.unwatch(index);
                    self.sources[index as usize] = None;
                    self.free.push(index);
                    self.active.swap_remove(at);
                    busy = true;
                    continue;
                }
            }
            at += 1;
        }
        if !io.run_queue.is_empty() {
            io.run_queue.run();
            busy = true;
        }
        busy |= self.wake_ready();
        for &index in &self.active {
            if let Some(Some(entry)) = self.sources.get_mut(index as usize) {
                entry.source.publish();
            }
        }
        let mut ring = io.ring.borrow_mut();
        if ring.must_enter() {
            ring.enter(Wait::No);
            busy = true;
        }
        drop(ring);
        if busy && self.active.len() > 1 {
            self.retire_lazy();
        }
        busy
    }

    fn wake_ready(&mut self) -> bool {
        let mut any = false;
        loop {
            let Some(id) = self.io.ready.borrow_mut().pop() else { return any };
            any = true;
            self.activate(id.0);
        }
    }

    fn read_mail(&mut self) -> bool {
        if !self.io.shared.mail.load(Ordering::Relaxed) {
            return false;
        }
        self.io.shared.mail.store(false, Ordering::SeqCst);
        let messages = std::mem::take(&mut *self.io.shared.inbox.lock());
        for message in messages {
            match message {
                Message::Run(work) => work(self),
                Message::Task(task) => self.io.run_queue.push(task),
            }
        }
        self.wake_ready();
        true
    }

    fn dispatch(&mut self) -> bool {
        let io = self.io.clone();
        let mut completions = std::mem::take(&mut self.completions);
        completions.append(&mut io.stash.borrow_mut());
        io.ring.borrow_mut().reap(&mut completions);
        let any = !completions.is_empty();
        for completion in completions.drain(..) {
            let (kind, extra, number) = tag::unpack(completion.user_data);
            match kind {
                tag::OP => {
                    if let Some((Owner::Source(token), result)) =
                        io.finish(number, completion.result)
                        && let Some(Some(entry)) = self.sources.get_mut(token.source.0 as usize)
                    {
                        entry.source.complete(&io, token.tag, result);
                        self.activate(token.source.0);
                    }
                }
                tag::KICK => self.kicked(number, extra, completion),
                tag::WAKE if !completion.more => self.watch_mail(),
                _ => {}
            }
        }
        self.completions = completions;
        any
    }

    fn kicked(&mut self, index: u32, number: u32, completion: Completion) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        let Some((watch, fd)) = entry.watch else { return };
        if watch != number {
            return;
        }
        if !completion.more {
            if completion.result < 0 {
                let errno = Errno(-completion.result);
                log::error!("{}: the kick descriptor of a queue: {errno}", self.io.shared.name);
                entry.watch = None;
            } else {
                self.poll_many(completion.user_data, fd);
            }
        }
        self.activate(index);
    }

    fn watch_mail(&self) {
        self.poll_many(tag::pack(tag::WAKE, 0, 0), self.io.shared.wake.as_raw_fd());
    }

    /// Sends sources that have had nothing for long, while others kept the worker busy, back to
    /// kicks.
    fn retire_lazy(&mut self) {
        let mut at = 0;
        while at < self.active.len() {
            match self.sources[self.active[at] as usize].as_mut() {
                Some(entry) if entry.idle_turns > LAZY_TURNS && entry.watch.is_some() => {
                    if entry.source.arm() {
                        entry.active = false;
                        self.active.swap_remove(at);
                        continue;
                    }
                    entry.source.disarm();
                    entry.idle_turns = 0;
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Whether a spinning worker would find something to do.
    fn has_work(&self) -> bool {
        let shared = &self.io.shared;
        if shared.mail.load(Ordering::Relaxed) {
            return true;
        }
        let mut ring = self.io.ring.borrow_mut();
        ring.must_enter()
            || ring.has_completions()
            || self.active.iter().any(|&index| {
                self.sources[index as usize].as_ref().is_some_and(|e| e.source.has_work())
            })
    }

    /// Spins while that is promising. True if there is something to do.
    fn spin(&mut self, poll_max: u64) -> bool {
        // What was learnt under a larger bound does not hold under this one.
        let limit = self.spin.limit_ns.min(poll_max);
        if limit == 0 || self.active.is_empty() && self.io.timers.next().is_none() {
            return self.has_work();
        }
        let began = self.io.now();
        loop {
            for _ in 0..16 {
                if self.has_work() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = self.io.now();
            if now - began >= limit || self.io.timers.next().is_some_and(|at| at <= now) {
                return false;
            }
        }
    }

    /// Asks all sources for kicks. False if one of them has something now.
    fn arm_all(&mut self) -> bool {
        let mut at = 0;
        while at < self.active.len() {
            let index = self.active[at];
            let Some(entry) = self.sources[index as usize].as_mut() else {
                self.active.swap_remove(at);
                continue;
            };
            if entry.watch.is_none() && !entry.source.rests() {
                at += 1;
                continue;
            }
            if !entry.source.arm() {
                entry.source.disarm();
                return false;
            }
            entry.active = false;
            self.active.swap_remove(at);
        }
        true
    }

    fn sleep(&mut self) {
        let shared = self.io.shared.clone();
        shared.asleep.store(true, Ordering::SeqCst);
        if !shared.mail.load(Ordering::SeqCst) && self.io.run_queue.is_empty() {
            let mut ring = self.io.ring.borrow_mut();
            let timer = self.io.timers.next().map(|at| at.saturating_sub(ring.now()));
            // A front end that gives no kick descriptor wants its queue to be looked at.
            let look = (!self.active.is_empty()).then_some(LOOK_NS);
            let wait = match timer.into_iter().chain(look).min() {
                Some(ns) => Wait::For(Duration::from_nanos(ns)),
                None => Wait::Forever,
            };
            ring.enter(wait);
        }
        shared.asleep.store(false, Ordering::Relaxed);
    }

    fn may_stop(&self) -> bool {
        self.io.shared.stopping.load(Ordering::Relaxed)
            && self.io.tasks.get() == 0
            && self.sources.iter().all(Option::is_none)
            && !self.io.shared.mail.load(Ordering::SeqCst)
    }

    /// One round of work and, if there is none, of waiting. False when the worker may end.
    fn round(&mut self) -> bool {
        if self.io.timers.next().is_some() {
            let now = self.io.now();
            self.io.timers.wake_due(now);
        }
        if self.turn() || !self.io.stash.borrow().is_empty() {
            return true;
        }
        if self.may_stop() {
            return false;
        }
        let poll_max = self.io.shared.poll_max_ns.load(Ordering::Relaxed);
        let began = if poll_max > 0 { self.io.now() } else { 0 };
        if !self.spin(poll_max) && self.arm_all() {
            self.sleep();
        }
        if poll_max > 0 {
            self.spin.learn(self.io.now() - began, poll_max);
        }
        true
    }
}

/// How long to spin: as long as work came lately within the time that spinning may take, not at
/// all when it did not.
///
/// One short gap is not enough. A disk at depth 1 has two kinds that take turns, the storage's and
/// the guest's, and spinning through the longer because the shorter was short is a waste.
#[derive(Default)]
struct Spin {
    limit_ns: u64,
    /// Gaps in a row that spinning would have bridged.
    streak: u32,
}

impl Spin {
    const FIRST_NS: u64 = 4_000;
    const STREAK: u32 = 3;

    /// `gap` is how long there was nothing to do. Gaps longer than half of `max` are left to sleep:
    /// going to sleep and waking up costs less than spinning through them.
    fn learn(&mut self, gap: u64, max: u64) {
        if gap > max / 2 {
            *self = Spin::default();
            return;
        }
        self.streak = self.streak.saturating_add(1);
        if self.streak >= Self::STREAK && gap > self.limit_ns {
            self.limit_ns = (self.limit_ns * 2).max(Self::FIRST_NS).max(gap).min(max / 2);
        }
    }
}

/// A worker's handle: other threads talk to it through this. The thread ends with the handle, once
/// its sources and tasks have.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a worker's thread.
    pub fn start(name: &str, options: WorkerOptions) -> std::io::Result<Worker> {
        let shared = Shared::new(name, options)?;
        let (sender, receiver) = mpsc::channel();
        let theirs = shared.clone();
        // The kernel cuts names at 15 bytes.
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Some(cpu) = options.cpu {
                pin(cpu);
            }
            // The ring belongs to the thread that makes it.
            match Uring::new() {
                Ok(ring) => {
                    let _ = sender.send(Ok(()));
                    let mut local = Local::new(Box::new(ring), theirs);
                    let _guard = AbortOnPanic;
                    while local.round() {}
                    CURRENT.set(None);
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        })?;
        receiver.recv().map_err(|_| std::io::Error::other("the worker's thread died"))??;
        Ok(Worker { shared, thread: Some(thread) })
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Changes how long the worker spins when idle.
    pub fn set_poll_max(&self, poll_max: Duration) {
        self.shared.poll_max_ns.store(poll_max.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Runs `work` on the worker, between two turns.
    pub fn send(&self, work: impl FnOnce(&mut Local) + Send + 'static) {
        self.shared.send(Message::Run(Box::new(work)));
    }

    /// Runs `work` on the worker and waits for its answer. Not to be called on the worker itself.
    pub fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Local) -> T + Send + 'static,
    ) -> T {
        let (sender, receiver) = mpsc::channel();
        self.send(move |local| {
            let _ = sender.send(work(local));
        });
        receiver.recv().expect("the worker lives as long as its handle")
    }

    /// Runs a future on the worker and waits for its result. Not to be called on a worker.
    pub fn block_on<T, F>(&self, make: impl FnOnce() -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        self.send(move |local| {
            let future = make();
            local.io.spawn(async move {
                let _ = sender.send(future.await);
            });
        });
        receiver.recv().expect("the worker lives as long as its handle")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.send(|_| {});
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn new(name: &str, options: WorkerOptions) -> std::io::Result<Arc<Shared>> {
        Ok(Arc::new(Shared {
            name: name.to_owned(),
            inbox: Mutex::default(),
            mail: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
            stopping: AtomicBool::new(false),
            poll_max_ns: AtomicU64::new(options.poll_max.as_nanos() as u64),
        }))
    }
}

impl Local {
    fn new(ring: Box<dyn Ring>, shared: Arc<Shared>) -> Local {
        let io = Rc::new(Io::new(ring, shared));
        CURRENT.set(Some(io.clone()));
        let local = Local {
            io,
            sources: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            completions: Vec::with_capacity(BATCH),
            watches: 0,
            spin: Spin::default(),
        };
        local.watch_mail();
        local
    }
}

/// Runs `future` to its end on this thread, as a worker of its own whose ring is `ring`: how tests
/// run the block layer over a simulated ring.
pub fn run_on<T: 'static>(ring: Box<dyn Ring>, future: impl Future<Output = T> + 'static) -> T {
    run_local(ring, |_| future)
}

/// As [`run_on`], for futures whose making wants the worker, to attach sources to it.
pub fn run_local<T, F>(ring: Box<dyn Ring>, make: impl FnOnce(&mut Local) -> F) -> T
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let options = WorkerOptions { poll_max: Duration::ZERO, cpu: None };
    let shared = Shared::new("simulated", options).expect("an eventfd");
    let mut local = Local::new(ring, shared);
    let future = make(&mut local);
    let result = Rc::new(RefCell::new(None));
    let theirs = result.clone();
    local.io.spawn(async move {
        *theirs.borrow_mut() = Some(future.await);
    });
    while result.borrow().is_none() {
        local.round();
    }
    CURRENT.set(None);
    let value = result.borrow_mut().take();
    value.expect("the loop ends with a result")
}

/// Pins the calling thread to a processor, if that is possible.
fn pin(cpu: usize) {
    if cpu >= libc::CPU_SETSIZE as usize {
        return log::warn!("cannot pin a worker to processor {cpu}: there is no such number");
    }
    // SAFETY: the set is initialised and has room for the number.
    unsafe {
        let mut set = std::mem::zeroed::<libc::cpu_set_t>();
        libc::CPU_SET(cpu, &mut set);
        if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) != 0 {
            log::warn!("cannot pin a worker to processor {cpu}: {}", Errno::last());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_starts_on_a_processor_that_cannot_be() {
        for cpu in [1023, 1024, usize::MAX] {
            let options = WorkerOptions { cpu: Some(cpu), ..WorkerOptions::default() };
            Worker::start("nowhere", options).unwrap().call(|_| ());
        }
    }

    #[test]
    fn spinning_begins_with_a_streak_of_short_gaps_and_ends_with_a_long_one() {
        let mut spin = Spin::default();
        for gap in [5_000, 80_000, 5_000, 80_000, 5_000, 5_000] {
            spin.learn(gap, 32_000);
            assert_eq!(spin.limit_ns, 0);
        }
        spin.learn(5_000, 32_000);
        assert_eq!(spin.limit_ns, 5_000);
        spin.learn(15_000, 32_000);
        assert_eq!(spin.limit_ns, 15_000);
        spin.learn(17_000, 32_000);
        assert_eq!(spin.limit_ns, 0);
    }
}
