//! A hostile NBD client against the real server: its handshake and its requests, over a simulated socket and disk.
//!
//! The law: no panic, and no request that the block contract forbids (the disk panics at one); once the client has
//! gone, nothing of it is in flight, and the export ends.

use super::disk::{self, LEN, Under};
use super::input::Input;
use super::worker::worker;
use std::rc::Rc;
use std::time::Duration;
use vublk::export::core::{DiskOptions, Parts, Transport};
use vublk::export::nbd::{Options, Server};
use vublk::io::sim::Disorder;
use vublk::io::sim::socket::{Link, pair};
use vublk::io::{Deadline, IoVec, Socket, current};
use vublk::nbd::handshake::*;
use vublk::nbd::option::{Go, MetaQueries};
use vublk::nbd::request::{Request, StatusQuery};
use vublk::nbd::{ClientFlags, CommandFlags, Headers};

/// Messages in one connection.
const MESSAGES: usize = 40;

/// Runs one connection.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let worker = worker(0);
    let max_delay = Duration::from_micros(50);
    let disorder = Disorder { seed: input.u8().into(), max_delay, short: 0.1, interrupted: 0.0 };
    let under = input.pick(&[Under::Fast, Under::Slow, Under::Aligned, Under::Null]);
    let (writable, faulty) = (!input.one_in(4), input.one_in(4));
    let link = Link { capacity: 256 << input.below(9), reset: 0.0 };
    let said = conversation(&mut input);
    let node = worker.drive(disorder, |_| disk::node(under, writable, faulty));
    let server = Server::default();
    server.start_alone(Duration::from_secs(1)).expect("it does not run");
    let options = Options::named(&server, "vol".into()).with_allocation_depth(true);
    let disk = DiskOptions { writable, write_through: false, failures: Default::default() };
    let (name, workers) = ("fuzz".to_owned(), vec![worker.clone()]);
    let parts = Parts { name, node, disk, workers, first_worker: 0, metrics: None };
    let mut export = Box::new(options).create(parts).expect("an export");
    export.start(Box::new(|| ())).expect("its name is free");
    let theirs = server.clone();
    worker.drive(disorder, |_| async move {
        let (ours, client) = pair(link);
        let client = Rc::new(Socket::from(client));
        theirs.take(Socket::from(ours));
        let speaking = client.clone();
        current().spawn(async move {
            let mut done = 0;
            while done < said.len() {
                match speaking.send(&IoVec::from_ref(&said[done..]), Deadline::NEVER).await {
                    Ok(n @ 1..) => done += n as usize,
                    _ => break,
                }
            }
        });
        // All that is answered; the time is a virtual one, and more than the answers take.
        let mut bytes = [0; 4096];
        let patience = Duration::from_secs(5);
        loop {
            let room = IoVec::from_mut(&mut bytes);
            if !matches!(client.receive(&room, Deadline::after(patience)).await, Ok(1..)) {
                break;
            }
        }
        client.shut_down();
        while theirs.connections().0 > 0 {
            vublk::io::sleep(Duration::from_millis(1)).await;
        }
    });
    assert_eq!(export.disk().memory.held(), 0);
    drop(export);
    server.stop();
}

/// What the client says, from its flags on: with a plan, so that it comes further than the handshake, or without.
fn conversation(input: &mut Input<'_>) -> Vec<u8> {
    let mut said = Vec::new();
    if input.one_in(8) {
        said.extend(input.bytes(2000));
        return said;
    }
    said.extend(client_flags(ClientFlags::all()));
    for _ in 0..input.below(4) {
        put_option(&mut said, input);
    }
    let headers = input.pick(&[Headers::Simple, Headers::Structured, Headers::Extended]);
    let mut option = |option, payload: &[u8]| {
        said.extend(OptionHeader { option, len: payload.len() as u32 }.encode());
        said.extend(payload);
    };
    match headers {
        Headers::Simple => {}
        Headers::Structured => option(OPT_STRUCTURED_REPLY, &[]),
        Headers::Extended => option(OPT_EXTENDED_HEADERS, &[]),
    }
    let queries = vec!["base:allocation", "qemu:allocation-depth"];
    option(OPT_SET_META_CONTEXT, &MetaQueries { export: "vol", queries }.encode());
    option(OPT_GO, &Go { name: "vol", wanted: vec![3] }.encode());
    for _ in 0..MESSAGES {
        if input.is_empty() {
            break;
        }
        put_request(&mut said, input, headers);
    }
    said
}

/// An option that may make sense.
fn put_option(said: &mut Vec<u8>, input: &mut Input<'_>) {
    let option = input.below(13) as u32;
    let payload = match input.below(4) {
        0 => Go { name: "vol", wanted: vec![input.u16()] }.encode(),
        1 => MetaQueries { export: "vol", queries: vec!["base:", "qemu:"] }.encode(),
        _ => {
            let len = input.below(40) as usize;
            input.bytes(len).to_vec()
        }
    };
    let len = if input.one_in(16) { input.u32() } else { payload.len() as u32 };
    said.extend(OptionHeader { option, len }.encode());
    said.extend(payload);
}

/// A request that may make sense.
fn put_request(said: &mut Vec<u8>, input: &mut Input<'_>, headers: Headers) {
    if input.one_in(32) {
        let len = input.below(64) as usize;
        return said.extend(input.bytes(len));
    }
    let command = input.below(9) as u16;
    let flags = CommandFlags::from_bits_retain(match input.below(3) {
        0 => 0,
        1 => 1 << input.below(7),
        _ => input.u8().into(),
    });
    let (offset, length) = match input.below(8) {
        0 => (input.u64(), input.u64()),
        1 => (LEN - input.below(1024), input.below(2048)),
        2 => (512 * input.below(128), 512 * input.below(128)),
        _ => (input.below(LEN), input.below(8192)),
    };
    let length = if headers == Headers::Extended { length } else { length & 0xffff_ffff };
    let mut request = Request { flags, command, cookie: input.u8().into(), offset, length };
    let mut payload = Vec::new();
    if request.payload_len(headers) > 0 {
        payload = match input.one_in(3) {
            true => StatusQuery { length: input.below(LEN), ids: vec![0, input.below(3) as u32] }
                .encode(),
            false => vec![input.u8(); length.min(20_000) as usize],
        };
        if !input.one_in(8) {
            request.length = payload.len() as u64;
        }
    }
    match headers {
        Headers::Extended => said.extend(request.encode_extended()),
        _ => said.extend(request.encode_compact()),
    }
    said.extend(payload);
}
