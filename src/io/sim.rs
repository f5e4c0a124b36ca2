//! A simulated ring: seeded, with a clock of its own, for tests that want every order of events.
//!
//! An operation takes effect when it completes, after a seeded delay on the virtual clock, so two
//! operations in flight happen in either order; transfers may come out short or be interrupted. The
//! same seed over the same files gives the same run. Real descriptors are executed with ordinary
//! system calls; descriptors of [`register`]ed [`SimFile`]s by them.
//!
//! Polls are of real descriptors, because wake-ups from other threads are real: they are looked at
//! in each turn, and waited for only when nothing is due on the virtual clock. Simulated sockets
//! ([`socket`]) have delays, parts and resets of their own.

pub mod socket;

use super::errno::Errno;
use super::iovec::IoVec;
use super::op::{Durable, Op, Segments};
use super::polls::{Polls, calls};
use super::ring::{Completion, Ring, Wait};
use super::sync::Mutex;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The first descriptor of a simulated file; real ones stay far below.
const FIRST_SIM_FD: RawFd = 1 << 30;
/// How long the real world may keep a simulated worker waiting before that counts as a deadlock.
const STALL: Duration = Duration::from_secs(20);
/// Blocks that a short transfer on a descriptor opened with O_DIRECT still respects, in bytes.
const DIRECT_BLOCK: u64 = 4096;
/// The same for other files: sectors are what guests expect to be whole.
const BLOCK: u64 = 512;
/// A busy worker's entries after which descriptors are looked at.
const LOOK_ENTERS: u32 = 8;

/// What a simulated file is asked to do.
pub enum SimOp<'a> {
    Read {
        offset: u64,
        into: IoVec<'a>,
    },
    Write {
        offset: u64,
        from: IoVec<'a>,
        durable: Durable,
    },
    Sync,
    /// As fallocate, with its modes.
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
}

/// What a simulated file answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executed {
    /// Done: bytes, for transfers.
    Now(Result<u64, Errno>),
    /// Ask again when this time has passed.
    After(Duration),
    /// Ask again after anything else has happened.
    Hung,
}

/// A file that exists only in memory.
pub trait SimFile: Send + Sync {
    /// Performs `op` as a whole or in part. `ticket` is zero when an operation is first asked for;
    /// what the file leaves there comes back when it is asked again.
    fn execute(&self, op: &SimOp<'_>, ticket: &mut u64) -> Executed;

    /// What a short transfer is a multiple of, in bytes.
    fn block(&self) -> u64;
}

static NEXT_FD: AtomicI32 = AtomicI32::new(FIRST_SIM_FD);
static FILES: Mutex<BTreeMap<RawFd, Weak<dyn SimFile>>> = Mutex::new(BTreeMap::new());

/// A simulated file's descriptor, valid on every simulated ring of the process until it is dropped.
pub struct SimFd(RawFd);

/// Gives `file` a descriptor.
pub fn register(file: Weak<dyn SimFile>) -> SimFd {
    let fd = NEXT_FD.fetch_add(1, Ordering::Relaxed);
    FILES.lock().insert(fd, file);
    SimFd(fd)
}

impl AsRawFd for SimFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Drop for SimFd {
    fn drop(&mut self) {
        FILES.lock().remove(&self.0);
    }
}

fn registered(fd: RawFd) -> Option<Arc<dyn SimFile>> {
    FILES.lock().get(&fd).and_then(Weak::upgrade)
}

/// How disorderly a simulated ring is.
#[derive(Clone, Copy, Debug)]
pub struct Disorder {
    pub seed: u64,
    /// The longest that an operation takes, on the virtual clock.
    pub max_delay: Duration,
    /// How often a transfer comes out short, from 0 to 1.
    pub short: f64,
    /// How often an operation has to be asked for again (EINTR, EAGAIN), from 0 to below 1.
    pub interrupted: f64,
}

impl Disorder {
    /// Everything that can happen, happens often.
    pub fn wild(seed: u64) -> Disorder {
        let max_delay = Duration::from_micros(500);
        Disorder { seed, max_delay, short: 0.2, interrupted: 0.1 }
    }
}

/// Gives a simulated ring another order of events after it was given away.
#[derive(Clone, Default)]
pub struct Reorder(Rc<Cell<Option<Disorder>>>);

impl Reorder {
    /// Events that come from now on come in the order that `disorder` decides.
    pub fn set(&self, disorder: Disorder) {
        self.0.set(Some(disorder));
    }
}

/// See the module's text.
pub struct SimRing {
    disorder: Disorder,
    reorder: Reorder,
    rng: fastrand::Rng,
    /// Nanoseconds.
    clock: u64,
    queued: Vec<Begun>,
    /// What has started, by when it is due, equal times in a seeded order.
    due: BTreeMap<(u64, u64), Begun>,
    hung: Vec<Begun>,
    ready: VecDeque<Completion>,
    polls: Polls,
    enters: u32,
}

struct Begun {
    user_data: u64,
    fd: RawFd,
    op: Op,
    /// What a file has left when it was asked before.
    ticket: u64,
}

impl SimRing {
    pub fn new(disorder: Disorder) -> std::io::Result<SimRing> {
        Ok(SimRing {
            disorder,
            reorder: Reorder::default(),
            rng: fastrand::Rng::with_seed(disorder.seed),
            clock: 0,
            queued: Vec::new(),
            due: BTreeMap::new(),
            hung: Vec::new(),
            ready: VecDeque::new(),
            polls: Polls::new()?,
            enters: 0,
        })
    }

