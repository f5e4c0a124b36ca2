//! The NBD server of a process: its listening sockets, its connections, and its exports by name.
//!
//! It listens on the worker of whoever starts it, and handshakes are tasks there: a client that says nothing costs a
//! task until its time is over. Once it has an export, the export serves it on a worker of its own.

use super::address::{Listening, Where, read_options};
use super::handshake::{self, Agreed};
use super::offer::{Client, Offer};
use crate::block::Error;
use crate::export::core::socket::accept;
use crate::io::sync::{Mutex, Waiters};
use crate::io::task::{Either, either};
use crate::io::{self, Deadline, Socket, current, descriptors, offload, socket};
use crate::options::Map;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// How long a client may take for its handshake, as QEMU gives it.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How long nobody is accepted after somebody could not be.
const PAUSE: Duration = Duration::from_millis(100);

const POLLIN: u32 = libc::POLLIN as u32;

/// The NBD server of a process, which may be running or not. Clones are the same one.
#[derive(Clone, Default)]
pub struct Server(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    running: Option<Arc<Running>>,
    /// In the order in which they came.
    exports: Vec<Arc<dyn Offer>>,
}

/// How a server is started.
pub struct ServerOptions {
    pub at: Where,
    /// 0: as many as come.
    pub max_connections: u32,
    /// Zero: a handshake may take for ever.
    pub handshake_limit: Duration,
}

/// What is shared by the tasks of a server that runs.
struct Running {
    /// Readable once the server is to stop.
    stop: EventFd,
    max_connections: u32,
    handshake_limit: Duration,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    /// Their sockets, to cut them off.
    all: BTreeMap<u64, Arc<Socket>>,
    /// Connections that have ended so far.
    ended: u64,
    stopping: bool,
    waiting: Waiters,
}

/// The place of one connection, until it is dropped.
pub(super) struct Ticket {
    running: Arc<Running>,
    number: u64,
}

impl Ticket {
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let waiting = {
            let mut connections = self.running.connections.lock();
            connections.all.remove(&self.number);
            connections.ended += 1;
            connections.waiting.take()
        };
        waiting.wake();
    }
}

impl ServerOptions {
    /// Reads `--nbd-server`, or with `legacy` the arguments of `nbd-server-start`.
    ///
    /// # Errors
    /// They are not complete, or ask for what there is not.
    pub fn read(mut map: Map, legacy: bool) -> Result<ServerOptions, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        struct Rest {
            tls_creds: Option<String>,
            tls_authz: Option<String>,
            #[serde(default)]
            max_connections: u32,
        }
        let at = read_options(&mut map, legacy)?;
        let Rest { tls_creds, tls_authz, max_connections } = crate::options::from_map(map)?;
        if tls_creds.is_some() || tls_authz.is_some() {
            return Err(Error::new("TLS is not available"));
        }
        Ok(ServerOptions { at, max_connections, handshake_limit: HANDSHAKE_LIMIT })
    }
}

impl Server {
    /// Listens from now on. To be called on the worker that is to do it.
    ///
    /// # Errors
    /// It does already, or a socket cannot be had.
    pub async fn start(&self, options: ServerOptions) -> Result<(), Error> {
        if self.is_running() {
            return Err(already_running());
        }
        let ServerOptions { at, max_connections, handshake_limit } = options;
        let listening = offload(move || at.listen()).await?;
        let running = self.begin(max_connections, handshake_limit)?;
        for socket in listening {
            current().spawn(accept_all(self.clone(), running.clone(), socket));
        }
        Ok(())
    }

    /// Runs from now on without listening anywhere: connections are brought ([`Server::take`]).
    ///
    /// # Errors
    /// It runs already, or a descriptor cannot be had.
    pub fn start_alone(&self, handshake_limit: Duration) -> Result<(), Error> {
        self.begin(0, handshake_limit).map(drop)
    }

    /// Runs from now on.
    fn begin(&self, max_connections: u32, limit: Duration) -> Result<Arc<Running>, Error> {
        let stop = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let stop = stop.map_err(|e| Error::os("eventfd", e))?;
        let connections = Mutex::default();
        let running = Running { stop, max_connections, handshake_limit: limit, connections };
        let mut state = self.0.lock();
        match state.running {
            Some(_) => Err(already_running()),
            None => Ok(state.running.insert(Arc::new(running)).clone()),
        }
    }

    /// Serves a client that has connected, from its handshake on. On a worker.
    pub fn take(&self, socket: Socket) {
        let running = self.0.lock().running.clone();
        if let Some(running) = running {
            running.admit(self, socket);
        }
    }

    pub fn is_running(&self) -> bool {
        self.0.lock().running.is_some()
    }

    /// # Errors
    /// It is not running.
    pub fn check_running(&self) -> Result<(), Error> {
        match self.is_running() {
            true => Ok(()),
            false => Err(Error::new("NBD server not running")),
        }
    }

    /// Whether it takes more than one connection at a time.
    pub fn is_shared(&self) -> bool {
        self.0.lock().running.as_ref().is_none_or(|running| running.max_connections != 1)
    }

