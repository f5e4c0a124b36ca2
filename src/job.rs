//! Jobs: long work on disks in the background, which can be watched, paused and cancelled.
//!
//! The rules held here: a job goes through QEMU's states, and each change is reported once, in order; a job that has
//! a name keeps it until it is dismissed; and the work of a job pauses, or ends early, only where it says so
//! itself, at the gates of its [`Control`].

mod status;

pub use status::{Status, Verb};

use crate::block::{Error, LocalFuture};
use crate::copy::Control;
use crate::io::sync::Mutex;
use crate::io::task::{Either, either};
use crate::options;
use std::pin::pin;
use std::sync::{Arc, Weak};

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Makes an image.
    Create,
}

impl Kind {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Create => "create",
        }
    }
}

/// A job that is to be started.
pub struct NewJob {
    pub id: String,
    pub kind: Kind,
    /// Takes effect as soon as the work has ended; otherwise on command.
    pub auto_finalize: bool,
    /// Is dismissed as soon as it is concluded; otherwise on command.
    pub auto_dismiss: bool,
    /// Before its work has begun.
    pub progress: Progress,
}

/// What a worker is given to run: makes the future there.
pub type Task = Box<dyn FnOnce() -> LocalFuture<'static, ()> + Send>;

/// The jobs of a process, and their events.
#[derive(Clone)]
pub struct Jobs(Arc<Board>);

struct Board {
    /// Oldest first.
    jobs: Mutex<Vec<Arc<Job>>>,
    /// Changes that were not taken yet.
    events: Mutex<Vec<(String, Status)>>,
    /// Called when there is something to take.
    notify: Box<dyn Fn() + Send + Sync>,
}

/// One of them.
pub struct Job {
    new: NewJob,
    control: Arc<Control>,
    state: Mutex<State>,
    board: Weak<Board>,
}

#[derive(Default)]
struct State {
    status: Status,
    /// One of the pauses of the control is the user's.
    is_paused_by_user: bool,
    progress: Progress,
    error: Option<String>,
}

/// How far a job has come, in a unit of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub current: u64,
    pub total: u64,
}

/// The description of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    pub id: String,
    pub kind: Kind,
    pub status: Status,
    pub progress: Progress,
    pub error: Option<String>,
}

impl Jobs {
    /// `notify` is called from any thread when [`Jobs::take_events`] has something to return.
    pub fn new(notify: impl Fn() + Send + Sync + 'static) -> Jobs {
        let (jobs, events) = (Mutex::default(), Mutex::default());
        Jobs(Arc::new(Board { jobs, events, notify: Box::new(notify) }))
    }

    /// Starts a job: `spawn` has to run the task on a worker.
    ///
    /// # Errors
    /// The name cannot be one, or another job has it.
    pub fn start<F>(
        &self,
        new: NewJob,
        spawn: impl FnOnce(Task),
        work: impl FnOnce(Arc<Job>) -> F + Send + 'static,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<(), Error>> + 'static,
    {
        let shown = new.id.escape_debug().to_string();
        if !options::is_identifier(&new.id) {
            return Err(Error::new(format!("Invalid job ID '{shown}'")));
        }
        let (control, progress) = (Arc::default(), new.progress);
        let state = Mutex::new(State { progress, ..State::default() });
        let job = Arc::new(Job { new, control, state, board: Arc::downgrade(&self.0) });
        {
            let mut jobs = self.0.jobs.lock();
            if jobs.iter().any(|other| other.new.id == job.new.id) {
                return Err(Error::new(format!("Job ID '{shown}' already in use")));
            }
            jobs.push(job.clone());
        }
        job.enter(Status::Created);
        job.enter(Status::Running);
        spawn(Box::new(move || Box::pin(async move { job.run(work).await })));
        Ok(())
    }

    /// The job of this name.
    pub fn find(&self, id: &str) -> Result<Arc<Job>, Error> {
        let jobs = self.0.jobs.lock();
        let found = jobs.iter().find(|job| job.new.id == id);
        found.cloned().ok_or_else(|| Error::new("Job not found"))
    }

    /// All of them, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.0.jobs.lock().iter().rev().map(|job| job.info()).collect()
    }

    /// The changes since the last call, in order.
    pub fn take_events(&self) -> Vec<(String, Status)> {
        std::mem::take(&mut *self.0.events.lock())
    }

    /// Makes the work of all of them end at its next gates: the end of the program.
    pub fn cancel_all(&self) {
        self.0.jobs.lock().iter().for_each(|job| job.control.cancel());
    }
}

