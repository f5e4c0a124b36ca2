//! Threads for work that blocks: made when there is work that no idle one takes, as many as the
//! pool allows, and gone some seconds after the last.

use super::unwind::AbortOnPanic;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread waits for more before it ends.
const LINGER: Duration = Duration::from_secs(5);

/// What a pool's threads do.
pub(super) trait Job: Send + 'static {
    fn run(self);
}

impl Job for Box<dyn FnOnce() + Send> {
    fn run(self) {
        self();
    }
}

pub(super) struct Pool<J> {
    /// What the threads are called.
    name: &'static str,
    /// Threads at most.
    most: usize,
    state: Mutex<State<J>>,
    work: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    threads: usize,
    idle: usize,
}

impl<J: Job> Pool<J> {
    pub const fn new(name: &'static str, most: usize) -> Pool<J> {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0 };
        Pool { name, most, state: Mutex::new(state), work: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the jobs done, in any order, and takes them out of the list.
    pub fn submit(&'static self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.lock();
        let before = state.jobs.len();
        state.jobs.extend(jobs);
        for _ in 0..state.idle.min(state.jobs.len() - before) {
            self.work.notify_one();
        }
        let new = state.jobs.len().saturating_sub(state.idle).min(self.most - state.threads);
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
            let job = if state.threads == 0 { state.jobs.pop_front() } else { None };
            drop(state);
            match job {
                Some(job) => job.run(),
                None => return,
            }
        }
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                let guard = AbortOnPanic;
                job.run();
                drop(guard);
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (guard, waited) =
                self.work.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
