//! A daemon's own process: signals, the pid file, detaching, and reporting that it is ready.

use super::log;
use super::outlet::Outlet;
use crate::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The signals that end the program, kept from doing so until they are waited for.
pub struct EndSignals(libc::sigset_t);

/// One of [`EndSignals`] has been taken.
static TAKEN: AtomicBool = AtomicBool::new(false);

impl EndSignals {
    /// Blocks SIGINT, SIGHUP and SIGTERM for this thread and all that it starts. To be called before
    /// there is another thread.
    pub fn block() -> EndSignals {
        // SAFETY: the set is initialised before it is used, and the signals exist.
        unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGINT, libc::SIGHUP, libc::SIGTERM] {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            EndSignals(set)
        }
    }

    /// Lets them end the program again, for this thread.
    pub fn unblock(self) {
        // SAFETY: the set is initialised.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &self.0, std::ptr::null_mut()) };
    }

    /// Whether one of them has come.
    pub fn have_come() -> bool {
        if TAKEN.load(Ordering::Relaxed) {
            return true;
        }
        // SAFETY: the call initialises the set.
        unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigpending(&mut set);
            let has = |signal| libc::sigismember(&set, signal) == 1;
            [libc::SIGINT, libc::SIGHUP, libc::SIGTERM].into_iter().any(has)
        }
    }

    /// A descriptor that is readable while one of them waits to be taken (signalfd).
    pub fn descriptor(&self) -> Result<OwnedFd, String> {
        // SAFETY: the set is initialised.
        let fd = unsafe { libc::signalfd(-1, &self.0, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(format!("signalfd: {}", Errno::last()));
        }
        // SAFETY: signalfd has just made it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Takes the pending [`EndSignals`], so that their descriptor reports the next one.
pub fn take_signals(stop: &OwnedFd) {
    // One of each.
    for _ in 0..3 {
        // SAFETY: any bytes are one.
        let mut info = unsafe { std::mem::zeroed::<libc::signalfd_siginfo>() };
        let size = size_of_val(&info);
        // SAFETY: the memory is as long as is said.
        let read = unsafe { libc::read(stop.as_raw_fd(), (&raw mut info).cast(), size) };
        if read <= 0 {
            return;
        }
        TAKEN.store(true, Ordering::Relaxed);
    }
}

/// Waits for one of [`EndSignals`], whose descriptor is `stop`, takes it, and gives its number.
pub fn next_signal(stop: &OwnedFd) -> libc::c_int {
    loop {
        // SAFETY: any bytes are one.
        let mut info = unsafe { std::mem::zeroed::<libc::signalfd_siginfo>() };
        let size = size_of_val(&info);
        // SAFETY: the memory is as long as is said.
        let read = unsafe { libc::read(stop.as_raw_fd(), (&raw mut info).cast(), size) };
        if usize::try_from(read) == Ok(size) {
            return info.ssi_signo as libc::c_int;
        }
        readable_within(stop.as_raw_fd(), Duration::MAX);
    }
}

/// Sleeps until one of two descriptors is readable, or for a limited time. True if it is not the first, which is
/// that of [`EndSignals`].
pub fn wait_unless_ended(stop: &OwnedFd, other: RawFd, limit: Option<Duration>) -> bool {
    let limit = limit.map_or(-1, milliseconds);
    let polled = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [polled(stop.as_raw_fd()), polled(other)];
    loop {
        // SAFETY: the array lives through the call, and its length is given.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit) };
        if ready >= 0 {
            return fds[0].revents == 0;
        }
        if Errno::last().0 != libc::EINTR {
            return false;
        }
    }
}

/// Sleeps for `time`. True if one of [`EndSignals`] came, whose descriptor is `stop`.
pub fn ended_within(stop: &OwnedFd, time: Duration) -> bool {
    readable_within(stop.as_raw_fd(), time)
}

/// Sleeps for `time`, or until a descriptor is readable. True then.
pub fn readable_within(fd: RawFd, time: Duration) -> bool {
    let mut fd = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which lives through the call.
    unsafe { libc::poll(&mut fd, 1, milliseconds(time)) > 0 }
}

fn milliseconds(time: Duration) -> libc::c_int {
    libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX)
}

/// The service manager that started the program, if it wants notifications (`sd_notify(3)`). Its socket is connected
/// at once: in the sandbox there are no new ones. A manager that does not read yet gets the messages later.
pub struct Manager(Option<Outlet>);

impl Manager {
    pub const READY: &str = "READY=1";
    pub const STOPPING: &str = "STOPPING=1";

    /// Asks the environment.
    pub fn find() -> Manager {
        Manager(std::env::var_os("NOTIFY_SOCKET").and_then(|name| Manager::connect(&name).ok()))
    }

    fn connect(name: &OsStr) -> std::io::Result<Outlet> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        let socket = Box::new(File::from(OwnedFd::from(socket)));
        Outlet::start("sd_notify", socket, |_| Vec::new())
    }

    pub fn notify(&self, state: &str) {
        if let Some(outlet) = &self.0 {
            outlet.push(state);
        }
    }

    /// Waits until everything is written, for a bounded time. For a process that ends.
    pub fn drain(&self) {
        if let Some(outlet) = &self.0 {
            outlet.drain();
        }
    }
}

