//! Reactions to requests that the storage has failed: `werror` and `rerror`, as in QEMU, and events.
//!
//! A back end cannot stop the machine. Where QEMU would, the request is held ([`super::held`]).
//!
//! The rule held here: a failed flush is never done again into success. After a failed fsync the
//! kernel forgets what did not land, and says yes to the next one.

use crate::io::Errno;
use crate::io::sync::Mutex;
use serde::Deserialize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// The reaction to a write, discard, write-zeroes or flush that the storage fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WriteErrors {
    /// Fail the request
    #[default]
    Report,
    /// Tell the guest that it has worked
    Ignore,
    /// Hold the request and try again until it works
    Stop,
    /// Hold it if the storage is full, fail it otherwise
    Enospc,
}

/// The reaction to a read that the storage fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ReadErrors {
    /// Fail the request
    #[default]
    Report,
    /// Tell the guest that it has worked
    Ignore,
    /// Hold the request and try again until it works
    Stop,
}

/// How an export meets failing storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailureOptions {
    pub werror: WriteErrors,
    pub rerror: ReadErrors,
    /// How long a request may be in flight before its connection is closed; zero forever.
    pub io_timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write zeroes",
        }
    }

    /// As QEMU's schema divides them: what is no read is a write.
    pub fn kind(self) -> &'static str {
        if self == Operation::Read { "read" } else { "write" }
    }
}

/// A request that the storage has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub operation: Operation,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    pub errno: Errno,
}

/// The reaction to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Report,
    Ignore,
    /// The request is held.
    Stop,
}

impl Action {
    /// As in QEMU's schema.
    pub fn name(self) -> &'static str {
        match self {
            Action::Report => "report",
            Action::Ignore => "ignore",
            Action::Stop => "stop",
        }
    }
}

impl FailureOptions {
    /// What the policies say, before anything else is asked.
    pub fn action(&self, failure: &Failure) -> Action {
        // No failure of the storage, but something that it does not know: it never will.
        if failure.errno == Errno::ENOTSUP {
            return Action::Report;
        }
        let full = failure.errno == Errno::ENOSPC;
        match (failure.operation, self.rerror, self.werror) {
            (Operation::Read, ReadErrors::Report, _) => Action::Report,
            (Operation::Read, ReadErrors::Ignore, _) => Action::Ignore,
            (Operation::Read, ReadErrors::Stop, _) => Action::Stop,
            (_, _, WriteErrors::Report) => Action::Report,
            (_, _, WriteErrors::Ignore) => Action::Ignore,
            (_, _, WriteErrors::Stop) => Action::Stop,
            (_, _, WriteErrors::Enospc) if full => Action::Stop,
            (_, _, WriteErrors::Enospc) => Action::Report,
        }
    }
}

/// The failures of an export. Written only when a request fails or is tried again.
#[derive(Default)]
pub struct Failures {
    /// Requests that are held, over all queues.
    held: AtomicUsize,
    last: Mutex<Option<Failure>>,
    teller: OnceLock<Teller>,
}

struct Teller {
    export: String,
    to: std::sync::Arc<IoErrors>,
}

impl Failures {
    /// Failures are reported there from now on, as those of this export.
    pub fn notify(&self, export: &str, to: std::sync::Arc<IoErrors>) {
        let teller = Teller { export: export.to_owned(), to };
        // Once, when the export is made.
        let _ = self.teller.set(teller);
    }

    /// Keeps it as the last one, and reports it as one of a node.
    pub fn note(&self, node: &str, failure: Failure, action: Action) {
        *self.last.lock() = Some(failure);
        let Some(teller) = self.teller.get() else { return };
        teller.to.push(IoError {
            export: teller.export.clone(),
            node: node.to_owned(),
            failure,
            action,
        });
    }

    pub fn last(&self) -> Option<Failure> {
        *self.last.lock()
    }

    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub fn hold(&self, requests: usize) {
        self.held.fetch_add(requests, Ordering::Relaxed);
    }

    pub fn let_go(&self, requests: usize) {
        self.held.fetch_sub(requests, Ordering::Relaxed);
    }
}

/// The event for monitors: QEMU's BLOCK_IO_ERROR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoError {
    pub export: String,
    pub node: String,
    pub failure: Failure,
    pub action: Action,
}

/// How long after one event none of its like follows: the guest decides how many there are.
const EVENT_PERIOD: Duration = Duration::from_secs(1);

/// Events that wait to be taken; where nobody takes them there are no more.
const EVENTS: usize = 64;

/// The events of all exports, until somebody takes them.
pub struct IoErrors {
    state: Mutex<Waiting>,
    wakeup: EventFd,
}

