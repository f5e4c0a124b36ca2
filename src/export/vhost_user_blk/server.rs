//! The socket of an export, and the one front end at a time that it serves.
//!
//! One control thread per export accepts, serves until the front end goes away, and accepts again;
//! a second front end waits in the socket's queue meanwhile. The thread never touches guest I/O.

use super::config::DiskOptions;
use super::cut_off::CutOff;
use super::door::{Address, Door, wait_readable};
use super::failure::{Failure, IoErrors};
use super::hand_over;
use super::handler;
use super::loss::Losses;
use super::metrics::ExportMetrics;
use super::notices::{Channel, Notices};
use super::queue::Queue;
use super::request::{Counters, Disk};
use super::session::Session;
use crate::block::graph::User;
use crate::block::{Activity, Error, LocalFuture, Node, SECTOR};
use crate::io::sync::Mutex;
use crate::io::{Worker, offload};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use vhost::vhost_user::Error as VhostError;
use vmm_sys_util::eventfd::EventFd;

/// What an export is made of.
pub struct ExportOptions {
    /// For the log and for those who ask.
    pub name: String,
    pub disk: DiskOptions,
    /// Queues are dealt to these in turn, beginning with number `first_worker`.
    pub workers: Vec<Arc<Worker>>,
    pub first_worker: usize,
    /// What is counted for those who watch.
    pub metrics: Option<Arc<ExportMetrics>>,
}

/// A disk that front ends can connect to, until it is dropped.
pub struct Export {
    shared: Arc<Shared>,
    door: Option<Door>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    me: Weak<Shared>,
    name: String,
    disk: Arc<Disk>,
    workers: Vec<Arc<Worker>>,
    first_worker: usize,
    stopping: AtomicBool,
    stop: EventFd,
    notices: Notices,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    /// The connection being served, to cut it off, and its session.
    front_end: Option<(UnixStream, Arc<std::sync::Mutex<Session>>)>,
    /// Sessions that begin meanwhile begin paused.
    paused: u32,
}

impl Export {
    /// Opens the socket. Nobody is served before [`Export::start`].
    pub fn new(node: Arc<Node>, address: Address, options: ExportOptions) -> Result<Export, Error> {
        let door = Door::new(address)?;
        let lost = options.metrics.as_ref().map(|metrics| metrics.flush_failed.clone());
        let losses = Losses::new(lost.unwrap_or_default());
        let disk = Disk { metrics: options.metrics, losses, ..Disk::new(node, options.disk) };
        let disk = Arc::new(disk);
        let stop = EventFd::new(libc::EFD_CLOEXEC).map_err(|e| Error::os("eventfd", e))?;
        let notices = Notices::new().map_err(|e| Error::os("eventfd", e))?;
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            name: options.name,
            disk,
            workers: options.workers,
            first_worker: options.first_worker,
            stopping: AtomicBool::new(false),
            stop,
            notices,
            current: Mutex::default(),
        });
        let weak = Arc::downgrade(&shared);
        shared.disk.lingering.when_none(move || {
            if let Some(shared) = weak.upgrade() {
                shared.go_on();
            }
        });
        Ok(Export { shared, door: Some(door), thread: None })
    }

    /// Serves front ends from now on. The caller holds the permissions on the node for as long as
    /// the export lives. `ended` is called when no other front end can come.
    pub fn start(mut self, ended: impl FnOnce() + Send + 'static) -> Result<Export, Error> {
        let Some(door) = self.door.take() else { return Ok(self) };
        let theirs = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("export".into())
            .stack_size(256 << 10)
            .spawn(move || theirs.serve(door, ended))
            .map_err(|e| Error::os("cannot start an export's thread", e))?;
        self.thread = Some(thread);
        Ok(self)
    }

    /// The disk is taken and given up through the hold that the export has on its node. Before
    /// [`Export::start`].
    pub fn follow(&self, activity: Activity) {
        self.shared.disk.hand_over.follow(activity);
    }

    /// What the graph tells of changes below the disk.
    pub fn user(&self) -> Arc<dyn User> {
        self.shared.clone()
    }

    /// Requests that the storage fails are told there from now on.
    pub fn tell(&self, to: Arc<IoErrors>) {
        let Shared { name, disk, .. } = &*self.shared;
        disk.failures.tell(name, to);
    }

    /// Requests that are held, requests that the storage has failed, and the last of these.
    pub fn failures(&self) -> (usize, u64, Option<Failure>) {
        let Disk { failures, counters, .. } = &*self.shared.disk;
        (failures.held(), counters.errors.load(Ordering::Relaxed), failures.last())
    }

    /// Whether flushes fail until an operator accepts what a failed one has lost.
    pub fn has_lost(&self) -> bool {
        self.shared.disk.losses.any()
    }

    /// Has all held requests tried again now.
    pub fn retry_held(&self) {
        self.shared.to_queues(Queue::retry_held);
    }

    /// Has all held requests failed to the guest.
    pub fn fail_held(&self) {
        self.shared.to_queues(Queue::fail_held);
    }

    /// Looks for what failed flushes of earlier processes have left, or, if the operator accepts it, forgets
    /// it. Before [`Export::start`].
    ///
    /// # Errors
    /// It cannot be forgotten.
    pub fn take_up_losses(&self, accept: bool) -> Result<(), Error> {
        let Shared { name, disk, .. } = &*self.shared;
        match disk.options.writable {
            true => disk.losses.begin(name, &disk.node(), accept),
            false => Ok(()),
        }
    }

    /// The operator accepts that a failed flush has lost data: flushes work again.
    ///
    /// # Errors
    /// A record of it cannot be removed.
    pub fn accept_loss(&self) -> Result<(), Error> {
        self.shared.disk.losses.accept(&self.shared.name, &self.shared.disk.node())
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn node(&self) -> Arc<Node> {
        self.shared.disk.node()
    }
}

