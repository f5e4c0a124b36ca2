//! The lives of exports: how they start, end, and are listed.
//!
//! The rule held here: no wait for a guest is without limit. An export ends by a task of its own, and
//! [`Service::take_ended`] tells when it has.

use super::executor::{Pending, within};
use super::{Service, handover};
use crate::block::graph::Attachment;
use crate::block::{Error, Node, Perm, Perms};
use crate::export::core::metrics::Serves;
use crate::export::core::{DiskOptions, Export, ExportMetrics, Failure, Parts, Transport};
use crate::io::sync::Waiters;
use crate::io::{self, Worker};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long the end of an export is waited for. Where nothing is in flight it takes less, and then
/// the node is free when the call returns, as scripts for qemu-storage-daemon expect.
const END_WAIT: Duration = Duration::from_millis(500);

/// How long a socket may be listened on by others before it is refused.
pub const SOCKET_PATIENCE: Duration = Duration::from_secs(2);

/// The exports of a service.
#[derive(Default)]
pub(super) struct Exports {
    /// Newest last.
    list: Vec<Served>,
    /// The process is ending: no export begins any more.
    ending: bool,
    /// Tasks that wait until none serves any more.
    waiting: Waiters,
}

struct Served {
    id: String,
    type_name: &'static str,
    /// Of what it served when it was told to end.
    node_name: String,
    /// The socket file that it has made.
    socket: Option<PathBuf>,
    metrics: Option<Arc<ExportMetrics>>,
    life: Life,
}

enum Life {
    /// Its name is taken. It serves nobody yet.
    Beginning,
    /// It lets the first front end in.
    Starting,
    Serving(Running),
    /// Told to end; a task waits for it.
    Ending,
}

/// The parts of an export that serves.
struct Running(Box<dyn Export>, Attachment);

impl Running {
    /// Ends it, which waits for guests' requests, in this order: no more requests, then no more user.
    async fn end(self) {
        let Running(export, attachment) = self;
        io::offload(move || {
            drop(export);
            drop(attachment);
        })
        .await;
    }

    /// Returns itself, unless an operation on it has failed: then it is ended.
    async fn unless_failed(self, result: Result<(), Error>) -> Result<Running, Error> {
        match result {
            Ok(()) => Ok(self),
            Err(error) => {
                self.end().await;
                Err(error)
            }
        }
    }
}

impl Served {
    /// What it serves with, if it does; it is told to end then.
    fn take(&mut self) -> Option<Running> {
        match std::mem::replace(&mut self.life, Life::Ending) {
            Life::Serving(running) => {
                running.0.node().name().clone_into(&mut self.node_name);
                Some(running)
            }
            other => {
                self.life = other;
                None
            }
        }
    }
}

/// A disk to serve, on behalf of any caller.
pub struct NewExport {
    pub id: String,
    pub node: Arc<Node>,
    pub disk: DiskOptions,
    /// The type of export, with its options.
    pub transport: Box<dyn Transport>,
    pub workers: Vec<Arc<Worker>>,
    /// A node that is inactive stays so until the first front end starts a ring. Else it becomes
    /// active now.
    pub allow_inactive: bool,
    /// The operator knows what failed flushes of earlier processes have lost.
    pub accept_loss: bool,
}

/// The listing of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    pub id: String,
    /// The name of its type.
    pub type_name: &'static str,
    pub node_name: String,
    /// It is told to end and has not yet.
    pub shutting_down: bool,
    /// Flushes fail until an operator accepts what a failed one has lost.
    pub flush_failed: bool,
    /// Requests that the storage has failed and that are held.
    pub held: usize,
    /// Requests that the storage has failed.
    pub errors: u64,
    /// The last of these.
    pub last_failure: Option<Failure>,
}

impl Exports {
    fn find(&mut self, id: &str) -> Option<&mut Served> {
        self.list.iter_mut().find(|served| served.id == id)
    }

    /// # Errors
    /// An export has this name, or is about to have it.
    pub(super) fn check_id(&mut self, id: &str) -> Result<(), Error> {
        match self.find(id) {
            Some(_) => Err(Error::new(format!("Block export id '{id}' is already in use"))),
            None => Ok(()),
        }
    }

    fn remove(&mut self, id: &str) {
        self.list.retain(|served| served.id != id);
        self.waiting.take().wake();
    }

    /// Whether an export serves, or may have a front end that it has let in.
    fn any_serves(&self) -> bool {
        self.list.iter().any(|served| !matches!(served.life, Life::Beginning))
    }
}

fn is_ending() -> Error {
    Error::new("The process is about to end")
}

