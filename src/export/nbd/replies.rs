//! Replies to requests: how they are put together, and how they are sent, many in one operation.

use crate::io::{AlignedBuf, Deadline, Errno, IoResult, IoVec, Permit, Socket};
use crate::nbd::reply::{self, Chunk, ErrorChunk, Hole, Simple, Status};
use crate::nbd::request::Request;
use crate::nbd::{ChunkFlags, Headers, cut, error};
use smallvec::SmallVec;
use std::ops::Range;

/// Data that is zero is looked for in units of this many bytes of the disk.
const UNIT: u64 = 64 << 10;

/// Segments of memory that one operation sends at most.
const MOST_SEGMENTS: usize = 512;

/// A reply that waits to be sent.
pub(super) struct Reply {
    /// Headers, one after the other, and what chunks carry besides data.
    heads: SmallVec<[u8; 64]>,
    /// Bytes of `heads`, and the data that follow them.
    pieces: SmallVec<[(usize, Range<usize>); 1]>,
    data: Option<AlignedBuf>,
    /// Of the data.
    _permit: Option<Permit>,
}

impl Headers {
    fn put_chunk(self, heads: &mut SmallVec<[u8; 64]>, chunk: &Chunk) {
        match self {
            Headers::Extended => heads.extend_from_slice(&chunk.encode_extended()),
            _ => heads.extend_from_slice(&chunk.encode_structured()),
        }
    }
}

/// The header of a chunk of the reply to a request.
fn chunk(request: &Request, kind: u16, length: u64, is_last: bool) -> Chunk {
    let flags = if is_last { ChunkFlags::DONE } else { ChunkFlags::empty() };
    Chunk { flags, kind, cookie: request.cookie, offset: request.offset, length }
}

impl Reply {
    fn of_heads(heads: SmallVec<[u8; 64]>) -> Reply {
        let pieces = SmallVec::from_iter([(heads.len(), 0..0)]);
        Reply { heads, pieces, data: None, _permit: None }
    }

    /// A request without data has worked.
    pub fn done(headers: Headers, request: &Request) -> Reply {
        match headers {
            Headers::Extended => Reply::no_data(headers, request),
            _ => Reply::no_data(Headers::Simple, request),
        }
    }

    /// A read of nothing has worked.
    pub fn no_data(headers: Headers, request: &Request) -> Reply {
        let mut heads = SmallVec::new();
        match headers {
            Headers::Simple => {
                heads.extend_from_slice(&Simple { error: 0, cookie: request.cookie }.encode());
            }
            _ => headers.put_chunk(&mut heads, &chunk(request, reply::CHUNK_NONE, 0, true)),
        }
        Reply::of_heads(heads)
    }

    /// A request has failed; the text is for people.
    pub fn failed(headers: Headers, request: &Request, errno: Errno, text: &str) -> Reply {
        let (error, mut heads) = (error::to_wire(errno), SmallVec::new());
        if headers == Headers::Simple {
            heads.extend_from_slice(&Simple { error, cookie: request.cookie }.encode());
        } else {
            let error = ErrorChunk { error, message: cut(text), offset: None };
            let payload = error.encode();
            headers
                .put_chunk(&mut heads, &chunk(request, error.kind(), payload.len() as u64, true));
            heads.extend_from_slice(&payload);
        }
        Reply::of_heads(heads)
    }

    /// The data of a read, which are not empty. `whole`: in one chunk.
    pub fn data(
        headers: Headers,
        request: &Request,
        (data, permit): (AlignedBuf, Option<Permit>),
        whole: bool,
    ) -> Reply {
        let mut made =
            Reply { heads: SmallVec::new(), pieces: SmallVec::new(), data: None, _permit: permit };
        if headers == Headers::Simple {
            let head = Simple { error: 0, cookie: request.cookie }.encode();
            made.heads.extend_from_slice(&head);
            made.pieces.push((head.len(), 0..data.len()));
        } else {
            let runs =
                if whole { vec![(false, 0..data.len())] } else { runs(request.offset, &data) };
            let count = runs.len();
            for (n, (is_zero, range)) in runs.into_iter().enumerate() {
                let offset = request.offset + range.start as u64;
                let (is_last, len) = (n + 1 == count, range.len());
                if is_zero {
                    let hole = Hole { offset, length: len as u32 }.encode();
                    let head = chunk(request, reply::CHUNK_OFFSET_HOLE, hole.len() as u64, is_last);
                    made.put(headers, &head, &hole, 0..0);
                } else {
                    let prefix = offset.to_be_bytes();
                    let carried = (prefix.len() + len) as u64;
                    let head = chunk(request, reply::CHUNK_OFFSET_DATA, carried, is_last);
                    made.put(headers, &head, &prefix, range);
                }
            }
        }
        made.data = Some(data);
        made
    }

