//! What is done every so often for as long as somebody needs it: on one thread for all, which is there
//! while there is something to do, and sleeps in between.

use super::sync::Mutex;
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Says whether it is still needed.
type Work = Box<dyn FnMut() -> bool + Send>;

struct Job {
    interval: Duration,
    next: Instant,
    work: Work,
}

struct Jobs {
    list: Vec<Job>,
    /// Does them.
    thread: Option<Thread>,
}

static JOBS: Mutex<Jobs> = Mutex::new(Jobs { list: Vec::new(), thread: None });

/// Has `work` done every `interval` from now on, until it says that it is not needed any more. It must
/// not wait for anything. Where no thread can be had it is not done.
pub fn every(interval: Duration, work: impl FnMut() -> bool + Send + 'static) {
    let job = Job { interval, next: Instant::now() + interval, work: Box::new(work) };
    let mut jobs = JOBS.lock();
    jobs.list.push(job);
    match &jobs.thread {
        Some(thread) => thread.unpark(),
        None => {
            let started = std::thread::Builder::new().name("periodic".into()).spawn(run);
            match started {
                Ok(handle) => jobs.thread = Some(handle.thread().clone()),
                Err(error) => {
                    jobs.list.clear();
                    log::warn!("what is unused is not given back: cannot start a thread: {error}");
                }
            }
        }
    }
}

fn run() {
    loop {
        let now = Instant::now();
        let mut jobs = JOBS.lock();
        jobs.list.retain_mut(|job| {
            if job.next > now {
                return true;
            }
            job.next = now + job.interval;
            (job.work)()
        });
        let Some(next) = jobs.list.iter().map(|job| job.next).min() else {
            jobs.thread = None;
            return;
        };
        drop(jobs);
        std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
    }
}
