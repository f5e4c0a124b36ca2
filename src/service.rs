//! What one process serves: its block graph, its workers, its exports. The command lines and the
//! monitor all act through this, so that a thing is done, refused and worded in one way.

mod export_options;
mod exports;
mod handover;
mod holders;
mod looks;
mod nodes;
mod objects;
mod observed;
mod overlays;
mod patience;
mod pending;
mod snapshots;
mod told;
mod transaction;

pub use exports::{ExportInfo, NewExport, SOCKET_PATIENCE};
pub use handover::wait_for_socket;
pub use observed::Observed;
pub use overlays::NewOverlay;
pub use patience::is_locked;
pub use pending::Pending;
pub use transaction::Step;

use crate::block::graph::Graph;
use crate::block::{Error, OpenPolicy, Registry};
use crate::export::core::IoErrors;
use crate::io::{Worker, WorkerOptions};
use exports::Served;
use objects::start_worker;
use std::sync::Arc;
use std::time::Duration;
use told::Ended;

/// A running service. Dropping it ends the exports, then closes the graph.
pub struct Service {
    graph: Graph,
    /// Opens, closes and changes the graph; serves no guest.
    control: Worker,
    /// By id, in the order in which they came.
    iothreads: Vec<(String, Arc<Worker>)>,
    /// For exports that name no iothread; made when the first one does.
    main: Option<Arc<Worker>>,
    /// Newest last.
    exports: Vec<Served>,
    /// What ends the wait for images that are locked; `None`: they are not waited for.
    patience: Option<fn() -> bool>,
    /// Those of them that have ended and were not asked for yet.
    ended: Arc<Ended>,
    /// What the storage has failed and was not asked for yet.
    io_errors: Arc<IoErrors>,
    /// What can be watched; `None`: nothing is counted for that.
    observed: Option<Arc<Observed>>,
    /// What exports do is counted, watched or not.
    counts: bool,
}

impl Service {
    /// A service without anything. `policy` says what may be opened.
    pub fn new(registry: &'static Registry, policy: OpenPolicy) -> Result<Service, Error> {
        let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let control = start_worker("control", options)?;
        let graph = Graph::with_policy(registry, policy);
        let ended = Ended::new()?;
        let io_errors = ended.io_errors()?;
        ended.listen(graph.notices())?;
        let (iothreads, exports) = (Vec::new(), Vec::new());
        let patience = Some((|| false) as fn() -> bool);
        Ok(Service {
            graph,
            control,
            iothreads,
            main: None,
            exports,
            patience,
            ended,
            io_errors,
            observed: None,
            counts: false,
        })
    }

    /// Exports that are made from now on can be watched through what this gives.
    pub fn observe(&mut self) -> Arc<Observed> {
        self.observed.get_or_insert_default().clone()
    }

    /// Exports that are made from now on count their requests, so that [`Service::counted`] has something
    /// to tell.
    pub fn count_requests(&mut self) {
        self.counts = true;
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Waits for locked images from now on until `give_up` says true, and no longer than it makes
    /// sense; with `None` not at all.
    pub fn wait_for_locks(&mut self, give_up: Option<fn() -> bool>) {
        self.patience = give_up;
    }

    fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        match self.patience {
            Some(give_up) => patience::patiently(give_up, attempt),
            None => attempt(),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // In this order: no more requests, then no more users, then no more nodes.
        self.end_exports();
        let graph = self.graph.clone();
        self.control.block_on(move || async move { graph.close().await });
    }
}
