//! Clients that say what makes no sense, too much, or nothing: an error or the end of their connection, and no other's.

use std::io::Write;

use super::client::Client;
use super::daemon;
use crate::vhost_user::pattern;
use vublk::nbd::handshake::*;
use vublk::nbd::option::{Go, MetaQueries};
use vublk::nbd::reply::{self, Status};
use vublk::nbd::request::*;
use vublk::nbd::{CommandFlags, Headers};

const NONE: CommandFlags = CommandFlags::empty();

#[test]
fn options_that_make_no_sense_are_refused_and_the_handshake_goes_on() {
    let daemon = daemon(&[]);
    let mut client = Client::greet(&daemon.path("nbd.sock"));
    let refused = |client: &mut Client, option, payload: &[u8]| {
        let replies = client.option(option, payload);
        assert_eq!(replies.len(), 1);
        replies[0].0
    };
    let queries = MetaQueries { export: "vol", queries: vec!["base:allocation"] }.encode();
    assert_eq!(refused(&mut client, OPT_SET_META_CONTEXT, &queries), REP_ERR_INVALID);
    assert_eq!(refused(&mut client, 77, b"abc"), REP_ERR_UNSUP);
    assert_eq!(refused(&mut client, OPT_LIST, b"abc"), REP_ERR_INVALID);
    assert_eq!(refused(&mut client, OPT_STARTTLS, &[]), REP_ERR_POLICY);
    assert_eq!(refused(&mut client, OPT_GO, b"\0\0\0\x04vol"), REP_ERR_INVALID);
    let none = Go { name: "none", wanted: vec![] }.encode();
    assert_eq!(refused(&mut client, OPT_GO, &none), REP_ERR_UNKNOWN);
    assert_eq!(refused(&mut client, OPT_GO, &vec![0; 1 << 20]), REP_ERR_TOO_BIG);
    assert_eq!(refused(&mut client, OPT_STRUCTURED_REPLY, &[]), REP_ACK);
    assert_eq!(refused(&mut client, OPT_STRUCTURED_REPLY, &[]), REP_ERR_INVALID);
    assert_eq!(refused(&mut client, OPT_EXTENDED_HEADERS, &[]), REP_ACK);
    assert_eq!(refused(&mut client, OPT_STRUCTURED_REPLY, &[]), REP_ERR_INVALID);
    assert_eq!(client.option(OPT_SET_META_CONTEXT, &queries).len(), 2);
    assert_eq!(client.option(OPT_ABORT, &[]), [(REP_ACK, vec![])]);
    assert!(client.is_closed());
}

#[test]
fn what_cannot_be_answered_ends_the_connection_with_one_line() {
    let mut daemon = daemon(&[]);
    let path = daemon.path("nbd.sock");
    let greeted: [&[u8]; 4] = [
        b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
        b"IHAVEOPX\0\0\0\x07\0\0\0\0",
        b"IHAVEOPT\0\0\0\x01\0\0\0\x03abc",
        b"IHAVEOPT\0\0\0\x01\xff\xff\xff\xff",
    ];
    for bytes in greeted {
        let mut client = Client::greet(&path);
        client.send(bytes);
        assert!(client.is_closed());
    }
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let mut client = Client::connect(&path, "vol", headers, &[]);
        client.send(&[0x55; 32]);
        assert!(client.is_closed());
        let mut client = Client::connect(&path, "vol", headers, &[]);
        let request = client.request(CMD_WRITE, NONE, 0, (32 << 20) + 1);
        client.send_request(&request, &[]);
        assert!(client.is_closed());
    }
    let log = daemon.wait_log("NBD client refused: ", 10);
    assert_eq!(log.lines().count(), 10, "{log}");
    let mut client = Client::connect(&path, "vol", Headers::Simple, &[]);
    assert_eq!(client.read(0, 512).len(), 512);
}

