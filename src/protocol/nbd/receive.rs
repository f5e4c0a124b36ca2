//! Receiving: headers into a buffer, data to where they belong.
//!
//! One receive has room for the data that are due and for one header behind them, so that a reply costs one
//! operation. Nothing that a server says is believed: data lie inside their request and come once, and whatever
//! else does not fit ends the connection.

use super::requests::{Answer, Memory, Requests};
use crate::io::iovec::iovec;
use crate::io::{IoResult, Segments};
use crate::nbd::error::from_wire;
use crate::nbd::reply::{
    CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE,
    Chunk, DATA_PREFIX, ErrorChunk, Hole, Reply, Simple, Status,
};
use crate::nbd::request::CMD_BLOCK_STATUS;
use crate::nbd::{Headers, Malformed};

/// Holds every payload that is not data: an error's chunk with the longest message is half as long.
const BUFFER: usize = 8192;
/// Chunks of one reply that carry no data.
const MOST_CHUNKS: u32 = 4096;

/// What the server's next bytes are.
#[derive(Clone, Copy)]
enum Expect {
    Header,
    /// The payload of a chunk, or what comes before its data.
    Payload(Chunk, u32),
    /// Data of a slot's request, from byte `at` of it on.
    Data {
        index: u32,
        at: u64,
        left: u64,
        last: bool,
    },
}

pub struct Receiver {
    buffer: Box<[u8; BUFFER]>,
    /// What of it has not been looked at.
    start: usize,
    end: usize,
    expect: Expect,
    list: Vec<libc::iovec>,
    /// Bytes that the receive in flight puts into a request's memory.
    direct: u64,
}

/// What a connection has agreed on, as far as it matters here.
#[derive(Clone, Copy)]
pub struct Terms {
    pub headers: Headers,
    pub context: Option<u32>,
}

/// Told of a request that has its answer.
pub type Told<'a> = &'a mut dyn FnMut(&mut Requests, u32, IoResult<Answer>);

impl Default for Receiver {
    fn default() -> Receiver {
        Receiver {
            buffer: Box::new([0; BUFFER]),
            start: 0,
            end: 0,
            expect: Expect::Header,
            list: Vec::with_capacity(super::send::MOST_SEGMENTS as usize + 1),
            direct: 0,
        }
    }
}

impl Receiver {
    /// Forgets a connection.
    pub fn clear(&mut self) {
        (self.start, self.end, self.direct) = (0, 0, 0);
        self.expect = Expect::Header;
    }

    /// Whether no reply has begun.
    pub fn is_between_replies(&self) -> bool {
        self.start == self.end && matches!(self.expect, Expect::Header)
    }

    /// Whether the receive in flight may put data into the memory of this slot's request.
    pub fn fills(&self, index: u32) -> bool {
        self.direct > 0 && matches!(self.expect, Expect::Data { index: its, .. } if its == index)
    }

    /// Where the next bytes go.
    pub fn prepare(&mut self, requests: &mut Requests, terms: Terms) -> Segments {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.list.clear();
        self.direct = 0;
        let header = terms.headers.reply_len() + DATA_PREFIX;
        let mut room = match self.expect {
            // No data can come that would have to be copied.
            Expect::Header if requests.reads() == 0 => BUFFER - self.end,
            Expect::Header => header - self.end,
            Expect::Payload(chunk, _) => payload_len(&chunk) as usize - self.end,
            Expect::Data { .. } => header,
        };
        if let Expect::Data { index, at, left, .. } = self.expect {
            match requests.get(index).ask.memory {
                Some(memory) => {
                    parts(memory.list(), at, left, |base, len| self.list.push(iovec(base, len)));
                    self.direct = left;
                }
                // Nobody wants them any more.
                None => room = (left as usize).saturating_add(room).min(BUFFER),
            }
        }
        let free = &mut self.buffer[self.end..][..room];
        self.list.push(iovec(free.as_mut_ptr(), room));
        Segments::new(&self.list, self.direct + room as u64)
    }

    /// So many bytes have come.
    ///
    /// # Errors
    /// They are not what the protocol says.
    pub fn take(
        &mut self,
        bytes: u64,
        requests: &mut Requests,
        terms: Terms,
        told: Told<'_>,
    ) -> Result<(), Malformed> {
        let direct = bytes.min(self.direct);
        self.direct = 0;
        self.end += (bytes - direct) as usize;
        if direct > 0 {
            self.advance(direct, requests, told)?;
        }
        while self.step(requests, terms, told)? {}
        Ok(())
    }

