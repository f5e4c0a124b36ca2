//! Waiting for tasks during start-up and shutdown without missing signals.
//!
//! The rule held here: an end is bounded. Work that has hung, such as a job on storage that does not answer, cannot
//! keep the program: a second signal ends it at once, and so does a long time without any node being closed. The
//! images are then as a killed process leaves them.

use super::process::{readable_within, take_signals, wait_unless_ended};
use crate::block::Error;
use crate::service::{Owned, Service};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a task may continue after a signal. One that waits for a lock gives up at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long an end may continue without any node being closed. What a guest has written has to reach the storage
/// meanwhile; service managers often wait as long before they kill.
const END: Duration = Duration::from_secs(90);

/// When the log reports what the end waits for.
const REPORT_AFTER: Duration = Duration::from_secs(5);

/// A service that is being set up.
pub struct Startup {
    service: Option<Owned>,
    /// Readable when a signal has come.
    stop: OwnedFd,
    /// A task was abandoned before its end.
    is_stuck: bool,
}

impl Startup {
    pub fn new(service: Owned, stop: OwnedFd) -> Startup {
        Startup { service: Some(service), stop, is_stuck: false }
    }

    pub fn service(&self) -> &Service {
        self.service.as_ref().expect("it is there until the end")
    }

    pub fn stop(&self) -> &OwnedFd {
        &self.stop
    }

    /// Runs a task of the service.
    ///
    /// # Errors
    /// Its own; and that it has not ended soon after a signal.
    pub fn run<T: Send + 'static>(
        &mut self,
        name: &'static str,
        work: impl AsyncFnOnce(Service) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let task = self.service().spawn(name, work);
        let tasks = self.service().tasks_descriptor();
        let mut end = None;
        loop {
            self.service().clear_tasks_event();
            if let Some(result) = task.take() {
                return result;
            }
            match end {
                None if wait_unless_ended(&self.stop, tasks, None) => {}
                None => end = Some(Instant::now() + PATIENCE),
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        self.is_stuck = true;
                        return Err(Error::new("ended by a signal before it was done"));
                    }
                    readable_within(tasks, left);
                }
            }
        }
    }
}

impl Drop for Startup {
    fn drop(&mut self) {
        match self.service.take() {
            Some(service) if self.is_stuck => service.abandon(PATIENCE),
            Some(service) => end(service, &self.stop),
            None => {}
        }
    }
}

/// Ends a service, in the time that it may take.
fn end(service: Owned, stop: &OwnedFd) {
    take_signals(stop);
    let ended = service.begin_end();
    let (mut nodes, mut since, mut is_reported) = (usize::MAX, Instant::now(), false);
    loop {
        service.clear_tasks_event();
        if ended.take().is_some() {
            return;
        }
        let left = service.graph().nodes().len();
        if left < nodes {
            (nodes, since) = (left, Instant::now());
        }
        if since.elapsed() >= REPORT_AFTER && !is_reported {
            is_reported = true;
            log::warn!(
                "{left} nodes are still to be closed; another signal ends the program at once"
            );
        }
        let is_late = since.elapsed() >= END;
        if is_late || !wait_unless_ended(stop, service.tasks_descriptor(), Some(PATIENCE)) {
            return service.leave();
        }
    }
}
