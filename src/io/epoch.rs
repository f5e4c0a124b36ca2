//! Epochs: which queues are on the fast path, known without a lock and without a write to shared memory per request.
//!
//! Each queue has an [`Announcer`]. Before the first look at the graph in a guard it announces the current epoch, and
//! it keeps the announcement up until the guard is over and every request begun under that epoch has completed. Code
//! that changes something that fast requests rely on (raises a barrier, replaces a node) makes the change first, and
//! then waits with [`synchronize`] until every announcement older than the change has ended. Requests announced later
//! see the change.
//!
//! Members are asked by name, not all at once: a disk that hangs blocks only the tasks that wait for it.
//!
//! Why it is enough: an announcement made while nothing was announced is followed by a full fence
//! before the graph is looked at, and `synchronize` has one between the change and its look at the
//! announcements, so one of the two sees the other. A member that already stands at an older epoch
//! and reads the new one has seen the change with it; if it reads the old one, it is waited for.

use super::atomics::{AtomicU64, AtomicUsize, Ordering, fence};
use super::sync::{Mutex, Waiters};
use crossbeam_utils::CachePadded;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;

/// What a member that is not on the fast path announces.
const OFFLINE: u64 = u64::MAX;

static EPOCH: AtomicU64 = AtomicU64::new(1);
/// How many `synchronize` calls wait, so that members look for wakers only then.
static WAITING: AtomicUsize = AtomicUsize::new(0);
static WAITERS: Mutex<Waiters> = Mutex::new(Waiters::new());

/// A queue's announcement, as others see it.
pub struct Member {
    /// The oldest epoch that a guard or a request of this member still stands in.
    oldest: CachePadded<AtomicU64>,
}

/// The owner's side of a [`Member`]; stays on its worker.
pub struct Announcer {
    member: Arc<Member>,
    /// Epochs with requests in flight, oldest first, and how many. Usually one.
    generations: RefCell<VecDeque<(u64, u32)>>,
    announced: Cell<u64>,
    /// Guards that are not dropped. While there are any the announcement stays up, so that one that is forgotten
    /// keeps it up forever, and does no other harm.
    guards: Cell<u32>,
    witness: InFlight,
}

/// The proof, required by the fast path, that an announcement is up, which every change of the graph waits for: only
/// the guard of an announcer that is listed there has one ([`Announcer::new`]).
pub struct InFlight {
    not_send: PhantomData<*const ()>,
}

/// Keeps the announcement up while the fast path reads shared state, until it is dropped.
pub struct Guard<'a> {
    announcer: &'a Announcer,
    epoch: u64,
}

/// The epoch that a request was begun in; given back with [`Announcer::end`], once. One that is lost keeps
/// the announcement up.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the announcement stays up until it is given back"]
pub struct Generation(u64);

/// In tests, for what no graph is asked.
#[cfg(test)]
impl Default for Announcer {
    fn default() -> Announcer {
        // SAFETY: tests change what they look at themselves.
        unsafe { Announcer::new() }
    }
}

impl Announcer {
    /// An announcer that is in no list yet.
    ///
    /// # Safety
    /// Before its first guard its [`Announcer::member`] is listed with all that is looked at with the guards'
    /// [`InFlight`], so that a change of that calls [`synchronize`] with it. For a graph
    /// [`Node::announcer`](crate::block::Node::announcer) sees to it.
    pub unsafe fn new() -> Announcer {
        Announcer {
            member: Arc::new(Member { oldest: CachePadded::new(AtomicU64::new(OFFLINE)) }),
            generations: RefCell::new(VecDeque::with_capacity(16)),
            announced: Cell::new(OFFLINE),
            guards: Cell::new(0),
            witness: InFlight { not_send: PhantomData },
        }
    }

    pub fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// Begins a guard: what is looked up in the graph from here on stays true for the requests that
    /// the guard begins.
    pub fn enter(&self) -> Guard<'_> {
        let epoch = EPOCH.load(Ordering::Acquire);
        if self.announced.get() == OFFLINE {
            self.announced.set(epoch);
            self.member.oldest.store(epoch, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
        self.guards.set(self.guards.get() + 1);
        Guard { announcer: self, epoch }
    }

    /// Ends a request. Waiting changes see it when the worker calls [`Announcer::settle`].
    pub fn end(&self, generation: Generation) {
        let mut generations = self.generations.borrow_mut();
        if let Some(entry) = generations.iter_mut().find(|(epoch, _)| *epoch == generation.0) {
            entry.1 = entry.1.saturating_sub(1);
        }
    }

    /// Brings the announcement up to date. Within a guard it stays as it is.
    pub fn settle(&self) {
        if self.guards.get() > 0 {
            return;
        }
        let mut generations = self.generations.borrow_mut();
        while generations.front().is_some_and(|&(_, count)| count == 0) {
            generations.pop_front();
        }
        let oldest = generations.front().map_or(OFFLINE, |&(epoch, _)| epoch);
        if oldest != self.announced.get() {
            self.announced.set(oldest);
            self.member.oldest.store(oldest, Ordering::SeqCst);
            if WAITING.load(Ordering::SeqCst) != 0 {
                wake_waiters();
            }
        }
    }
}

impl Guard<'_> {
    /// What [`map`](crate::block::Driver::map) asks for.
    pub fn in_flight(&self) -> &InFlight {
        &self.announcer.witness
    }