    /// So many bytes of data are where they belong.
    fn advance(
        &mut self,
        bytes: u64,
        requests: &mut Requests,
        told: Told<'_>,
    ) -> Result<(), Malformed> {
        let Expect::Data { index, at, left, last } = self.expect else { return Ok(()) };
        if bytes < left {
            self.expect = Expect::Data { index, at: at + bytes, left: left - bytes, last };
            return Ok(());
        }
        self.expect = Expect::Header;
        if last { conclude(requests, index, told) } else { Ok(()) }
    }

    /// Takes one thing out of the buffer. False if it does not hold a whole one.
    fn step(
        &mut self,
        requests: &mut Requests,
        terms: Terms,
        told: Told<'_>,
    ) -> Result<bool, Malformed> {
        let there = &self.buffer[self.start..self.end];
        match self.expect {
            Expect::Header => {
                let Some(magic) = there.first_chunk() else { return Ok(false) };
                let len = Reply::len_by_magic(terms.headers, *magic)?;
                let Some(header) = there.get(..len) else { return Ok(false) };
                let reply = Reply::decode(terms.headers, header)?;
                self.start += len;
                match reply {
                    Reply::Simple(simple) => self.simple(simple, requests, terms, told)?,
                    Reply::Chunk(chunk) => self.chunk(chunk, requests, terms, told)?,
                }
                Ok(true)
            }
            Expect::Payload(chunk, index) => {
                let len = payload_len(&chunk) as usize;
                let Some(payload) = there.get(..len) else { return Ok(false) };
                self.start += len;
                self.expect = Expect::Header;
                let slot = requests.get(index);
                let ask = slot.ask;
                match chunk.kind {
                    CHUNK_OFFSET_DATA => {
                        let mut offset = [0; DATA_PREFIX];
                        offset.copy_from_slice(payload);
                        let left = chunk.length - DATA_PREFIX as u64;
                        let at = place(requests, index, u64::from_be_bytes(offset), left)?;
                        self.expect = Expect::Data { index, at, left, last: chunk.is_last() };
                        return Ok(true);
                    }
                    CHUNK_OFFSET_HOLE => {
                        let hole = Hole::decode(payload)?;
                        let len = u64::from(hole.length);
                        let at = place(requests, index, hole.offset, len)?;
                        if let Some(memory) = ask.memory {
                            fill(&memory, at, len);
                        }
                    }
                    CHUNK_BLOCK_STATUS | CHUNK_BLOCK_STATUS_EXT => {
                        let status = Status::decode(chunk.kind, payload)?;
                        if terms.context != Some(status.id) || slot.answer.is_some() {
                            return Err(Malformed(format!(
                                "block status of context {}, which is not awaited",
                                status.id
                            )));
                        }
                        let first =
                            status.extents.first().map(|e| (e.length.min(ask.len), e.flags));
                        slot.answer = first;
                    }
                    kind => {
                        let error = ErrorChunk::decode(kind, payload)?;
                        slot.error.get_or_insert(from_wire(error.error));
                    }
                }
                if chunk.is_last() {
                    conclude(requests, index, told)?;
                }
                Ok(true)
            }
            Expect::Data { index, at, left, .. } => {
                let len = left.min(there.len() as u64);
                if len == 0 {
                    return Ok(false);
                }
                if let Some(memory) = requests.get(index).ask.memory {
                    copy(&memory, at, &there[..len as usize]);
                }
                self.start += len as usize;
                self.advance(len, requests, told)?;
                Ok(true)
            }
        }
    }

    fn simple(
        &mut self,
        simple: Simple,
        requests: &mut Requests,
        terms: Terms,
        told: Told<'_>,
    ) -> Result<(), Malformed> {
        let index = find(requests, simple.cookie)?;
        let slot = requests.get(index);
        if simple.error != 0 {
            slot.error = Some(from_wire(simple.error));
        } else if slot.ask.is_read() {
            if terms.headers != Headers::Simple || !slot.filled.add(0, slot.ask.len) {
                return Err(Malformed("a read has a simple reply among chunks".into()));
            }
            let left = slot.ask.len;
            self.expect = Expect::Data { index, at: 0, left, last: true };
            return Ok(());
        }
        conclude(requests, index, told)
    }

