//! The system calls of the monitors' sockets.

use crate::block::Error;
use crate::export::core::listening_fd;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

/// A descriptor that is waited on, what for, and what came of it.
pub type Polled = libc::pollfd;

pub fn polled(fd: RawFd, events: libc::c_short) -> Polled {
    Polled { fd, events, revents: 0 }
}

/// Sleeps until one of the descriptors is ready, for `timeout` milliseconds at most; -1 forever. An interruption
/// counts as nothing ready.
pub fn poll(polled: &mut [Polled], timeout: i32) {
    // SAFETY: the slice lives through the call, and its length is given.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
    if ready < 0 {
        polled.iter_mut().for_each(|one| one.revents = 0);
    }
}

/// Accepts a connection from a listening socket of any family; it does not block.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the descriptor is open, and no address is asked for.
    let fd = unsafe {
        let (address, len) = (std::ptr::null_mut(), std::ptr::null_mut());
        libc::accept4(listener.as_raw_fd(), address, len, flags)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: accept4 has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over a listening socket by its number on the command line. From now on it does not block: another
/// process that shares it may have taken the client that was announced.
pub fn take_listener(fd: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: the program's caller gives this descriptor to us.
    let listener = UnixListener::from(unsafe { listening_fd(fd) }?);
    listener.set_nonblocking(true).map_err(|e| Error::os(format!("File descriptor '{fd}'"), e))?;
    Ok(listener.into())
}