    /// Keeps the announcement up beyond the guard, until [`Announcer::end`].
    pub fn begin(&self) -> Generation {
        let mut generations = self.announcer.generations.borrow_mut();
        match generations.back_mut() {
            Some((epoch, count)) if *epoch == self.epoch => *count += 1,
            _ => generations.push_back((self.epoch, 1)),
        }
        Generation(self.epoch)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.announcer.guards.set(self.announcer.guards.get() - 1);
        self.announcer.settle();
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.member.oldest.store(OFFLINE, Ordering::SeqCst);
        wake_waiters();
    }
}

fn wake_waiters() {
    WAITERS.wake_all();
}

/// Waits until every guard and request that `members` had announced before the call has ended.
pub async fn synchronize(members: &[Arc<Member>]) {
    struct Waiting;
    impl Drop for Waiting {
        fn drop(&mut self) {
            WAITING.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let target = EPOCH.fetch_add(1, Ordering::SeqCst) + 1;
    WAITING.fetch_add(1, Ordering::SeqCst);
    let _waiting = Waiting;
    let passed = || {
        fence(Ordering::SeqCst);
        members.iter().all(|m| m.oldest.load(Ordering::SeqCst) >= target)
    };
    if !passed() {
        WAITERS.wait_until(passed).await;
    }
}

/// A moment that announcements are compared with, for callers that cannot wait: what was changed before
/// [`Grace::begin`] is known to all of `members` once [`Grace::has_passed`].
pub struct Grace(u64);

impl Grace {
    pub fn begin() -> Grace {
        Grace(EPOCH.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Whether every guard and request that `members` had announced before has ended.
    pub fn has_passed(&self, members: &[Arc<Member>]) -> bool {
        fence(Ordering::SeqCst);
        members.iter().all(|member| member.oldest.load(Ordering::SeqCst) >= self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    fn poll_once(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn synchronize_waits_for_older_requests_and_not_for_younger_ones() {
        let a = Announcer::default();
        let old = a.enter().begin();
        let members = [a.member().clone()];
        let mut wait = pin!(synchronize(&members));
        assert!(!poll_once(wait.as_mut()));
        let young = a.enter().begin();
        a.settle();
        assert!(!poll_once(wait.as_mut()));
        a.end(old);
        a.settle();
        assert!(poll_once(wait.as_mut()), "only a younger request is in flight");
        a.end(young);
        a.settle();
        assert_eq!(a.member.oldest.load(Ordering::SeqCst), OFFLINE);
    }

    #[test]
    fn synchronize_passes_at_once_when_no_reader_is_announced() {
        let a = Announcer::default();
        drop(a.enter());
        assert!(poll_once(pin!(synchronize(&[a.member().clone()]))));
    }

    #[test]
    fn an_announcement_stays_up_through_turns_in_turns_and_those_that_are_forgotten() {
        let a = Announcer::default();
        let members = [a.member().clone()];
        let outer = a.enter();
        let mut wait = pin!(synchronize(&members));
        assert!(!poll_once(wait.as_mut()));
        drop(a.enter());
        a.settle();
        assert!(!poll_once(wait.as_mut()), "the outer one has not ended");
        drop(outer);
        assert!(poll_once(wait.as_mut()));
        std::mem::forget(a.enter());
        drop(a.enter());
        let mut wait = pin!(synchronize(&members));
        assert!(!poll_once(wait.as_mut()), "nobody knows whether it has ended");
        drop(a);
        assert!(poll_once(wait.as_mut()));
    }

    #[test]
    fn a_turn_that_has_begun_nothing_is_waited_for_too() {
        let a = Announcer::default();
        let guard = a.enter();
        let members = [a.member().clone()];
        let mut wait = pin!(synchronize(&members));
        assert!(!poll_once(wait.as_mut()));
        drop(guard);
        assert!(poll_once(wait.as_mut()));
    }
}
