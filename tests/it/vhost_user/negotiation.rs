//! Negotiation: the features that are offered, and front ends that accept others.

use std::os::unix::net::UnixStream;

use vublk_testkit::frontend::{MemoryMessages, QueueSetup};
use vublk_testkit::message::{NEED_REPLY, VERSION, receive, send};
use vublk_testkit::request::{Laid, Request, Shape};
use vublk_testkit::ring::DriverRing;
use vublk_testkit::spec::{feature, protocol, status};
use vublk_testkit::{Connection, Memory, MemoryLayout, Options};

use super::Daemon;
use super::daemon::{LIMIT, export_of, new_image};

const ALWAYS: u64 = feature::SEG_MAX
    | feature::BLK_SIZE
    | feature::TOPOLOGY
    | feature::FLUSH
    | feature::MQ
    | feature::LOG_ALL
    | feature::RING_INDIRECT
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VERSION_1;

/// Served, and offered by our side because all of it is implemented.
const PROTOCOL: u64 = protocol::MQ
    | protocol::CONFIG
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

fn greet(daemon: &Daemon, number: usize) -> Connection {
    let mut connection = Connection::connect(&daemon.socket(number), LIMIT).unwrap();
    connection.negotiate(feature::QEMU, protocol::DEFAULT).unwrap();
    connection
}

#[test]
fn the_virtio_features_follow_from_the_node_and_the_export() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..3 {
        new_image(&dir.path().join(format!("{number}.img")), 1 << 20);
    }
    let writable = feature::WRITE_ZEROES | feature::CONFIG_WCE;
    // Node, export options, and what is offered besides that which always is.
    let table = [
        ("unmap", "writable=on", writable | feature::DISCARD),
        ("unmap", "writable=on,writethrough=on", feature::WRITE_ZEROES | feature::DISCARD),
        ("unmap", "writable=off", feature::RO),
        ("ignore", "writable=on", writable),
        ("ignore", "writable=on,num-queues=8,logical-block-size=4096", writable),
        ("readonly", "", feature::RO),
    ];
    let mut arguments = Vec::new();
    for (number, (node, more)) in
        [("unmap", "discard=unmap"), ("ignore", "discard=ignore"), ("readonly", "read-only=on")]
            .into_iter()
            .enumerate()
    {
        arguments.push("--blockdev".to_owned());
        arguments.push(format!("driver=file,node-name={node},filename=DIR/{number}.img,{more}"));
    }
    for (number, (node, options, _)) in table.iter().enumerate() {
        arguments.push("--export".to_owned());
        let export = format!("{},{options}", export_of(node, number));
        arguments.push(export.trim_end_matches(',').to_owned());
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::start_in(dir, &[env!("CARGO_BIN_EXE_vublk"), "daemon"], &arguments);
    for (number, (node, options, extra)) in table.iter().enumerate() {
        let connection = greet(&daemon, number);
        assert_eq!(connection.offered(), ALWAYS | extra, "{node} {options}");
    }
}

#[test]
fn only_the_protocol_features_that_are_implemented_are_offered() {
    let daemon = Daemon::file("");
    assert_eq!(greet(&daemon, 0).offered_protocol(), PROTOCOL);
}

#[test]
fn requests_in_flight_are_tracked_where_what_a_killed_daemon_left_in_the_kernel_is_known_to_end() {
    let file = "file.driver=file,file.filename=DIR/disk.img";
    for (blockdev, export, offered) in [
        ("driver=null-co".into(), "", true),
        (format!("driver=raw,{file}"), "writable=on", true),
        // Two who read do not exclude each other.
        (format!("driver=raw,{file}"), "", false),
        (format!("driver=raw,{file},file.locking=off"), "writable=on", false),
        // Nor do two who write to a bare file and let others do so.
        ("driver=file,filename=DIR/disk.img".into(), "writable=on", false),
    ] {
        let daemon = Daemon::serve(&format!("{blockdev},node-name=d0"), export);
        let protocol = greet(&daemon, 0).offered_protocol();
        assert_eq!(protocol & protocol::INFLIGHT_SHMFD != 0, offered, "{blockdev} {export}");
    }
}

#[test]
fn a_front_end_that_takes_a_feature_that_was_not_offered_is_cut_off() {
    let mut daemon = Daemon::file("");
    let bits = [
        feature::SIZE_MAX,
        feature::RO,
        feature::ACCESS_PLATFORM,
        feature::RING_PACKED,
        1 << 63,
        u64::MAX,
    ];
    for bit in bits {
        let mut connection = greet(&daemon, 0);
        let all = connection.features() | bit;
        connection.set_exact_features(all).unwrap_err();
        connection.config().unwrap_err();
    }
    let log = daemon.wait_log("were not offered", bits.len());
    assert!(log.contains("virtio features 0x400000000 were not offered"), "{log}");
    daemon.assert_serves(0);
}