    /// Listens no more, and cuts all clients off. Waits for none of them.
    pub fn stop(&self) {
        let Some(running) = self.0.lock().running.take() else { return };
        let (waiting, all) = {
            let mut connections = running.connections.lock();
            connections.stopping = true;
            let all: Vec<_> = connections.all.values().cloned().collect();
            (connections.waiting.take(), all)
        };
        let _ = running.stop.write(1);
        all.iter().for_each(|socket| socket.shut_down());
        waiting.wake();
    }

    /// Clients can ask for the export from now on.
    ///
    /// # Errors
    /// There is one of its name.
    pub(super) fn add(&self, export: Arc<dyn Offer>) -> Result<(), Error> {
        let mut state = self.0.lock();
        if state.exports.iter().any(|other| other.name() == export.name()) {
            let name = export.name().escape_debug();
            return Err(Error::new(format!("NBD server already has export named '{name}'")));
        }
        state.exports.push(export);
        Ok(())
    }

    /// Clients cannot ask for it any more.
    pub(super) fn remove(&self, name: &str) {
        let removed = {
            let exports = &mut self.0.lock().exports;
            exports.iter().position(|export| export.name() == name).map(|at| exports.remove(at))
        };
        // It may be the last reference, whose end wants no lock.
        drop(removed);
    }

    /// The export of this name.
    pub(super) fn find(&self, name: &str) -> Option<Arc<dyn Offer>> {
        self.0.lock().exports.iter().find(|export| export.name() == name).cloned()
    }

    /// All exports, in the order in which they came.
    pub(super) fn exports(&self) -> Vec<Arc<dyn Offer>> {
        self.0.lock().exports.clone()
    }

    /// Connections that are there, and those that have ended.
    pub fn connections(&self) -> (usize, u64) {
        let running = self.0.lock().running.clone();
        running.map_or((0, 0), |running| running.connections.lock().counts())
    }

    /// Waits until other numbers of connections than these are there and have ended, or the server has stopped.
    pub async fn connections_changed(&self, known: (usize, u64)) {
        let Some(running) = self.0.lock().running.clone() else { return };
        let changed = |connections: &mut Connections| {
            if connections.stopping || connections.counts() != known { Ok(()) } else { Err(()) }
        };
        let all = &running.connections;
        all.wait_for(|all| changed(all).map_err(|()| &mut all.waiting)).await;
    }
}

fn already_running() -> Error {
    Error::new("NBD server already running")
}

impl Connections {
    fn counts(&self) -> (usize, u64) {
        (self.all.len(), self.ended)
    }
}

impl Running {
    /// Waits until there is room for one more connection. False if the server is to stop.
    async fn room(&self) -> bool {
        let most = match self.max_connections {
            0 => usize::MAX,
            most => most as usize,
        };
        self.connections
            .wait_for(|connections| match (connections.stopping, connections.all.len()) {
                (true, _) => Ok(false),
                (false, count) if count < most => Ok(true),
                _ => Err(&mut connections.waiting),
            })
            .await
    }

    /// Begins a handshake, unless the server is to stop.
    fn admit(self: &Arc<Running>, server: &Server, socket: Socket) {
        let socket = Arc::new(socket);
        socket.send_at_once();
        if let Some(ticket) = self.list(&socket) {
            current().spawn(begin(server.clone(), self.handshake_limit, socket, ticket));
        }
    }

    /// Lists a connection. None if the server is to stop.
    fn list(self: &Arc<Running>, socket: &Arc<Socket>) -> Option<Ticket> {
        let (number, waiting) = {
            let mut connections = self.connections.lock();
            if connections.stopping {
                return None;
            }
            connections.next += 1;
            let number = connections.next;
            connections.all.insert(number, socket.clone());
            (number, connections.waiting.take())
        };
        waiting.wake();
        Some(Ticket { running: self.clone(), number })
    }
}

/// Accepts clients on one socket until the server stops.
async fn accept_all(server: Server, running: Arc<Running>, listening: Listening) {
    let mut told = None;
    while running.room().await {
        let ready = socket::poll(listening.as_raw_fd(), POLLIN, Deadline::NEVER);
        let stop = socket::poll(running.stop.as_raw_fd(), POLLIN, Deadline::NEVER);
        if let Either::Second(_) = either(ready, stop).await {
            return;
        }
        let accepted = accept(&listening).map_err(io::Errno::from);
        let socket = match accepted.and_then(Socket::try_from) {
            Ok(socket) => socket,
            Err(errno) if errno.0 == libc::EAGAIN => continue,
            Err(errno) => {
                if told.replace(errno) != Some(errno) {
                    log::error!("NBD server: accept: {}", descriptors::explain(&errno.into()));
                }
                // The socket stays readable: pause, or this loop spins.
                io::sleep(PAUSE).await;
                continue;
            }
        };
        running.admit(&server, socket);
    }
}

/// Agrees with a client on an export, which serves it then.
async fn begin(server: Server, limit: Duration, socket: Arc<Socket>, ticket: Ticket) {
    let deadline = match limit.is_zero() {
        true => Deadline::NEVER,
        false => Deadline::after(limit),
    };
    match handshake::negotiate(&server, &socket, deadline).await {
        Ok(Agreed { export, headers, contexts }) => {
            export.adopt(Client { socket, headers, contexts, ticket });
        }
        Err(handshake::End::Gone) => {}
        Err(handshake::End::Refused(why)) => log::warn!("NBD client refused: {why}"),
    }
}