impl Job {
    /// What its work asks before each piece.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    pub fn set_progress(&self, progress: Progress) {
        self.state.lock().progress = progress;
    }

    fn info(&self) -> JobInfo {
        let state = self.state.lock();
        JobInfo {
            id: self.new.id.clone(),
            kind: self.new.kind,
            status: state.status,
            progress: state.progress,
            error: state.error.clone(),
        }
    }

    // ---- What users ask for

    /// Makes the work rest at its next gates.
    ///
    /// # Errors
    /// As of all that follow: the state does not allow it.
    pub fn pause(&self) -> Result<(), Error> {
        self.check(Verb::Pause)?;
        if std::mem::replace(&mut self.state.lock().is_paused_by_user, true) {
            return Err(Error::new("Job is already paused"));
        }
        self.control.pause();
        Ok(())
    }

    pub fn resume(&self) -> Result<(), Error> {
        if !std::mem::replace(&mut self.state.lock().is_paused_by_user, false) {
            return Err(Error::new("Can't resume a job that was not paused"));
        }
        self.control.resume();
        Ok(())
    }

    /// Ends the job without effect: at the next gate of its work, or at once if that is done.
    pub fn cancel(&self) -> Result<(), Error> {
        self.check(Verb::Cancel)?;
        self.control.cancel();
        if self.go(Some(Status::Pending), Status::Aborting, Some(cancelled())) {
            self.conclude(Status::Aborting);
        }
        Ok(())
    }

    /// Asks a job that is ready to come to its end. No kind of job becomes ready so far.
    pub fn complete(&self) -> Result<(), Error> {
        self.check(Verb::Complete)
    }

    /// Lets a job that is pending take effect.
    pub fn finalize(&self) -> Result<(), Error> {
        self.check(Verb::Finalize)?;
        self.conclude(Status::Pending);
        Ok(())
    }

    /// Forgets a job that is concluded.
    pub fn dismiss(&self) -> Result<(), Error> {
        self.check(Verb::Dismiss)?;
        self.forget();
        Ok(())
    }

    fn check(&self, verb: Verb) -> Result<(), Error> {
        let status = self.state.lock().status;
        match status.allows(verb) {
            true => Ok(()),
            false => Err(Error::new(format!(
                "Job '{}' in state '{}' cannot accept command verb '{}'",
                self.new.id,
                status.name(),
                verb.name()
            ))),
        }
    }

    // ---- Its life

    async fn run<F>(self: Arc<Job>, work: impl FnOnce(Arc<Job>) -> F)
    where
        F: Future<Output = Result<(), Error>>,
    {
        let done = self.watch(work(self.clone())).await;
        let done = if self.control.is_cancelled() { Err(cancelled()) } else { done };
        if let Err(error) = done {
            self.go(None, Status::Aborting, Some(error));
            return self.conclude(Status::Aborting);
        }
        self.enter(Status::Waiting);
        self.enter(Status::Pending);
        if self.new.auto_finalize {
            self.conclude(Status::Pending);
        }
    }

    /// Runs the work, and reports meanwhile whether it rests.
    async fn watch(&self, work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
        let mut work = pin!(work);
        let done = loop {
            let is_resting = self.control.is_resting();
            self.enter(if is_resting { Status::Paused } else { Status::Running });
            let changed = self.control.until(|control| control.is_resting() != is_resting);
            if let Either::First(done) = either(work.as_mut(), changed).await {
                break done;
            }
        };
        self.enter(Status::Running);
        done
    }

    fn conclude(&self, from: Status) {
        if self.go(Some(from), Status::Concluded, None) && self.new.auto_dismiss {
            self.forget();
        }
    }

    fn forget(&self) {
        if self.go(Some(Status::Concluded), Status::Null, None)
            && let Some(board) = self.board.upgrade()
        {
            board.jobs.lock().retain(|job| !std::ptr::eq(&**job, self));
        }
    }

    /// Enters the next state, unless it is there already.
    fn enter(&self, next: Status) {
        self.go(None, next, None);
    }

    /// Enters the next state and reports it, if that can follow the current one, and if the current one is `from`.
    fn go(&self, from: Option<Status>, next: Status, error: Option<Error>) -> bool {
        let mut state = self.state.lock();
        let now = state.status;
        if from.is_some_and(|from| from != now) || !now.may_become(next) {
            return false;
        }
        state.status = next;
        state.error = error.map(|error| error.to_string()).or(state.error.take());
        if let Some(board) = self.board.upgrade() {
            // Under the lock, so that changes are reported in order.
            board.events.lock().push((self.new.id.clone(), next));
            drop(state);
            (board.notify)();
        }
        true
    }
}

fn cancelled() -> Error {
    Error::new("Operation canceled")
}

#[cfg(test)]
mod tests;