    /// Block status, a chunk for each context.
    pub fn status(headers: Headers, request: &Request, all: &[Status]) -> Reply {
        let kind = match headers {
            Headers::Extended => reply::CHUNK_BLOCK_STATUS_EXT,
            _ => reply::CHUNK_BLOCK_STATUS,
        };
        let mut heads = SmallVec::new();
        for (n, status) in all.iter().enumerate() {
            let payload = status.encode(kind);
            let is_last = n + 1 == all.len();
            headers.put_chunk(&mut heads, &chunk(request, kind, payload.len() as u64, is_last));
            heads.extend_from_slice(&payload);
        }
        Reply::of_heads(heads)
    }

    fn put(&mut self, headers: Headers, head: &Chunk, more: &[u8], data: Range<usize>) {
        let before = self.heads.len();
        headers.put_chunk(&mut self.heads, head);
        self.heads.extend_from_slice(more);
        self.pieces.push((self.heads.len() - before, data));
    }

    /// Segments of memory that it takes at most.
    pub fn segments(&self) -> usize {
        2 * self.pieces.len()
    }
}

/// Which parts of data from `offset` on are zero and which are not, as far as it is worth a chunk.
fn runs(offset: u64, data: &[u8]) -> Vec<(bool, Range<usize>)> {
    let mut runs: Vec<(bool, Range<usize>)> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let to_unit = (UNIT - (offset + at as u64) % UNIT) as usize;
        let end = data.len().min(at + to_unit);
        let is_zero = is_zero(&data[at..end]);
        match runs.last_mut() {
            Some((last, range)) if *last == is_zero => range.end = end,
            _ => runs.push((is_zero, at..end)),
        }
        at = end;
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    // By words of eight, eight at a time, so that the compiler has something to make wide.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| {
        let words = chunk.as_chunks::<8>().0.iter();
        words.fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|&byte| byte == 0)
}

/// How many of these replies one operation sends.
pub(super) fn batch<'a>(replies: impl Iterator<Item = &'a Reply>) -> usize {
    let mut segments = 0;
    let fits = replies.take_while(|reply| {
        segments += reply.segments();
        segments <= MOST_SEGMENTS
    });
    fits.count().max(1)
}

/// Sends replies, one after the other.
pub(super) async fn send(socket: &Socket, replies: &[Reply]) -> IoResult {
    let total = replies.iter().map(|reply| reply.heads.len()).sum();
    let mut heads = AlignedBuf::for_overwriting(total, 1).ok_or(Errno::ENOMEM)?;
    let mut at = 0;
    for reply in replies {
        heads[at..][..reply.heads.len()].copy_from_slice(&reply.heads);
        at += reply.heads.len();
    }
    let source = heads.source();
    let mut parts: SmallVec<[IoVec<'_>; 8]> = SmallVec::new();
    // What of the heads is in no part yet.
    let mut waiting = 0..0;
    for reply in replies {
        for (len, data) in &reply.pieces {
            waiting.end += *len as u64;
            let Some(bytes) = reply.data.as_ref().filter(|_| !data.is_empty()) else { continue };
            parts.push(source.slice(waiting.start, waiting.end - waiting.start));
            parts.push(bytes.source().slice(data.start as u64, data.len() as u64));
            waiting.start = waiting.end;
        }
    }
    if !waiting.is_empty() {
        parts.push(source.slice(waiting.start, waiting.end - waiting.start));
    }
    let parts: SmallVec<[&IoVec<'_>; 8]> = parts.iter().collect();
    let all = IoVec::concat(&parts);
    let mut done = 0;
    while done < all.len() {
        let rest = all.slice(done, all.len() - done);
        match socket.send(&rest, Deadline::NEVER).await? {
            0 => return Err(Errno(libc::EPIPE)),
            n => done += u64::from(n),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::CommandFlags;
    use crate::nbd::request::CMD_READ;

    #[test]
    fn zeroes_are_holes_by_whole_units_of_the_disk_or_where_the_request_ends() {
        let unit = UNIT as usize;
        let mut data = vec![0; 4 * unit];
        assert_eq!(runs(0, &data), [(true, 0..4 * unit)]);
        assert_eq!(runs(512, &data[..1024]), [(true, 0..1024)]);
        data[2 * unit + 5] = 1;
        let all = runs(0, &data);
        assert_eq!(
            all,
            [(true, 0..2 * unit), (false, 2 * unit..3 * unit), (true, 3 * unit..4 * unit)]
        );
        // Units are those of the disk.
        let all = runs(100, &data[..2 * unit + 6]);
        assert_eq!(all, [(true, 0..2 * unit - 100), (false, 2 * unit - 100..2 * unit + 6)]);
    }

    #[test]
    fn a_reply_with_data_is_one_chunk_where_that_is_asked_for() {
        let request = Request {
            flags: CommandFlags::DF,
            command: CMD_READ,
            cookie: 7,
            offset: 4096,
            length: 200 << 10,
        };
        let data = || AlignedBuf::new(200 << 10, 1).unwrap();
        for (headers, whole, heads) in [
            (Headers::Simple, false, 16),
            (Headers::Structured, true, 28),
            (Headers::Structured, false, 32),
            (Headers::Extended, false, 44),
        ] {
            let reply = Reply::data(headers, &request, (data(), None), whole);
            assert_eq!((reply.heads.len(), reply.pieces.len()), (heads, 1));
        }
    }
}
