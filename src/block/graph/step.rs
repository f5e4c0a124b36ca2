//! Steps of a change that wait for storage while guests are paused, and their deadline.
//!
//! The rules:
//!
//! * A step has as long as requests have to come to rest ([`super::rest`]), or less if a user that is paused says
//!   so ([`User::patience`](super::User::patience)).
//! * If it has not ended by then it has failed, with one line that names the node and the step. The change is taken
//!   back as after any other failure, and paused users continue.
//! * The storage may still do what it was asked to. So the step continues by itself, and the change says what is done
//!   when it has ended. Until then others do only what does not conflict with it ([`Meanwhile`]).
//! * Where no step can be taken back before it has ended, the whole rest of the change continues by itself
//!   ([`Drained::in_time`]). Its users stay paused until it has taken everything back.

use super::claims::{Claim, Part};
use super::drain::Pause;
use super::rest::DEADLINE;
use super::{Drained, Graph};
use crate::block::{Error, Node};
use crate::io;
use crate::io::epoch::{self, Member};
use crate::io::task::apart;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// What others may do with a node while an overdue step on it continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// Everything but changing it: its users continue, and new nodes may be put above it.
    Use,
    /// Its users continue.
    Requests,
    /// Its users stay paused.
    Nothing,
}

/// One step of a change.
pub struct Step<'a> {
    pub node: &'a Arc<Node>,
    /// For errors: `Flushing node 'a'`.
    pub what: String,
    pub meanwhile: Meanwhile,
}

/// What a step that has not ended in time keeps until it has: first the users continue, then others may change the
/// node.
struct Held {
    _pause: Option<Pause>,
    _claim: Claim,
}

/// What the task of a step and the change share.
struct Shared<T> {
    result: RefCell<Option<Result<T, Error>>>,
    held: RefCell<Option<Held>>,
}

impl Drained {
    /// Does `work`, a step of the change, which must end in time. If it does not, `late` is given what comes of it
    /// when it has ended.
    ///
    /// # Errors
    /// Those of `work`, and that it has not ended in time.
    pub async fn step<T: 'static>(
        &self,
        step: Step<'_>,
        work: impl Future<Output = Result<T, Error>> + 'static,
        late: impl AsyncFnOnce(Result<T, Error>) + 'static,
    ) -> Result<T, Error> {
        let shared = Rc::new(Shared { result: RefCell::default(), held: RefCell::default() });
        let clone = shared.clone();
        let task = apart(async move {
            let result = work.await;
            if clone.held.borrow().is_some() {
                late(result).await;
                clone.held.take();
            } else {
                *clone.result.borrow_mut() = Some(result);
            }
        });
        let limit = self.patience();
        // It may have ended at the very end of its time.
        let in_time = io::in_time(limit, task).await;
        if let Some(result) = shared.result.take() {
            return result;
        }
        debug_assert!(in_time.is_none());
        self.late.set(true);
        *shared.held.borrow_mut() = Some(self.keep_for(&step));
        let (what, seconds) = (step.what, limit.as_secs_f32());
        Err(Error::new(format!("{what} has not ended within {seconds} s")))
    }

    /// Does `work`, the rest of the change, as a task of its own, and then closes what the change no longer uses. `work`
    /// asks its second argument before it makes anything final: true means that it has not ended in time, and has to
    /// take everything back.
    ///
    /// # Errors
    /// Those of `work`, and that it has not ended in time. `what` begins that error: `Opening node 'a' again`.
    pub(super) async fn in_time(
        self,
        what: String,
        work: impl AsyncFnOnce(&Drained, &Cell<bool>) -> Result<(), Error> + 'static,
    ) -> Result<(), Error> {
        // A step of the rest has one time for itself.
        let limit = self.patience() * 2;
        let shared = Rc::new((Cell::new(false), RefCell::new(None)));
        let clone = shared.clone();
        let task = apart(async move {
            let result = work(&self, &clone.0).await;
            let is_whole = result.is_ok();
            // The result for the caller no longer depends on how long closing takes.
            *clone.1.borrow_mut() = Some(result);
            if is_whole {
                self.graph().end_changed_in_time(&self).await;
            }
        });
        // It may have ended at the very end of its time.
        let _ended = io::in_time(limit, task).await;
        if let Some(result) = shared.1.take() {
            return result;
        }
        shared.0.set(true);
        Err(Error::new(format!("{what} has not ended within {} s", limit.as_secs_f32())))
    }

    /// Brings what was written to a node to its storage, as a step of the change.
    ///
    /// # Errors
    /// In QEMU's words, or it has not ended in time.
    pub async fn flush(&self, node: &Arc<Node>) -> Result<(), Error> {
        let what = format!("Flushing node '{}'", node.name());
        let step = Step { node, what, meanwhile: Meanwhile::Use };
        let node = node.clone();
        let flush = async move {
            let flushed = node.flush().await;
            flushed.map_err(|errno| Error::os(format!("Error flushing '{}'", node.name()), errno))
        };
        self.step(step, flush, async |_| ()).await
    }

    /// Waits until no request on the fast path still uses the graph as it was before the change, and drops what those
    /// may have seen then.
    pub(super) async fn settle<T: 'static>(
        &self,
        node: &Arc<Node>,
        members: Vec<Arc<Member>>,
        seen: T,
    ) {
        let what = format!("Waiting for requests on their way to node '{}'", node.name());
        let step = Step { node, what, meanwhile: Meanwhile::Use };
        let passed = async move {
            epoch::synchronize(&members).await;
            drop(seen);
            Ok(())
        };
        if let Err(error) = self.step(step, passed, async |_| ()).await {
            log::warn!("{error}");
        }
    }

    /// How long a step may take.
    pub(super) fn patience(&self) -> Duration {
        let users = self.users();
        users.iter().filter_map(|user| user.patience()).min().map_or(DEADLINE, |t| t.min(DEADLINE))
    }

    fn keep_for(&self, step: &Step<'_>) -> Held {
        let graph = self.graph();
        let mut state = graph.0.state.lock();
        // It is in the graph: the change has claimed it.
        let id = state.id(step.node).ok();
        let parts = match (step.meanwhile, id) {
            (Meanwhile::Requests | Meanwhile::Nothing, Some(id)) => vec![Part::Change(id)],
            _ => vec![Part::Keep(step.node.name().to_owned())],
        };
        let claim = state.claim_within(self.claim(), parts);
        let paused = id.filter(|_| step.meanwhile == Meanwhile::Nothing);
        let pause = paused.map(|id| state.pause_longer(id));
        drop(state);
        Held { _pause: pause.map(|id| Pause::new(graph, id)), _claim: Claim::new(graph, claim) }
    }
}

impl Graph {
    /// Waits for a claim, but not forever: others keep what they change as long as their storage takes.
    ///
    /// # Errors
    /// It is not served in time.
    pub(super) async fn claim_in_time(
        &self,
        parts: Vec<Part>,
        node: Option<&Arc<Node>>,
    ) -> Result<Claim, Error> {
        match io::in_time(DEADLINE, self.claim(parts)).await {
            Some(claim) => Ok(claim),
            None => {
                let (name, seconds) = (node.map_or("", |node| node.name()), DEADLINE.as_secs());
                Err(Error::new(format!(
                    "Another change around node '{name}' has not ended within {seconds} s"
                )))
            }
        }
    }
}
