//! Changes under front ends that are connected.

use super::{Client, daemon};
use crate::vhost_user::{Daemon, SIZE, pattern};
use serde_json::{Value, json};
use vublk_testkit::Options;

fn export(daemon: &Daemon, more: Value) -> Value {
    let mut all = json!({"type": "vhost-user-blk", "id": "e0", "node-name": "d0", "writable": true,
                         "addr": {"type": "unix", "path": daemon.path("e0.sock")}});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

fn blockdev(daemon: &Daemon) -> Value {
    json!({"driver": "file", "node-name": "d0", "filename": daemon.path("disk.img")})
}

#[test]
fn a_disk_added_through_the_monitor_serves_and_goes_again() {
    let daemon = daemon(&[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    for round in 0..3u8 {
        client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
        client.run("blockdev-add", blockdev(&daemon));
        client.run("block-export-add", export(&daemon, json!({"iothread": "io0"})));
        let data = pattern(4096, round);
        let mut disk = daemon.open(&Options::default());
        disk.write(8, &data).unwrap();
        assert_eq!(&daemon.image()[4096..8192], data);
        // Everything is in use.
        let refused = client.refusal("object-del", json!({"id": "io0"}));
        assert_eq!(refused, "object 'io0' is in use, can not be deleted");
        let refused = client.refusal("blockdev-del", json!({"node-name": "d0"}));
        assert_eq!(refused, "Node d0 is in use");
        // Front ends hold no reference: the safe mode cuts them off, as in qemu-storage-daemon.
        client.run("block-export-del", json!({"id": "e0"}));
        assert_eq!(client.event()["data"], json!({"id": "e0"}));
        assert_eq!(client.run("query-block-exports", json!({})), json!([]));
        client.run("object-del", json!({"id": "io0"}));
        client.run("blockdev-del", json!({"node-name": "d0"}));
        assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
        assert!(!daemon.socket(0).exists());
    }
}

#[test]
fn a_resize_reaches_the_capacity_that_front_ends_read() {
    let daemon = daemon(&[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("blockdev-add", blockdev(&daemon));
    client.run("block-export-add", export(&daemon, json!({})));
    let mut disk = daemon.open(&Options::default());
    assert_eq!(disk.connection().config().unwrap().capacity_sectors, SIZE / 512);
    assert!(disk.write(SIZE / 512, &[1; 512]).is_err());
    client.run("block_resize", json!({"node-name": "d0", "size": 2 * SIZE}));
    assert_eq!(disk.connection().config().unwrap().capacity_sectors, 2 * SIZE / 512);
    disk.write(SIZE / 512, &[1; 512]).unwrap();
    client.run("block_resize", json!({"node-name": "d0", "size": SIZE}));
    assert!(disk.write(SIZE / 512, &[1; 512]).is_err());
}

#[test]
fn an_export_with_requests_in_flight_is_listed_until_it_has_ended() {
    let daemon = daemon(&["--blockdev", "driver=null-co,node-name=d0,latency-ns=3000000000"]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("block-export-add", export(&daemon, json!({})));
    let mut disk = daemon.open(&Options::default());
    let request = vublk_testkit::request::Request::In { sector: 0, len: 512 };
    let shape = vublk_testkit::request::Shape::default();
    disk.queue(0).submit(&request, &shape).unwrap();
    // The request is taken at once, and takes seconds.
    std::thread::sleep(std::time::Duration::from_millis(200));
    client.run("block-export-del", json!({"id": "e0", "mode": "hard"}));
    if client.events.is_empty() {
        let list = client.run("query-block-exports", json!({}));
        if let Some(export) = list.get(0) {
            assert_eq!(export["shutting-down"], json!(true));
            let refused = client.refusal("block-export-del", json!({"id": "e0"}));
            assert_eq!(refused, "Export 'e0' is already shutting down");
        }
    }
    assert_eq!(client.event()["event"], json!("BLOCK_EXPORT_DELETED"));
    assert_eq!(client.run("query-block-exports", json!({})), json!([]));
    client.run("blockdev-del", json!({"node-name": "d0"}));
}

#[test]
fn a_client_cannot_have_descriptors_of_the_process() {
    let daemon = daemon(&["--blockdev", "driver=null-co,node-name=d0"]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    for fd in 0..16 {
        let addr = json!({"addr": {"type": "fd", "str": fd.to_string()}});
        let refused = client.refusal("block-export-add", export(&daemon, addr));
        assert_eq!(refused, format!("File descriptor named '{fd}' has not been found"));
    }
}