impl Drop for Export {
    /// Cuts the front end off, waits for what is in flight, removes our own socket file.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1);
        if let Some((stream, _)) = &self.shared.current.lock().front_end {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Whoever may open the image next relies on it.
        self.shared.disk.lingering.wait(&self.shared.name);
        self.shared.disk.journal.detach(&self.shared.name, &self.shared.workers[0]);
        let Shared { name, disk, .. } = &*self.shared;
        disk.losses.note_at_the_end(name, &disk.node());
        let Counters { requests, slow, flushes, errors } = &self.shared.disk.counters;
        log::info!(
            export = &*self.shared.name;
            "ended: requests={} slow={} flushes={} errors={}",
            requests.load(Ordering::Relaxed),
            slow.load(Ordering::Relaxed),
            flushes.load(Ordering::Relaxed),
            errors.load(Ordering::Relaxed),
        );
    }
}

impl Shared {
    /// Has every queue that runs do something, soon. Waits for nobody.
    fn to_queues(&self, work: fn(&mut Queue)) {
        let running = self.disk.running.lock().clone();
        for (worker, source) in running {
            let disk = self.disk.clone();
            self.workers[worker].send(move |local| {
                // By now the number may be that of another source.
                if let Some(queue) = local.source::<Queue>(source)
                    && queue.serves(&disk)
                {
                    work(queue);
                }
            });
        }
    }

    /// The door closes with the last front end.
    fn serve(&self, mut door: Door, ended: impl FnOnce()) {
        while let Some(stream) = door.next(&self.name, self.stop.as_raw_fd()) {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            self.serve_one(stream, door.listener());
        }
        if !self.stopping.load(Ordering::SeqCst) {
            ended();
        }
    }

