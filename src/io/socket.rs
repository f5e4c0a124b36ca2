//! Stream sockets on a worker: connecting, sending, receiving, waiting for events; each with a deadline.
//!
//! A send or receive may move a part, and says how much. What is in flight when its future is dropped is cancelled,
//! and its memory is kept until the kernel has released it.
//!
//! Connecting does not go through the ring. A ring's operations are not seen by a system call filter, so a ring that
//! could connect would do so for an attacker that takes the process over. connect(2) is up to the sandbox
//! ([`crate::io::uring`]).

use super::op::Op;
use super::sim::socket as simulated;
use super::{Deadline, Errno, IoResult, IoVec, current, sleep};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

/// How soon a connection is tried again that a full queue of the other side has turned away.
const RETRY: Duration = Duration::from_millis(10);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A path, or a name in the abstract namespace, which begins with a zero byte.
    Unix(PathBuf),
    Tcp(SocketAddr),
    Vsock {
        cid: u32,
        port: u32,
    },
    /// In a simulation: a [`simulated::Listener`] of this number.
    Simulated(u64),
}

/// A connected stream socket.
pub struct Socket(Descriptor);

enum Descriptor {
    Real(OwnedFd),
    Simulated(simulated::End),
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match &self.0 {
            Descriptor::Real(fd) => fd.as_raw_fd(),
            Descriptor::Simulated(end) => end.as_raw_fd(),
        }
    }
}

impl From<simulated::End> for Socket {
    fn from(end: simulated::End) -> Socket {
        Socket(Descriptor::Simulated(end))
    }
}

impl TryFrom<OwnedFd> for Socket {
    type Error = Errno;

    /// Takes a socket that is connected. The worker waits for it, so that the socket itself has to wait as
    /// well: what would return EAGAIN at once would be asked for over and over.
    fn try_from(fd: OwnedFd) -> IoResult<Socket> {
        set_nonblocking(fd.as_raw_fd(), false)?;
        Ok(Socket(Descriptor::Real(fd)))
    }
}

impl Socket {
    /// Connects to a server.
    ///
    /// # Errors
    /// ETIMEDOUT: not before the deadline.
    pub async fn connect(address: &Address, deadline: Deadline) -> IoResult<Socket> {
        let (family, name) = match address {
            Address::Unix(path) => (libc::AF_UNIX, unix_name(path.as_os_str().as_bytes())?),
            Address::Tcp(address @ SocketAddr::V4(_)) => (libc::AF_INET, tcp_name(address)),
            Address::Tcp(address) => (libc::AF_INET6, tcp_name(address)),
            Address::Vsock { cid, port } => (libc::AF_VSOCK, vsock_name(*cid, *port)),
            Address::Simulated(number) => {
                let socket = Socket::from(simulated::connect(*number)?);
                socket.poll(libc::POLLOUT as u32, deadline).await?;
                return Ok(socket);
            }
        };
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the call names no memory; the descriptor is new and owned by nobody else.
        let fd = match unsafe { libc::socket(family, kind, 0) } {
            -1 => return Err(Errno::last()),
            // SAFETY: as above.
            fd => unsafe { OwnedFd::from_raw_fd(fd) },
        };
        let socket = Socket(Descriptor::Real(fd));
        let fd = socket.as_raw_fd();
        loop {
            // SAFETY: the name lives through the call, with the length that is given.
            let result = unsafe { libc::connect(fd, (&raw const name.0).cast(), name.1) };
            match if result == 0 { Errno(0) } else { Errno::last() } {
                Errno(0 | libc::EISCONN) => break,
                Errno(libc::EINPROGRESS | libc::EINTR | libc::EALREADY) => {
                    socket.poll(libc::POLLOUT as u32, deadline).await?;
                    take_error(fd)?;
                    break;
                }
                // The queue of a Unix socket is full, and nothing tells when it has room.
                Errno(libc::EAGAIN) if !deadline.has_passed() => sleep(RETRY).await,
                Errno(libc::EAGAIN) => return Err(Errno(libc::ETIMEDOUT)),
                errno => return Err(errno),
            }
        }
        set_nonblocking(fd, false)?;
        if matches!(address, Address::Tcp(_)) {
            // What is sent is whole messages: waiting for more of them only costs time.
            set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY)?;
        }
        Ok(socket)
    }

    /// Has the kernel find out when the other side of a connection has gone silently.
    pub fn keep_alive(&self) -> IoResult {
        set_option(self.as_raw_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE)
    }

    /// Sends a part of `from` that is not empty, and tells its length in bytes.
    pub async fn send(&self, from: &IoVec<'_>, deadline: Deadline) -> IoResult<u32> {
        let held = from.hold_to_send()?;
        let op = Op::Send { segments: held.list().into() };
        // SAFETY: `held` keeps the list and its memory.
        unsafe { current().run(self.as_raw_fd(), op, deadline) }.await
    }

    /// Receives what is there, at most as much as `into` has room for, and waits until there is something.
    /// Tells the length in bytes: zero at the end of what the other side sends.
    pub async fn receive(&self, into: &IoVec<'_>, deadline: Deadline) -> IoResult<u32> {
        let held = into.hold_to_fill()?;
        let op = Op::Receive { segments: held.list().into() };
        // SAFETY: as for `send`.
        let received = unsafe { current().run(self.as_raw_fd(), op, deadline) }.await?;
        held.filled(received.into());
        Ok(received)
    }

    /// Waits until one of these events (poll(2)) is there, and tells which are.
    pub async fn poll(&self, events: u32, deadline: Deadline) -> IoResult<u32> {
        poll(self.as_raw_fd(), events, deadline).await
    }

    /// Has what is sent go out at once, and the kernel find out in time when the other side is not there any more, if
    /// the socket is one of a network.
    pub fn send_at_once(&self) {
        let Descriptor::Real(fd) = &self.0 else { return };
        let on: libc::c_int = 1;
        let options =
            [(libc::IPPROTO_TCP, libc::TCP_NODELAY), (libc::SOL_SOCKET, libc::SO_KEEPALIVE)];
        for (level, option) in options {
            let len = size_of::<libc::c_int>() as libc::socklen_t;
            // SAFETY: the call reads one number of the length that is given. It fails on other sockets.
            unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const on).cast(), len) };
        }
    }

    /// Ends both directions: whatever waits on the socket is notified of it.
    pub fn shut_down(&self) {
        match &self.0 {
            Descriptor::Real(fd) => {
                // SAFETY: the call names no memory. It fails where the other side has gone before.
                unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
            }
            Descriptor::Simulated(end) => end.shut_down(),
        }
    }
}

