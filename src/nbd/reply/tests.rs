//! Tests of replies.

use super::super::MAX_STRING;
use super::*;

#[test]
fn headers_go_there_and_back_where_they_were_agreed_on() {
    let simple = Simple { error: 5, cookie: 77 };
    let chunk = Chunk {
        flags: ChunkFlags::DONE,
        kind: CHUNK_OFFSET_DATA,
        cookie: 78,
        offset: 0,
        length: 4104,
    };
    let extended = Chunk { offset: 1 << 40, length: 1 << 33, ..chunk };
    let all: [(&[u8], Reply); 3] = [
        (&simple.encode(), Reply::Simple(simple)),
        (&chunk.encode_structured(), Reply::Chunk(chunk)),
        (&extended.encode_extended(), Reply::Chunk(extended)),
    ];
    let agreed = [
        (Headers::Simple, [true, false, false]),
        (Headers::Structured, [true, true, false]),
        (Headers::Extended, [false, false, true]),
    ];
    for (headers, taken) in agreed {
        for ((bytes, reply), taken) in all.iter().zip(taken) {
            assert_eq!(Reply::decode(headers, bytes).ok(), taken.then_some(*reply));
            let len = Reply::len_by_magic(headers, *bytes.first_chunk().unwrap());
            assert_eq!(len.ok(), taken.then_some(bytes.len()));
            assert!(!taken || bytes.len() <= headers.reply_len());
            Reply::decode(headers, &bytes[..bytes.len() - 1]).unwrap_err();
        }
    }
    assert!(chunk.is_last() && !chunk.is_error());
    assert!(Chunk { kind: 0x8123, ..chunk }.is_error());
}

#[test]
fn what_chunks_carry_goes_there_and_back() {
    let hole = Hole { offset: 9, length: 512 };
    assert_eq!(Hole::decode(&hole.encode()), Ok(hole));
    Hole::decode(&Hole { length: 0, ..hole }.encode()).unwrap_err();
    Hole::decode(&hole.encode()[..11]).unwrap_err();
    for offset in [None, Some(1 << 40)] {
        let error = ErrorChunk { error: 28, message: "full", offset };
        let bytes = error.encode();
        assert_eq!(ErrorChunk::decode(error.kind(), &bytes), Ok(error.clone()));
        let longer = [&bytes[..], b"x"].concat();
        ErrorChunk::decode(error.kind(), &longer).unwrap_err();
        // Nobody knows what else an unknown type carries.
        ErrorChunk::decode(0x8fff, &longer).unwrap();
    }
    ErrorChunk::decode(CHUNK_ERROR, &[0; 6]).unwrap_err();
    ErrorChunk::decode(CHUNK_ERROR, b"\0\0\0\x05\0\x09full").unwrap_err();
}

#[test]
fn a_message_that_is_too_long_is_cut_between_characters() {
    let message = format!("x{}", "é".repeat(MAX_STRING));
    let bytes = ErrorChunk { error: 5, message: &message, offset: None }.encode();
    let error = ErrorChunk::decode(CHUNK_ERROR, &bytes).unwrap();
    assert_eq!(error.message, &message[..MAX_STRING - 1]);
}

#[test]
fn block_status_goes_there_and_back_and_has_no_empty_extents() {
    let status = |lengths: &[u64]| Status {
        id: 3,
        extents: lengths.iter().map(|&length| Extent { length, flags: 3 }).collect(),
    };
    for kind in [CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT] {
        let good = status(&[512, 1]);
        let bytes = good.encode(kind);
        assert_eq!(Status::decode(kind, &bytes), Ok(good));
        for len in 0..bytes.len() {
            // Without a count, a chunk may end after any extent.
            let whole = kind == CHUNK_BLOCK_STATUS && len == 12;
            assert_eq!(Status::decode(kind, &bytes[..len]).is_ok(), whole, "{len}");
        }
        Status::decode(kind, &status(&[512, 0]).encode(kind)).unwrap_err();
        Status::decode(kind, &status(&[]).encode(kind)).unwrap_err();
    }
    let long = status(&[1 << 40]);
    assert_eq!(
        Status::decode(CHUNK_BLOCK_STATUS_EXT, &long.encode(CHUNK_BLOCK_STATUS_EXT)),
        Ok(long)
    );
    let huge = Status::decode(CHUNK_BLOCK_STATUS_EXT, b"\0\0\0\x01\xff\xff\xff\xff").unwrap_err();
    assert_eq!(huge.to_string(), "block status has 4294967295 extents in 0 bytes");
}