impl Service {
    /// Serves a node.
    pub async fn export(&self, new: NewExport) -> Result<(), Error> {
        let NewExport { id, node, disk, transport, .. } = &new;
        transport.check(id)?;
        if disk.writable && node.is_read_only() {
            return Err(Error::new("Cannot export read-only node as writable"));
        }
        let (socket, queues) = (transport.socket().map(Path::to_owned), transport.queues());
        let (id, node_name) = (id.clone(), node.name().to_owned());
        let (first_worker, metrics) = {
            let mut state = self.state();
            state.exports.check_id(&id)?;
            let first_worker = state.exports.list.len();
            let is_timed = state.observed.is_some();
            let metrics = (is_timed || state.counts).then(|| {
                let of = (Serves::of(node), node.len());
                let metrics = ExportMetrics::new(&id, of, disk.writable, queues, is_timed);
                Arc::new(metrics.at(socket.as_deref()))
            });
            let begins = Served {
                id: id.clone(),
                type_name: "",
                node_name,
                socket,
                metrics: metrics.clone(),
                life: Life::Beginning,
            };
            state.exports.list.push(begins);
            (first_worker, metrics)
        };
        let begun = self.begin(new, first_worker, metrics).await;
        if begun.is_err() {
            self.state().exports.remove(&id);
        }
        begun
    }

    async fn begin(
        &self,
        new: NewExport,
        first_worker: usize,
        metrics: Option<Arc<ExportMetrics>>,
    ) -> Result<(), Error> {
        let NewExport { id, node, disk, transport, workers, allow_inactive, accept_loss } = new;
        if let Some(path) = transport.socket() {
            self.wait_for_socket(path.to_owned()).await;
        }
        // An active node needs no change of the graph, for which others might be waited for long.
        if !allow_inactive && !node.is_active() {
            self.patiently(async || self.graph().activate(&node).await).await?;
        }
        let writable = disk.writable;
        let (name, served, counted) = (id.clone(), node.clone(), metrics.clone());
        let parts = Parts { name, node: served, disk, workers, first_worker, metrics: counted };
        // The front end is let in last: by then all permissions are held.
        let export = io::offload(move || transport.create(parts)).await?;
        export.notify(self.0.io_errors.clone());
        let attachment = match self.attach(&id, &node, writable, &*export).await {
            Ok(attachment) => attachment,
            Err(error) => {
                io::offload(move || drop(export)).await;
                return Err(error);
            }
        };
        let taken = io::offload(move || {
            let result = export.take_up_losses(accept_loss);
            (Running(export, attachment), result)
        });
        let (running, taken) = taken.await;
        let mut running = running.unless_failed(taken).await?;
        if !allow_inactive && !node.is_active() {
            let activated = running.1.activity().activate().await;
            running = running.unless_failed(activated).await?;
        }
        self.serve(id, running).await?;
        let observed = self.state().observed.clone();
        if let (Some(observed), Some(metrics)) = (observed, metrics) {
            observed.add(metrics);
            observed.add_drives(node.drives());
        }
        Ok(())
    }

    async fn wait_for_socket(&self, path: PathBuf) {
        let patience = self.state().patience;
        if let Some(give_up) = patience {
            io::offload(move || handover::wait_for_socket(&path, SOCKET_PATIENCE, give_up)).await;
        }
    }

    async fn attach(
        &self,
        id: &str,
        node: &Arc<Node>,
        writable: bool,
        export: &dyn Export,
    ) -> Result<Attachment, Error> {
        let mut held = Perm::CONSISTENT_READ;
        if writable {
            held |= Perm::WRITE;
        }
        let perms = Perms { held, shared: Perm::all() };
        let what = format!("export '{id}'");
        self.patiently(async || {
            let (graph, node, what) = (self.graph().clone(), node.clone(), what.clone());
            let user = Some(export.user());
            // Locks of files are system calls.
            io::offload(move || graph.attach(&node, &what, perms, user)).await
        })
        .await
    }

    /// Lets front ends in, unless the process is to end.
    async fn serve(&self, id: String, running: Running) -> Result<(), Error> {
        let may_start = {
            let mut state = self.state();
            let Exports { ending, .. } = state.exports;
            if !ending && let Some(served) = state.exports.find(&id) {
                served.life = Life::Starting;
            }
            !ending
        };
        if !may_start {
            running.end().await;
            return Err(is_ending());
        }
        let Running(mut export, attachment) = running;
        export.follow(attachment.activity());
        let (name, ended) = (id.clone(), self.0.ended.clone());
        let started = io::offload(move || {
            let result = export.start(Box::new(move || ended.notify(name)));
            (Running(export, attachment), result)
        });
        let (running, started) = started.await;
        let running = running.unless_failed(started).await?;
        let ended = {
            let mut state = self.state();
            let ending = state.exports.ending;
            let served = state.exports.find(&id);
            served.and_then(|served| {
                served.type_name = running.0.type_name();
                served.life = Life::Serving(running);
                if ending { served.take() } else { None }
            })
        };
        if let Some(running) = ended {
            self.end(id, running).await;
            return Err(is_ending());
        }
        Ok(())
    }

