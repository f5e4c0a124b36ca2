//! A client that says what the test wants, with the protocol's bytes of the library.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vublk::nbd::handshake::*;
use vublk::nbd::option::{Go, MetaQueries};
use vublk::nbd::reply::{self, Chunk, Reply};
use vublk::nbd::request::*;
use vublk::nbd::{ClientFlags, CommandFlags, Headers};

/// A connection to a server.
pub struct Client {
    pub stream: UnixStream,
    pub headers: Headers,
    cookie: u64,
}

impl Client {
    /// Connects, and has the greeting behind it.
    pub fn greet(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut client = Client { stream, headers: Headers::Simple, cookie: 0 };
        let greeting: [u8; NEWSTYLE_GREETING_LEN] = client.receive();
        assert_eq!(style(greeting.first_chunk().unwrap()), Ok(Style::Newstyle));
        client.send(&client_flags(ClientFlags::all()));
        client
    }

    /// A client of this export, with these headers and contexts.
    pub fn connect(path: &Path, export: &str, headers: Headers, contexts: &[&str]) -> Client {
        let mut client = Client::greet(path);
        let option = match headers {
            Headers::Simple => None,
            Headers::Structured => Some(OPT_STRUCTURED_REPLY),
            Headers::Extended => Some(OPT_EXTENDED_HEADERS),
        };
        if let Some(option) = option {
            assert_eq!(client.option(option, &[]).last().unwrap().0, REP_ACK);
            client.headers = headers;
        }
        if !contexts.is_empty() {
            let queries = MetaQueries { export, queries: contexts.to_vec() };
            let replies = client.option(OPT_SET_META_CONTEXT, &queries.encode());
            assert_eq!(replies.len(), contexts.len() + 1);
        }
        let go = Go { name: export, wanted: vec![] }.encode();
        assert_eq!(client.option(OPT_GO, &go).last().unwrap().0, REP_ACK);
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn receive_vec(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has nothing more to say, and closes the connection.
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        !matches!(self.stream.read(&mut byte), Ok(1..))
    }

    /// Sends an option, and gives its replies with what they carry.
    pub fn option(&mut self, option: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let len = payload.len() as u32;
        self.send(&[&OptionHeader { option, len }.encode(), payload].concat());
        let mut all = Vec::new();
        loop {
            let reply = OptionReply::decode(&self.receive()).unwrap();
            assert_eq!(reply.option, option);
            all.push((reply.kind, self.receive_vec(reply.len.into())));
            if reply.is_error() || reply.kind == REP_ACK {
                return all;
            }
        }
    }

    /// The header of a request with a cookie of its own.
    pub fn request(
        &mut self,
        command: u16,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Request {
        self.cookie += 1;
        Request { flags, command, cookie: self.cookie, offset, length }
    }

    pub fn send_request(&mut self, request: &Request, data: &[u8]) {
        match self.headers {
            Headers::Extended => self.send(&[&request.encode_extended(), data].concat()),
            _ => self.send(&[&request.encode_compact(), data].concat()),
        }
    }

    /// The header of the next reply.
    pub fn reply(&mut self) -> Reply {
        let begin: [u8; 4] = self.receive();
        let len = Reply::len_by_magic(self.headers, begin).unwrap();
        let rest = self.receive_vec(len as u64 - 4);
        Reply::decode(self.headers, &[&begin, &rest[..]].concat()).unwrap()
    }

    /// All chunks of the next reply, with what they carry, or its error. A simple reply without data is no chunk.
    pub fn chunks(&mut self) -> Result<Vec<(Chunk, Vec<u8>)>, u32> {
        let mut all = Vec::new();
        loop {
            match self.reply() {
                Reply::Simple(simple) if simple.error == 0 => return Ok(all),
                Reply::Simple(simple) => return Err(simple.error),
                Reply::Chunk(chunk) => {
                    let carried = self.receive_vec(chunk.length);
                    if chunk.is_error() {
                        return Err(reply::ErrorChunk::decode(chunk.kind, &carried).unwrap().error);
                    }
                    all.push((chunk, carried));
                    if chunk.is_last() {
                        return Ok(all);
                    }
                }
            }
        }
    }

    /// A request and its reply.
    pub fn ask(
        &mut self,
        command: u16,
        flags: CommandFlags,
        (offset, length): (u64, u64),
        data: &[u8],
    ) -> Result<Vec<(Chunk, Vec<u8>)>, u32> {
        let request = self.request(command, flags, offset, length);
        self.send_request(&request, data);
        self.chunks()
    }

    /// Writes, which must work.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let flags = match self.headers {
            Headers::Extended => CommandFlags::PAYLOAD_LEN,
            _ => CommandFlags::empty(),
        };
        self.ask(CMD_WRITE, flags, (offset, data.len() as u64), data).unwrap();
    }

    /// Reads, which must work, in whatever chunks.
    pub fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        if self.headers == Headers::Simple {
            let request = self.request(CMD_READ, CommandFlags::empty(), offset, len);
            self.send_request(&request, &[]);
            assert_eq!(
                self.reply(),
                Reply::Simple(reply::Simple { error: 0, cookie: request.cookie })
            );
            return self.receive_vec(len);
        }
        let chunks = self.ask(CMD_READ, CommandFlags::empty(), (offset, len), &[]).unwrap();
        let mut all = vec![0xee; len as usize];
        for (chunk, carried) in chunks {
            match chunk.kind {
                reply::CHUNK_OFFSET_DATA => {
                    let (at, data) = carried.split_at(8);
                    let at = u64::from_be_bytes(at.try_into().unwrap()) - offset;
                    all[at as usize..][..data.len()].copy_from_slice(data);
                }
                reply::CHUNK_OFFSET_HOLE => {
                    let hole = reply::Hole::decode(&carried).unwrap();
                    all[(hole.offset - offset) as usize..][..hole.length as usize].fill(0);
                }
                _ => assert_eq!(chunk.kind, reply::CHUNK_NONE),
            }
        }
        all
    }
}
