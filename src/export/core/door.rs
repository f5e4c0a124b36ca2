//! Where front ends come from: they connect to a socket of ours, or we to one of theirs.

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

/// How often it is looked whether there are descriptors again.
const SHORT_RETRY: Duration = Duration::from_millis(100);

/// A place where one front end after the other is met.
pub struct Door {
    /// Goes before the listener does.
    _own_file: Option<SocketFile>,
    way: Way,
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
                let (listener, file) = socket::listen(&path, mode, owner)?;
                own_file = Some(file);
                Way::Listen(listener)
            }
            Address::Listening(fd) => Way::Listen(UnixListener::from(fd)),
            Address::Connected(fd) => Way::Once(Some(UnixStream::from(fd))),
            Address::Connect(path) => {
                socket::check_path(&path)?;
                Way::Connect(path)
            }
        };
        Ok(Door { _own_file: own_file, way })
    }

    /// The next front end, waited for until `stop` is readable, and the `count` descriptors that are set aside
    /// for it. None then, and when no more come.
    pub fn next(&mut self, name: &str, count: usize, stop: RawFd) -> Option<(UnixStream, Reserve)> {
        match &mut self.way {
            Way::Once(stream) => Some((stream.take()?, Reserve::take(count).unwrap_or_default())),
            Way::Listen(listener) => accept(listener, name, count, stop),
            Way::Connect(path) => connect(path, name, count, stop),
        }
    }

    /// The socket of ours that front ends come to.
    pub fn listener(&self) -> Option<RawFd> {
        match &self.way {
            Way::Listen(listener) => Some(listener.as_raw_fd()),
            _ => None,
        }
    }
}

/// Sets descriptors aside for a front end, which is kept waiting until so many are left: one that is let in
/// and then cut off in the middle loses its disk. None once `stop` is readable.
fn set_aside(count: usize, name: &str, stop: RawFd) -> Option<Reserve> {
    let mut told = false;
    loop {
        if let Some(reserve) = Reserve::take(count) {
            return Some(reserve);
        }
        if !told {
            told = true;
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
    let mut told = None;
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
                if told.replace(error.kind()) != Some(error.kind()) {
                    log::error!(export = name; "accept: {}", descriptors::explain(&error));
                }
                // The listener stays readable, and its front end is not to be waited for in a loop.
                if wait_readable(&[stop], Some(SHORT_RETRY)).is_some() {
                    return None;
                }
            }
        }
    }
}

fn connect(path: &Path, name: &str, count: usize, stop: RawFd) -> Option<(UnixStream, Reserve)> {
    let (mut wait, longest) = RETRY;
    let mut told = None;
    loop {
        // A front end that hangs up at once is met again at the same pace as one that is not there.
        if wait_readable(&[stop], Some(wait)).is_some() {
            return None;
        }
        let reserve = set_aside(count, name, stop)?;
        let error = match socket::try_connect(path) {
            Ok(stream) => return Some((stream, reserve)),
            Err(error) => error,
        };
        if told != Some(error.kind()) {
            let (path, why) = (path.display(), descriptors::explain(&error));
            log::warn!(export = name; "no front end at '{path}': {why}: trying on");
            told = Some(error.kind());
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