#[test]
fn requests_are_refused_one_by_one_and_later_ones_work() {
    let daemon = daemon(&["--export", "type=nbd,id=r,node-name=f,name=ro"]);
    let path = daemon.path("nbd.sock");
    let data = pattern(4096, 3);
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let mut client = Client::connect(&path, "ro", headers, &[]);
        assert_eq!(client.ask(CMD_WRITE, NONE, (0, 4096), &data), Err(1));
        assert_eq!(client.ask(CMD_TRIM, NONE, (0, 4096), &[]), Err(1));
        let mut client = Client::connect(&path, "vol", headers, &[]);
        assert_eq!(client.ask(99, NONE, (0, 0), &[]), Err(22));
        assert_eq!(client.ask(CMD_WRITE, NONE, (8 << 20, 4096), &data), Err(28));
        assert_eq!(client.ask(CMD_READ, NONE, (u64::MAX, 4096), &[]), Err(22));
        assert_eq!(client.ask(CMD_TRIM, CommandFlags::DF, (0, 4096), &[]), Err(22));
        assert_eq!(client.ask(CMD_BLOCK_STATUS, NONE, (0, 4096), &[]), Err(22));
        client.write(4096, &data);
        assert_eq!(client.read(4096, 4096), data);
        assert_eq!(client.read(4097, 1), data[1..2]);
        client.write(4096, &[]);
        let request = client.request(CMD_DISC, NONE, 0, 0);
        client.send_request(&request, &[]);
        assert!(client.is_closed());
    }
}

#[test]
fn extended_headers_take_lengths_of_64_bits_and_contexts_of_the_clients_choice() {
    let daemon = daemon(&[
        "--blockdev",
        "driver=null-co,node-name=n,read-zeroes=on,size=1099511627776",
        "--export",
        "type=nbd,id=n,node-name=n,name=null,writable=on,allocation-depth=on",
    ]);
    let contexts = ["base:allocation", "qemu:allocation-depth"];
    let path = daemon.path("nbd.sock");
    let mut client = Client::connect(&path, "null", Headers::Extended, &contexts);
    let whole = (0, 1 << 40);
    let chunks = client.ask(CMD_BLOCK_STATUS, NONE, whole, &[]).unwrap();
    let told = chunks.iter().map(|(chunk, carried)| {
        let status = Status::decode(chunk.kind, carried).unwrap();
        (status.id, status.extents[0].length)
    });
    let ids: Vec<_> = told.collect();
    assert_eq!(ids, [(0, 1 << 40), (1, 1 << 40)]);
    let query = StatusQuery { length: 1 << 39, ids: vec![1] }.encode();
    let flags = CommandFlags::PAYLOAD_LEN;
    let chunks = client.ask(CMD_BLOCK_STATUS, flags, (0, query.len() as u64), &query).unwrap();
    assert_eq!(chunks.len(), 1);
    let status = Status::decode(chunks[0].0.kind, &chunks[0].1).unwrap();
    assert_eq!((status.id, status.extents[0].length), (1, 1 << 39));
    for ids in [vec![], vec![0, 0], vec![5]] {
        let query = StatusQuery { length: 512, ids }.encode();
        let length = query.len() as u64;
        assert_eq!(client.ask(CMD_BLOCK_STATUS, flags, (0, length), &query), Err(22));
    }
    // Payload that nobody expects is passed over.
    assert_eq!(client.ask(CMD_FLUSH, flags, (0, 3), b"abc"), Err(22));
    let chunks = client.ask(CMD_WRITE_ZEROES, NONE, whole, &[]).unwrap();
    assert_eq!(chunks[0].0.kind, reply::CHUNK_NONE);
    assert_eq!(client.ask(CMD_READ, NONE, (0, 1 << 33), &[]), Err(22));
}

#[test]
fn clients_that_say_nothing_or_take_nothing_hold_up_nobody() {
    let daemon = daemon(&[]);
    let path = daemon.path("nbd.sock");
    let _silent: Vec<_> = (0..20).map(|_| Client::greet(&path)).collect();
    // Asks for more than the kernel and we keep for it, and takes none of it.
    let mut slow: Vec<_> =
        (0..3).map(|_| Client::connect(&path, "vol", Headers::Structured, &[])).collect();
    for client in &mut slow {
        client.stream.set_nonblocking(true).unwrap();
        client.write_some(2000);
    }
    let mut client = Client::connect(&path, "vol", Headers::Simple, &[]);
    let data = pattern(1 << 20, 5);
    for n in 0..8 {
        client.write(n << 20, &data);
        assert_eq!(client.read(n << 20, 1 << 20), data);
    }
    client.ask(CMD_FLUSH, NONE, (0, 0), &[]).unwrap();
    drop(client);
    // Their ends do not hold up the daemon's.
    let log = daemon.end();
    assert!(!log.contains("refused"), "{log}");
}

impl Client {
    /// Sends up to `count` reads of a MiB, as many as are taken at once.
    fn write_some(&mut self, count: u64) {
        for n in 0..count {
            let request = self.request(CMD_READ, NONE, (n % 8) << 20, 1 << 20);
            if self.stream.write(&request.encode_compact()).is_err() {
                break;
            }
        }
    }
}