/// A pid file: locked as long as the program runs, removed at its end.
pub struct PidFile {
    path: PathBuf,
    locked: File,
}

impl PidFile {
    /// Creates and locks it. The messages are qemu-storage-daemon's.
    pub fn create(path: &Path) -> Result<PidFile, String> {
        let failed = PidFile::failed;
        let shown = path.display();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|e| failed(format!("Could not create '{shown}': {}", Errno::from(e))))?;
        // SAFETY: the structure is plain data, and the descriptor is open.
        let locked = unsafe {
            let mut lock = std::mem::zeroed::<libc::flock>();
            lock.l_type = libc::F_WRLCK as libc::c_short;
            lock.l_whence = libc::SEEK_SET as libc::c_short;
            libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &lock)
        };
        if locked != 0 {
            let errno = Errno::last();
            return Err(failed(format!("Cannot lock pid file: {errno}")));
        }
        // A pid that a dead process has left there is removed.
        file.set_len(0).map_err(|e| PidFile::failed_to_write(e.into()))?;
        // Its place must still be known after a change of directory.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        Ok(PidFile { path, locked: file })
    }

    /// Writes it, when everything is ready.
    pub fn write(&mut self) -> Result<(), String> {
        writeln!(self.locked, "{}", std::process::id())
            .map_err(|e| PidFile::failed_to_write(e.into()))
    }

    fn failed_to_write(errno: Errno) -> String {
        PidFile::failed(format!("Failed to write pid file: {errno}"))
    }

    fn failed(what: String) -> String {
        format!("cannot create PID file: {what}")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The background process's promise to tell its parent that it is ready.
pub struct Background {
    parent: OwnedFd,
    /// The replacements for standard input, output and error.
    nothing: [OwnedFd; 3],
}

impl Background {
    /// Forks. The parent waits until the child is ready and exits: with success, or, if the child
    /// ended before, with failure; so this returns in the child alone. To be called before there is
    /// another thread.
    pub fn enter() -> Result<Background, String> {
        // Now, for it may not be allowed later.
        let failed = |e: std::io::Error| format!("cannot daemonize: {}", Errno::from(e));
        let nothing = nothing().map_err(failed)?;
        let (mut receiver, sender) = std::io::pipe().map_err(failed)?;
        // SAFETY: there is one thread, so the child may do anything.
        match unsafe { libc::fork() } {
            -1 => Err(format!("cannot daemonize: {}", Errno::last())),
            0 => {
                // SAFETY: takes no arguments; a fresh child leads no group, so it cannot fail.
                unsafe { libc::setsid() };
                Ok(Background { parent: sender.into(), nothing })
            }
            _ => {
                drop(sender);
                let ready = receiver.read_exact(&mut [0]).is_ok();
                // The child has the error line, if there is one.
                std::process::exit(i32::from(!ready));
            }
        }
    }

    /// Detaches from the terminal and the directory, and lets the parent exit.
    pub fn ready(self) -> Result<(), String> {
        let failed = |e: std::io::Error| format!("cannot daemonize: {e}");
        std::env::set_current_dir("/").map_err(failed)?;
        // Earlier lines belong to the old standard error.
        log::drain();
        for (fd, nothing) in (0..).zip(&self.nothing) {
            // SAFETY: both descriptors are open, and the standard ones are nobody's property.
            if unsafe { libc::dup2(nothing.as_raw_fd(), fd) } < 0 {
                return Err(failed(std::io::Error::last_os_error()));
            }
        }
        File::from(self.parent).write_all(&[1]).map_err(failed)
    }
}

/// Descriptors in place of the standard ones: /dev/null, or where that is missing (in a jail, say) the
/// ends of pipes that nobody has the other ends of. What is written to those fails, and is lost too.
fn nothing() -> std::io::Result<[OwnedFd; 3]> {
    match File::options().read(true).write(true).open("/dev/null") {
        Ok(null) => Ok([null.try_clone()?.into(), null.try_clone()?.into(), null.into()]),
        Err(_) => {
            let ((input, _), (_, output)) = (std::io::pipe()?, std::io::pipe()?);
            Ok([input.into(), output.try_clone()?.into(), output.into()])
        }
    }
}