#[test]
fn any_subset_of_features_serves() {
    let daemon = Daemon::file("num-queues=2");
    let features = [
        0,
        feature::FLUSH,
        feature::EVENT_IDX,
        feature::RING_INDIRECT,
        feature::MQ | feature::CONFIG_WCE,
        feature::QEMU,
    ];
    let protocols = [
        protocol::CONFIG,
        protocol::CONFIG | protocol::MQ,
        protocol::CONFIG | protocol::REPLY_ACK,
        protocol::DEFAULT,
        PROTOCOL,
    ];
    for virtio in features {
        for protocol in protocols {
            let mut disk = daemon.open(&Options {
                features: virtio | feature::VERSION_1 | feature::PROTOCOL_FEATURES,
                protocol,
                ..Options::default()
            });
            let data = super::pattern(4096, virtio as u8 ^ protocol as u8);
            disk.write(8, &data).unwrap();
            let mut back = vec![0; 4096];
            disk.read(8, &mut back).unwrap();
            assert_eq!(back, data, "{virtio:#x} {protocol:#x}");
        }
    }
}

#[test]
fn without_protocol_features_a_ring_is_enabled_from_its_start() {
    let daemon = Daemon::file("");
    let memory = Memory::new(&MemoryLayout::single(1 << 20)).unwrap();
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    connection.negotiate(feature::VERSION_1 | feature::FLUSH, 0).unwrap();
    connection.set_features().unwrap();
    connection.share_memory(&memory, 1, MemoryMessages::Table).unwrap();
    let mut ring = DriverRing::new(&memory, 16, false).unwrap();
    let layout = ring.layout();
    let setup = QueueSetup {
        size: 16,
        base: 0,
        desc: layout.desc,
        avail: layout.avail,
        used: layout.used,
        logged: false,
        kick: ring.kick_fd(),
        call: ring.call_fd(),
    };
    connection.start_queue(0, &memory, &setup).unwrap();
    let request = Request::In { sector: 0, len: 512 };
    let laid = Laid::new(&memory, &request, &Shape::default()).unwrap();
    ring.add(&laid.segments(), false).unwrap();
    ring.publish().unwrap();
    ring.wait(LIMIT).unwrap();
    assert_eq!(laid.outcome().unwrap(), (vec![0; 512], status::OK));
}

#[test]
fn the_number_of_queues_is_the_exports() {
    for (options, want) in [("", 1), ("num-queues=7", 7), ("num-queues=256", 256)] {
        let daemon = Daemon::file(options);
        let mut connection = greet(&daemon, 0);
        assert_eq!(connection.max_queues(), want);
        assert_eq!(u64::from(connection.config().unwrap().num_queues), want);
    }
}

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_BASE: u32 = 10;
const SET_PROTOCOL_FEATURES: u32 = 16;

#[test]
fn a_front_end_that_never_asks_for_the_features_gets_the_answers_that_it_wants() {
    let mut daemon = Daemon::file("");
    let stream = UnixStream::connect(daemon.socket(0)).unwrap();
    let number = |value: u64| value.to_le_bytes().to_vec();
    let pair = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
    for (request, payload, value) in [
        (SET_PROTOCOL_FEATURES, number(protocol::REPLY_ACK | protocol::MQ), 0),
        (SET_OWNER, vec![], 0),
        (SET_FEATURES, number(feature::PROTOCOL_FEATURES | feature::VERSION_1), 0),
        (SET_VRING_NUM, pair(0, 128), 0),
        (SET_VRING_BASE, pair(0, 7), 0),
        (SET_VRING_NUM, pair(0, 129), 1),
    ] {
        send(&stream, request, VERSION | NEED_REPLY, None, &payload, &[]).unwrap();
        let answer = receive(&stream, LIMIT).unwrap().expect("an answer");
        assert_eq!((answer.request, answer.value()), (request, Some(value)));
    }
    assert_eq!(receive(&stream, LIMIT).unwrap(), None, "a wrong message ends the connection");
    daemon.assert_serves(0);
}

#[test]
fn a_front_end_that_has_not_taken_answers_gets_none() {
    let daemon = Daemon::file("");
    let stream = UnixStream::connect(daemon.socket(0)).unwrap();
    send(&stream, SET_OWNER, VERSION | NEED_REPLY, None, &[], &[]).unwrap();
    send(&stream, GET_FEATURES, VERSION, None, &[], &[]).unwrap();
    let answer = receive(&stream, LIMIT).unwrap().expect("an answer");
    assert_eq!(answer.request, GET_FEATURES);
}