    /// Ends an export that is marked for it, and reports when it has ended.
    async fn end(&self, id: String, running: Running) {
        running.end().await;
        self.state().exports.remove(&id);
        self.0.ended.notify(id);
    }

    /// All exports, newest first.
    pub fn exports(&self) -> Vec<ExportInfo> {
        let info = |served: &Served| {
            let (node_name, flush_failed, (held, errors, last_failure)) = match &served.life {
                Life::Serving(Running(export, _)) => {
                    (export.node().name().to_owned(), export.has_lost(), export.failures())
                }
                Life::Ending => (served.node_name.clone(), false, (0, 0, None)),
                Life::Beginning | Life::Starting => return None,
            };
            Some(ExportInfo {
                id: served.id.clone(),
                type_name: served.type_name,
                node_name,
                shutting_down: matches!(served.life, Life::Ending),
                flush_failed,
                held,
                errors,
                last_failure,
            })
        };
        self.state().exports.list.iter().rev().filter_map(info).collect()
    }

    /// Ends an export, if `hard` also one that is in use: its front end is cut off, a task waits for what is in flight,
    /// and then [`Service::take_ended`] returns its name.
    ///
    /// # Errors
    /// There is none of this name, it is ending already, or it is in use.
    pub async fn export_del(&self, id: &str, hard: bool) -> Result<(), Error> {
        let running = {
            let mut state = self.state();
            let served = serving(state.exports.find(id), id)?;
            if let Life::Serving(Running(export, _)) = &served.life
                && !hard
                && export.is_in_use()
            {
                let error = Error::new(format!("export '{id}' still in use"));
                return Err(error.with_hint("Use mode='hard' to force client disconnect"));
            }
            served.take()
        };
        let Some(running) = running else { return Ok(()) };
        let (service, id) = (self.clone(), id.to_owned());
        let ended = within(END_WAIT, async move {
            service.end(id, running).await;
            service.graph().tidy().await;
        });
        ended.await;
        Ok(())
    }

    /// Tries the held requests of an export again now.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn retry_held(&self, id: &str) -> Result<(), Error> {
        self.with_serving(id, |export| export.retry_held())
    }

    /// Fails the held requests of an export to its guest.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn fail_held(&self, id: &str) -> Result<(), Error> {
        self.with_serving(id, |export| export.fail_held())
    }

    /// Accepts that a failed flush of an export has lost data.
    ///
    /// # Errors
    /// There is none of this name, or a record cannot be removed.
    pub async fn accept_loss(&self, id: &str) -> Result<(), Error> {
        self.with_serving(id, |export| export.accept_loss())?.await
    }

    fn with_serving<T>(&self, id: &str, work: impl FnOnce(&dyn Export) -> T) -> Result<T, Error> {
        let mut state = self.state();
        match &serving(state.exports.find(id), id)?.life {
            Life::Serving(Running(export, _)) => Ok(work(&**export)),
            _ => Err(not_found(id)),
        }
    }

    /// Tells all exports to end, newest first. [`Service::take_ended`] gives the name of each that has, and
    /// the result comes when all have. No other begins.
    pub fn end_exports(&self) -> Pending<()> {
        self.tell_exports_to_end();
        self.spawn("end of all exports", async |service| service.exports_ended().await)
    }

    pub(super) fn tell_exports_to_end(&self) {
        self.nbd().stop();
        let mut state = self.state();
        state.exports.ending = true;
        let all = state.exports.list.iter_mut().rev();
        let reported = all.filter_map(|served| Some((served.id.clone(), served.take()?)));
        let reported: Vec<_> = reported.collect();
        drop(state);
        for (id, running) in reported {
            self.spawn("end of an export", async move |service| service.end(id, running).await);
        }
    }

    /// Returns when no export serves any more.
    pub(super) async fn exports_ended(&self) {
        self.0
            .state
            .wait_for(|state| match state.exports.any_serves() {
                false => Ok(()),
                true => Err(&mut state.exports.waiting),
            })
            .await;
    }

    /// What exports have counted, oldest first.
    pub fn counted(&self) -> Vec<Arc<ExportMetrics>> {
        let state = self.state();
        state.exports.list.iter().filter_map(|served| served.metrics.clone()).collect()
    }

    /// The socket files that exports have made.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let state = self.state();
        state.exports.list.iter().filter_map(|served| served.socket.clone()).collect()
    }
}

/// An export, which has not been told to end.
fn serving<'a>(found: Option<&'a mut Served>, id: &str) -> Result<&'a mut Served, Error> {
    match found {
        Some(Served { life: Life::Ending, .. }) => {
            let shown = id.escape_debug();
            Err(Error::new(format!("Export '{shown}' is already shutting down")))
        }
        Some(Served { life: Life::Beginning | Life::Starting, .. }) | None => Err(not_found(id)),
        Some(served) => Ok(served),
    }
}

fn not_found(id: &str) -> Error {
    Error::new(format!("Export '{}' is not found", id.escape_debug()))
}
