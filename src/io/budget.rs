//! Memory budgets for requests: one for each disk, and one for the whole process.
//!
//! A request takes a [`Permit`] for all the memory that it may need before it begins, and gives it back
//! when it ends. Requests that find no room wait in the order in which they came, and hold nothing meanwhile.
//!
//! Two rules keep disks apart. Each disk can always have [`Limits::reserved`] bytes, or one request of any
//! size, whatever the others hold: a disk that stalls with its share in use starves no other one. And
//! a request that holds a permit takes no second one of the same budget, so no request waits for itself.

use super::sync::{Mutex, Waiters};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};

/// What one disk's requests may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most, in bytes, but for a single request that needs more.
    pub most: u64,
    /// What the process's limit leaves to the disk in any case, in bytes.
    pub reserved: u64,
}

impl Limits {
    /// 64 requests of 1 MiB that have to be copied, or some 500 small writes that each copy a cluster of 64 KiB:
    /// more than keeps storage busy.
    pub const DISK: Limits = Limits { most: 64 << 20, reserved: 4 << 20 };
}

/// All disks together may hold this part of the machine's memory above what is reserved for each,
const PART_OF_MACHINE: u64 = 8;
/// and this many bytes in any case.
const LEAST_FOR_PROCESS: u64 = 256 << 20;

/// What all disks share beyond what is reserved for each.
pub struct Pool {
    limit: u64,
    held: AtomicU64,
    /// Budgets with requests that wait for room in the pool, and how many there are.
    short: Mutex<Vec<Weak<Budget>>>,
    shorts: AtomicUsize,
}

impl Pool {
    pub fn new(limit: u64) -> Arc<Pool> {
        let (held, shorts) = (AtomicU64::new(0), AtomicUsize::new(0));
        Arc::new(Pool { limit, held, short: Mutex::default(), shorts })
    }

    /// The process's own.
    pub fn of_process() -> Arc<Pool> {
        static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
        let limit = || (machine_memory() / PART_OF_MACHINE).max(LEAST_FOR_PROCESS);
        POOL.get_or_init(|| Pool::new(limit())).clone()
    }

    /// The most that disks may hold together beyond what is reserved for each, in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What they hold, in bytes.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn try_take(&self, bytes: u64) -> bool {
        let more = |held: u64| held.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    /// Gives room back, and makes waiting requests try again.
    fn give_back(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.held.fetch_sub(bytes, Ordering::SeqCst);
        if self.shorts.load(Ordering::SeqCst) == 0 {
            return;
        }
        let short = {
            let mut short = self.short.lock();
            self.shorts.store(0, Ordering::SeqCst);
            std::mem::take(&mut *short)
        };
        for budget in short.iter().filter_map(Weak::upgrade) {
            budget.wake_first();
        }
    }

    /// Notes that `budget` has found no room; it looks once more after that.
    fn note_short(&self, budget: &Arc<Budget>) {
        let mut short = self.short.lock();
        let budget = Arc::downgrade(budget);
        if !short.iter().any(|noted| noted.ptr_eq(&budget)) {
            short.push(budget);
        }
        self.shorts.store(short.len(), Ordering::SeqCst);
    }
}

/// What one disk's requests hold.
pub struct Budget {
    limits: Limits,
    pool: Arc<Pool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes. What is beyond the reserve is the pool's.
    held: u64,
    permits: usize,
    waiting: VecDeque<Waiting>,
    next_ticket: u64,
}

struct Waiting {
    ticket: u64,
    task: Waiters,
}

impl Budget {
    /// A disk's, of the process.
    pub fn of_disk() -> Arc<Budget> {
        Budget::new(Limits::DISK, Pool::of_process())
    }

    pub fn new(limits: Limits, pool: Arc<Pool>) -> Arc<Budget> {
        Arc::new(Budget { limits, pool, state: Mutex::default() })
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The bytes that its requests hold.
    pub fn held(&self) -> u64 {
        self.state.lock().held
    }

    /// Room for one request, if there is some now and nobody waits for it.
    pub fn try_take(self: &Arc<Budget>, bytes: u64) -> Option<Permit> {
        let mut state = self.state.lock();
        let is_taken = state.waiting.is_empty() && self.add(&mut state, bytes);
        is_taken.then(|| Permit { budget: self.clone(), bytes })
    }

    /// Room for one request, once there is some and all that came before have theirs.
    pub async fn take(self: &Arc<Budget>, bytes: u64) -> Permit {
        let mut place = Place { budget: self, ticket: None };
        poll_fn(|cx| place.poll(cx, bytes)).await;
        Permit { budget: self.clone(), bytes }
    }

    /// Books `bytes` if there is room for them.
    fn add(self: &Arc<Budget>, state: &mut State, bytes: u64) -> bool {
        let after = state.held.saturating_add(bytes);
        let of_pool = self.of_pool(after) - self.of_pool(state.held);
        if state.permits == 0 {
            // Nothing would ever make more room for it.
            self.pool.held.fetch_add(of_pool, Ordering::SeqCst);
        } else if after > self.limits.most {
            return false;
        } else if of_pool > 0 && !self.pool.try_take(of_pool) {
            self.pool.note_short(self);
            if !self.pool.try_take(of_pool) {
                return false;
            }
        }
        state.held = after;
        state.permits += 1;
        true
    }

    /// How much of `held` bytes the pool has to give.
    fn of_pool(&self, held: u64) -> u64 {
        held.saturating_sub(self.limits.reserved)
    }

    fn give_back(&self, bytes: u64) {
        let (of_pool, first) = {
            let mut state = self.state.lock();
            let after = state.held - bytes;
            let of_pool = self.of_pool(state.held) - self.of_pool(after);
            state.held = after;
            state.permits -= 1;
            (of_pool, state.first())
        };
        self.pool.give_back(of_pool);
        first.wake();
    }

    /// Makes the first that waits look for room.
    fn wake_first(&self) {
        let first = self.state.lock().first();
        first.wake();
    }
}

impl State {
    fn first(&mut self) -> Waiters {
        self.waiting.front_mut().map_or_else(Waiters::new, |waiting| waiting.task.take())
    }
}

/// A place in the order of those that wait, given up when dropped.
struct Place<'a> {
    budget: &'a Arc<Budget>,
    /// None as long as it has not had to wait.
    ticket: Option<u64>,
}

