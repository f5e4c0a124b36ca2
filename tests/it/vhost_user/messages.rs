//! Invalid messages: the connection ends, and the daemon and its other disks are unaffected.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vublk_testkit::message::{self, NEED_REPLY, REPLY, VERSION};
use vublk_testkit::spec::{feature, protocol};
use vublk_testkit::{Connection, Options};

use super::daemon::LIMIT;
use super::{Daemon, seed};

const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;

/// What is wrong, and the message: request, flags, size in the header if not the payload's, payload.
type Wrong = (&'static str, u32, u32, Option<u32>, Vec<u8>);

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn connect(daemon: &Daemon) -> Connection {
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    connection.negotiate(feature::QEMU, protocol::DEFAULT).unwrap();
    connection.set_features().unwrap();
    connection
}

/// The server closes the connection, perhaps after a refusal.
fn assert_ends(stream: &UnixStream, what: &str) {
    for _ in 0..2 {
        match message::receive(stream, LIMIT).unwrap_or(None) {
            None => return,
            Some(answer) => assert_ne!(answer.value(), Some(0), "{what}: accepted"),
        }
    }
    panic!("{what}: the connection goes on");
}

#[test]
fn a_message_that_is_wrong_ends_the_connection_and_no_more() {
    let mut daemon = Daemon::file("num-queues=2");
    let table: Vec<Wrong> = vec![
        ("an unknown request", 200, VERSION, None, vec![]),
        ("request 0", 0, VERSION, None, vec![]),
        ("a request of the largest number", u32::MAX, VERSION, None, vec![]),
        ("no version", SET_FEATURES, 0, None, longs(&[0])),
        ("another version", SET_FEATURES, 2, None, longs(&[0])),
        ("a reply", SET_FEATURES, VERSION | REPLY, None, longs(&[0])),
        ("a size beyond all limits", SET_FEATURES, VERSION, Some(u32::MAX), longs(&[0])),
        ("a size of 4097", SET_FEATURES, VERSION, Some(4097), vec![0; 4097]),
        ("a short payload", SET_FEATURES, VERSION, None, words(&[0])),
        ("a long payload", SET_FEATURES, VERSION, None, longs(&[0, 0])),
        ("no payload", SET_VRING_NUM, VERSION, None, vec![]),
        ("a queue beyond the last", SET_VRING_NUM, VERSION, None, words(&[2, 128])),
        ("a queue far beyond", SET_VRING_NUM, VERSION, None, words(&[u32::MAX, 128])),
        ("a ring of 0", SET_VRING_NUM, VERSION, None, words(&[0, 0])),
        ("a ring of 3", SET_VRING_NUM, VERSION, None, words(&[0, 3])),
        ("a ring of 2048", SET_VRING_NUM, VERSION, None, words(&[0, 2048])),
        ("a ring of 65536", SET_VRING_NUM, VERSION, None, words(&[0, 65536])),
        ("a base for no queue", SET_VRING_BASE, VERSION, None, words(&[9, 0])),
        ("the base of no queue", GET_VRING_BASE, VERSION, None, words(&[9, 0])),
        ("addresses of no queue", SET_VRING_ADDR, VERSION, None, longs(&[7, 0, 0, 0, 0])),
        ("an enable of no queue", SET_VRING_ENABLE, VERSION, None, words(&[2, 1])),
        ("an enable of 2", SET_VRING_ENABLE, VERSION, None, words(&[0, 2])),
        ("a kick without descriptor", SET_VRING_KICK, VERSION, None, longs(&[0])),
        ("a kick of no queue", SET_VRING_KICK, VERSION, None, longs(&[0x1ff])),
        ("a call of no queue", SET_VRING_CALL, VERSION, None, longs(&[0x1ff])),
        ("an error descriptor of no queue", SET_VRING_ERR, VERSION, None, longs(&[0x1ff])),
        ("a table without descriptors", SET_MEM_TABLE, VERSION, None, longs(&[1, 0, 4096, 0, 0])),
        ("a table of 100 regions", SET_MEM_TABLE, VERSION, None, longs(&[100])),
        ("a region without descriptor", ADD_MEM_REG, VERSION, None, longs(&[0, 0, 4096, 0, 0])),
        ("configuration of no bytes", GET_CONFIG, VERSION, None, words(&[0, 0, 0])),
        ("configuration that is not sent", GET_CONFIG, VERSION, None, words(&[0, 60, 0])),
        (
            "a configuration too long",
            SET_CONFIG,
            VERSION,
            None,
            [words(&[0, 300, 1]), vec![0; 300]].concat(),
        ),
        ("a log that was not offered", SET_LOG_BASE, VERSION, None, longs(&[4096, 0])),
        ("inflight that was not offered", GET_INFLIGHT_FD, VERSION, None, longs(&[0, 0, 0])),
        ("an inflight region not offered", SET_INFLIGHT_FD, VERSION, None, longs(&[0, 0, 0])),
    ];
    for (what, request, flags, size, payload) in table {
        let connection = connect(&daemon);
        let stream = connection.stream();
        // The server may close before it has read all of it.
        let _ = message::send(stream, request, flags | NEED_REPLY, size, &payload, &[]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_ends(stream, what);
    }
    daemon.assert_serves(0);
}

#[test]
fn a_connection_that_breaks_off_anywhere_in_a_message_ends() {
    let mut daemon = Daemon::file("");
    let whole = [words(&[SET_FEATURES, VERSION | NEED_REPLY, 8]), longs(&[0])].concat();
    for len in 0..whole.len() {
        let stream = UnixStream::connect(daemon.socket(0)).unwrap();
        (&stream).write_all(&whole[..len]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_ends(&stream, &format!("{len} bytes"));
    }
    daemon.assert_serves(0);
}

#[test]
fn descriptors_that_no_message_wants_are_closed() {
    let mut daemon = Daemon::file("");
    daemon.assert_serves(0);
    daemon.wait_log("front end disconnected", 1);
    let before = daemon.server.open_files();
    let file = tempfile::tempfile().unwrap();
    for count in [1, 8, 32, 100] {
        for request in [1, SET_FEATURES, SET_MEM_TABLE, SET_VRING_KICK, GET_CONFIG] {
            let connection = connect(&daemon);
            let fds = vec![file.as_raw_fd(); count];
            let payload = longs(&[0]);
            let _ = message::send(connection.stream(), request, VERSION, None, &payload, &fds);
            let _ = connection.stream().shutdown(std::net::Shutdown::Write);
            while let Ok(Some(_)) = message::receive(connection.stream(), LIMIT) {}
        }
    }
    daemon.assert_serves(0);
    daemon.wait_log("front end connected", 22);
    assert_eq!(daemon.server.open_files(), before);
}

#[test]
fn random_messages_do_not_end_the_daemon() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = Daemon::file("num-queues=2");
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    for _ in 0..300 {
        let connection = connect(&daemon);
        let stream = connection.stream();
        stream.set_nonblocking(true).unwrap();
        for _ in 0..random.usize(1..20) {
            let len = [0, 8, 8, 8, 12, 40, random.usize(0..300)][random.usize(0..7)];
            // Small numbers pass more checks than large ones.
            let small = |random: &mut fastrand::Rng| match random.u8(0..8) {
                0 => random.u8(..),
                1 | 2 => random.u8(0..3),
                _ => 0,
            };
            let payload: Vec<u8> = (0..len).map(|_| small(&mut random)).collect();
            let flags = VERSION | if random.bool() { NEED_REPLY } else { 0 };
            let fds = vec![file.as_raw_fd(); if random.bool() { 0 } else { random.usize(0..3) }];
            let request = random.u32(1..48);
            if message::send(stream, request, flags, None, &payload, &fds).is_err() {
                break;
            }
        }
    }
    for _ in 0..50 {
        let stream = UnixStream::connect(daemon.socket(0)).unwrap();
        let bytes: Vec<u8> = (0..random.usize(1..200)).map(|_| random.u8(..)).collect();
        let _ = (&stream).write_all(&bytes);
    }
    daemon.assert_serves(0);
}

#[test]
fn rings_outside_the_memory_or_off_their_alignment_are_refused() {
    let mut daemon = Daemon::file("");
    // Where the descriptor, available and used parts are, from the start of the one region.
    let size = 1 << 20;
    let table: [(&str, [u64; 3]); 7] = [
        ("descriptors outside", [size, 0, 8192]),
        ("descriptors ending outside", [size - 16, 0, 8192]),
        ("an available ring ending outside", [0, size - 4, 8192]),
        ("a used ring ending outside", [0, 4096, size - 8]),
        ("descriptors at an odd address", [8, 4096, 8192]),
        ("an available ring at an odd address", [0, 4097, 8192]),
        ("a used ring off its alignment", [0, 4096, 8194]),
    ];
    for (what, parts) in table {
        let memory =
            vublk_testkit::Memory::new(&vublk_testkit::MemoryLayout::single(size as usize))
                .unwrap();
        let mut connection = connect(&daemon);
        let memory_messages = vublk_testkit::frontend::MemoryMessages::Table;
        connection.share_memory(&memory, 1, memory_messages).unwrap();
        let user = memory.regions()[0].host_addr();
        let [descriptors, available, used] = parts.map(|part| user + part);
        let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let stream = connection.stream();
        let mut refused = false;
        for (request, payload, fds) in [
            (SET_VRING_NUM, words(&[0, 128]), vec![]),
            (SET_VRING_BASE, words(&[0, 0]), vec![]),
            (SET_VRING_ADDR, longs(&[0, descriptors, used, available, 0]), vec![]),
            (SET_VRING_KICK, longs(&[0]), vec![kick.as_raw_fd()]),
            (SET_VRING_ENABLE, words(&[0, 1]), vec![]),
        ] {
            let flags = VERSION | NEED_REPLY;
            if message::send(stream, request, flags, None, &payload, &fds).is_err() {
                break;
            }
            match message::receive(stream, LIMIT).unwrap() {
                Some(answer) if answer.value() == Some(0) => {}
                _ => {
                    refused = true;
                    break;
                }
            }
        }
        assert!(refused, "{what} were taken");
    }
    daemon.assert_serves(0);
}

#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_holds_nobody_else_up() {
    let one = super::daemon::export_of("d0", 0);
    let two = super::daemon::export_of("d0", 1);
    let mut daemon = Daemon::start(&[
        "--blockdev",
        "driver=file,node-name=d0,filename=DIR/disk.img",
        "--export",
        &one,
        "--export",
        &two,
    ]);
    let silent = UnixStream::connect(daemon.socket(0)).unwrap();
    (&silent).write_all(&words(&[SET_FEATURES, VERSION])).unwrap();
    let mut other = daemon.open_number(1, &Options::default());
    other.read(0, &mut [0; 512]).unwrap();
    // Not even the daemon's end.
    daemon.server.signal(libc::SIGTERM).unwrap();
    assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
}
