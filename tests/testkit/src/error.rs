//! The errors of the driver's side, in one line each.

use std::fmt;
use std::io;
use std::time::Duration;

/// A failure of the conversation, the ring, or a request.
#[derive(Debug)]
pub enum Error {
    /// A vhost-user message failed: refused, answered wrongly, timed out, or the peer went away.
    Message(&'static str, vhost::Error),
    /// A system call failed: what was tried, and the error.
    Io(String, io::Error),
    /// Nothing came within the time given: what was awaited.
    Timeout(String, Duration),
    /// The ring has too few free descriptors: wanted and free.
    RingFull(usize, usize),
    /// The device wrote something into the used ring that no driver can accept.
    BadUsed(String),
    /// Shared memory has no free range of this many bytes.
    NoMemory(u64),
    /// The device completed the request with this status (see [`crate::spec::status`]).
    Status(u8),
    /// The server lacks something the caller insists on, or answered nonsense.
    Peer(String),
}

/// Result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Message(what, e) => write!(f, "{what}: {e}"),
            Error::Io(what, e) => write!(f, "{what}: {e}"),
            Error::Timeout(what, limit) => write!(f, "{what}: nothing within {limit:?}"),
            Error::RingFull(want, free) => {
                write!(f, "ring: {want} descriptors wanted, {free} are free")
            }
            Error::BadUsed(what) => write!(f, "used ring: {what}"),
            Error::NoMemory(len) => write!(f, "shared memory: no free range of {len} bytes"),
            Error::Status(1) => write!(f, "request: status 1 (IOERR), 0 (OK) wanted"),
            Error::Status(2) => write!(f, "request: status 2 (UNSUPP), 0 (OK) wanted"),
            Error::Status(s) => write!(f, "request: status {s}, 0 (OK) wanted"),
            Error::Peer(what) => write!(f, "server: {what}"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// For `map_err`: names the system call that failed.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |e| Error::Io(what, e)
    }

    /// For `map_err` on libc-style calls: takes `errno`.
    pub(crate) fn last_os(what: impl Into<String>) -> Error {
        Error::Io(what.into(), io::Error::last_os_error())
    }
}
