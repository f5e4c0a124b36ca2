//! The worker that serves metrics: one task accepts clients, and each client has one task.

use super::Address;
use super::http;
use super::text::{self, Process};
use crate::block::Error;
use crate::export::core::socket::{self, SocketFile};
use crate::io::task::{Either, either, yield_now};
use crate::io::{
    Deadline, IoResult, IoVec, Socket, Worker, WorkerOptions, current, descriptors, process_cpu_ns,
    sleep, socket as sockets,
};
use crate::service::{Observed, SOCKET_PATIENCE, wait_for_socket};
use std::cell::RefCell;
use std::fs::File;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmm_sys_util::eventfd::EventFd;

/// Clients that are served at a time. One more takes the place of the one that has been there longest.
const CLIENTS: usize = 4;

/// How long a client may take, from its connection to the end of the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long no client is accepted after one could not be.
const PAUSE: Duration = Duration::from_millis(100);

/// How often a port that another process listens on is tried.
const RETRY: Duration = Duration::from_millis(10);

/// Offers the metrics of a service until it is dropped.
pub struct Server {
    stop: Arc<EventFd>,
    worker: Option<Worker>,
    /// Removed before the worker, and with it the listener, ends.
    own_file: Option<SocketFile>,
}

impl Server {
    /// Listens, and starts the worker. A daemon that still ends is waited for as on other sockets, until
    /// `give_up` says so. `log_lines_dropped` counts what the log has lost.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn start(
        address: &Address,
        observed: Arc<Observed>,
        log_lines_dropped: fn() -> u64,
        give_up: fn() -> bool,
    ) -> Result<Server, Error> {
        let failed = |e| Error::os("cannot offer metrics", e);
        let stop = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(failed)?;
        let (listener, own_file) = match address {
            Address::Unix(path) => at_path(path, give_up)?,
            Address::Tcp(address) => (Listener::Tcp(at_port(address, give_up)?), None),
        };
        // From here on a failure removes the file.
        let mut server = Server { stop: Arc::new(stop), worker: None, own_file };
        // Opened while files can still be opened.
        let status = File::open("/proc/self/status").ok();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let started = now.map_or(0.0, |now| now.as_secs_f64());
        let page = Page { observed, log_lines_dropped, started, status };
        let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let worker = Worker::start("metrics", options).map_err(failed)?;
        let stop = server.stop.clone();
        worker.send(move |local| {
            let clients = Rc::new(Clients { page, served: RefCell::default() });
            local.io().spawn(clients.accept(listener, stop));
        });
        server.worker = Some(worker);
        Ok(server)
    }

    /// The socket file, if there is one. It is removed in the end.
    pub fn path(&self) -> Option<&Path> {
        self.own_file.as_ref().map(SocketFile::path)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.own_file = None;
        let _ = self.stop.write(1);
        // It ends when its tasks have.
        self.worker = None;
    }
}

fn at_path(path: &Path, give_up: fn() -> bool) -> Result<(Listener, Option<SocketFile>), Error> {
    wait_for_socket(path, SOCKET_PATIENCE, give_up);
    let (listener, file) = socket::listen(path, None, None)?;
    let failed = |e| Error::os(format!("Failed to set up socket to {}", path.display()), e);
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((Listener::Unix(listener), Some(file)))
}

fn at_port(address: &SocketAddr, give_up: fn() -> bool) -> Result<TcpListener, Error> {
    let end = Instant::now() + SOCKET_PATIENCE;
    loop {
        let listener = TcpListener::bind(address);
        match listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)) {
            Ok(listener) => return Ok(listener),
            Err(error)
                if error.kind() != ErrorKind::AddrInUse || Instant::now() > end || give_up() =>
            {
                return Err(Error::os(format!("cannot listen on {address}"), error));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn fd(&self) -> i32 {
        match self {
            Listener::Unix(listener) => listener.as_raw_fd(),
            Listener::Tcp(listener) => listener.as_raw_fd(),
        }
    }

    fn accept(&self) -> std::io::Result<Socket> {
        let fd: OwnedFd = match self {
            Listener::Unix(listener) => listener.accept()?.0.into(),
            Listener::Tcp(listener) => listener.accept()?.0.into(),
        };
        Socket::try_from(fd).map_err(Into::into)
    }
}

/// The clients, and the page that they get.
struct Clients {
    page: Page,
    /// In the order in which they came.
    served: RefCell<Vec<Rc<Socket>>>,
}

impl Clients {
    /// Serves all clients until it is stopped.
    async fn accept(self: Rc<Self>, listener: Listener, stop: Arc<EventFd>) {
        let readable = libc::POLLIN as u32;
        let mut stopped = pin!(sockets::poll(stop.as_raw_fd(), readable, Deadline::NEVER));
        loop {
            match listener.accept() {
                Ok(client) => {
                    self.clone().admit(client);
                    // However many come, those that are there have their turn.
                    yield_now().await;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let client = sockets::poll(listener.fd(), readable, Deadline::NEVER);
                    if let Either::First(_) = either(stopped.as_mut(), client).await {
                        break;
                    }
                }
                Err(error) => {
                    log::warn!("metrics: accept: {}", descriptors::explain(&error));
                    // Out of descriptors, most likely: do not spin on it.
                    if let Either::First(_) = either(stopped.as_mut(), sleep(PAUSE)).await {
                        break;
                    }
                }
            }
        }
        self.served.borrow().iter().for_each(|client| client.shut_down());
    }

    /// Serves a client by a task of its own.
    fn admit(self: Rc<Self>, client: Socket) {
        let client = Rc::new(client);
        let mut served = self.served.borrow_mut();
        if served.len() == CLIENTS {
            // Its task is notified.
            served.remove(0).shut_down();
        }
        served.push(client.clone());
        drop(served);
        current().spawn(async move {
            // What the client does wrong is its own affair.
            let _ = self.serve(&client).await;
            self.served.borrow_mut().retain(|other| !Rc::ptr_eq(other, &client));
        });
    }

    async fn serve(&self, client: &Socket) -> IoResult {
        let deadline = Deadline::after(PATIENCE);
        let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
        let answer = loop {
            let n = client.receive(&IoVec::from_mut(&mut buffer), deadline).await?;
            if n == 0 {
                return Ok(());
            }
            request.extend_from_slice(&buffer[..n as usize]);
            match http::read(&request) {
                None => {}
                Some(Ok(request)) => break self.page.answer(&request),
                Some(Err(refusal)) => break refusal,
            }
        };
        let mut sent = 0;
        while sent < answer.len() {
            sent += client.send(&IoVec::from_ref(&answer[sent..]), deadline).await? as usize;
        }
        Ok(())
    }
}

/// What the page is made of.
struct Page {
    observed: Arc<Observed>,
    log_lines_dropped: fn() -> u64,
    started: f64,
    /// `/proc/self/status`.
    status: Option<File>,
}

impl Page {
    fn answer(&self, request: &http::Request) -> Vec<u8> {
        let process = Process {
            started: self.started,
            cpu_ns: process_cpu_ns(),
            resident_bytes: self.status.as_ref().and_then(resident).unwrap_or(0),
            log_lines_dropped: (self.log_lines_dropped)(),
        };
        let (exports, drives) = (self.observed.exports(), self.observed.drives());
        http::answer(request, &text::page(request.format, process, &exports, &drives))
    }
}

/// The process's resident memory in bytes, from its status file.
fn resident(status: &File) -> Option<u64> {
    let mut buffer = [0; 4096];
    let n = status.read_at(&mut buffer, 0).ok()?;
    let text = String::from_utf8_lossy(&buffer[..n]);
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}
