//! Accepts front ends on a listening socket, or connects to theirs.

use super::address::Address;
use super::socket::{self, SocketFile};
use crate::block::Error;
use crate::io::Errno;
use crate::io::descriptors::{self, Reserve};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The first wait for a front end that does not listen, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The interval between checks for free descriptors.
const SHORT_RETRY: Duration = Duration::from_millis(100);

/// A source of front ends, which come one after another.
pub struct Listener {
    /// Removed before the listening socket closes.
    _own_file: Option<SocketFile>,
    kind: Kind,
}

enum Kind {
    Listen(UnixListener),
    Once(Option<UnixStream>),
    Connect(PathBuf),
}

impl Listener {
    /// Creates the listening socket where there is one. Accepts no front end yet.
    pub fn new(address: Address) -> Result<Listener, Error> {
        let mut own_file = None;
        let kind = match address {
            Address::Path { path, mode, owner } => {
                let (listener, file) = socket::listen(&path, mode, owner)?;
                own_file = Some(file);
                Kind::Listen(listener)
            }
            Address::Listening(fd) => Kind::Listen(UnixListener::from(fd)),
            Address::Connected(fd) => Kind::Once(Some(UnixStream::from(fd))),
            Address::Connect(path) => {
                socket::check_path(&path)?;
                Kind::Connect(path)
            }
        };
        Ok(Listener { _own_file: own_file, kind })
    }

    /// Waits for the next front end, and reserves `count` descriptors for it. Returns None once `stop` is readable, or
    /// when no more front ends can come.
    pub fn next(&mut self, name: &str, count: usize, stop: RawFd) -> Option<(UnixStream, Reserve)> {
        match &mut self.kind {
            Kind::Once(stream) => Some((stream.take()?, Reserve::take(count).unwrap_or_default())),
            Kind::Listen(listener) => accept(listener, name, count, stop),
            Kind::Connect(path) => connect(path, name, count, stop),
        }
    }

    /// The listening socket, if there is one.
    pub fn socket(&self) -> Option<RawFd> {
        match &self.kind {
            Kind::Listen(listener) => Some(listener.as_raw_fd()),
            _ => None,
        }
    }
}

/// Reserves descriptors for a front end, and makes it wait until enough are free: a front end that runs out of them
/// later loses its disk. Returns None once `stop` is readable.
fn set_aside(count: usize, name: &str, stop: RawFd) -> Option<Reserve> {
    let mut reported = false;
    loop {
        if let Some(reserve) = Reserve::take(count) {
            return Some(reserve);
        }
        if !reported {
            reported = true;
            let limit = descriptors::name_limit();
            log::error!(
                export = name;
                "a front end waits: the {count} descriptors that it may need are not left ({limit})"
            );
        }
        if wait_readable(&[stop], Some(SHORT_RETRY)).is_some() {
            return None;
        }
    }
}

fn accept(
    listener: &UnixListener,
    name: &str,
    count: usize,
    stop: RawFd,
) -> Option<(UnixStream, Reserve)> {
    let mut reported = None;
    // Waiting and accepting are two steps, and the caller may have gone in between.
    let _ = listener.set_nonblocking(true);
    loop {
        if wait_readable(&[stop, listener.as_raw_fd()], None) != Some(1) {
            return None;
        }
        let reserve = set_aside(count, name, stop)?;
        match listener.accept() {
            Ok((stream, _)) => return Some((stream, reserve)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                if reported.replace(error.kind()) != Some(error.kind()) {
                    log::error!(export = name; "accept: {}", descriptors::explain(&error));
                }
                // The socket stays readable: pause, or this loop spins.
                if wait_readable(&[stop], Some(SHORT_RETRY)).is_some() {
                    return None;
                }
            }
        }
    }
}

fn connect(path: &Path, name: &str, count: usize, stop: RawFd) -> Option<(UnixStream, Reserve)> {
    let (mut wait, longest) = RETRY;
    let mut reported = None;
    loop {
        // The pause also limits how often a front end that hangs up at once is tried.
        if wait_readable(&[stop], Some(wait)).is_some() {
            return None;
        }
        let reserve = set_aside(count, name, stop)?;
        let error = match socket::try_connect(path) {
            Ok(stream) => return Some((stream, reserve)),
            Err(error) => error,
        };
        if reported != Some(error.kind()) {
            let (path, why) = (path.display(), descriptors::explain(&error));
            log::warn!(export = name; "no front end at '{path}': {why}: trying on");
            reported = Some(error.kind());
        }
        wait = (wait * 2).min(longest);
    }
}

/// Waits until one of the descriptors is readable, the first of which comes first: its index. None
/// if the time is over, or something is wrong.
pub fn wait_readable(fds: &[RawFd], time: Option<Duration>) -> Option<usize> {
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
