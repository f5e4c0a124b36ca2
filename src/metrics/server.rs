//! The thread that answers those who ask for metrics.

use super::Address;
use super::http;
use super::text::{self, Process};
use crate::block::Error;
use crate::export::core::socket::{self, SocketFile};
use crate::io::{descriptors, process_cpu_ns};
use crate::service::{Observed, SOCKET_PATIENCE, wait_for_socket};
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
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
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    /// Removed before the thread, and with it the listener, ends.
    own_file: Option<SocketFile>,
}

impl Server {
    /// Listens, and starts the thread. A daemon that still ends is waited for as on other sockets, until
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
        let mut server = Server { stop, thread: None, own_file };
        let watcher =
            Watcher::new(listener, &server.stop, observed, log_lines_dropped).map_err(failed)?;
        let thread = std::thread::Builder::new().name("metrics".into()).stack_size(256 << 10);
        server.thread = Some(thread.spawn(move || watcher.serve()).map_err(failed)?);
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
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
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

    fn accept(&self) -> std::io::Result<File> {
        let fd: OwnedFd = match self {
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.into()
            }
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.into()
            }
        };
        Ok(File::from(fd))
    }
}

/// What an event is about: the end, the listener, or the client of a place.
const STOP: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CLIENT: u64 = 2;

/// The thread's own.
struct Watcher {
    epoll: Epoll,
    listener: Listener,
    clients: [Option<Client>; CLIENTS],
    observed: Arc<Observed>,
    log_lines_dropped: fn() -> u64,
    /// No client is accepted before: the last could not be.
    paused_until: Option<Instant>,
    started: f64,
    /// `/proc/self/status`, opened while files can still be opened.
    status: Option<File>,
}

struct Client {
    stream: File,
    until: Instant,
    request: Vec<u8>,
    /// Empty until the request is there.
    answer: Vec<u8>,
    sent: usize,
}

/// What has come of a client.
enum Read {
    /// More is to come.
    More,
    Request(http::Request),
    /// What it is to be answered.
    Refused(Vec<u8>),
    Gone,
}

impl Watcher {
    fn new(
        listener: Listener,
        stop: &EventFd,
        observed: Arc<Observed>,
        log_lines_dropped: fn() -> u64,
    ) -> std::io::Result<Watcher> {
        let epoll = Epoll::new()?;
        let event = |number| EpollEvent::new(EventSet::IN, number);
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event(STOP))?;
        epoll.ctl(ControlOperation::Add, listener.fd(), event(LISTENER))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Watcher {
            epoll,
            listener,
            clients: [const { None }; CLIENTS],
            observed,
            log_lines_dropped,
            paused_until: None,
            started: now.map_or(0.0, |now| now.as_secs_f64()),
            status: File::open("/proc/self/status").ok(),
        })
    }

    fn serve(mut self) {
        let mut events = [EpollEvent::default(); CLIENTS + 2];
        loop {
            // Interrupted: as if nothing had come.
            let count = self.epoll.wait(self.timeout(), &mut events).unwrap_or(0);
            for event in &events[..count] {
                match event.data() {
                    STOP => return,
                    LISTENER => self.accept(),
                    place => self.go_on((place - FIRST_CLIENT) as usize),
                }
            }
            let now = Instant::now();
            if self.paused_until.is_some_and(|until| until <= now) {
                self.paused_until = None;
                self.listen(EventSet::IN);
            }
            for client in &mut self.clients {
                if client.as_ref().is_some_and(|client| client.until <= now) {
                    *client = None;
                }
            }
        }
    }

    /// Waits for clients from now on, or no longer.
    fn listen(&self, events: EventSet) {
        // The listener is in the set, so that this cannot fail.
        let event = EpollEvent::new(events, LISTENER);
        let _ = self.epoll.ctl(ControlOperation::Modify, self.listener.fd(), event);
    }

    /// Milliseconds until a client has had its time, or others are accepted again; -1: neither.
    fn timeout(&self) -> i32 {
        let first = self.clients.iter().flatten().map(|client| client.until);
        let first = first.chain(self.paused_until).min();
        first.map_or(-1, |at| at.saturating_duration_since(Instant::now()).as_millis() as i32 + 1)
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => {
                log::warn!("metrics: accept: {}", descriptors::explain(&error));
                // Out of descriptors, most likely: do not spin on it.
                self.paused_until = Some(Instant::now() + PAUSE);
                return self.listen(EventSet::empty());
            }
        };
        // A free place comes first.
        let until = |place: &usize| self.clients[*place].as_ref().map(|client| client.until);
        let place = (0..CLIENTS).min_by_key(until).unwrap_or(0);
        self.clients[place] = None;
        let event = EpollEvent::new(EventSet::IN, FIRST_CLIENT + place as u64);
        if self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event).is_ok() {
            let until = Instant::now() + PATIENCE;
            let (request, answer) = (Vec::new(), Vec::new());
            self.clients[place] = Some(Client { stream, until, request, answer, sent: 0 });
        }
    }

    /// Reads or writes what there is; closing the connection takes it from the epoll set.
    fn go_on(&mut self, place: usize) {
        let Some(mut client) = self.clients[place].take() else { return };
        if client.answer.is_empty() {
            client.answer = match client.read() {
                Read::More => return self.clients[place] = Some(client),
                Read::Request(request) => self.answer(&request),
                Read::Refused(answer) => answer,
                Read::Gone => return,
            };
            let event = EpollEvent::new(EventSet::OUT, FIRST_CLIENT + place as u64);
            let fd = client.stream.as_raw_fd();
            if self.epoll.ctl(ControlOperation::Modify, fd, event).is_err() {
                return;
            }
        }
        if !client.write() {
            self.clients[place] = Some(client);
        }
    }

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

impl Client {
    fn read(&mut self) -> Read {
        let mut buffer = [0; 1024];
        let n = match self.stream.read(&mut buffer) {
            Ok(0) => return Read::Gone,
            Ok(n) => n,
            Err(error) if is_passing(&error) => return Read::More,
            Err(_) => return Read::Gone,
        };
        self.request.extend_from_slice(&buffer[..n]);
        match http::read(&self.request) {
            None => Read::More,
            Some(Ok(request)) => Read::Request(request),
            Some(Err(refusal)) => Read::Refused(refusal),
        }
    }

    /// Writes what there is room for. True if the client is done with, one way or the other.
    fn write(&mut self) -> bool {
        while let Some(rest @ [_, ..]) = self.answer.get(self.sent..) {
            match self.stream.write(rest) {
                Ok(0) => return true,
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return !is_passing(&error),
            }
        }
        true
    }
}

fn is_passing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
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
