//! The socket of an export, and the one front end at a time that it serves.
//!
//! One control thread per export accepts, serves until the front end goes away, and accepts again;
//! a second front end waits in the socket's queue meanwhile. The thread never touches guest I/O.

use super::config::DiskOptions;
use super::handler::{self, Handler};
use super::notices::{Channel, Notices};
use super::queue::Queue;
use super::request::{Counters, Disk};
use super::session::Session;
use crate::block::graph::User;
use crate::block::{Activity, Error, LocalFuture, Node, SECTOR};
use crate::export::core::cut_off::CutOff;
use crate::export::core::door::{Address, Door, wait_readable};
use crate::export::core::failure::{Failure, IoErrors};
use crate::export::core::hand_over;
use crate::export::core::loss::Losses;
use crate::export::core::metrics::ExportMetrics;
use crate::io::descriptors::{self, Reserve};
use crate::io::sync::Mutex;
use crate::io::{Worker, offload};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use vhost::vhost_user::Error as VhostError;
use vmm_sys_util::eventfd::EventFd;

/// Descriptors of a connection besides those of its queues: its stream and a copy of it.
const OF_CONNECTION: usize = 2;

/// Descriptors that a connection has only for moments once its queues have theirs, and its socket for notices.
const IN_PASSING: usize = 2;

/// Descriptors of a queue: for kicks, for calls, and for errors.
const OF_QUEUE: usize = 3;

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
    front_end: Option<(Arc<UnixStream>, Arc<std::sync::Mutex<Session>>)>,
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
        while let Some((stream, reserve)) =
            door.next(&self.name, self.descriptors_to_reserve(), self.stop.as_raw_fd())
        {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            self.serve_one(stream, reserve, door.listener());
        }
        if !self.stopping.load(Ordering::SeqCst) {
            ended();
        }
    }

    /// How many descriptors must be left for a front end to be let in. Most front ends use fewer queues than
    /// they are offered, so what the queues may need is no more than a quarter of all.
    fn descriptors_to_reserve(&self) -> usize {
        let queues = usize::from(self.disk.options.num_queues) * OF_QUEUE;
        OF_CONNECTION + IN_PASSING + queues.min(descriptors::limit() / 4)
    }

    fn serve_one(&self, stream: UnixStream, mut reserve: Reserve, others: Option<RawFd>) {
        let session = Session::new(
            self.name.clone(),
            self.disk.clone(),
            self.workers.clone(),
            self.first_worker,
        );
        let session = Arc::new(std::sync::Mutex::new(session));
        let mut handler = match self.begin(stream, &session) {
            Ok(handler) => handler,
            Err(error) => {
                let why = descriptors::explain(&error);
                return log::error!(export = &*self.name; "a front end is not served: {why}");
            }
        };
        log::info!(export = &*self.name; "front end connected");
        if let Some(metrics) = &self.disk.metrics {
            metrics.connections.fetch_add(1, Ordering::Relaxed);
            metrics.connected.store(true, Ordering::Relaxed);
        }
        let mut channel = Channel::new(&self.name, &self.notices, others);
        let end = self.hear(&session, &mut handler, &mut channel, &mut reserve);
        lock(&session).stop_all();
        self.current.lock().front_end = None;
        if let Some(metrics) = &self.disk.metrics {
            metrics.connected.store(false, Ordering::Relaxed);
        }
        // Memory and descriptors are given back before the log says that the front end has gone.
        drop((channel, handler, session, reserve));
        match end {
            Err(error) if !self.stopping.load(Ordering::SeqCst) => {
                log::warn!(export = &*self.name; "connection ended: {error}")
            }
            _ => log::info!(export = &*self.name; "front end disconnected"),
        }
    }

    /// Makes a connection the one that is served.
    ///
    /// # Errors
    /// There are no descriptors left.
    fn begin(
        &self,
        stream: UnixStream,
        session: &Arc<std::sync::Mutex<Session>>,
    ) -> std::io::Result<Handler> {
        stream.set_nonblocking(false)?;
        let copy = Arc::new(stream.try_clone()?);
        let handler = handler::new(stream, session.clone())?;
        let mut current = self.current.lock();
        lock(session).set_cut_off(CutOff::new(self.name.clone(), copy.clone()));
        for _ in 0..current.paused {
            lock(session).pause();
        }
        current.front_end = Some((copy, session.clone()));
        Ok(handler)
    }

    /// Does what the front end says until it goes, or until the export ends.
    ///
    /// # Errors
    /// It has said something wrong, or what it wants cannot be done.
    fn hear(
        &self,
        session: &std::sync::Mutex<Session>,
        handler: &mut Handler,
        channel: &mut Channel,
        reserve: &mut Reserve,
    ) -> Result<(), VhostError> {
        let mut wait = hand_over::Wait::default();
        while !self.stopping.load(Ordering::SeqCst) {
            if !self.take_disk(session, &mut wait, handler.as_raw_fd())? {
                continue;
            }
            let running = lock(session).is_running();
            let next = channel.wait(handler.as_raw_fd(), running);
            next.check()?;
            match handler.handle_request() {
                Ok(()) => {}
                Err(VhostError::Disconnected) => return Ok(()),
                Err(VhostError::SocketRetry(_)) => continue,
                Err(error) => return Err(next.explain(error)),
            }
            let mut session = lock(session);
            channel.accept(session.has_channel());
            reserve.set_used(OF_CONNECTION + session.descriptors());
            if session.is_running() {
                reserve.settle(IN_PASSING);
            }
            let moved = session.take_moved();
            drop(session);
            if moved {
                self.disk.hand_over.give_up(&self.name, &self.workers[0]);
            }
        }
        Ok(())
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