    /// Changes the order of events later.
    pub fn reorder(&self) -> Reorder {
        self.reorder.clone()
    }

    fn schedule(&mut self, delay: u64, begun: Begun) {
        let order = self.rng.u64(..);
        self.due.insert((self.clock.saturating_add(delay), order), begun);
    }

    fn start_queued(&mut self) {
        let mut queued = std::mem::take(&mut self.queued);
        for begun in queued.drain(..) {
            let Begun { user_data, fd, op, .. } = begun;
            match op {
                Op::Cancel(cancelled) => self.cancel(user_data, cancelled),
                op if op.waits() && fd < FIRST_SIM_FD => {
                    // SAFETY: the promise of the code that pushed the operation.
                    self.ready.extend(unsafe { self.polls.start(user_data, fd, op) });
                }
                _ => {
                    let longest = self.disorder.max_delay.as_nanos() as u64;
                    let delay = self.rng.u64(0..=longest);
                    self.schedule(delay, begun);
                }
            }
        }
        self.queued = queued;
    }

    fn cancel(&mut self, user_data: u64, cancelled: u64) {
        let is_match = |begun: &Begun| begun.user_data == cancelled && begun.op.waits();
        let waiting = self.hung.len() + self.due.len();
        self.hung.retain(|begun| !is_match(begun));
        self.due.retain(|_, begun| !is_match(begun));
        if self.hung.len() + self.due.len() < waiting {
            self.complete(cancelled, -libc::ECANCELED);
            return self.complete(user_data, 0);
        }
        self.ready.extend(self.polls.cancel(user_data, cancelled));
    }

    fn complete(&mut self, user_data: u64, result: i32) {
        self.ready.push_back(Completion { user_data, result, more: false });
    }

    /// Looks at what is polled, for at most so much of real time.
    fn poll(&mut self, time: Duration) {
        if !time.is_zero() {
            self.polls.sleep(Some(time));
        }
        self.polls.poll(&mut self.ready);
    }

    /// Performs what is due up to `until`, the clock moving along.
    fn run_due(&mut self, until: u64) {
        while let Some(entry) = self.due.first_entry() {
            let at = entry.key().0;
            if at > until {
                break;
            }
            let begun = entry.remove();
            self.clock = self.clock.max(at);
            self.perform(begun);
        }
    }

    fn perform(&mut self, mut begun: Begun) {
        let Begun { user_data, fd, op, .. } = begun;
        if begun.ticket == 0 && self.rng.f64() < self.disorder.interrupted {
            let errno = if self.rng.bool() { libc::EINTR } else { libc::EAGAIN };
            return self.complete(user_data, -errno);
        }
        if op.waits() {
            let is_new = std::mem::replace(&mut begun.ticket, 1) == 0;
            let short = self.disorder.short;
            return match socket::execute(fd, op, is_new, short, &mut self.rng) {
                Some(Ok(count)) => self.complete(user_data, count as i32),
                Some(Err(errno)) => self.complete(user_data, -errno.0),
                None => self.hung.push(begun),
            };
        }
        let file = if fd >= FIRST_SIM_FD { registered(fd) } else { None };
        let block = match &file {
            Some(file) => file.block(),
            None if is_direct(fd) => DIRECT_BLOCK,
            None => BLOCK,
        };
        let op = self.sim_op(op, block);
        let executed = match &file {
            Some(file) => file.execute(&op, &mut begun.ticket),
            None => Executed::Now(execute_real(fd, &op)),
        };
        match executed {
            Executed::Now(Ok(bytes)) => self.complete(user_data, bytes as i32),
            Executed::Now(Err(errno)) => self.complete(user_data, -errno.0),
            Executed::After(time) => self.schedule(time.as_nanos() as u64, begun),
            Executed::Hung => self.hung.push(begun),
        }
    }

