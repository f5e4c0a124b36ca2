//! The socket of an export, and the one front end at a time that it serves.
//!
//! One control thread per export accepts, serves until the front end goes away, and accepts again;
//! a second front end waits in the socket's queue meanwhile. The thread never touches guest I/O.
//!
//! A session belongs to that thread alone. The thread may wait for I/O that the front end has asked for, and nobody
//! waits for the thread, but for the end of the export: changes of the graph turn the queues themselves, and
//! whatever else the session is to look at only wakes it.

mod connection;
mod user;

use super::device::Device;
use super::options::Options;
use super::queue::Queue;
use crate::block::Error;
use crate::block::graph::User;
use crate::export::core::listener::Listener;
use crate::export::core::server_events::ServerEvents;
use crate::export::core::{Disk, Export, Parts};
use crate::io::Worker;
use crate::io::driven::receive;
use crate::io::sync::Mutex;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// A disk that front ends can connect to, until it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    listener: Option<Listener>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    device: Arc<Device>,
    disk: Arc<Disk>,
    workers: Vec<Arc<Worker>>,
    first_worker: usize,
    stopping: AtomicBool,
    stop: EventFd,
    server_events: Arc<ServerEvents>,
    /// The connection that is served, to cut it off.
    front_end: Mutex<Option<Arc<UnixStream>>>,
}

impl Server {
    /// Opens the socket. Nobody is served before [`Export::start`].
    ///
    /// # Errors
    /// The socket or a descriptor cannot be had.
    pub fn new(parts: Parts, options: Options) -> Result<Server, Error> {
        let listener = Listener::new(options.address)?;
        let Parts { name, node, disk, workers, first_worker, metrics } = parts;
        let disk = Disk::new(&name, node, disk, options.logical_block_size as u32, metrics);
        let device = Arc::new(Device::new(disk, options.device));
        let stop = EventFd::new(libc::EFD_CLOEXEC).map_err(|e| Error::os("eventfd", e))?;
        let server_events = Arc::new(ServerEvents::new().map_err(|e| Error::os("eventfd", e))?);
        wake_when_rings_may_start(&device, &server_events);
        let shared = Arc::new(Shared {
            disk: device.disk.clone(),
            device,
            workers,
            first_worker,
            stopping: AtomicBool::new(false),
            stop,
            server_events,
            front_end: Mutex::default(),
        });
        Ok(Server { shared, listener: Some(listener), thread: None })
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
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let clone = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("export".into())
            .stack_size(256 << 10)
            .spawn(move || clone.serve(listener, ended))
            .map_err(|e| Error::os("cannot start an export's thread", e))?;
        self.thread = Some(thread);
        Ok(())
    }

    fn retry_held(&self) {
        self.shared.device.notify_queues(&self.shared.workers, Queue::retry_held);
    }

    fn fail_held(&self) {
        self.shared.device.notify_queues(&self.shared.workers, Queue::fail_held);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1);
        self.shared.cut_off();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let disk = &self.shared.disk;
        // The next user of the image relies on it.
        disk.lingering.wait(&disk.name);
        if let Some(detached) = self.shared.device.detach_journal(&self.shared.workers[0]) {
            let _ = receive(&detached);
        }
        disk.losses.note_at_the_end(&disk.name, &disk.node());
        disk.log_end();
    }
}

impl Shared {
    /// Ends the connection that is served. Its thread does the rest.
    fn cut_off(&self) {
        if let Some(stream) = &*self.front_end.lock() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Makes the session look again at its rings once the I/O of earlier connections has ended, and whenever a drain has
/// ended.
fn wake_when_rings_may_start(device: &Arc<Device>, server_events: &Arc<ServerEvents>) {
    let clone = server_events.clone();
    device.when_free(move || clone.wake());
    let (clone, disk) = (server_events.clone(), Arc::downgrade(&device.disk));
    device.disk.lingering.when_none(move || {
        if let Some(disk) = disk.upgrade() {
            log::info!(export = &*disk.name; "I/O of an earlier connection has ended");
        }
        clone.wake();
    });
}