/// Waits until a descriptor has one of these events (poll(2)), and tells which it has.
pub async fn poll(fd: RawFd, events: u32, deadline: Deadline) -> IoResult<u32> {
    // SAFETY: names no memory.
    unsafe { current().run(fd, Op::Poll { events, many: false }, deadline) }.await
}

/// An address as the kernel takes it, with its length.
struct Name(libc::sockaddr_storage, libc::socklen_t);

impl Name {
    fn new<T>(fill: impl FnOnce(&mut T)) -> Name {
        const { assert!(size_of::<T>() <= size_of::<libc::sockaddr_storage>()) };
        // SAFETY: all zeroes is a valid value, and the kernel's addresses all fit and are plain numbers.
        unsafe {
            let mut storage: libc::sockaddr_storage = std::mem::zeroed();
            fill(&mut *(&raw mut storage).cast::<T>());
            Name(storage, size_of::<T>() as libc::socklen_t)
        }
    }
}

fn unix_name(path: &[u8]) -> IoResult<Name> {
    let is_abstract = path.first() == Some(&0);
    let mut fits = false;
    let mut name = Name::new(|name: &mut libc::sockaddr_un| {
        name.sun_family = libc::AF_UNIX as libc::sa_family_t;
        // The last byte ends a path; other names end with their length.
        fits = path.len() < name.sun_path.len() + usize::from(is_abstract);
        for (to, from) in name.sun_path.iter_mut().zip(path) {
            *to = *from as libc::c_char;
        }
    });
    if is_abstract {
        let begin = std::mem::offset_of!(libc::sockaddr_un, sun_path);
        name.1 = (begin + path.len()) as libc::socklen_t;
    }
    if fits { Ok(name) } else { Err(Errno(libc::ENAMETOOLONG)) }
}

fn vsock_name(cid: u32, port: u32) -> Name {
    Name::new(|name: &mut libc::sockaddr_vm| {
        name.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        name.svm_cid = cid;
        name.svm_port = port;
    })
}

fn tcp_name(address: &SocketAddr) -> Name {
    match address {
        SocketAddr::V4(address) => Name::new(|name: &mut libc::sockaddr_in| {
            name.sin_family = libc::AF_INET as libc::sa_family_t;
            name.sin_port = address.port().to_be();
            name.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
        }),
        SocketAddr::V6(address) => Name::new(|name: &mut libc::sockaddr_in6| {
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = address.port().to_be();
            name.sin6_flowinfo = address.flowinfo();
            name.sin6_addr.s6_addr = address.ip().octets();
            name.sin6_scope_id = address.scope_id();
        }),
    }
}

/// What connecting came to.
fn take_error(fd: RawFd) -> IoResult {
    let (mut error, mut len) = (0, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the call writes one number of the length that is given.
    let result = unsafe {
        let at = (&raw mut error).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, at, &raw mut len)
    };
    match (result, error) {
        (0, 0) => Ok(()),
        (0, errno) => Err(Errno(errno)),
        _ => Err(Errno::last()),
    }
}

/// Switches an option of a socket on.
fn set_option(fd: RawFd, level: libc::c_int, option: libc::c_int) -> IoResult {
    let on: libc::c_int = 1;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the call reads one number of the length that is given.
    match unsafe { libc::setsockopt(fd, level, option, (&raw const on).cast(), len) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

fn set_nonblocking(fd: RawFd, on: bool) -> IoResult {
    let mut on = libc::c_int::from(on);
    // SAFETY: the request reads one number.
    match unsafe { libc::ioctl(fd, libc::FIONBIO, &raw mut on) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

#[cfg(test)]
mod tests;
