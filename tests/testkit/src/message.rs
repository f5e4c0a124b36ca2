//! Hand-made vhost-user messages, which a well-behaved front end never sends.
//!
//! A message is a header of three little-endian words (request, flags, payload size), the payload,
//! and file descriptors beside the first byte.

use std::io::Read;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::{Error, Result};

/// Flag bits of the header. The low two bits hold the version, 1.
pub const VERSION: u32 = 1;
pub const REPLY: u32 = 1 << 2;
pub const NEED_REPLY: u32 = 1 << 3;

/// An answer: request number, flags, payload.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
}

impl Answer {
    /// The payload as the number it is in most answers, acknowledgements included (0 is success).
    pub fn value(&self) -> Option<u64> {
        Some(u64::from_le_bytes(self.payload.as_slice().try_into().ok()?))
    }
}

/// Sends one message with any header, right or wrong. `size` is the payload's unless given.
pub fn send(
    stream: &UnixStream,
    request: u32,
    flags: u32,
    size: Option<u32>,
    payload: &[u8],
    fds: &[RawFd],
) -> Result<()> {
    let size = size.unwrap_or(payload.len() as u32);
    let mut bytes = Vec::with_capacity(12 + payload.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    let sent = stream
        .send_with_fds(&[&bytes[..]], fds)
        .map_err(|e| Error::Io("sendmsg".into(), e.into()))?;
    if sent != bytes.len() {
        return Err(Error::Peer(format!("took {sent} of {} bytes of a message", bytes.len())));
    }
    Ok(())
}

/// Receives one answer; `Ok(None)` when the server closed the connection instead.
pub fn receive(stream: &UnixStream, limit: Duration) -> Result<Option<Answer>> {
    stream.set_read_timeout(Some(limit)).map_err(Error::io("socket timeout"))?;
    let mut header = [0u8; 12];
    if !read_or_end(stream, &mut header, limit)? {
        return Ok(None);
    }
    let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| header[4 * i + b]));
    let mut payload = vec![0; (word(2) as usize).min(1 << 16)];
    if !read_or_end(stream, &mut payload, limit)? {
        return Err(Error::Peer("closed in the middle of an answer".into()));
    }
    Ok(Some(Answer { request: word(0), flags: word(1), payload }))
}

/// Fills `out`; false when the connection ended first.
fn read_or_end(mut stream: &UnixStream, out: &mut [u8], limit: Duration) -> Result<bool> {
    use std::io::ErrorKind as Kind;
    match stream.read_exact(out) {
        Ok(()) => Ok(true),
        Err(e) => match e.kind() {
            Kind::UnexpectedEof | Kind::ConnectionReset => Ok(false),
            Kind::WouldBlock | Kind::TimedOut => {
                Err(Error::Timeout("answer to a message".into(), limit))
            }
            _ => Err(Error::Io("read from the socket".into(), e)),
        },
    }
}
