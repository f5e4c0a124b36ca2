//! Bringing all users of drained nodes to rest at one moment.
//!
//! All users are asked to pause. The rules while they come to rest:
//!
//! * Users at rest do not wait long for slow ones. After a grace they continue, and they are asked again when the
//!   slow ones are at rest. The grace doubles each time, so that it once suffices for all.
//! * A user has [`DEADLINE`] to come to rest, or less if it says so ([`User::patience`]): an export declares
//!   requests hung after its own time, and no guest should wait longer than it would for a disk that answers.
//!   After that the drain fails, with one line that names the disk and what it has in flight.
//! * All users that are paused when a drain ends, however it ends, continue.

use super::drain::User;
use super::{Graph, State};
use crate::block::{Error, LocalFuture};
use crate::io;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// How long requests in flight are waited for. It is the time-out of Linux for a request to a SCSI disk.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// How long users at rest wait at first for those that are not.
const GRACE: Duration = Duration::from_millis(100);

/// The time that a user has to report its requests in flight.
const ANSWER: Duration = Duration::from_secs(1);

/// A user that a drain pauses.
pub(super) struct Asked {
    /// How errors call it: `export 'e0'`.
    pub what: Arc<str>,
    /// The name of its node.
    pub node: String,
    pub user: Arc<dyn User>,
}

impl Asked {
    fn patience(&self) -> Duration {
        self.user.patience().map_or(DEADLINE, |most| most.min(DEADLINE))
    }
}

/// The progress of a user towards rest.
enum Stage<'a> {
    /// It continues as before.
    Running,
    /// It takes nothing more.
    Ending(LocalFuture<'a, ()>),
    /// Nothing of it is in flight.
    AtRest,
}

impl Graph {
    /// Pauses these users for a drain, and returns when all of them are at rest.
    ///
    /// # Errors
    /// One of them does not come to rest.
    pub(super) async fn bring_to_rest(&self, drain: u64, asked: &[Asked]) -> Result<(), Error> {
        let began = now();
        let mut grace = GRACE;
        let mut stages: Vec<Stage<'_>> = asked.iter().map(|_| Stage::Running).collect();
        loop {
            for (stage, Asked { user, .. }) in stages.iter_mut().zip(asked) {
                if matches!(stage, Stage::Running) {
                    self.0.state.lock().paused(drain, user);
                    *stage = Stage::Ending(user.quiesce());
                }
            }
            if io::in_time(grace, all_at_rest(&mut stages)).await.is_some() {
                return Ok(());
            }
            grace *= 2;
            self.let_rested_go_on(drain, asked, &mut stages);
            let slow = asked.iter().zip(&stages).filter(|(_, s)| matches!(s, Stage::Ending(_)));
            let patience = slow.map(|(one, _)| one.patience()).min().unwrap_or(DEADLINE);
            let left = patience.saturating_sub(now().saturating_sub(began));
            if io::in_time(left, all_at_rest(&mut stages)).await.is_none() {
                return Err(unended(asked, &stages, patience).await);
            }
        }
    }

    /// Makes users at rest continue, if there are others, which they would wait for.
    fn let_rested_go_on(&self, drain: u64, asked: &[Asked], stages: &mut [Stage<'_>]) {
        for (stage, Asked { user, .. }) in stages.iter_mut().zip(asked) {
            if matches!(stage, Stage::AtRest) {
                *stage = Stage::Running;
                self.0.state.lock().goes_on(drain, user);
                user.resume();
            }
        }
    }
}

impl State {
    /// A drain pauses a user until the drain ends.
    fn paused(&mut self, drain: u64, user: &Arc<dyn User>) {
        if let Some(drain) = self.drain(drain) {
            drain.users.push(user.clone());
        }
    }

    fn goes_on(&mut self, drain: u64, user: &Arc<dyn User>) {
        let Some(drain) = self.drain(drain) else { return };
        if let Some(at) = drain.users.iter().position(|one| Arc::ptr_eq(one, user)) {
            drain.users.remove(at);
        }
    }
}

/// Returns when no user is ending what it has in flight.
async fn all_at_rest(stages: &mut [Stage<'_>]) {
    poll_fn(|cx| {
        let mut ready = true;
        for stage in &mut *stages {
            ready &= poll(stage, cx);
        }
        if ready { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

fn poll(stage: &mut Stage<'_>, cx: &mut Context<'_>) -> bool {
    if let Stage::Ending(ending) = stage {
        if ending.as_mut().poll(cx).is_pending() {
            return false;
        }
        *stage = Stage::AtRest;
    }
    true
}

/// The error about requests that have not ended.
async fn unended(asked: &[Asked], stages: &[Stage<'_>], waited: Duration) -> Error {
    let mut lines = Vec::new();
    for (Asked { what, node, user }, stage) in asked.iter().zip(stages) {
        if matches!(stage, Stage::Ending(_)) {
            let in_flight = io::in_time(ANSWER, user.in_flight()).await;
            let in_flight = in_flight.unwrap_or_else(|| "requests in flight".to_owned());
            lines.push(format!("{what} (node '{node}') has {in_flight}"));
        }
    }
    Error::new(format!("I/O has not ended within {} s: {}", waited.as_secs_f32(), lines.join("; ")))
}

fn now() -> Duration {
    Duration::from_nanos(io::current().now())
}
