//! What can be asked of a running service: listings, and taking things away again.
//!
//! The rule held here: nothing waits for a guest without limit. An export ends on a thread of its
//! own, and [`Service::take_ended`] tells when it has.

use super::{Pending, Served, Service, State};
use crate::block::graph::NodeInfo;
use crate::block::name::Names;
use crate::block::{Abilities, Error, Node, Notice, Notices};
use crate::export::core::{ExportMetrics, Failure, IoError, IoErrors};
use crate::export::vhost_user_blk::Export;
use crate::io::sync::Mutex;
use crate::options::{Map, bytes};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// How long the end of an export is waited for. Where nothing is in flight it takes less, and then
/// the node is free when the call returns, as scripts for qemu-storage-daemon expect.
const END_WAIT: Duration = Duration::from_millis(500);

/// What is told of an export in listings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    pub id: String,
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

/// The exports that have ended by themselves, and how that is noticed.
pub(super) struct Ended {
    ids: Mutex<Vec<String>>,
    notice: EventFd,
}

impl Ended {
    pub(super) fn new() -> Result<Arc<Ended>, Error> {
        let notice = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let notice = notice.map_err(|e| Error::os("eventfd", e))?;
        Ok(Arc::new(Ended { ids: Mutex::default(), notice }))
    }

    pub(super) fn tell(&self, id: String) {
        self.ids.lock().push(id);
        let _ = self.notice.write(1);
    }

    /// Makes a sign of it when `notices` has something to give.
    pub(super) fn listen(&self, notices: &Notices) -> Result<(), Error> {
        let notice = self.notice.try_clone().map_err(|e| Error::os("eventfd", e))?;
        notices.on_notice(move || {
            let _ = notice.write(1);
        });
        Ok(())
    }

    /// What the storage fails; noticed in the same way.
    pub(super) fn io_errors(&self) -> Result<Arc<IoErrors>, Error> {
        let notice = self.notice.try_clone().map_err(|e| Error::os("eventfd", e))?;
        Ok(Arc::new(IoErrors::new(notice)))
    }
}

