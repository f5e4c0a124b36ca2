//! Tests of copy jobs between disks in memory: their states, in order, and pauses.

use super::*;
use crate::copy::control::Cancelled;
use crate::io::{Worker, WorkerOptions};
use std::sync::mpsc;
use std::time::Duration;

/// Jobs on a worker of their own, and what tells of their events.
struct Bench {
    jobs: Jobs,
    worker: Worker,
    wakeups: mpsc::Receiver<()>,
    seen: Vec<&'static str>,
}

impl Bench {
    fn new() -> Bench {
        let (sender, wakeups) = mpsc::channel();
        let jobs = Jobs::new(move || sender.send(()).unwrap_or_default());
        let worker = Worker::start("jobs", WorkerOptions::default()).unwrap();
        Bench { jobs, worker, wakeups, seen: Vec::new() }
    }

    /// A job that passes `gates`, and comes to each by a message.
    fn start(&self, id: &str, autos: (bool, bool), gates: u64) -> Result<mpsc::Sender<()>, Error> {
        let (open, opened) = mpsc::channel::<()>();
        let opened = Arc::new(std::sync::Mutex::new(opened));
        let new = NewJob {
            id: id.to_owned(),
            kind: Kind::Create,
            auto_finalize: autos.0,
            auto_dismiss: autos.1,
            progress: Progress { current: 0, total: gates },
        };
        let spawn = |task: Task| self.worker.send(|local| local.io().spawn(task()));
        self.jobs.start(new, spawn, move |job| async move {
            let member = job.control().join();
            for current in 1..=gates {
                let opened = opened.clone();
                crate::io::offload(move || opened.lock().map(|gate| gate.recv().is_ok()).is_ok())
                    .await;
                if member.gate(1).await == Err(Cancelled) {
                    return Err(Error::new("ended early"));
                }
                job.set_progress(Progress { current, total: gates });
            }
            Ok(())
        })?;
        Ok(open)
    }

    /// Waits until the last state told of is `status`; all of them since the last call.
    fn until(&mut self, status: &str) -> Vec<&'static str> {
        loop {
            self.seen.extend(self.jobs.take_events().into_iter().map(|(_, status)| status.name()));
            if self.seen.last() == Some(&status) {
                return std::mem::take(&mut self.seen);
            }
            self.wakeups.recv_timeout(Duration::from_secs(60)).expect("another event");
        }
    }
}

#[test]
fn a_job_goes_through_its_states_and_is_forgotten_when_it_is_dismissed() {
    let mut bench = Bench::new();
    let gate = bench.start("j", (true, false), 1).unwrap();
    assert_eq!(
        bench.start("j", (true, false), 1).unwrap_err().to_string(),
        "Job ID 'j' already in use"
    );
    assert_eq!(bench.start("9", (true, false), 1).unwrap_err().to_string(), "Invalid job ID '9'");
    gate.send(()).unwrap();
    assert_eq!(bench.until("concluded"), ["created", "running", "waiting", "pending", "concluded"]);
    let info = bench.jobs.query().remove(0);
    assert_eq!((info.status, info.error), (Status::Concluded, None));
    assert_eq!(info.progress, Progress { current: 1, total: 1 });
    let job = bench.jobs.find("j").unwrap();
    let refusal = job.cancel().unwrap_err().to_string();
    assert_eq!(refusal, "Job 'j' in state 'concluded' cannot accept command verb 'cancel'");
    job.dismiss().unwrap();
    assert_eq!(bench.until("null"), ["null"]);
    assert_eq!(bench.jobs.query(), []);
    assert_eq!(bench.jobs.find("j").err().unwrap().to_string(), "Job not found");
}

#[test]
fn a_paused_job_rests_at_its_gate_and_goes_on_when_all_who_paused_it_have_resumed_it() {
    let mut bench = Bench::new();
    let gate = bench.start("j", (true, true), 1).unwrap();
    let job = bench.jobs.find("j").unwrap();
    job.pause().unwrap();
    assert_eq!(job.pause().unwrap_err().to_string(), "Job is already paused");
    job.control().pause();
    assert_eq!(bench.jobs.query()[0].status, Status::Running, "it has not come to its gate");
    gate.send(()).unwrap();
    assert_eq!(bench.until("paused"), ["created", "running", "paused"]);
    job.resume().unwrap();
    let refusal = job.resume().unwrap_err().to_string();
    assert_eq!(refusal, "Can't resume a job that was not paused");
    assert_eq!(bench.jobs.query()[0].status, Status::Paused, "somebody else wants it to rest");
    job.control().resume();
    assert_eq!(bench.until("null"), ["running", "waiting", "pending", "concluded", "null"]);
}

#[test]
fn a_cancelled_job_ends_at_its_gate_though_it_is_paused() {
    let mut bench = Bench::new();
    let gate = bench.start("j", (true, false), 2).unwrap();
    let job = bench.jobs.find("j").unwrap();
    job.pause().unwrap();
    gate.send(()).unwrap();
    assert_eq!(bench.until("paused"), ["created", "running", "paused"]);
    job.cancel().unwrap();
    assert_eq!(bench.until("concluded"), ["running", "aborting", "concluded"]);
    assert_eq!(bench.jobs.query()[0].error.as_deref(), Some("Operation canceled"));
}

#[test]
fn a_job_that_is_not_finalized_by_itself_waits_for_that_or_for_its_cancellation() {
    let mut bench = Bench::new();
    for is_cancelled in [false, true] {
        let gate = bench.start("j", (false, true), 1).unwrap();
        gate.send(()).unwrap();
        assert_eq!(bench.until("pending"), ["created", "running", "waiting", "pending"]);
        let job = bench.jobs.find("j").unwrap();
        assert!(job.pause().is_err() && job.complete().is_err() && job.dismiss().is_err());
        match is_cancelled {
            true => {
                job.cancel().unwrap();
                assert_eq!(bench.until("null"), ["aborting", "concluded", "null"]);
            }
            false => {
                job.finalize().unwrap();
                assert_eq!(bench.until("null"), ["concluded", "null"]);
            }
        }
    }
}
