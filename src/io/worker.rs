//! A worker: one thread, one ring, a slab of operations, and its queues.
//!
//! Here are its parts and the handle that other threads hold; [`super::turn`] is the loop of the thread.

use super::device::Devices;
use super::per_worker::States;
use super::ring::{Completion, Ring, Wait};
use super::slots::Ops;
use super::sync::Mutex;
use super::task::RunQueue;
use super::threads::Threads;
use super::timer::Timers;
use super::unwind::AbortOnPanic;
use super::{Errno, Local, SourceId};
use super::{driven, spare};
use async_task::Runnable;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// How a worker behaves.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// The longest that an idle worker spins before it sleeps. Zero: it never spins.
    pub poll_max: Duration,
    /// The processor that it is pinned to.
    pub cpu: Option<usize>,
    /// Only its own tasks wait for it: copies, and work for other threads ([`super::offload`]), are done in place
    /// ([`may_block`]).
    pub may_block: bool,
}

impl Default for WorkerOptions {
    fn default() -> WorkerOptions {
        WorkerOptions { poll_max: Duration::from_nanos(32_768), cpu: None, may_block: false }
    }
}

/// Operations that the slab has room for without growing.
const OPERATIONS: usize = 1024;
/// Bytes of a worker's stack. Requests recurse through at most 64 nodes, for which builds without optimization need 2
/// MiB where all of them are filters. Untouched pages take no memory.
const STACK: usize = 16 << 20;

/// The part of a worker that other threads use.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) inbox: Mutex<Vec<Message>>,
    /// The inbox is not empty.
    pub(super) mail: AtomicBool,
    /// The worker sleeps, or is about to.
    pub(super) asleep: AtomicBool,
    pub(super) wake: EventFd,
    pub(super) stopping: AtomicBool,
    pub(super) poll_max_ns: u64,
    may_block: bool,
}

pub(super) enum Message {
    Run(Box<dyn FnOnce(&mut Local) + Send>),
    Task(u32, Runnable),
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

/// Whether this thread is a worker that may be kept waiting ([`WorkerOptions::may_block`]).
pub fn may_block() -> bool {
    CURRENT.with_borrow(|io| io.as_ref().is_some_and(|io| io.shared.may_block))
}

/// Calls `look` with the worker of this thread, without another reference to it.
///
/// # Panics
/// On a thread that is no worker.
pub(super) fn with_current<T>(look: impl FnOnce(&Io) -> T) -> T {
    CURRENT.with_borrow(|io| look(io.as_ref().expect("called on a worker's thread")))
}

/// Makes this thread another worker, or none. Returns the previous one.
pub(super) fn replace_current(io: Option<Rc<Io>>) -> Option<Rc<Io>> {
    CURRENT.replace(io)
}

impl Shared {
    pub(super) fn schedule(&self, flow: u32, task: Runnable) {
        let here = CURRENT.with_borrow(|io| match io {
            Some(io) if std::ptr::eq(&*io.shared, self) => Some(io.clone()),
            _ => None,
        });
        match here {
            Some(io) => io.run_queue.push(flow, task),
            None => self.send(Message::Task(flow, task)),
        }
    }

    /// Runs `work` on the worker, between two turns; never if it has ended.
    pub(super) fn run(&self, work: impl FnOnce(&mut Local) + Send + 'static) {
        self.send(Message::Run(Box::new(work)));
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
    pub(super) ready: RefCell<Vec<SourceId>>,
    /// Completions reaped while waiting for another one.
    pub(super) stash: RefCell<Vec<Completion>>,
    pub(super) run_queue: RunQueue,
    pub(super) tasks: Cell<usize>,
    pub(super) timers: Timers,
    pub(super) devices: Devices,
    pub(super) states: States,
    /// When the sources want a tick, in nanoseconds; [`NEVER`].
    pub(super) tick: Cell<u64>,
    /// What [`Io::turn_time`] gives; [`NEVER`]: the clock was not read yet.
    pub(super) turn_time: Cell<u64>,
    pub(super) shared: Arc<Shared>,
}

/// No tick is wanted; no time is known.
pub(super) const NEVER: u64 = u64::MAX;

impl Io {
    pub(super) fn new(ring: Box<dyn Ring>, shared: Arc<Shared>) -> Io {
        Io {
            ring: RefCell::new(ring),
            ops: RefCell::new(Ops::with_capacity(OPERATIONS)),
            ready: RefCell::new(Vec::with_capacity(64)),
            stash: RefCell::default(),
            run_queue: RunQueue::default(),
            tasks: Cell::new(0),
            timers: Timers::default(),
            devices: Devices::default(),
            states: States::default(),
            tick: Cell::new(NEVER),
            turn_time: Cell::new(NEVER),
            shared,
        }
    }

    /// Nanoseconds on the ring's clock.
    pub fn now(&self) -> u64 {
        self.ring.borrow().now()
    }

