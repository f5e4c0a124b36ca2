//! Unix sockets by path: creating, inspecting and connecting, without waiting for the other end.
//!
//! The rules held here:
//!
//! * **No call waits for a listener.** One whose backlog is full would not release the caller.
//! * **Of all programs that start on one path at a time, one gets it.** Between the look at a socket that
//!   nobody listens on and its replacement another could put a fresh one there, and between bind(2) and
//!   listen(2) a fresh socket looks like one that nobody listens on. Both happen under a lock on the
//!   folder, which leaves no file behind and ends with the process.
//! * **A socket has its mode and owner before anybody can connect to it.**

use crate::block::Error;
use crate::io::Errno;
use std::fs::{File, Permissions, symlink_metadata};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of the name of a socket, its end included (`sockaddr_un`).
const MAX_PATH: usize = 108;

/// How long the folder's lock is tried. Other starters hold it for a moment; what holds it longer is no
/// starter.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// How often it is tried.
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// Connections that wait to be accepted: as many as the kernel allows.
const BACKLOG: libc::c_int = -1;

/// The file of a socket that this process has made, removed in the end unless another has taken its place.
/// It is dropped before the listener: a starter that finds nobody listening replaces the file itself.
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn at(path: &Path) -> std::io::Result<SocketFile> {
        let found = symlink_metadata(path)?;
        // It must still be found after the process has gone to another directory.
        let path = std::path::absolute(path)?;
        Ok(SocketFile { path, device: found.dev(), inode: found.ino() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Ok(found) = symlink_metadata(&self.path)
            && (found.dev(), found.ino()) == (self.device, self.inode)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Refuses a path that is too long for a socket, in QEMU's words.
pub fn check_path(path: &Path) -> Result<(), Error> {
    if path.as_os_str().len() < MAX_PATH {
        return Ok(());
    }
    let error = Error::new(format!("UNIX socket path '{}' is too long", path.display()));
    Err(error.with_hint(format!("Path must be less than {MAX_PATH} bytes")))
}

/// Connects, or fails at once: with `WouldBlock` if the listener's backlog is full. The stream does not block.
pub fn try_connect(path: &Path) -> std::io::Result<UnixStream> {
    let socket = new_socket()?;
    // SAFETY: the address is a local of the length given.
    with_address(path, |address, len| unsafe { libc::connect(socket.as_raw_fd(), address, len) })?;
    Ok(UnixStream::from(socket))
}

/// Whether somebody listens on the socket at `path`. They may see a front end come and go.
///
/// # Errors
/// It cannot be known.
pub fn is_listened_on(path: &Path) -> std::io::Result<bool> {
    match try_connect(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a listening socket at `path`, instead of one that nobody listens on any more.
pub fn listen(
    path: &Path,
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
) -> Result<(UnixListener, SocketFile), Error> {
    let at = |what: &str, error: std::io::Error| {
        Error::os(format!("Failed to {what} socket to {}", path.display()), Errno::from(error))
    };
    check_path(path)?;
    let _lock = lock_folder(path);
    if let Ok(found) = symlink_metadata(path) {
        let shown = path.display();
        if !found.file_type().is_socket() {
            return Err(Error::new(format!("'{shown}' exists already and is not a socket")));
        }
        match is_listened_on(path) {
            Ok(false) => std::fs::remove_file(path).map_err(|e| at("replace", e))?,
            Ok(true) => {
                return Err(Error::new(format!("another process listens on the socket '{shown}'")));
            }
            Err(error) => return Err(at("bind", error)),
        }
    }
    let socket = new_socket().map_err(|e| at("bind", e))?;
    if mode.is_some() {
        // Linux makes the file with the mode of the socket, less the umask: nobody can use it yet.
        File::from(socket.try_clone().map_err(|e| at("bind", e))?)
            .set_permissions(Permissions::from_mode(0o0))
            .map_err(|e| at("set up", e))?;
    }
    // SAFETY: the address is a local of the length given.
    with_address(path, |address, len| unsafe { libc::bind(socket.as_raw_fd(), address, len) })
        .map_err(|e| at("bind", e))?;
    // From here on a failure removes the file.
    let file = SocketFile::at(path).map_err(|e| at("set up", e))?;
    if let Some((user, group)) = owner {
        chown(path, Some(user), Some(group)).map_err(|e| at("set up", e))?;
    }
    if let Some(mode) = mode {
        std::fs::set_permissions(path, Permissions::from_mode(mode))
            .map_err(|e| at("set up", e))?;
    }
    // SAFETY: names no memory, and the descriptor is open.
    if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } != 0 {
        return Err(at("listen on", std::io::Error::last_os_error()));
    }
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(false).map_err(|e| at("set up", e))?;
    Ok((listener, file))
}

/// Keeps other starters from the folder of `path`. None where it cannot be locked: for long by a program
/// that is no starter, or at all.
fn lock_folder(path: &Path) -> Option<File> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = File::open(folder.unwrap_or(Path::new("."))).ok()?;
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match folder.try_lock() {
            Ok(()) => return Some(folder),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(_) => return None,
        }
    }
}

/// A stream socket that does not block.
fn new_socket() -> std::io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes integers alone.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls what takes the address of the socket at `path`.
fn with_address(
    path: &Path,
    call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> libc::c_int,
) -> std::io::Result<()> {
    let name = path.as_os_str().as_bytes();
    // SAFETY: all zeroes are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // An empty name, or one that begins with a zero byte, is not that of a file.
    if name.is_empty() || name.len() >= MAX_PATH || name.contains(&0) {
        return Err(Errno(libc::EINVAL).into());
    }
    for (place, byte) in address.sun_path.iter_mut().zip(name) {
        *place = *byte as libc::c_char;
    }
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    match call((&raw const address).cast(), len) {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Takes a connection that waits at a listening socket of any family, which does not wait itself.
///
/// # Errors
/// EAGAIN: none waits.
pub fn accept(listening: &impl AsRawFd) -> std::io::Result<OwnedFd> {
    let fd = listening.as_raw_fd();
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: no address is asked for.
    let fd = unsafe { libc::accept4(fd, null.cast(), null.cast(), libc::SOCK_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A socket that nobody listens on.
    fn stale(path: &Path) {
        let _ = std::fs::remove_file(path);
        drop(UnixListener::bind(path).unwrap());
    }

    /// A listener whose backlog is full, and what fills it.
    fn full(path: &Path) -> (UnixListener, Vec<UnixStream>) {
        let listener = UnixListener::bind(path).unwrap();
        // SAFETY: names no memory, and the descriptor is open.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let mut waiting = Vec::new();
        while let Ok(stream) = try_connect(path) {
            waiting.push(stream);
        }
        (listener, waiting)
    }

    #[test]
    fn of_those_that_start_on_a_stale_socket_at_a_time_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for round in 0..100 {
            match round % 2 {
                0 => stale(&path),
                _ => std::fs::remove_file(&path).unwrap(),
            }
            let together = Barrier::new(4);
            let results: Vec<_> = std::thread::scope(|scope| {
                let start = || {
                    together.wait();
                    listen(&path, None, None)
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for error in results.iter().filter_map(|result| result.as_ref().err()) {
                assert!(error.to_string().starts_with("another process listens"), "{error}");
            }
            let mut winners = results.iter().filter_map(|result| result.as_ref().ok());
            let (listener, file) = winners.next().unwrap();
            assert!(winners.next().is_none(), "round {round}");
            assert_eq!(file.path(), path);
            let _client = try_connect(&path).unwrap();
            listener.accept().unwrap();
            std::mem::forget(results);
        }
    }

    #[test]
    fn a_listener_with_a_full_backlog_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, waiting) = full(&path);
        assert!(!waiting.is_empty());
        assert_eq!(try_connect(&path).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert!(is_listened_on(&path).unwrap());
        let error = listen(&path, None, None).err().unwrap();
        assert!(error.to_string().starts_with("another process listens"), "{error}");
        drop((listener, waiting));
        assert!(!is_listened_on(&path).unwrap());
        listen(&path, None, None).unwrap();
    }

    #[test]
    fn a_socket_never_has_more_rights_than_it_is_to_have() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut seen = 0;
                while !done.load(Ordering::Relaxed) {
                    seen |= symlink_metadata(&path).map_or(0, |found| found.mode() & 0o777);
                }
                seen
            });
            for _ in 0..500 {
                drop(listen(&path, Some(0o600), None).unwrap());
                std::fs::remove_file(&path).unwrap_err();
            }
            let made = listen(&path, Some(0o600), None).unwrap();
            assert_eq!(symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
            done.store(true, Ordering::Relaxed);
            assert_eq!(watch.join().unwrap() & !0o600, 0);
            drop(made);
        });
    }

    #[test]
    fn a_folder_that_others_have_locked_holds_nobody_up_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let held = File::open(dir.path()).unwrap();
        held.lock().unwrap();
        listen(&dir.path().join("s"), None, None).unwrap();
    }
}
