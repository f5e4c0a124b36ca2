//! The socket of an export, and the one front end at a time that it serves.
//!
//! One control thread per export accepts, serves until the front end goes away, and accepts again;
//! a second front end waits in the socket's queue meanwhile. The thread never touches guest I/O.

mod connection;
mod user;

use super::device::Device;
use super::options::Options;
use super::queue::Queue;
use super::session::Session;
use crate::block::Error;
use crate::block::graph::User;
use crate::export::core::door::Door;
use crate::export::core::notices::Notices;
use crate::export::core::{Disk, Export, Parts};
use crate::io::Worker;
use crate::io::sync::Mutex;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// A disk that front ends can connect to, until it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    door: Option<Door>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    me: Weak<Shared>,
    device: Arc<Device>,
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
}

impl Server {
    /// Opens the socket. Nobody is served before [`Export::start`].
    ///
    /// # Errors
    /// The socket or a descriptor cannot be had.
    pub fn new(parts: Parts, options: Options) -> Result<Server, Error> {
        let door = Door::new(options.address)?;
        let Parts { name, node, disk, workers, first_worker, metrics } = parts;
        let disk = Disk::new(&name, node, disk, options.logical_block_size as u32, metrics);
        let device = Arc::new(Device::new(disk, options.device));
        let stop = EventFd::new(libc::EFD_CLOEXEC).map_err(|e| Error::os("eventfd", e))?;
        let notices = Notices::new().map_err(|e| Error::os("eventfd", e))?;
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            disk: device.disk.clone(),
            device,
            workers,
            first_worker,
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
        Ok(Server { shared, door: Some(door), thread: None })
    }
}

impl Export for Server {
    fn type_name(&self) -> &'static str {
        super::ENTRY.name
    }

    fn disk(&self) -> &Arc<Disk> {
        &self.shared.disk
    }

    fn user(&self) -> Arc<dyn User> {
        self.shared.clone()
    }

    fn start(&mut self, ended: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
        let Some(door) = self.door.take() else { return Ok(()) };
        let theirs = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("export".into())
            .stack_size(256 << 10)
            .spawn(move || theirs.serve(door, ended))
            .map_err(|e| Error::os("cannot start an export's thread", e))?;
        self.thread = Some(thread);
        Ok(())
    }

    fn retry_held(&self) {
        self.shared.device.tell_queues(&self.shared.workers, Queue::retry_held);
    }

    fn fail_held(&self) {
        self.shared.device.tell_queues(&self.shared.workers, Queue::fail_held);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1);
        if let Some((stream, _)) = &self.shared.current.lock().front_end {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let disk = &self.shared.disk;
        // Whoever may open the image next relies on it.
        disk.lingering.wait(&disk.name);
        disk.journal.detach(&disk.name, &self.shared.workers[0]);
        disk.losses.note_at_the_end(&disk.name, &disk.node());
        disk.log_end();
    }
}

fn lock(session: &std::sync::Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
