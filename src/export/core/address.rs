//! Addresses of exports: a socket to create, an inherited one, or one to connect to.

use crate::block::Error;
use crate::options;
use serde::Deserialize;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

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

impl Address {
    /// Reads a `SocketAddress` that can be listened on here.
    ///
    /// # Errors
    /// It is of another kind, or names a descriptor that is no listening socket.
    pub fn read(addr: options::Value) -> Result<Address, Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Unix {
            path: std::path::PathBuf,
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fd {
            str: String,
        }
        let at = |error: options::Error| Error::from(error.under("addr"));
        let options::Value::Map(mut map) = addr else {
            return Err(Error::new("Invalid parameter type for 'addr', expected: object"));
        };
        match &*map.take_required_str("type").map_err(at)? {
            "unix" => {
                let Unix { path } = options::from_map(map).map_err(at)?;
                Ok(Address::Path { path, mode: None, owner: None })
            }
            "fd" => {
                let Fd { str } = options::from_map(map).map_err(at)?;
                let fd = str
                    .parse()
                    .map_err(|_| Error::new(format!("Unable to parse FD number {str}")))?;
                // SAFETY: the program's caller gives this descriptor to us.
                Ok(Address::Listening(unsafe { listening_fd(fd) }?))
            }
            "inet" | "vsock" => {
                Err(Error::new("Only socket address types 'unix' and 'fd' are supported"))
            }
            other => Err(Error::new(format!("Parameter 'type' does not accept value '{other}'"))),
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
