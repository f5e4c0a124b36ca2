//! Periodic work, all on one thread that exists while there is any.

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

/// Runs `work` every `interval` from now on, until it returns false. Other periodic work waits meanwhile. Nothing
/// runs if no thread can be started.
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
        let due: Vec<Job> = JOBS.lock().list.extract_if(.., |job| job.next <= now).collect();
        // Without the lock: a job may take its time.
        let again = due.into_iter().filter_map(|mut job| {
            job.next = now + job.interval;
            (job.work)().then_some(job)
        });
        let again: Vec<Job> = again.collect();
        let mut jobs = JOBS.lock();
        jobs.list.extend(again);
        let Some(next) = jobs.list.iter().map(|job| job.next).min() else {
            jobs.thread = None;
            return;
        };
        drop(jobs);
        std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_job_that_takes_its_time_keeps_nobody_from_adding_another() {
        let (started, is_started) = mpsc::channel();
        let (finish, is_to_finish) = mpsc::channel();
        let (ended, has_ended) = mpsc::channel();
        every(Duration::from_millis(1), move || {
            started.send(()).unwrap();
            let result = is_to_finish.recv_timeout(Duration::from_secs(20));
            ended.send(result).unwrap();
            false
        });
        is_started.recv().unwrap();
        let (done, is_done) = mpsc::channel();
        every(Duration::from_millis(1), move || done.send(()).is_ok());
        finish.send(()).unwrap();
        assert_eq!(has_ended.recv().unwrap(), Ok(()), "the other was added while it ran");
        // Again and again.
        (0..3).for_each(|_| is_done.recv().unwrap());
    }
}
