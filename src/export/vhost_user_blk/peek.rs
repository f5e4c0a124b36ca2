//! Peeking at the next message before the `vhost` crate reads it.
//!
//! The crate does not report two things: it keeps the socket for notices to itself, and where the process has no room
//! for a descriptor it finds the message invalid.

use crate::io::descriptors;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use vhost::vhost_user::Error as VhostError;
use vhost::vhost_user::message::FrontendReq;

/// Bytes of a message's header: request, flags, and length of what follows.
pub const HEADER_LEN: usize = 12;

/// Descriptors at most of one message, as the `vhost` crate has it.
const MOST_FILES: usize = 32;

/// The requests that bring descriptors.
const WITH_FILES: [FrontendReq; 9] = [
    FrontendReq::SET_MEM_TABLE,
    FrontendReq::SET_LOG_BASE,
    FrontendReq::SET_LOG_FD,
    FrontendReq::SET_VRING_KICK,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_ERR,
    FrontendReq::SET_BACKEND_REQ_FD,
    FrontendReq::SET_INFLIGHT_FD,
    FrontendReq::ADD_MEM_REG,
];

/// What was seen of a message.
#[derive(Default)]
pub struct Next {
    /// Descriptors that it brings, as far as there was room for them.
    count: usize,
    /// There was no room for all of them.
    is_short: bool,
    /// The socket for notices, if the message brings it: a descriptor of our own.
    pub channel: Option<OwnedFd>,
}

impl Next {
    /// Looks at the message, if all of its header is there.
    pub fn peek(stream: RawFd) -> Next {
        let mut header = [0u32; HEADER_LEN / 4];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: at most `HEADER_LEN` bytes are written to the array, which has as many. Descriptors
        // are not asked for, so none is made.
        let seen = unsafe { libc::recv(stream, header.as_mut_ptr().cast(), HEADER_LEN, flags) };
        let is_one = |request: &FrontendReq| *request as u32 == header[0];
        let Some(request) = WITH_FILES.iter().find(|request| is_one(request)) else {
            return Next::default();
        };
        if seen != HEADER_LEN as isize {
            return Next::default();
        }
        let (mut files, is_cut) = copies(stream);
        let count = files.len();
        // While the copies are there, so that it is known whether there was room for one more.
        let is_short = is_cut && count < MOST_FILES && !descriptors::are_left(1);
        let is_channel = *request == FrontendReq::SET_BACKEND_REQ_FD && count == 1;
        Next { count, is_short, channel: if is_channel { files.pop() } else { None } }
    }

    /// Fails if the message cannot be taken whole.
    pub fn check(&self) -> Result<(), VhostError> {
        if self.is_short { Err(no_room()) } else { Ok(()) }
    }

    /// What was wrong when the message was read. Others may have taken the room that there was.
    pub fn explain(&self, error: VhostError) -> VhostError {
        let is_refused =
            !matches!(error, VhostError::ReqHandlerError(_) | VhostError::Disconnected);
        if is_refused && self.count > 0 && !descriptors::are_left(self.count) {
            return no_room();
        }
        error
    }
}

fn no_room() -> VhostError {
    let limit = descriptors::name_limit();
    let text = format!("no descriptor is left for one that a message brings ({limit})");
    VhostError::ReqHandlerError(std::io::Error::other(text))
}

/// Copies of the descriptors that come with the next message, which the kernel makes with each look, and
/// whether there are more.
fn copies(stream: RawFd) -> (Vec<OwnedFd>, bool) {
    let mut header = [0u32; HEADER_LEN / 4];
    // Aligned as control messages are.
    let mut control = [0u64; 20];
    let mut part = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_LEN };
    // SAFETY: all zeroes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // CMSG_SPACE would leave room for more than are expected where it rounds up.
    // SAFETY: computes a number.
    let room = unsafe { libc::CMSG_LEN((MOST_FILES * size_of::<RawFd>()) as u32) } as usize;
    assert!(room <= size_of_val(&control));
    message.msg_controllen = room as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the parts of the message are locals with the lengths given.
    if unsafe { libc::recvmsg(stream, &mut message, flags) } < 0 {
        return (Vec::new(), false);
    }
    let is_cut = message.msg_flags & libc::MSG_CTRUNC != 0;
    // SAFETY: the kernel has filled in the message.
    let first = unsafe { libc::CMSG_FIRSTHDR(&message) };
    if first.is_null() {
        return (Vec::new(), is_cut);
    }
    // SAFETY: not null, so it is in `control`, and the kernel has written as much as its length says.
    unsafe {
        if (*first).cmsg_level != libc::SOL_SOCKET || (*first).cmsg_type != libc::SCM_RIGHTS {
            return (Vec::new(), is_cut);
        }
        let bytes = ((*first).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
        let data = libc::CMSG_DATA(first).cast::<RawFd>();
        let fds = (0..bytes / size_of::<RawFd>()).map(|at| data.add(at).read_unaligned());
        (fds.map(|fd| OwnedFd::from_raw_fd(fd)).collect(), is_cut)
    }
}
