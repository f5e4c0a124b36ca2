//! A disk whose storage does not answer, under a guest's read and under a command.
//!
//! Other monitors, other disks and the end of the process do not wait for it. The tests show an order, not a time:
//! the read is still in flight.

use super::slow::lease;
use super::{Client, MONITOR};
use crate::failing::held::marked;
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::protocol;
use vublk_testkit::{Disk, Options, process::Server};

/// The healthy disk `b` with the export `eb`, and `a`, whose requests take longer than any test; its export
/// comes last, and would be the first to be waited for.
const ARGUMENTS: [&str; 16] = [
    "--chardev",
    "socket,id=n,path=DIR/n.sock,server=on,wait=off",
    "--monitor",
    "chardev=n",
    "--chardev",
    "socket,id=o,path=DIR/o.sock,server=on,wait=off",
    "--monitor",
    "chardev=o",
    "--blockdev",
    "driver=file,node-name=b,filename=DIR/disk.img",
    "--blockdev",
    "driver=null-co,node-name=a,size=1048576,read-zeroes=on,latency-ns=600000000000",
    "--export",
    "type=vhost-user-blk,id=eb,node-name=b,addr.type=unix,addr.path=DIR/eb.sock",
    "--export",
    "type=vhost-user-blk,id=ea,node-name=a,addr.type=unix,addr.path=DIR/ea.sock,writable=on",
];

struct Stalled {
    daemon: Daemon,
    clients: [Client; 3],
    /// The front end of `a`, with a read in flight.
    disk: Disk,
}

fn stalled() -> Stalled {
    let daemon = Daemon::start(&[&MONITOR[..], &ARGUMENTS[..]].concat());
    let clients = ["m.sock", "n.sock", "o.sock"].map(|name| Client::connect(&daemon.path(name)));
    let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
    let options = Options { protocol, ..Options::default() };
    let mut disk = Disk::open(&daemon.path("ea.sock"), &options).unwrap();
    let read = Request::In { sector: 0, len: 512 };
    disk.queue(0).submit(&read, &Shape::default()).unwrap();
    let end = Instant::now() + LIMIT;
    while marked(&disk).is_empty() {
        assert!(Instant::now() < end, "the read is not taken");
        std::thread::sleep(Duration::from_millis(1));
    }
    Stalled { daemon, clients, disk }
}