impl Service {
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
            drop::<Export>(export);
            drop::<crate::block::Attachment>(attachment);
            ended.tell(name);
            let _ = tell.send(());
        });
        let thread = thread.map_err(|e| Error::os("cannot start a thread", e))?;
        if let State::Serving(export, attachment) =
            std::mem::replace(&mut served.state, State::Ending(thread))
        {
            export.node().name().clone_into(&mut served.node_name);
            let _ = give.send((*export, attachment));
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
        self.serving(id).map(Export::retry_held)
    }

    /// Fails the held requests of an export to its guest.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn fail_held(&self, id: &str) -> Result<(), Error> {
        self.serving(id).map(Export::fail_held)
    }

    /// Accepts that a failed flush of an export has lost data.
    ///
    /// # Errors
    /// There is none of this name, or a record cannot be removed.
    pub fn accept_loss(&self, id: &str) -> Result<(), Error> {
        self.serving(id)?.accept_loss()
    }

    fn serving(&self, id: &str) -> Result<&Export, Error> {
        let shown = id.escape_debug();
        let served = self.exports.iter().find(|served| served.id == id);
        match served.map(|served| &served.state) {
            Some(State::Serving(export, _)) => Ok(export),
            Some(State::Ending(_)) => {
                Err(Error::new(format!("Export '{shown}' is already shutting down")))
            }
            None => Err(Error::new(format!("Export '{shown}' is not found"))),
        }
    }

    /// What the storage has failed since this was last asked.
    pub fn take_io_errors(&self) -> Vec<IoError> {
        self.io_errors.take()
    }

    /// What nodes have had to tell since this was last asked.
    pub fn take_notices(&self) -> Vec<Notice> {
        self.graph.notices().take()
    }

    /// Readable while [`Service::take_ended`], [`Service::take_io_errors`] or
    /// [`Service::take_notices`] has something to give.
    pub fn ended_notice(&self) -> RawFd {
        self.ended.notice.as_raw_fd()
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

    /// Deletes a node that was opened by name.
    ///
    /// # Errors
    /// [`Graph::delete`](crate::block::Graph::delete).
    pub fn blockdev_del(&self, name: &str) -> Pending<Result<(), Error>> {
        let (graph, name) = (self.graph.clone(), name.to_owned());
        Pending::start(&self.control, move || async move { graph.delete(&name).await })
    }

    /// [`Service::blockdev_add`], but an image that is locked is not waited for.
    pub fn blockdev_open(&self, options: Map) -> Pending<Result<Arc<Node>, Error>> {
        let graph = self.graph.clone();
        Pending::start(&self.control, move || super::open_disk(graph, options))
    }

    /// Sets the length of a node, in bytes; its exports see it.
    pub fn resize(&self, node: &Arc<Node>, len: u64) -> Pending<Result<(), Error>> {
        let (graph, node) = (self.graph.clone(), node.clone());
        Pending::start(&self.control, move || async move { graph.resize(&node, len).await })
    }

    /// Changes the bitmaps of a node.
    pub fn change_bitmaps<F>(&self, node: Arc<Node>, change: F) -> Pending<Result<(), Error>>
    where
        F: AsyncFnOnce(&Arc<Node>) -> Result<(), Error> + Send + 'static,
    {
        let graph = self.graph.clone();
        Pending::start(
            &self.control,
            move || async move { graph.change_bitmaps(&node, change).await },
        )
    }

    /// Deletes an object that nothing uses.
    pub fn object_del(&mut self, id: &str) -> Result<(), Error> {
        let shown = id.escape_debug();
        let found = self.iothreads.iter().position(|(name, _)| name == id);
        let index = found.ok_or_else(|| Error::new(format!("object '{shown}' not found")))?;
        // Everything that runs on a worker holds a reference to it.
        if Arc::strong_count(&self.iothreads[index].1) > 1 {
            return Err(Error::new(format!("object '{shown}' is in use, can not be deleted")));
        }
        self.iothreads.remove(index);
        Ok(())
    }

    /// What there is to tell of all nodes, newest first, and the bytes that each occupies.
    pub fn query_nodes(&self) -> Pending<Vec<(NodeInfo, Option<u64>)>> {
        let graph = self.graph.clone();
        Pending::start(&self.control, move || async move {
            let (mut all, mut names) = (Vec::new(), Names::new(graph.registry()));
            for node in graph.nodes() {
                let allocated = match node.driver().image() {
                    Some(image) => image.allocated().await.ok(),
                    None => None,
                };
                all.push((NodeInfo::of(&node, &mut names), allocated));
            }
            all
        })
    }

    /// What exports have counted, oldest first.
    pub fn counted(&self) -> Vec<Arc<ExportMetrics>> {
        self.exports.iter().filter_map(|served| served.metrics.clone()).collect()
    }

    /// The files and devices that are open, and whether for writing.
    pub fn files(&self) -> Vec<(PathBuf, bool)> {
        let file = |node: &Arc<Node>| {
            let driver = node.driver();
            let name = if driver.children().is_empty() { driver.filename() } else { None };
            let writable = !node.traits().abilities.contains(Abilities::READ_ONLY);
            name.map(|name| (bytes::path_of(&name).into_owned(), writable))
        };
        self.graph.nodes().iter().filter_map(file).collect()
    }

    /// The socket files that exports have made.
    pub fn sockets(&self) -> Vec<PathBuf> {
        self.exports.iter().filter_map(|served| served.socket.clone()).collect()
    }

    /// The same without asking the storage, which may not answer.
    pub fn list_nodes(&self) -> Vec<(NodeInfo, Option<u64>)> {
        self.graph.query().into_iter().map(|info| (info, None)).collect()
    }
}