#[derive(Default)]
struct Waiting {
    events: Vec<IoError>,
    /// The times and kinds of recent reports.
    reported: Vec<(Instant, String, &'static str, Action)>,
}

impl IoErrors {
    /// `wakeup` is written to when there is something to take.
    pub fn new(wakeup: EventFd) -> IoErrors {
        IoErrors { state: Mutex::default(), wakeup }
    }

    pub fn take(&self) -> Vec<IoError> {
        std::mem::take(&mut self.state.lock().events)
    }

    /// Not if one with the same export, operation and action was reported less than a period ago.
    fn push(&self, error: IoError) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.reported.retain(|(at, ..)| now.duration_since(*at) < EVENT_PERIOD);
        let kind = error.failure.operation.kind();
        let is_like = |(_, export, operation, action): &(_, String, _, _)| {
            *export == error.export && *operation == kind && *action == error.action
        };
        if state.events.len() >= EVENTS || state.reported.iter().any(is_like) {
            return;
        }
        state.reported.push((now, error.export.clone(), kind, error.action));
        state.events.push(error);
        drop(state);
        let _ = self.wakeup.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn failure(operation: Operation, errno: Errno) -> Failure {
        Failure { operation, offset: 0, len: 512, errno }
    }

    #[test]
    fn the_policies_mean_what_they_mean_to_qemu() {
        let of = |werror, rerror, operation, errno| {
            FailureOptions { werror, rerror, ..FailureOptions::default() }
                .action(&failure(operation, errno))
        };
        use Operation::*;
        for operation in [Write, Flush, Discard, WriteZeroes] {
            let act = |werror, errno| of(werror, ReadErrors::Ignore, operation, errno);
            assert_eq!(act(WriteErrors::Report, Errno::ENOSPC), Action::Report);
            assert_eq!(act(WriteErrors::Ignore, Errno::EIO), Action::Ignore);
            assert_eq!(act(WriteErrors::Stop, Errno::EIO), Action::Stop);
            assert_eq!(act(WriteErrors::Enospc, Errno::EIO), Action::Report);
            assert_eq!(act(WriteErrors::Enospc, Errno::ENOSPC), Action::Stop);
            assert_eq!(act(WriteErrors::Stop, Errno::ENOTSUP), Action::Report);
        }
        let read = |rerror| of(WriteErrors::Enospc, rerror, Read, Errno::ENOSPC);
        assert_eq!(read(ReadErrors::Report), Action::Report);
        assert_eq!(read(ReadErrors::Ignore), Action::Ignore);
        assert_eq!(read(ReadErrors::Stop), Action::Stop);
        assert_eq!(FailureOptions::default().action(&failure(Read, Errno::EIO)), Action::Report);
    }

    #[test]
    fn of_many_failures_of_a_kind_one_is_reported() {
        let wakeup = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let errors = Arc::new(IoErrors::new(wakeup.try_clone().unwrap()));
        let export = |name: &str| {
            let failures = Failures::default();
            failures.notify(name, errors.clone());
            failures
        };
        let (a, b) = (export("a"), export("b"));
        let began = Instant::now();
        for _ in 0..100 {
            a.note("node", failure(Operation::Write, Errno::EIO), Action::Stop);
            a.note("node", failure(Operation::Flush, Errno::EIO), Action::Stop);
            a.note("node", failure(Operation::Flush, Errno::EIO), Action::Report);
            a.note("node", failure(Operation::Read, Errno::EIO), Action::Report);
            b.note("node", failure(Operation::Read, Errno::EIO), Action::Report);
        }
        let reported = errors.take();
        // On a machine that stood still meanwhile there may be more.
        if began.elapsed() < EVENT_PERIOD {
            let reported: Vec<_> = reported
                .iter()
                .map(|e| (&*e.export, e.failure.operation.kind(), e.action.name()))
                .collect();
            let wanted = [
                ("a", "write", "stop"),
                ("a", "write", "report"),
                ("a", "read", "report"),
                ("b", "read", "report"),
            ];
            assert_eq!(reported, wanted);
        }
        assert!(wakeup.read().unwrap() > 0);
        assert!(errors.take().is_empty());
    }

    #[test]
    fn where_nobody_takes_them_events_do_not_pile_up() {
        let errors = Arc::new(IoErrors::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        for export in 0..1000 {
            let failures = Failures::default();
            failures.notify(&export.to_string(), errors.clone());
            failures.note("node", failure(Operation::Read, Errno::EIO), Action::Report);
        }
        assert_eq!(errors.take().len(), EVENTS);
    }
}