/// A command that waits until nothing of `a` is in flight.
fn waits_for_a() -> Value {
    let add = json!({"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "bits"}});
    json!({"execute": "transaction", "arguments": {"actions": [add]}, "id": "a"})
}

/// The next event tells of the end of `export`.
fn assert_ends(client: &mut Client, export: &str) {
    let event = client.event();
    assert_eq!(
        (&event["event"], &event["data"]["id"]),
        (&json!("BLOCK_EXPORT_DELETED"), &json!(export))
    );
}

#[test]
fn other_monitors_are_served_while_a_command_waits_for_a_stalled_disk() {
    let Stalled { daemon, clients: [mut first, mut second, mut third], mut disk } = stalled();
    first.send(waits_for_a().to_string().as_bytes());
    let export = json!({"type": "vhost-user-blk", "id": "e1", "node-name": "b",
                        "addr": {"type": "unix", "path": daemon.path("e1.sock")}});
    second.run("block-export-add", export);
    third.run("query-version", json!({}));
    third.run("object-add", json!({"qom-type": "iothread", "id": "io1"}));
    third.run("object-del", json!({"id": "io1"}));
    Disk::open(&daemon.path("e1.sock"), &Options::default())
        .unwrap()
        .read(0, &mut [0; 512])
        .unwrap();
    second.run("block-export-del", json!({"id": "e1"}));
    assert_ends(&mut second, "e1");
    assert_eq!(disk.queue(0).in_flight(), 1);
    assert_eq!(disk.queue(0).reap().unwrap(), None);
}

#[test]
fn an_export_is_deleted_while_another_that_was_reported_to_end_has_not() {
    let Stalled { daemon, clients: [mut first, mut second, mut third], disk } = stalled();
    // It is answered after a moment, and its end takes longer.
    first.run("block-export-del", json!({"id": "ea"}));
    let refused = third.refusal("block-export-del", json!({"id": "ea"}));
    assert_eq!(refused, "Export 'ea' is already shutting down");
    second.run("block-export-del", json!({"id": "eb"}));
    assert_ends(&mut second, "eb");
    let exports = second.run("query-block-exports", json!({}));
    assert_eq!((&exports[0]["id"], &exports[0]["shutting-down"]), (&json!("ea"), &json!(true)));
    drop((daemon, disk));
}

#[test]
fn quit_ends_healthy_exports_while_a_command_of_another_monitor_waits_for_a_stalled_disk() {
    let Stalled { daemon, clients: [mut first, mut second, _third], disk } = stalled();
    first.send(waits_for_a().to_string().as_bytes());
    assert_eq!(second.ask("quit", json!({})), json!({"return": {}}));
    assert_ends(&mut second, "eb");
    assert!(!daemon.path("eb.sock").exists());
    drop(disk);
}

#[test]
fn quit_is_obeyed_behind_a_command_of_the_same_monitor_that_does_not_end() {
    let Stalled { daemon, clients: [mut first, mut second, _third], disk } = stalled();
    let pipelined =
        format!("{} {{'execute': 'query-version'}} {{'execute': 'quit'}}", waits_for_a());
    first.send(pipelined.as_bytes());
    assert_ends(&mut second, "eb");
    assert!(!daemon.path("eb.sock").exists());
    // No reply comes out of order.
    assert_ends(&mut first, "eb");
    drop(disk);
}

#[test]
fn a_signal_ends_healthy_exports_while_a_command_waits_for_a_stalled_disk() {
    let Stalled { daemon, clients: [mut first, mut second, _third], disk } = stalled();
    first.send(waits_for_a().to_string().as_bytes());
    second.run("query-version", json!({}));
    daemon.server.signal(libc::SIGTERM).unwrap();
    assert_ends(&mut second, "eb");
    assert!(!daemon.path("eb.sock").exists());
    drop(disk);
}

#[test]
fn commands_before_a_quit_are_carried_out_and_each_has_its_reply() {
    let mut daemon = super::daemon(&[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut requests = String::new();
    for id in 0..20 {
        let blockdev = json!({"driver": "null-co", "node-name": format!("n{id}")});
        requests +=
            &json!({"execute": "blockdev-add", "arguments": blockdev, "id": id}).to_string();
    }
    requests += "{'execute': 'query-version', 'id': 20} {'execute': 'quit', 'id': 21}";
    client.send(requests.as_bytes());
    for id in 0..22 {
        let reply = client.reply();
        assert!(reply["id"] == json!(id) && reply.get("return").is_some(), "{reply}");
    }
    assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
}

#[test]
fn a_signal_ends_a_daemon_whose_image_does_not_open_and_the_export_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("disk.img"), [0; 4096]).unwrap();
    let leased = lease(&path("disk.img"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={}",
        path("e.sock").display()
    );
    let image = format!("driver=file,node-name=d,filename={}", path("disk.img").display());
    command.args(["daemon", "--blockdev", "driver=null-co,node-name=n", "--export", &export]);
    command.args(["--blockdev", &image]);
    let mut server = Server::spawn(command).unwrap();
    server.wait_socket(&path("e.sock"), LIMIT).unwrap();
    wait_for_opening(&leased, &server);
    server.signal(libc::SIGTERM).unwrap();
    assert_eq!(server.wait_exit(LIMIT).unwrap().code(), Some(1));
    assert!(server.stderr().contains("ended by a signal"), "{}", server.stderr());
    assert!(!path("e.sock").exists());
    drop(leased);
}

/// Waits until somebody waits for the lease, in open(2).
fn wait_for_opening(leased: &File, server: &Server) {
    let end = Instant::now() + LIMIT;
    // SAFETY: the call takes a descriptor that is open.
    while unsafe { libc::fcntl(leased.as_raw_fd(), libc::F_GETLEASE) } == libc::F_WRLCK {
        assert!(Instant::now() < end, "{}", server.stderr());
        std::thread::sleep(Duration::from_millis(2));
    }
}
