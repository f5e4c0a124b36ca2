//! Random bytes to every reader: none panics, and what is read is written back as it was.

use super::handshake::{self, OptionHeader, OptionReply};
use super::option::{Context, Go, Info, Listed, MetaQueries};
use super::reply::{self, ErrorChunk, Hole, Reply, Status};
use super::request::{Request, StatusQuery};
use super::{Headers, Malformed};
use fastrand::Rng;

const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

/// Bytes of small numbers, so that counts are often possible.
fn bytes(rng: &mut Rng) -> Vec<u8> {
    let byte = |rng: &mut Rng| match rng.u8(..4) {
        0 => rng.u8(..),
        1 => rng.u8(..6),
        _ => 0,
    };
    (0..rng.usize(..80)).map(|_| byte(rng)).collect()
}

/// What was read must be what was given.
fn same(bytes: &[u8], back: Result<Vec<u8>, Malformed>) -> usize {
    match back {
        Ok(back) => {
            assert_eq!(back, bytes);
            1
        }
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            0
        }
    }
}

#[test]
fn no_bytes_break_a_reader_and_what_is_read_is_written_as_it_was() {
    let mut rng = Rng::with_seed(18);
    let mut read = [0; 8];
    for _ in 0..200_000 {
        let bytes = bytes(&mut rng);
        read[0] += same(&bytes, Go::decode(&bytes).map(|go| go.encode()));
        read[1] += same(&bytes, MetaQueries::decode(&bytes).map(|queries| queries.encode()));
        read[2] += same(&bytes, Listed::decode(&bytes).map(|listed| listed.encode()));
        read[3] += same(&bytes, Context::decode(&bytes).map(|context| context.encode()));
        read[4] += same(&bytes, StatusQuery::decode(&bytes).map(|query| query.encode()));
        for kind in [reply::CHUNK_ERROR, reply::CHUNK_ERROR_OFFSET] {
            read[5] += same(&bytes, ErrorChunk::decode(kind, &bytes).map(|error| error.encode()));
        }
        for kind in [reply::CHUNK_BLOCK_STATUS, reply::CHUNK_BLOCK_STATUS_EXT] {
            read[6] += same(&bytes, Status::decode(kind, &bytes).map(|status| status.encode(kind)));
        }
        read[7] += same(&bytes, Hole::decode(&bytes).map(|hole| hole.encode().to_vec()));
        match Info::decode(&bytes) {
            Ok(Info::Other(_)) | Err(_) => {}
            Ok(info) => assert_eq!(info.encode(), bytes),
        }
    }
    assert!(read.iter().all(|&count| count > 10), "{read:?}");
}

#[test]
fn headers_with_the_right_magic_are_written_as_they_were() {
    let mut rng = Rng::with_seed(19);
    for _ in 0..10_000 {
        let mut bytes = [0; 40];
        rng.fill(&mut bytes);
        for headers in ALL {
            let magic = match headers {
                Headers::Extended => super::request::EXTENDED_REQUEST_MAGIC,
                _ => super::request::REQUEST_MAGIC,
            };
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            let header = &bytes[..headers.request_len()];
            let request = Request::decode(headers, header).unwrap();
            match headers {
                Headers::Extended => assert_eq!(request.encode_extended(), header),
                _ => assert_eq!(request.encode_compact(), header),
            }
            for magic in [reply::SIMPLE_MAGIC, reply::STRUCTURED_MAGIC, reply::EXTENDED_MAGIC] {
                bytes[..4].copy_from_slice(&magic.to_be_bytes());
                let begin = *bytes.first_chunk().unwrap();
                let Ok(len) = Reply::len_by_magic(headers, begin) else { continue };
                match Reply::decode(headers, &bytes[..len]).unwrap() {
                    Reply::Simple(simple) => assert_eq!(simple.encode(), bytes[..len]),
                    Reply::Chunk(chunk) if headers == Headers::Extended => {
                        assert_eq!(chunk.encode_extended(), bytes[..len]);
                    }
                    Reply::Chunk(chunk) => assert_eq!(chunk.encode_structured(), bytes[..len]),
                }
            }
        }
        bytes[..8].copy_from_slice(&handshake::IHAVEOPT.to_be_bytes());
        let header = bytes.first_chunk().unwrap();
        assert_eq!(OptionHeader::decode(header).unwrap().encode(), *header);
        bytes[..8].copy_from_slice(&handshake::REPLY_MAGIC.to_be_bytes());
        let header = bytes.first_chunk().unwrap();
        assert_eq!(OptionReply::decode(header).unwrap().encode(), *header);
    }
}