    /// Nanoseconds on the ring's clock, at some time after this turn's completions were there and before anything
    /// else was taken. The clock is read at most once in a turn.
    #[inline]
    pub fn turn_time(&self) -> u64 {
        if self.turn_time.get() == NEVER {
            self.turn_time.set(self.now());
        }
        self.turn_time.get()
    }

    /// Whether simulated files can be operated on ([`super::sim`]).
    pub fn is_simulated(&self) -> bool {
        self.ring.borrow().is_simulated()
    }

    /// Starts queued operations now, rather than at the end of the turn.
    pub fn submit(&self) {
        let mut ring = self.ring.borrow_mut();
        if ring.must_enter() {
            ring.enter(Wait::No);
        }
    }

    /// Asks that [`Source::tick`](super::Source::tick) be called when the ring's clock shows `at`
    /// nanoseconds or a little more. Costs nothing until then but that the worker sleeps no longer.
    pub fn tick_by(&self, at: u64) {
        self.tick.set(self.tick.get().min(at));
    }

    /// Asks that `source` be polled in this turn or the next.
    pub fn wake_source(&self, source: SourceId) {
        self.ready.borrow_mut().push(source);
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
        let clone = shared.clone();
        // The kernel cuts names at 15 bytes.
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK);
        let thread = thread.spawn(move || {
            if let Some(cpu) = options.cpu {
                pin(cpu);
            }
            // The ring belongs to the thread that makes it.
            match make_ring() {
                Ok(ring) => {
                    let _ = sender.send(Ok(()));
                    let mut local = Local::new(ring, clone);
                    let _guard = AbortOnPanic;
                    while local.round() {}
                    replace_current(None);
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        })?;
        receiver.recv().map_err(|_| std::io::Error::other("the worker's thread died"))??;
        Ok(Worker { shared, thread: Some(thread) })
    }

    pub(super) fn without_thread(shared: Arc<Shared>) -> Worker {
        Worker { shared, thread: None }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Runs `work` on the worker, between two turns.
    pub fn send(&self, work: impl FnOnce(&mut Local) + Send + 'static) {
        self.shared.run(work);
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
        driven::receive(&receiver).expect("the worker lives as long as its handle")
    }

    /// Runs a future on the worker. Its result comes through the channel.
    pub fn spawn<T, F>(&self, make: impl FnOnce() -> F + Send + 'static) -> mpsc::Receiver<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        self.send(move |local| {
            let future = make();
            local.io().spawn(async move {
                let _ = sender.send(future.await);
            });
        });
        receiver
    }

    /// Runs a future on the worker and waits for its result. Not to be called on a worker.
    pub fn block_on<T, F>(&self, make: impl FnOnce() -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let result = self.spawn(make);
        driven::receive(&result).expect("the worker lives as long as its handle")
    }
}

/// The kernel's ring, or one of threads where there is none, with one warning.
fn make_ring() -> std::io::Result<Box<dyn Ring>> {
    static WARNED: std::sync::Once = std::sync::Once::new();
    match spare::take_ring() {
        Ok(ring) => Ok(Box::new(ring)),
        Err(error) => {
            WARNED.call_once(|| {
                log::warn!(
                    "io_uring cannot be used ({error}): threads do the I/O, which costs more \
                     processor time"
                );
            });
            Ok(Box::new(Threads::new()?))
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.send(|_| {});
        driven::end(&self.shared);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    pub(super) fn new(name: &str, options: WorkerOptions) -> std::io::Result<Arc<Shared>> {
        Ok(Arc::new(Shared {
            name: name.to_owned(),
            inbox: Mutex::default(),
            mail: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
            stopping: AtomicBool::new(false),
            poll_max_ns: options.poll_max.as_nanos() as u64,
            may_block: options.may_block,
        }))
    }
}

/// Runs `future` to its end on this thread, as a worker of its own whose ring is `ring`: how tests
/// run the block layer over a simulated ring.
pub fn run_on<T: 'static>(ring: Box<dyn Ring>, future: impl Future<Output = T> + 'static) -> T {
    run_local(ring, |_| future)
}

/// As [`run_on`], for futures that need the worker when they are made, to attach sources to it.
pub fn run_local<T, F>(ring: Box<dyn Ring>, make: impl FnOnce(&mut Local) -> F) -> T
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
    let shared = Shared::new("simulated", options).expect("an eventfd");
    let mut local = Local::new(ring, shared);
    let future = make(&mut local);
    let result = Rc::new(RefCell::new(None));
    let clone = result.clone();
    local.io().spawn(async move {
        *clone.borrow_mut() = Some(future.await);
    });
    while result.borrow().is_none() || local.io().leave_all() {
        local.round();
    }
    replace_current(None);
    let value = result.borrow_mut().take();
    value.expect("the loop ends with a result")
}

/// The processor time that the calling thread has used, in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    cpu_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// The processor time that the process has used, in nanoseconds.
pub fn process_cpu_ns() -> u64 {
    cpu_ns(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn cpu_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec. Both clocks always exist, so it cannot fail.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
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
}
