//! Waiting for tasks while a program starts, without missing the signals that end it.

use super::process::{readable_within, wait_unless_ended};
use crate::block::Error;
use crate::service::{Owned, Service};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a task may go on after a signal. One that waits for a lock gives up at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// A service that is being set up.
pub struct Startup {
    service: Option<Owned>,
    /// Readable when a signal has come.
    stop: OwnedFd,
    /// A task was left that had not ended.
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
        let notice = self.service().task_notice();
        let mut end = None;
        loop {
            self.service().clear_task_notice();
            if let Some(result) = task.take() {
                return result;
            }
            match end {
                None if wait_unless_ended(&self.stop, notice) => {}
                None => end = Some(Instant::now() + PATIENCE),
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        self.is_stuck = true;
                        return Err(Error::new("ended by a signal before it was done"));
                    }
                    readable_within(notice, left);
                }
            }
        }
    }
}

impl Drop for Startup {
    fn drop(&mut self) {
        if let Some(service) = self.service.take()
            && self.is_stuck
        {
            service.abandon(PATIENCE);
        }
    }
}