    fn chunk(
        &mut self,
        chunk: Chunk,
        requests: &mut Requests,
        terms: Terms,
        told: Told<'_>,
    ) -> Result<(), Malformed> {
        let index = find(requests, chunk.cookie)?;
        let slot = requests.get(index);
        let (kind, length) = (chunk.kind, chunk.length);
        if terms.headers == Headers::Extended && chunk.offset != slot.ask.offset {
            let (offset, wanted) = (chunk.offset, slot.ask.offset);
            return Err(Malformed(format!("a chunk is of offset {offset} and not of {wanted}")));
        }
        slot.chunks += u32::from(kind != CHUNK_OFFSET_DATA && kind != CHUNK_OFFSET_HOLE);
        let is_status = match terms.headers {
            Headers::Extended => kind == CHUNK_BLOCK_STATUS_EXT,
            _ => kind == CHUNK_BLOCK_STATUS,
        };
        let data = DATA_PREFIX as u64 + 1..=DATA_PREFIX as u64 + slot.ask.len;
        let fits = match kind {
            CHUNK_NONE => {
                if length != 0 || !chunk.is_last() {
                    return Err(Malformed("an empty chunk is not the last one".into()));
                }
                return conclude(requests, index, told);
            }
            CHUNK_OFFSET_DATA => slot.ask.is_read() && data.contains(&length),
            CHUNK_OFFSET_HOLE => slot.ask.is_read() && length == Hole::LEN as u64,
            _ if is_status => {
                slot.ask.command == CMD_BLOCK_STATUS && (1..=BUFFER as u64).contains(&length)
            }
            _ => chunk.is_error() && (1..=BUFFER as u64).contains(&length),
        };
        if !fits || slot.chunks > MOST_CHUNKS {
            let command = crate::nbd::request::command_name(slot.ask.command);
            return Err(Malformed(format!(
                "a reply to {command} has a chunk of type {kind:#x} and {length} bytes"
            )));
        }
        self.expect = Expect::Payload(chunk, index);
        Ok(())
    }
}

/// Bytes of a chunk's payload that are looked at before its data.
fn payload_len(chunk: &Chunk) -> u64 {
    match chunk.kind {
        CHUNK_OFFSET_DATA => DATA_PREFIX as u64,
        _ => chunk.length,
    }
}

fn find(requests: &mut Requests, cookie: u64) -> Result<u32, Malformed> {
    let found = requests.find(cookie);
    found.ok_or_else(|| Malformed(format!("a reply has the cookie {cookie:#x} of no request")))
}

/// Where data lie in a read's memory.
fn place(requests: &mut Requests, index: u32, offset: u64, len: u64) -> Result<u64, Malformed> {
    let slot = requests.get(index);
    let at = offset.checked_sub(slot.ask.offset);
    let at = at.filter(|at| at.checked_add(len).is_some_and(|end| end <= slot.ask.len));
    match at {
        Some(at) if slot.filled.add(at, at + len) => Ok(at),
        Some(_) => Err(Malformed(format!("data at {offset} come twice, or with too many gaps"))),
        None => Err(Malformed(format!("data at {offset} lie outside their request"))),
    }
}

/// A reply has ended.
fn conclude(requests: &mut Requests, index: u32, told: Told<'_>) -> Result<(), Malformed> {
    let result = requests.get(index).outcome().map_err(|text| Malformed(text.into()))?;
    told(requests, index, result);
    Ok(())
}

/// The parts of the list that hold `len` bytes from byte `at` on.
fn parts(list: &[libc::iovec], at: u64, len: u64, mut each: impl FnMut(*mut u8, usize)) {
    let (mut skip, mut left) = (at as usize, len as usize);
    for segment in list {
        if left == 0 {
            break;
        }
        if skip >= segment.iov_len {
            skip -= segment.iov_len;
            continue;
        }
        let part = left.min(segment.iov_len - skip);
        each(segment.iov_base.cast::<u8>().wrapping_add(skip), part);
        left -= part;
        skip = 0;
    }
}

fn fill(memory: &Memory, at: u64, len: u64) {
    parts(memory.list(), at, len, |base, len| {
        // SAFETY: the request has no answer yet, so its memory is mapped and writable.
        unsafe { std::ptr::write_bytes(base, 0, len) }
    });
}

fn copy(memory: &Memory, at: u64, mut from: &[u8]) {
    parts(memory.list(), at, from.len() as u64, |base, len| {
        // SAFETY: as for `fill`; `from` has at least as many bytes left.
        unsafe { std::ptr::copy(from.as_ptr(), base, len) }
        from = &from[len..];
    });
}
