//! The interface of an export, the same for every transport.

use super::disk::{Counters, Disk, DiskOptions};
use super::failure::{Failure, IoErrors};
use super::metrics::ExportMetrics;
use crate::block::graph::User;
use crate::block::{Activity, Error, LocalFuture, Node};
use crate::io::{Worker, offload};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What an export of any type is made of.
pub struct Parts {
    /// For the log and for listings.
    pub name: String,
    pub node: Arc<Node>,
    pub disk: DiskOptions,
    /// Queues are dealt to these in turn, beginning with number `first_worker`.
    pub workers: Vec<Arc<Worker>>,
    pub first_worker: usize,
    /// The counters.
    pub metrics: Option<Arc<ExportMetrics>>,
}

/// An export that is still to be made: what the options of its type say.
pub trait Transport: Send {
    /// Checks the options for an export of this name.
    ///
    /// # Errors
    /// An option is out of its range.
    fn check(&self, name: &str) -> Result<(), Error>;

    /// How many queues front ends may use.
    fn queues(&self) -> u16;

    /// The socket file that the export makes, if it makes one.
    fn socket(&self) -> Option<&Path>;

    /// Makes the export, and opens what it listens on. Nobody is served before [`Export::start`].
    ///
    /// # Errors
    /// A socket or a descriptor cannot be had.
    fn create(self: Box<Self>, parts: Parts) -> Result<Box<dyn Export>, Error>;
}

/// A disk that is served. Dropping it cuts the front end off, waits for what is in flight, and removes our own
/// socket file.
pub trait Export: Send + Sync {
    /// The type, as options and listings name it.
    fn type_name(&self) -> &'static str;

    fn disk(&self) -> &Arc<Disk>;

    /// The graph's notifications of changes below the disk.
    fn user(&self) -> Arc<dyn User>;

    /// Serves front ends from now on. The caller holds the permissions on the node while the export lives. `ended` is
    /// called when no other front end can come.
    ///
    /// # Errors
    /// A thread cannot be started.
    fn start(&mut self, ended: Box<dyn FnOnce() + Send>) -> Result<(), Error>;

    /// Retries all held requests now.
    fn retry_held(&self);

    /// Fails all held requests to the guest.
    fn fail_held(&self);

    /// Whether somebody would miss it now, so that it is only ended if that is meant.
    fn is_in_use(&self) -> bool {
        false
    }

    fn name(&self) -> &str {
        &self.disk().name
    }

    fn node(&self) -> Arc<Node> {
        self.disk().node()
    }

    /// The disk is taken and given up through the hold that the export has on its node. Before
    /// [`Export::start`].
    fn follow(&self, activity: Activity) {
        self.disk().hand_over.follow(activity);
    }

    /// Failed requests are reported there from now on.
    fn notify(&self, to: Arc<IoErrors>) {
        self.disk().failures.notify(self.name(), to);
    }

    /// Requests that are held, requests that the storage has failed, and the last of these.
    fn failures(&self) -> (usize, u64, Option<Failure>) {
        let Disk { failures, counters: Counters { errors, .. }, .. } = &**self.disk();
        (failures.held(), errors.load(Ordering::Relaxed), failures.last())
    }

    /// Whether flushes fail until an operator accepts what a failed one has lost.
    fn has_lost(&self) -> bool {
        self.disk().losses.any()
    }

    /// Looks for what failed flushes of earlier processes have left, or, if the operator accepts it, forgets
    /// it. Before [`Export::start`].
    ///
    /// # Errors
    /// It cannot be forgotten.
    fn take_up_losses(&self, accept: bool) -> Result<(), Error> {
        let disk = self.disk();
        match disk.options.writable {
            true => disk.losses.begin(&disk.name, &disk.node(), accept),
            false => Ok(()),
        }
    }

    /// The operator accepts that a failed flush has lost data: flushes work again.
    ///
    /// # Errors
    /// A record of it cannot be removed.
    fn accept_loss(&self) -> LocalFuture<'static, Result<(), Error>> {
        let disk = self.disk().clone();
        Box::pin(offload(move || disk.losses.accept(&disk.name, &disk.node())))
    }
}
