//! The socket of an export, and the one front end at a time that it serves.
//!
//! One control thread per export accepts, serves until the front end goes away, and accepts again;
//! a second front end waits in the socket's queue meanwhile. The thread never touches guest I/O.

mod connection;
mod user;

use super::config::DiskOptions;
use super::notices::Notices;
use super::queue::Queue;
use super::request::{Counters, Disk};
use super::session::Session;
use crate::block::graph::User;
use crate::block::{Activity, Error, Node};
use crate::export::core::door::{Address, Door};
use crate::export::core::failure::{Failure, IoErrors};
use crate::export::core::loss::Losses;
use crate::export::core::metrics::ExportMetrics;
use crate::io::Worker;
use crate::io::sync::Mutex;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
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
}

fn lock(session: &std::sync::Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
