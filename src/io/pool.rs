//! A pool of threads for blocking work.
//!
//! A thread is made when no idle one is left, and ends after some seconds without work.
//!
//! The rule held here: nobody's work waits for somebody else's. Each job has an owner, a disk for
//! example. An owner without a running job gets a thread for its next one in any case, above the
//! pool's limit if need be, and no owner has more threads than its share.

use super::unwind::AbortOnPanic;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread waits for more before it ends.
const LINGER: Duration = Duration::from_secs(5);

/// What a pool's threads do.
pub(super) trait Job: Send + 'static {
    /// Whose work it is.
    fn owner(&self) -> u64;

    fn run(self);
}

/// How many threads there are at most.
pub(super) struct Limits {
    /// For one owner.
    pub each: usize,
    /// For all, but that each owner may have one.
    pub all: usize,
}

pub(super) struct Pool<J> {
    /// What the threads are called.
    name: &'static str,
    limits: Limits,
    state: Mutex<State<J>>,
    work: Condvar,
}

struct State<J> {
    /// Owners with jobs that run or wait.
    owners: BTreeMap<u64, Owned<J>>,
    /// Owners with waiting jobs, of which none runs. A thread that looks for work takes these first.
    first: VecDeque<u64>,
    /// Owners with waiting jobs, some running, and room in their share.
    others: VecDeque<u64>,
    threads: usize,
    idle: usize,
}

/// The jobs of one owner.
struct Owned<J> {
    waiting: VecDeque<J>,
    running: usize,
}

impl<J> Default for Owned<J> {
    fn default() -> Owned<J> {
        Owned { waiting: VecDeque::new(), running: 0 }
    }
}

impl<J: Job> State<J> {
    fn add(&mut self, job: J, limits: &Limits) {
        let owner = job.owner();
        let owned = self.owners.entry(owner).or_default();
        owned.waiting.push_back(job);
        if owned.waiting.len() > 1 {
            // It is in a list, or has its share.
        } else if owned.running == 0 {
            self.first.push_back(owner);
        } else if owned.running < limits.each {
            self.others.push_back(owner);
        }
    }

    /// The next job for a thread. One above the limit takes only what has been promised a thread.
    fn take(&mut self, limits: &Limits) -> Option<J> {
        let owner = match self.first.pop_front() {
            Some(owner) => owner,
            None if self.threads > limits.all => return None,
            None => self.others.pop_front()?,
        };
        let owned = self.owners.get_mut(&owner)?;
        let job = owned.waiting.pop_front()?;
        owned.running += 1;
        if !owned.waiting.is_empty() && owned.running < limits.each {
            self.others.push_back(owner);
        }
        Some(job)
    }

    /// A job has been run.
    fn done(&mut self, owner: u64, limits: &Limits) {
        let Some(owned) = self.owners.get_mut(&owner) else { return };
        owned.running -= 1;
        match (owned.running, owned.waiting.is_empty()) {
            (0, true) => drop(self.owners.remove(&owner)),
            (0, false) => {
                self.others.retain(|&listed| listed != owner);
                self.first.push_back(owner);
            }
            // It had its whole share, and was in no list.
            (running, false) if running + 1 == limits.each => self.others.push_back(owner),
            _ => {}
        }
    }

    /// How many threads are missing.
    fn wanted(&self, limits: &Limits) -> usize {
        let room = |owner| {
            self.owners
                .get(owner)
                .map_or(0, |owned: &Owned<J>| owned.waiting.len().min(limits.each - owned.running))
        };
        let startable: usize = self.first.iter().chain(&self.others).map(room).sum();
        let most = limits.all.saturating_sub(self.threads);
        let promised = self.first.len().saturating_sub(self.idle);
        startable.saturating_sub(self.idle).min(most).max(promised)
    }
}

impl<J: Job> Pool<J> {
    pub const fn new(name: &'static str, limits: Limits) -> Pool<J> {
        let state = State {
            owners: BTreeMap::new(),
            first: VecDeque::new(),
            others: VecDeque::new(),
            threads: 0,
            idle: 0,
        };
        Pool { name, limits, state: Mutex::new(state), work: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the jobs, in any order.
    pub fn submit(&'static self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.lock();
        let mut added = 0;
        for job in jobs {
            state.add(job, &self.limits);
            added += 1;
        }
        for _ in 0..state.idle.min(added) {
            self.work.notify_one();
        }
        let new = state.wanted(&self.limits);
        state.threads += new;
        drop(state);
        for _ in 0..new {
            let thread = std::thread::Builder::new().name(self.name.into());
            if thread.spawn(|| self.serve()).is_err() {
                self.lock().threads -= 1;
            }
        }
        if new > 0 {
            self.help_out();
        }
    }

    /// Without any thread to be had, the caller's own must do the work, or nobody would.
    fn help_out(&self) {
        loop {
            let mut state = self.lock();
            let job = if state.threads == 0 { state.take(&self.limits) } else { None };
            drop(state);
            let Some(job) = job else { return };
            let owner = job.owner();
            job.run();
            self.lock().done(owner, &self.limits);
        }
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.take(&self.limits) {
                drop(state);
                let owner = job.owner();
                let guard = AbortOnPanic;
                job.run();
                drop(guard);
                state = self.lock();
                state.done(owner, &self.limits);
                continue;
            }
            if state.threads > self.limits.all {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            let (guard, waited) =
                self.work.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.first.is_empty() && state.others.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Tells that it has begun, and ends when it is let go.
    struct Held {
        owner: u64,
        began: Sender<u64>,
        end: Receiver<()>,
    }

    impl Job for Held {
        fn owner(&self) -> u64 {
            self.owner
        }

        fn run(self) {
            let _ = self.began.send(self.owner);
            let _ = self.end.recv();
        }
    }

    /// Nothing is expected to come within this time.
    const NOTHING: Duration = Duration::from_millis(50);

    #[test]
    fn an_owner_has_its_share_and_everyone_has_a_thread() {
        static POOL: Pool<Held> = Pool::new("test", Limits { each: 3, all: 4 });
        let (began, starts) = channel();
        let submit = |owner| {
            let (go, end) = channel();
            POOL.submit([Held { owner, began: began.clone(), end }]);
            go
        };
        let mut stalled: Vec<_> = (0..5).map(|_| submit(1)).collect();
        let take = |n: usize| -> Vec<u64> { (0..n).map(|_| starts.recv().unwrap()).collect() };
        assert_eq!(take(3), [1; 3], "its share");
        assert!(starts.recv_timeout(NOTHING).is_err(), "and no more");
        // The pool has one more thread; the third and the fourth owner get theirs above the limit.
        let others: Vec<_> = (2..5).map(|owner| [submit(owner), submit(owner)]).collect();
        let mut first = take(3);
        first.sort_unstable();
        assert_eq!(first, [2, 3, 4]);
        assert!(starts.recv_timeout(NOTHING).is_err(), "the second ones wait");
        for [first, second] in others {
            drop(first);
            let owner = starts.recv().unwrap();
            assert!(owner > 1, "who has nothing running comes first");
            drop(second);
        }
        // Those that waited in the first owner's share come when there is room in it.
        assert!(starts.recv_timeout(NOTHING).is_err());
        drop(stalled.remove(0));
        assert_eq!(take(1), [1]);
        drop(stalled);
        assert_eq!(take(1), [1]);
        while !POOL.lock().owners.is_empty() {
            std::thread::yield_now();
        }
    }
}