    fn sim_op<'a>(&mut self, op: Op, block: u64) -> SimOp<'a> {
        match op {
            Op::Read { segments, offset } => {
                SimOp::Read { offset, into: self.part(segments, block) }
            }
            Op::Write { segments, offset, durable } => {
                SimOp::Write { offset, from: self.part(segments, block), durable }
            }
            Op::Fallocate { mode, offset, len } => SimOp::Allocate { mode, offset, len },
            _ => SimOp::Sync,
        }
    }

    /// The segments, or so much of them as this transfer is going to move.
    fn part<'a>(&mut self, segments: Segments, block: u64) -> IoVec<'a> {
        // SAFETY: the code that pushed the operation keeps the list, and the memory that it names, in place until the
        // completion, which has not been given out yet.
        let whole = unsafe { IoVec::from_raw(segments.as_slice()) };
        let blocks = whole.len() / block;
        if blocks < 2 || self.rng.f64() >= self.disorder.short {
            return whole;
        }
        whole.slice(0, self.rng.u64(1..blocks) * block)
    }

    fn retry_hung(&mut self) {
        for begun in std::mem::take(&mut self.hung) {
            self.perform(begun);
        }
    }

    fn wait(&mut self, wait: Wait) {
        let deadline = match wait {
            Wait::No => return,
            Wait::For(time) => self.clock.saturating_add(time.as_nanos() as u64),
            Wait::Forever => u64::MAX,
        };
        let began = Instant::now();
        while self.ready.is_empty() {
            let next = self.due.keys().next().map(|key| key.0);
            match next {
                Some(at) if at <= deadline => self.run_due(at),
                _ if wait == Wait::Forever => {
                    self.poll(Duration::from_millis(10));
                    self.retry_hung();
                    assert!(
                        began.elapsed() < STALL,
                        "a simulated worker sleeps, nothing is due and nobody wakes it \
                         ({} operations hang)",
                        self.hung.len()
                    );
                }
                _ => {
                    self.clock = deadline;
                    return;
                }
            }
        }
    }
}

impl Ring for SimRing {
    unsafe fn push(&mut self, user_data: u64, fd: RawFd, op: Op) {
        self.queued.push(Begun { user_data, fd, op, ticket: 0 });
    }

    fn must_enter(&self) -> bool {
        !self.queued.is_empty()
    }

    fn has_completions(&mut self) -> bool {
        !self.ready.is_empty()
    }

    fn enter(&mut self, wait: Wait) {
        if let Some(disorder) = self.reorder.0.take() {
            self.disorder = disorder;
            self.rng = fastrand::Rng::with_seed(disorder.seed);
            self.enters = 0;
        }
        self.start_queued();
        // Time passes while a worker works, too.
        let now = self.clock + self.rng.u64(0..2_000);
        self.run_due(now);
        self.clock = now;
        self.retry_hung();
        // Asking the kernel is most of an entry's cost. A worker that is busy can be notified of a kick later.
        self.enters = self.enters.wrapping_add(1);
        if wait != Wait::No || self.enters.is_multiple_of(LOOK_ENTERS) {
            self.poll(Duration::ZERO);
        }
        self.wait(wait);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let room = (out.capacity() - out.len()).min(self.ready.len());
        out.extend(self.ready.drain(..room));
    }

    fn now(&self) -> u64 {
        self.clock
    }

    fn is_simulated(&self) -> bool {
        true
    }
}

fn is_direct(fd: RawFd) -> bool {
    // SAFETY: F_GETFL touches no memory of ours.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    flags >= 0 && flags & libc::O_DIRECT != 0
}

/// Performs `op` on a real descriptor, at once.
fn execute_real(fd: RawFd, op: &SimOp<'_>) -> Result<u64, Errno> {
    match op {
        // SAFETY: the list's memory is mapped, as `part` says.
        SimOp::Read { offset, into } => unsafe { calls::read(fd, into.as_raw(), *offset) },
        SimOp::Write { offset, from, durable } => {
            // SAFETY: as above.
            unsafe { calls::write(fd, from.as_raw(), *offset, *durable) }
        }
        SimOp::Sync => calls::sync(fd),
        SimOp::Allocate { mode, offset, len } => calls::allocate(fd, *mode, *offset, *len),
    }
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod tests;
