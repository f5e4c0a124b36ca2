//! Where front ends come from: they connect to a socket of ours, or we to one of theirs.

use crate::block::Error;
use crate::io::Errno;
use std::fs::symlink_metadata;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How an export meets its front ends.
pub enum Address {
    /// A socket that is made there, and removed at the end.
    Path { path: PathBuf, mode: Option<u32>, owner: Option<(u32, u32)> },
    /// A listening socket that somebody else made. Its file is theirs to remove.
    Listening(OwnedFd),
    /// A connection that is there already. When it ends, no other comes.
    Connected(OwnedFd),
    /// A socket that front ends listen on, one after the other.
    Connect(PathBuf),
}

/// The first wait for a front end that does not listen, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A place where one front end after the other is met.
pub(super) struct Door {
    way: Way,
    /// The socket file that is ours to remove: its path, device and inode.
    own_file: Option<(PathBuf, u64, u64)>,
}

enum Way {
    Listen(UnixListener),
    Once(Option<UnixStream>),
    Connect(PathBuf),
}

impl Door {
    /// Makes the sockets that are to be made. Nobody is met yet.
    pub fn new(address: Address) -> Result<Door, Error> {
        let mut own_file = None;
        let way = match address {
            Address::Path { path, mode, owner } => {
                let (listener, id) = listen(&path, mode, owner)?;
                // It must still be found after the process has gone to another directory.
                let path = std::path::absolute(&path).unwrap_or(path);
                own_file = Some((path, id.0, id.1));
                Way::Listen(listener)
            }
            Address::Listening(fd) => Way::Listen(UnixListener::from(fd)),
            Address::Connected(fd) => Way::Once(Some(UnixStream::from(fd))),
            Address::Connect(path) => {
                check_path(&path)?;
                Way::Connect(path)
            }
        };
        Ok(Door { way, own_file })
    }

    /// The next front end, waited for until `stop` is readable. None then, and when no more come.
    pub fn next(&mut self, name: &str, stop: RawFd) -> Option<UnixStream> {
        match &mut self.way {
            Way::Once(stream) => stream.take(),
            Way::Listen(listener) => accept(listener, name, stop),
            Way::Connect(path) => connect(path, name, stop),
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some((path, device, inode)) = &self.own_file
            && let Ok(found) = symlink_metadata(path)
            && (found.dev(), found.ino()) == (*device, *inode)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn accept(listener: &UnixListener, name: &str, stop: RawFd) -> Option<UnixStream> {
    // Waiting and accepting are two steps, and the caller may have gone in between.
    let _ = listener.set_nonblocking(true);
    loop {
        if wait_readable(&[stop, listener.as_raw_fd()], None) != Some(1) {
            return None;
        }
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log::error!(export = name; "accept: {error}");
                // Out of descriptors, most likely: do not spin on it.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn connect(path: &Path, name: &str, stop: RawFd) -> Option<UnixStream> {
    let (mut wait, longest) = RETRY;
    let mut told = None;
    loop {
        // A front end that hangs up at once is met again at the same pace as one that is not there.
        if wait_readable(&[stop], Some(wait)).is_some() {
            return None;
        }
        let error = match UnixStream::connect(path) {
            Ok(stream) => return Some(stream),
            Err(error) => error,
        };
        if told != Some(error.kind()) {
            let path = path.display();
            log::warn!(export = name; "no front end at '{path}': {error}: trying on");
            told = Some(error.kind());
        }
        wait = (wait * 2).min(longest);
    }
}

/// Waits until one of the descriptors is readable, the first of which comes first: its index. None
/// if the time is over, or something is wrong.
pub(super) fn wait_readable(fds: &[RawFd], time: Option<Duration>) -> Option<usize> {
    let mut polled: Vec<_> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let timeout = time.map_or(-1, |time| time.as_millis() as libc::c_int);
    loop {
        // SAFETY: the list lives through the call, and its length is given.
        let n = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
        if n > 0 {
            return polled.iter().position(|one| one.revents != 0);
        }
        if n == 0 || Errno::last().0 != libc::EINTR {
            return None;
        }
    }
}

/// Bytes of the name of a socket, its end included (`sockaddr_un`).
const MAX_PATH: usize = 108;

fn check_path(path: &Path) -> Result<(), Error> {
    if path.as_os_str().len() < MAX_PATH {
        return Ok(());
    }
    let error = Error::new(format!("UNIX socket path '{}' is too long", path.display()));
    Err(error.with_hint(format!("Path must be less than {MAX_PATH} bytes")))
}

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
    check_path(path)?;
    if let Ok(found) = symlink_metadata(path) {
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
        symlink_metadata(path).map(|found| (found.dev(), found.ino()))
    };
    match set_up() {
        Ok(id) => Ok((listener, id)),
        Err(error) => {
            let _ = std::fs::remove_file(path);
            Err(at("set up", error))
        }
    }
}

/// What a socket that somebody else made is.
pub enum Socket {
    Listening(OwnedFd),
    Connected(OwnedFd),
}

/// Takes over a socket by its descriptor's number.
///
/// # Errors
/// It is no socket.
///
/// # Safety
/// The descriptor must be open and nobody else's.
pub unsafe fn socket_fd(fd: RawFd) -> Result<Socket, Error> {
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
    // SAFETY: the caller's promise.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(if listening == 0 { Socket::Connected(socket) } else { Socket::Listening(socket) })
}

/// Takes over a listening socket by its descriptor's number, as `addr.type=fd` gives it.
///
/// # Safety
/// The descriptor must be open and nobody else's.
pub unsafe fn listening_fd(fd: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: the caller's promise.
    match unsafe { socket_fd(fd) }? {
        Socket::Listening(socket) => Ok(socket),
        Socket::Connected(socket) => {
            // It is not ours after all.
            let _ = socket.into_raw_fd();
            Err(Error::new(format!("File descriptor '{fd}' is not a listening socket")))
        }
    }
}
