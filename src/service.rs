//! The service of one process: its block graph, its workers, its exports.
//!
//! The command lines and the monitor all act through it, so that each thing is done, refused and worded in one way.
//!
//! The lives of exports, changes of the graph and the commands of monitors are tasks on the control executor
//! ([`executor`]). They share the service's state.
//!
//! **The order of locks.** A thread that holds one of these takes only those further down:
//!
//! 1. a claim on nodes of the graph (`block/graph/claims.rs`): the only one that is held across waits, by tasks;
//! 2. [`State`]: the lists of this file;
//! 3. an export's connection;
//! 4. the graph's list of nodes;
//! 5. the lists of events, counters and queues: code that holds one of these calls nothing else.
//!
//! Only the first is held across a wait for I/O, for a guest, or for a thread.

mod events;
mod executor;
mod export_options;
mod exports;
mod handover;
mod holders;
mod jobs;
mod looks;
mod nbd_server;
mod nodes;
mod objects;
mod observed;
mod overlays;
mod patience;
mod snapshots;
mod transaction;

pub use executor::Pending;
pub use exports::{ExportInfo, NewExport, SOCKET_PATIENCE};
pub use handover::wait_for_socket;
pub use holders::holder_of;
pub use observed::Observed;
pub use overlays::NewOverlay;
pub use patience::is_locked;
pub use transaction::Step;

use crate::block::graph::Graph;
use crate::block::{Error, OpenPolicy, Registry};
use crate::export::core::IoErrors;
use crate::export::nbd::Server;
use crate::io::Worker;
use crate::io::sync::Mutex;
use crate::job::Jobs;
use events::Ended;
use executor::Executor;
use exports::Exports;
use std::ops::Deref;
use std::os::fd::RawFd;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// A running service. Clones are the same one.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

/// A service that ends when this is dropped: its exports first, then its graph.
pub struct Owned(Service);

struct Inner {
    graph: Graph,
    executor: Executor,
    state: Mutex<State>,
    /// Exports that have ended and were not taken yet.
    ended: Arc<Ended>,
    /// Requests that the storage has failed and that were not taken yet.
    io_errors: Arc<IoErrors>,
    jobs: Jobs,
    nbd: Server,
}

/// The lists of a service. Their lock is held briefly.
#[derive(Default)]
struct State {
    /// By id, in the order in which they came. None: about to be started.
    iothreads: Vec<(String, Option<Arc<Worker>>)>,
    /// For exports that name no iothread; made when the first one does.
    main: Option<Arc<Worker>>,
    exports: Exports,
    /// Ends the wait for locked images; `None`: there is no wait.
    patience: Option<fn() -> bool>,
    /// The exports that can be watched; `None`: nothing is counted.
    observed: Option<Arc<Observed>>,
    /// Exports count their requests, watched or not.
    counts: bool,
}

impl Service {
    /// Starts a service without anything. `policy` says what may be opened.
    pub fn start(registry: &'static Registry, policy: OpenPolicy) -> Result<Owned, Error> {
        let executor = Executor::start()?;
        let graph = Graph::with_policy(registry, policy);
        let ended = Ended::new()?;
        let io_errors = ended.io_errors()?;
        ended.listen(graph.notices())?;
        let state = Mutex::new(State { patience: Some(|| false), ..State::default() });
        let jobs = Jobs::new(ended.sign()?);
        let inner =
            Inner { graph, executor, state, ended, io_errors, jobs, nbd: Server::default() };
        Ok(Owned(Service(Arc::new(inner))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    /// Exports that are made from now on can be watched through the returned value.
    pub fn observe(&self) -> Arc<Observed> {
        self.state().observed.get_or_insert_default().clone()
    }

    /// Exports that are made from now on count their requests, for [`Service::counted`].
    pub fn count_requests(&self) {
        self.state().counts = true;
    }

    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// Waits for locked images from now on until `give_up` returns true, for a limited time; with `None` not at all.
    pub fn wait_for_locks(&self, give_up: Option<fn() -> bool>) {
        self.state().patience = give_up;
    }

    async fn patiently<T>(
        &self,
        attempt: impl AsyncFnMut() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let give_up = self.state().patience;
        patience::patiently(give_up, attempt).await
    }

    /// Starts a task on the control executor.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl AsyncFnOnce(Service) -> T + Send + 'static,
    ) -> Pending<T> {
        let service = self.clone();
        self.0.executor.spawn(name, move || async move { work(service).await })
    }

    /// Runs a task and waits for it. Not to be called on a worker, nor on a thread that serves others.
    pub fn wait<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce(Service) -> T + Send + 'static,
    ) -> T {
        self.spawn("waited for", work).wait()
    }

    /// Ends all that it does. The result comes when the last node is closed.
    pub fn begin_end(&self) -> Pending<()> {
        // In this order: no more requests, then no more users, then no more nodes.
        self.tell_exports_to_end();
        self.spawn("end", async |service| {
            service.exports_ended().await;
            service.jobs().cancel_all();
            service.graph().close().await;
        })
    }

    /// Readable once a task has ended, until [`Service::clear_tasks_event`].
    pub fn tasks_descriptor(&self) -> RawFd {
        self.0.executor.descriptor()
    }

    /// Must be called before the results of tasks are read.
    pub fn clear_tasks_event(&self) {
        self.0.executor.clear_event();
    }
}

impl Deref for Owned {
    type Target = Service;
    fn deref(&self) -> &Service {
        &self.0
    }
}

impl Owned {
    /// Ends the service of a program that was told to end while it starts and whose storage does not answer.
    /// Nodes that are not closed within `patience` stay as a killed process leaves them.
    pub fn abandon(self, patience: Duration) {
        let Owned(service) = &self;
        service.end_exports().wait();
        let closed = service.spawn("close", async |service| service.graph().close().await);
        if closed.wait_for(patience).is_none() {
            self.leave();
        }
    }

    /// Ends nothing: nodes stay as a killed process leaves them.
    pub fn leave(self) {
        let tasks = self.0.0.executor.tasks().join(", ");
        log::warn!("ended while the storage has not answered: {tasks}");
        std::mem::forget(self);
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.begin_end().wait();
        let mut state = self.state();
        let workers = (std::mem::take(&mut state.iothreads), state.main.take());
        drop(state);
        drop(workers);
        // Tasks that are still under way keep the executor, whose thread ends with the process.
    }
}