    fn serve_one(&self, stream: UnixStream, others: Option<RawFd>) {
        log::info!(export = &*self.name; "front end connected");
        if let Some(metrics) = &self.disk.metrics {
            metrics.connections.fetch_add(1, Ordering::Relaxed);
            metrics.connected.store(true, Ordering::Relaxed);
        }
        let session = Session::new(
            self.name.clone(),
            self.disk.clone(),
            self.workers.clone(),
            self.first_worker,
        );
        let session = Arc::new(std::sync::Mutex::new(session));
        let mut current = self.current.lock();
        let copies = stream
            .set_nonblocking(false)
            .and_then(|()| Ok((stream.try_clone()?, stream.try_clone()?)));
        let Ok((clone, for_queues)) = copies else { return };
        lock(&session).set_cut_off(CutOff::new(self.name.clone(), for_queues));
        for _ in 0..current.paused {
            lock(&session).pause();
        }
        current.front_end = Some((clone, session.clone()));
        drop(current);
        let mut handler = match handler::new(stream, session.clone()) {
            Ok(handler) => handler,
            Err(error) => return log::error!(export = &*self.name; "a front end is not served: {error}"),
        };
        let mut wait = hand_over::Wait::default();
        let mut channel = Channel::new(&self.name, &self.notices, others);
        let end = loop {
            if self.stopping.load(Ordering::SeqCst) {
                break None;
            }
            match self.take_disk(&session, &mut wait, handler.as_raw_fd()) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => break Some(error),
            }
            let running = lock(&session).is_running();
            channel.wait(handler.as_raw_fd(), running);
            match handler.handle_request() {
                Ok(()) => {
                    channel.accept(lock(&session).has_channel());
                    let moved = lock(&session).take_moved();
                    if moved {
                        self.disk.hand_over.give_up(&self.name, &self.workers[0]);
                    }
                }
                Err(VhostError::Disconnected) => break None,
                Err(VhostError::SocketRetry(_)) => {}
                Err(error) => break Some(error),
            }
        };
        lock(&session).stop_all();
        self.current.lock().front_end = None;
        if let Some(metrics) = &self.disk.metrics {
            metrics.connected.store(false, Ordering::Relaxed);
        }
        // Memory and descriptors are given back before the log says that the front end has gone.
        drop((channel, handler, session));
        match end {
            Some(error) if !self.stopping.load(Ordering::SeqCst) => {
                log::warn!(export = &*self.name; "connection ended: {error}")
            }
            _ => log::info!(export = &*self.name; "front end disconnected"),
        }
    }

    /// The I/O of earlier connections has ended: the rings of this one may begin.
    fn go_on(&self) {
        log::info!(export = &*self.name; "I/O of an earlier connection has ended");
        let front_end = self.current.lock().front_end.as_ref().map(|(_, session)| session.clone());
        if let Some(session) = front_end
            && let Err(error) = lock(&session).start_waiting()
        {
            log::warn!(export = &*self.name; "connection closed: {error}");
            if let Some((stream, _)) = &self.current.lock().front_end {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// Makes the disk ours if a ring waits for it. True when there is nothing to do but to hear what
    /// the front end says.
    fn take_disk(
        &self,
        session: &std::sync::Mutex<Session>,
        wait: &mut hand_over::Wait,
        stream: RawFd,
    ) -> Result<bool, VhostError> {
        if !lock(session).waits_for_disk() {
            wait.end();
            return Ok(true);
        }
        // Others may ask the session meanwhile, so it is not locked.
        if let Err(error) = self.disk.hand_over.take(&self.workers[0]) {
            let refused = |error: Error| std::io::Error::other(error.to_string());
            wait.go_on(&self.name, error).map_err(|e| VhostError::ReqHandlerError(refused(e)))?;
            let fds = [stream, self.stop.as_raw_fd()];
            return Ok(wait_readable(&fds, Some(hand_over::RETRY)) == Some(0));
        }
        if self.disk.capacity.load(Ordering::SeqCst) != self.disk.node().len() / SECTOR {
            self.resized();
        }
        lock(session).start_waiting()?;
        Ok(true)
    }

    /// Has the session go over to the node that the disk is on now. Blocks: not to be called on a worker.
    fn change_node(&self) {
        let current = self.current.lock();
        if let Some((stream, session)) = &current.front_end
            && let Err(error) = lock(session).change_node()
        {
            log::warn!(export = &*self.name; "connection closed: {error}");
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The sessions' word for it blocks: not to be called on a worker.
    fn pause(&self) {
        self.disk.lingering.wait(&self.name);
        let mut current = self.current.lock();
        current.paused += 1;
        if let Some((_, session)) = &current.front_end {
            lock(session).pause();
        }
    }
}

impl User for Shared {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        let Some(shared) = self.me.upgrade() else { return Box::pin(std::future::ready(())) };
        Box::pin(offload(move || shared.pause()))
    }

    /// No front end is let in before the export has its node ([`Export::start`]).
    fn hold(&self) {
        self.current.lock().paused += 1;
    }

    fn resume(&self) {
        let mut current = self.current.lock();
        current.paused = current.paused.saturating_sub(1);
        if let Some((_, session)) = &current.front_end {
            lock(session).resume();
        }
    }

    fn can_move(&self) -> bool {
        true
    }

    fn moved<'a>(&'a self, node: &'a Arc<Node>) -> LocalFuture<'a, ()> {
        // The graph has it until all workers have passed.
        drop(self.disk.root.replace(node.clone()));
        if let Some(metrics) = &self.disk.metrics {
            node.name().clone_into(&mut metrics.node.lock());
        }
        let Some(shared) = self.me.upgrade() else { return Box::pin(std::future::ready(())) };
        Box::pin(offload(move || {
            shared.change_node();
            if shared.disk.options.writable {
                shared.disk.losses.follow(&shared.name, &shared.disk.node());
            }
        }))
    }

    fn resized(&self) {
        let sectors = self.disk.node().len() / SECTOR;
        self.disk.capacity.store(sectors, Ordering::SeqCst);
        if let Some(metrics) = &self.disk.metrics {
            metrics.size.store(sectors * SECTOR, Ordering::Relaxed);
        }
        self.notices.config_changed();
    }
}

fn lock(session: &std::sync::Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
