//! Sending: the requests of a turn go out together, headers from here and data from where they lie.

use super::requests::{Requests, Stage};
use crate::io::Segments;
use crate::io::iovec::iovec;
use crate::nbd::Headers;
use crate::nbd::request::{CMD_WRITE, EXTENDED_LEN, Request};
use crate::nbd::{CommandFlags, request};
use std::collections::VecDeque;

/// Requests that are sent at once.
const REQUESTS: usize = 64;
/// Segments that the kernel takes at once (UIO_MAXIOV).
const SEGMENTS: usize = 1024;
/// Segments that one request may have: a request is sent whole.
pub const MOST_SEGMENTS: u32 = 512;

/// What is being sent.
pub struct Sender {
    headers: Box<[[u8; EXTENDED_LEN]; REQUESTS]>,
    list: Vec<libc::iovec>,
    /// The first segment of which anything is left.
    first: usize,
    /// Bytes that are left.
    left: u64,
    /// The requests.
    slots: Vec<u32>,
    /// The memory of one of them is gone: nothing more of this may be sent.
    pub is_broken: bool,
}

impl Default for Sender {
    fn default() -> Sender {
        Sender {
            headers: Box::new([[0; EXTENDED_LEN]; REQUESTS]),
            list: Vec::with_capacity(SEGMENTS),
            first: 0,
            left: 0,
            slots: Vec::with_capacity(REQUESTS),
            is_broken: false,
        }
    }
}

impl Sender {
    /// Takes requests off the queue. What is left of those before is sent first.
    pub fn fill(&mut self, requests: &mut Requests, queue: &mut VecDeque<u32>, headers: Headers) {
        if self.left > 0 {
            return;
        }
        self.clear();
        while let Some(&index) = queue.front() {
            let cookie = requests.cookie(index);
            let slot = requests.get(index);
            let ask = slot.ask;
            let data = match ask.command {
                CMD_WRITE => ask.memory.as_ref().map_or(&[][..], |memory| memory.list()),
                _ => &[],
            };
            if self.slots.len() == REQUESTS || self.list.len() + 1 + data.len() > SEGMENTS {
                break;
            }
            queue.pop_front();
            slot.stage = Stage::Sending;
            let mut flags = ask.flags;
            flags.set(CommandFlags::PAYLOAD_LEN, {
                headers == Headers::Extended && ask.command == request::CMD_WRITE
            });
            let (command, offset, length) = (ask.command, ask.offset, ask.len);
            let request = Request { flags, command, cookie, offset, length };
            let header = &mut self.headers[self.slots.len()];
            match headers {
                Headers::Extended => *header = request.encode_extended(),
                _ => {
                    header[..request::COMPACT_LEN].copy_from_slice(&request.encode_compact());
                }
            }
            let len = headers.request_len();
            self.list.push(iovec(header.as_mut_ptr(), len));
            self.list.extend(data);
            self.left += len as u64 + if data.is_empty() { 0 } else { ask.len };
            self.slots.push(index);
        }
    }

    /// What is to be sent; none if nothing is.
    pub fn segments(&self) -> Option<Segments> {
        (self.left > 0).then(|| Segments::new(&self.list[self.first..], self.left))
    }

    /// So many bytes of it have been sent. True if that was all.
    pub fn sent(&mut self, mut bytes: u64) -> bool {
        self.left -= bytes;
        while let Some(segment) = self.list.get_mut(self.first) {
            let part = bytes.min(segment.iov_len as u64);
            segment.iov_base = segment.iov_base.wrapping_byte_add(part as usize);
            segment.iov_len -= part as usize;
            bytes -= part;
            if segment.iov_len > 0 {
                break;
            }
            self.first += 1;
        }
        self.left == 0
    }

    /// One of the requests whose data were sent, until there is none.
    pub fn next_sent(&mut self) -> Option<u32> {
        self.slots.pop()
    }

    pub fn clear(&mut self) {
        self.list.clear();
        self.slots.clear();
        (self.first, self.left, self.is_broken) = (0, 0, false);
    }
}
