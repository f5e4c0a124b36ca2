//! The socket of an export, and the one front end at a time that it serves.
//!
//! One control thread per export accepts, serves until the front end goes away, and accepts again;
//! a second front end waits in the socket's queue meanwhile. The thread never touches guest I/O.

use super::config::DiskOptions;
use super::notices::{Channel, Notices};
use super::request::{Counters, Disk};
use super::session::Session;
use crate::block::graph::User;
use crate::block::{Error, LocalFuture, Node, SECTOR};
use crate::io::sync::Mutex;
use crate::io::{Errno, Worker, offload};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::eventfd::EventFd;

/// Where front ends connect.
pub enum Address {
    Path {
        path: PathBuf,
        mode: Option<u32>,
        owner: Option<(u32, u32)>,
    },
    /// A listening socket that somebody else made. Its file is theirs to remove.
    Listening(OwnedFd),
}

/// What an export is made of.
pub struct ExportOptions {
    /// For the log and for those who ask.
    pub name: String,
    pub disk: DiskOptions,
    /// Queues are dealt to these in turn, beginning with number `first_worker`.
    pub workers: Vec<Arc<Worker>>,
    pub first_worker: usize,
}

/// A disk that front ends can connect to, until it is dropped.
pub struct Export {
    shared: Arc<Shared>,
    listener: Option<UnixListener>,
    thread: Option<JoinHandle<()>>,
    /// The socket file that is ours to remove: its path, device and inode.
    own_file: Option<(PathBuf, u64, u64)>,
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
        let (listener, own_file) = match address {
            Address::Path { path, mode, owner } => {
                let (listener, id) = listen(&path, mode, owner)?;
                // It must still be found after the process has gone to another directory.
                let path = std::path::absolute(&path).unwrap_or(path);
                (listener, Some((path, id.0, id.1)))
            }
            Address::Listening(fd) => (UnixListener::from(fd), None),
        };
        let disk = Arc::new(Disk::new(node, options.disk));
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
        Ok(Export { shared, listener: Some(listener), thread: None, own_file })
    }

    /// Serves front ends from now on. The caller holds the permissions on the node for as long as
    /// the export lives.
    pub fn start(mut self) -> Result<Export, Error> {
        let Some(listener) = self.listener.take() else { return Ok(self) };
        let theirs = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("export".into())
            .stack_size(256 << 10)
            .spawn(move || theirs.serve(&listener))
            .map_err(|e| Error::os("cannot start an export's thread", e))?;
        self.thread = Some(thread);
        Ok(self)
    }

    /// What the graph tells of changes below the disk.
    pub fn user(&self) -> Arc<dyn User> {
        self.shared.clone()
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.shared.disk.node
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
        if let Some((path, device, inode)) = &self.own_file
            && let Ok(found) = std::fs::symlink_metadata(path)
            && (found.dev(), found.ino()) == (*device, *inode)
        {
            let _ = std::fs::remove_file(path);
        }
        let Counters { requests, slow, flushes, errors } = &self.shared.disk.counters;
        log::info!(
            "{}: ended: requests={} slow={} flushes={} errors={}",
            self.shared.name,
            requests.load(Ordering::Relaxed),
            slow.load(Ordering::Relaxed),
            flushes.load(Ordering::Relaxed),
            errors.load(Ordering::Relaxed),
        );
    }
}

