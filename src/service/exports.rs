//! The lives of exports: how they begin and end, and what is told of them.
//!
//! The rule held here: nothing waits for a guest without limit. An export ends on a thread of its
//! own, and [`Service::take_ended`] tells when it has.

use super::{Pending, Service, handover};
use crate::block::graph::Attachment;
use crate::block::{Error, Node, Perm, Perms};
use crate::export::core::{DiskOptions, Export, ExportMetrics, Failure, Parts, Transport};
use crate::io::Worker;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the end of an export is waited for. Where nothing is in flight it takes less, and then
/// the node is free when the call returns, as scripts for qemu-storage-daemon expect.
const END_WAIT: Duration = Duration::from_millis(500);

/// How long a socket may be listened on by others before it is refused.
pub const SOCKET_PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct Served {
    pub(super) id: String,
    type_name: &'static str,
    /// Of what it served when it was told to end.
    node_name: String,
    /// The socket file that it has made.
    socket: Option<PathBuf>,
    metrics: Option<Arc<ExportMetrics>>,
    state: State,
}

enum State {
    Serving(Box<dyn Export>, Attachment),
    /// Told to end; the thread waits for it.
    Ending(JoinHandle<()>),
}

impl State {
    /// Ends the export, or waits until it has.
    fn end(self) {
        match self {
            // In this order: no more requests, then no more user.
            State::Serving(export, attachment) => {
                drop(export);
                drop(attachment);
            }
            State::Ending(thread) => drop(thread.join()),
        }
    }
}

/// A disk to serve, whoever asks for it.
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

/// What is told of an export in listings.
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

impl Service {
    /// Serves a node.
    pub fn export(&mut self, new: NewExport) -> Result<(), Error> {
        let NewExport { id, node, disk, transport, workers, allow_inactive, accept_loss } = new;
        transport.check(&id)?;
        if disk.writable && node.is_read_only() {
            return Err(Error::new("Cannot export read-only node as writable"));
        }
        let mut held = Perm::CONSISTENT_READ;
        if disk.writable {
            held |= Perm::WRITE;
        }
        let perms = Perms { held, shared: Perm::all() };
        let first_worker = self.exports.len();
        let queues = transport.queues();
        let is_timed = self.observed.is_some();
        let metrics = (is_timed || self.counts).then(|| {
            let of = (node.name(), node.len());
            Arc::new(ExportMetrics::new(&id, of, disk.writable, queues, is_timed))
        });
        let socket = transport.socket().map(Path::to_owned);
        if let (Some(path), Some(give_up)) = (&socket, self.patience) {
            handover::wait_for_socket(path, SOCKET_PATIENCE, give_up);
        }
        if !allow_inactive {
            self.activate(&node)?;
        }
        // The front end is let in last: by then all permissions are held.
        let (name, served, counted) = (id.clone(), node.clone(), metrics.clone());
        let parts = Parts { name, node: served, disk, workers, first_worker, metrics: counted };
        let mut export = transport.create(parts)?;
        let type_name = export.type_name();
        export.tell(self.io_errors.clone());
        let user = Some(export.user());
        let what = format!("export '{id}'");
        let attachment = self.patiently(|| self.graph.attach(&node, &what, perms, user.clone()))?;
        export.take_up_losses(accept_loss)?;
        export.follow(attachment.activity());
        let (name, ended) = (id.clone(), self.ended.clone());
        export.start(Box::new(move || ended.tell(name)))?;
        if let (Some(observed), Some(metrics)) = (&self.observed, &metrics) {
            observed.add(metrics.clone());
            observed.add_drives(node.drives());
        }
        let state = State::Serving(export, attachment);
        let node_name = node.name().to_owned();
        self.exports.push(Served { id, type_name, node_name, socket, metrics, state });
        Ok(())
    }

    /// Makes a node active, unless it is.
    fn activate(&self, node: &Arc<Node>) -> Result<(), Error> {
        self.patiently(|| {
            let (graph, node) = (self.graph.clone(), node.clone());
            self.control.block_on(move || async move { graph.activate(&node).await })
        })
    }

    /// All exports, newest first.
    pub fn exports(&self) -> Vec<ExportInfo> {
        let info = |served: &Served| {
            let (node_name, flush_failed, (held, errors, last_failure)) = match &served.state {
                State::Serving(export, _) => {
                    (export.node().name().to_owned(), export.has_lost(), export.failures())
                }
                State::Ending(_) => (served.node_name.clone(), false, (0, 0, None)),
            };
            ExportInfo {
                id: served.id.clone(),
                type_name: served.type_name,
                node_name,
                shutting_down: matches!(served.state, State::Ending(_)),
                flush_failed,
                held,
                errors,
                last_failure,
            }
        };
        self.exports.iter().rev().map(info).collect()
    }

