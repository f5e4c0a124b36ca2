//! The `vhost` crate's end of a connection, extended to answer every message that needs a reply.
//!
//! The crate acknowledges messages (REPLY_ACK) only after it has answered GET_FEATURES, which no front end has to
//! send: one that knows the features from before would wait forever. So the crate is asked once, over a connection
//! that takes the place of the front end's until then.

use super::session::Session;
use crate::io::Errno;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vhost::vhost_user::BackendReqHandler;

/// Reads the messages of one connection.
pub type Handler = BackendReqHandler<Mutex<Session>>;

/// VHOST_USER_GET_FEATURES, protocol version 1, nothing follows.
const GET_FEATURES: [u32; 3] = [1, 1, 0];

/// What reads the messages that come over `stream`.
///
/// # Errors
/// There are no descriptors left.
pub fn new(stream: UnixStream, session: Arc<Mutex<Session>>) -> io::Result<Handler> {
    let (stand_in, mut asking) = UnixStream::pair()?;
    let mut handler = BackendReqHandler::from_stream(stand_in, session);
    asking.write_all(&GET_FEATURES.map(u32::to_ne_bytes).concat())?;
    handler.handle_request().map_err(io::Error::other)?;
    // SAFETY: names no memory. The handler owns the number, which stays open, and nobody else has it.
    if unsafe { libc::dup3(stream.as_raw_fd(), handler.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
        return Err(Errno::last().into());
    }
    Ok(handler)
}