impl Shared {
    fn serve(&self, listener: &UnixListener) {
        // Waiting and accepting are two steps, and the caller may have gone in between.
        let _ = listener.set_nonblocking(true);
        while wait_readable([listener.as_raw_fd(), self.stop.as_raw_fd()]) {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.serve_one(stream),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    log::error!("{}: accept: {error}", self.name);
                    // Out of descriptors, most likely: do not spin on it.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }

    fn serve_one(&self, stream: UnixStream) {
        log::info!("{}: front end connected", self.name);
        let session = Session::new(
            self.name.clone(),
            self.disk.clone(),
            self.workers.clone(),
            self.first_worker,
        );
        let session = Arc::new(std::sync::Mutex::new(session));
        let mut current = self.current.lock();
        let Ok(clone) = stream.set_nonblocking(false).and_then(|()| stream.try_clone()) else {
            return;
        };
        for _ in 0..current.paused {
            lock(&session).pause();
        }
        current.front_end = Some((clone, session.clone()));
        drop(current);
        let mut handler = BackendReqHandler::from_stream(stream, session.clone());
        let mut channel = Channel::new(&self.name, &self.notices);
        let end = loop {
            if self.stopping.load(Ordering::SeqCst) {
                break None;
            }
            channel.wait(handler.as_raw_fd());
            match handler.handle_request() {
                Ok(()) => channel.accept(),
                Err(VhostError::Disconnected) => break None,
                Err(VhostError::SocketRetry(_)) => {}
                Err(error) => break Some(error),
            }
        };
        lock(&session).stop_all();
        self.current.lock().front_end = None;
        // Memory and descriptors are given back before the log says that the front end has gone.
        drop((channel, handler, session));
        match end {
            Some(error) if !self.stopping.load(Ordering::SeqCst) => {
                log::warn!("{}: connection ended: {error}", self.name)
            }
            _ => log::info!("{}: front end disconnected", self.name),
        }
    }

    /// The sessions' word for it blocks: not to be called on a worker.
    fn pause(&self) {
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

    fn resume(&self) {
        let mut current = self.current.lock();
        current.paused = current.paused.saturating_sub(1);
        if let Some((_, session)) = &current.front_end {
            lock(session).resume();
        }
    }

    fn resized(&self) {
        let sectors = self.disk.node.len() / SECTOR;
        self.disk.capacity.store(sectors, Ordering::SeqCst);
        self.notices.config_changed();
    }
}

fn lock(session: &std::sync::Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until one of the descriptors is readable.
fn wait_readable(fds: [RawFd; 2]) -> bool {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: the array lives through the call, and its length is given.
        let n = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
        if n > 0 {
            return true;
        }
        if Errno::last().0 != libc::EINTR {
            return false;
        }
    }
}

/// Bytes of the name of a socket, its end included (`sockaddr_un`).
const MAX_PATH: usize = 108;

/// Makes a listening socket at `path`, in the place of one that nobody listens on any more. Gives
/// its file's device and inode too.
pub fn listen(
    path: &Path,
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
) -> Result<(UnixListener, (u64, u64)), Error> {
    let at = |what: &str, error: std::io::Error| {
        Error::os(format!("Failed to {what} socket to {}", path.display()), Errno::from(error))
    };
    if path.as_os_str().len() >= MAX_PATH {
        let error = Error::new(format!("UNIX socket path '{}' is too long", path.display()));
        return Err(error.with_hint(format!("Path must be less than {MAX_PATH} bytes")));
    }
    if let Ok(found) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        if !found.file_type().is_socket() {
            return Err(Error::new(format!(
                "'{}' exists already and is not a socket",
                path.display()
            )));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(|e| at("replace", e))?;
            }
            Ok(_) => {
                return Err(Error::new(format!(
                    "another process listens on the socket '{}'",
                    path.display()
                )));
            }
            Err(error) => return Err(at("bind", error)),
        }
    }
    let listener = UnixListener::bind(path).map_err(|e| at("bind", e))?;
    let set_up = || {
        if let Some((user, group)) = owner {
            std::os::unix::fs::chown(path, Some(user), Some(group))?;
        }
        if let Some(mode) = mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        }
        std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
    };
    match set_up() {
        Ok(id) => Ok((listener, id)),
        Err(error) => {
            let _ = std::fs::remove_file(path);
            Err(at("set up", error))
        }
    }
}

/// Takes over a listening socket by its descriptor number, as `addr.type=fd` gives it.
///
/// # Safety
/// The descriptor must be open and nobody else's.
pub unsafe fn listening_fd(fd: RawFd) -> Result<OwnedFd, Error> {
    let mut listening: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to the integer.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listening).cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(Error::new(format!("File descriptor '{fd}' is not a socket")));
    }
    if listening == 0 {
        return Err(Error::new(format!("File descriptor '{fd}' is not a listening socket")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