    /// Ends an export: its front end is cut off, what is in flight is waited for on another thread,
    /// and then [`Service::take_ended`] gives its name.
    ///
    /// # Errors
    /// There is none of this name, or it is ending already.
    pub fn export_del(&mut self, id: &str) -> Result<(), Error> {
        let shown = id.escape_debug();
        let served = self.exports.iter_mut().find(|served| served.id == id);
        let served = served.ok_or_else(|| Error::new(format!("Export '{shown}' is not found")))?;
        if matches!(served.state, State::Ending(_)) {
            return Err(Error::new(format!("Export '{shown}' is already shutting down")));
        }
        // The thread is there before the export is given up, for it may not come to be.
        let (give, take) = mpsc::channel();
        let (tell, told) = mpsc::channel::<()>();
        let (name, ended) = (id.to_owned(), self.ended.clone());
        let thread = std::thread::Builder::new().name("export end".into()).spawn(move || {
            let Ok((export, attachment)) = take.recv() else { return };
            drop::<Box<dyn Export>>(export);
            drop::<crate::block::Attachment>(attachment);
            ended.tell(name);
            let _ = tell.send(());
        });
        let thread = thread.map_err(|e| Error::os("cannot start a thread", e))?;
        if let State::Serving(export, attachment) =
            std::mem::replace(&mut served.state, State::Ending(thread))
        {
            export.node().name().clone_into(&mut served.node_name);
            let _ = give.send((export, attachment));
        }
        if told.recv_timeout(END_WAIT).is_ok() {
            let _ = self.tidy().poll(END_WAIT);
        }
        Ok(())
    }

    /// Closes what exports that have ended have left.
    fn tidy(&self) -> Pending<()> {
        let graph = self.graph.clone();
        Pending::start(&self.control, move || async move { graph.tidy().await })
    }

    /// Tries the held requests of an export again now.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn retry_held(&self, id: &str) -> Result<(), Error> {
        self.serving(id).map(|export| export.retry_held())
    }

    /// Fails the held requests of an export to its guest.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn fail_held(&self, id: &str) -> Result<(), Error> {
        self.serving(id).map(|export| export.fail_held())
    }

    /// Accepts that a failed flush of an export has lost data.
    ///
    /// # Errors
    /// There is none of this name, or a record cannot be removed.
    pub fn accept_loss(&self, id: &str) -> Result<(), Error> {
        self.serving(id)?.accept_loss()
    }

    fn serving(&self, id: &str) -> Result<&dyn Export, Error> {
        let shown = id.escape_debug();
        let served = self.exports.iter().find(|served| served.id == id);
        match served.map(|served| &served.state) {
            Some(State::Serving(export, _)) => Ok(&**export),
            Some(State::Ending(_)) => {
                Err(Error::new(format!("Export '{shown}' is already shutting down")))
            }
            None => Err(Error::new(format!("Export '{shown}' is not found"))),
        }
    }

    /// The names of the exports that have ended since this was last asked. One whose front end was
    /// the only one that it could have is among them, and is still there.
    pub fn take_ended(&mut self) -> Vec<String> {
        let _ = self.ended.notice.read();
        let ids = std::mem::take(&mut *self.ended.ids.lock());
        if !ids.is_empty() {
            drop(self.tidy());
        }
        self.exports.retain(|served| {
            !(matches!(served.state, State::Ending(_)) && ids.contains(&served.id))
        });
        ids
    }

    /// Ends all exports, waits for it, and gives their names.
    pub fn end_exports(&mut self) -> Vec<String> {
        self.ended.ids.lock().clear();
        let end = |Served { id, state, .. }: Served| {
            state.end();
            id
        };
        self.exports.drain(..).rev().map(end).collect()
    }

    /// What exports have counted, oldest first.
    pub fn counted(&self) -> Vec<Arc<ExportMetrics>> {
        self.exports.iter().filter_map(|served| served.metrics.clone()).collect()
    }

    /// The socket files that exports have made.
    pub fn sockets(&self) -> Vec<PathBuf> {
        self.exports.iter().filter_map(|served| served.socket.clone()).collect()
    }
}