impl Place<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, bytes: u64) -> Poll<()> {
        let mut state = self.budget.state.lock();
        let is_first = match (self.ticket, state.waiting.front()) {
            (None, front) => front.is_none(),
            (Some(ticket), front) => front.is_some_and(|front| front.ticket == ticket),
        };
        // Listed before it looks: memory that is freed after the look finds its waker.
        let ticket = *self.ticket.get_or_insert_with(|| {
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            state.waiting.push_back(Waiting { ticket, task: Waiters::new() });
            ticket
        });
        if let Some(mine) = state.waiting.iter_mut().find(|waiting| waiting.ticket == ticket) {
            mine.task.add(cx);
        }
        if is_first && self.budget.add(&mut state, bytes) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let first = {
            let mut state = self.budget.state.lock();
            state.waiting.retain(|waiting| waiting.ticket != ticket);
            state.first()
        };
        // There may be room for the next one, too.
        first.wake();
    }
}

/// Room in a [`Budget`], given back when dropped.
#[must_use = "the room is given back when the permit is dropped"]
pub struct Permit {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// The machine's memory in bytes, as far as the system tells.
fn machine_memory() -> u64 {
    // SAFETY: the calls take a number and give one.
    let (pages, size) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::{Pin, pin};
    use std::task::Waker;

    const LIMITS: Limits = Limits { most: 100, reserved: 10 };

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn what_does_not_fit_waits_and_comes_in_its_order() {
        let budget = Budget::new(LIMITS, Pool::new(1000));
        let first = budget.try_take(60).unwrap();
        assert!(budget.try_take(41).is_none());
        let mut large = pin!(budget.take(80));
        assert!(poll(large.as_mut()).is_pending());
        // There is room for it, but another was first.
        assert!(budget.try_take(1).is_none());
        let mut small = pin!(budget.take(1));
        assert!(poll(small.as_mut()).is_pending());
        drop(first);
        assert!(poll(small.as_mut()).is_pending());
        let Poll::Ready(large) = poll(large.as_mut()) else { panic!("it has room") };
        assert!(poll(small.as_mut()).is_ready());
        drop(large);
        assert_eq!((budget.held(), budget.pool.held()), (0, 0));
    }

    #[test]
    fn a_request_that_gives_up_waiting_holds_up_nobody() {
        let budget = Budget::new(LIMITS, Pool::new(1000));
        let _first = budget.try_take(60).unwrap();
        let mut behind = Box::pin(budget.take(40));
        {
            let mut large = pin!(budget.take(80));
            assert!(poll(large.as_mut()).is_pending());
            assert!(poll(behind.as_mut()).is_pending());
        }
        assert!(poll(behind.as_mut()).is_ready());
    }

    #[test]
    fn one_request_of_any_size_and_the_reserve_need_no_room_in_the_pool() {
        let pool = Pool::new(50);
        let stalled = Budget::new(LIMITS, pool.clone());
        let _all = stalled.try_take(60).unwrap();
        let other = Budget::new(LIMITS, pool.clone());
        let huge = other.try_take(500).expect("it would never fit");
        assert!(other.try_take(1).is_none());
        drop(huge);
        let small: Vec<_> = (0..10).map(|_| other.try_take(1).expect("its reserve")).collect();
        assert!(other.try_take(1).is_none(), "the pool is empty");
        drop(small);
        assert_eq!((other.held(), pool.held()), (0, 50));
    }

    #[test]
    fn room_in_the_pool_is_reported_of_to_those_that_wait_for_it() {
        struct Flag(std::sync::atomic::AtomicBool);
        impl std::task::Wake for Flag {
            fn wake(self: Arc<Flag>) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let pool = Pool::new(50);
        let holder = Budget::new(LIMITS, pool.clone());
        let all = holder.try_take(60).unwrap();
        let other = Budget::new(LIMITS, pool);
        let _small = other.try_take(10).unwrap();
        let flag = Arc::new(Flag(false.into()));
        let waker = Waker::from(flag.clone());
        let mut more = pin!(other.take(20));
        assert!(more.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(all);
        assert!(flag.0.load(Ordering::SeqCst), "it was woken");
        assert!(poll(more.as_mut()).is_ready());
    }
}
