//! Changes that wait for a slow disk hold up nothing but that disk, and not forever.

use super::Client;
use super::slow::{assert_no_answer, two_monitors_with};
use crate::vhost_user::Daemon;
use serde_json::{Value, json};
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::{Disk, Options};

fn export(daemon: &Daemon, id: &str, node: &str, more: Value) -> Value {
    let path = daemon.path(&format!("{id}.sock"));
    let mut export = json!({"type": "vhost-user-blk", "id": id, "node-name": node,
                            "addr": {"type": "unix", "path": path}});
    export.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    export
}

fn connect(daemon: &Daemon, id: &str) -> Disk {
    Disk::open(&daemon.path(&format!("{id}.sock")), &Options::default()).unwrap()
}

/// A read that does not end while the test lasts.
fn begin_read(disk: &mut Disk) {
    let shape = Shape::default();
    disk.queue(0).submit(&Request::In { sector: 0, len: 512 }, &shape).unwrap();
    // Requests are taken in order, so this one's end tells that the read is taken.
    let token = disk.queue(0).submit(&Request::GetId, &shape).unwrap();
    assert_eq!(disk.queue(0).wait().unwrap().token, token);
}

fn bitmaps(nodes: &[&str]) -> Value {
    let add = |node: &&str| json!({"type": "block-dirty-bitmap-add", "data": {"node": node, "name": "marks"}});
    json!({"actions": nodes.iter().map(add).collect::<Vec<_>>()})
}

/// A disk that never answers, `a`, and one that does, `b`, each with an export and a front end.
fn slow_and_healthy(more: Value) -> (Daemon, [Client; 2], [Disk; 2]) {
    let daemon = two_monitors_with(&[
        "--blockdev",
        "driver=null-co,node-name=a,latency-ns=600000000000",
        "--blockdev",
        "driver=null-co,node-name=b",
    ]);
    let mut clients = ["m.sock", "n.sock"].map(|m| Client::connect(&daemon.path(m)));
    clients[0].run("block-export-add", export(&daemon, "ea", "a", more));
    clients[0].run("block-export-add", export(&daemon, "eb", "b", json!({"writable": true})));
    let mut disks = ["ea", "eb"].map(|id| connect(&daemon, id));
    begin_read(&mut disks[0]);
    (daemon, clients, disks)
}

#[test]
fn while_a_transaction_waits_for_a_slow_disk_everything_else_goes_on() {
    let (daemon, [mut first, mut second], [_slow, mut healthy]) = slow_and_healthy(json!({}));
    // An idle export of the slow disk.
    first.run("block-export-add", export(&daemon, "idle", "a", json!({})));
    let mut idle = connect(&daemon, "idle");
    idle.get_id().unwrap();

    let transaction = json!({"execute": "transaction", "arguments": bitmaps(&["a", "b"])});
    first.send(transaction.to_string().as_bytes());
    for sector in 0..20 {
        healthy.read(sector, &mut [0; 512]).unwrap();
        healthy.write(sector, &[1; 512]).unwrap();
    }
    second.run("query-version", json!({}));
    second.run("blockdev-add", json!({"driver": "null-co", "node-name": "c"}));
    second.run("block-export-add", export(&daemon, "ec", "c", json!({})));
    connect(&daemon, "ec").read(0, &mut [0; 512]).unwrap();
    let marks = json!({"node": "c", "name": "marks"});
    second.run("block-dirty-bitmap-add", marks.clone());
    second.run(
        "transaction",
        json!({"actions": [
            {"type": "block-dirty-bitmap-clear", "data": marks}
        ]}),
    );
    second.run("blockdev-add", json!({"driver": "null-co", "node-name": "d"}));
    second.run("blockdev-del", json!({"node-name": "d"}));
    // Its front end stops the queue, which has nothing in flight, and another one comes.
    idle.stop().unwrap();
    idle.reconnect().unwrap();
    healthy.reconnect().unwrap();
    healthy.read(0, &mut [0; 512]).unwrap();
    assert_no_answer(&mut first);
}

#[test]
fn a_drain_that_takes_too_long_names_the_disk_and_what_is_in_flight_and_leaves_all_as_before() {
    let (_daemon, [mut first, _], [_slow, mut healthy]) =
        slow_and_healthy(json!({"io-timeout": 2}));
    let refused = first.refusal("transaction", bitmaps(&["b", "a"]));
    let reported = "I/O has not ended within 2 s: export 'ea' (node 'a') has 1 request in flight, the \
                oldest a read of 512 bytes at 0";
    assert_eq!(refused, reported);
    let nodes = first.run("query-named-block-nodes", json!({"flat": true}));
    for node in nodes.as_array().unwrap() {
        assert!(node.get("dirty-bitmaps").is_none(), "{node}");
    }
    healthy.write(0, &[1; 512]).unwrap();
    first.run("transaction", bitmaps(&["b"]));
    healthy.write(0, &[1; 512]).unwrap();
}

#[test]
fn a_front_end_is_heard_while_its_disk_cannot_be_taken_yet() {
    let (daemon, [mut first, mut second], _disks) = slow_and_healthy(json!({}));
    first.run("blockdev-add", json!({"driver": "null-co", "node-name": "c", "active": false}));
    let more = json!({"allow-inactive": true, "writable": true});
    first.run("block-export-add", export(&daemon, "ec", "c", more));
    // It has the node `c` until the slow disk is at rest.
    let transaction = json!({"execute": "transaction", "arguments": bitmaps(&["a", "c"])});
    first.send(transaction.to_string().as_bytes());
    second.run("query-version", json!({}));
    let mut disk = connect(&daemon, "ec");
    for _ in 0..3 {
        disk.connection().config().unwrap();
        disk.stop().unwrap();
        let base = disk.queue(0).ring().resume_base();
        disk.start_queue(0, base).unwrap();
        disk.connection().enable_queue(0, true).unwrap();
    }
    assert_no_answer(&mut first);
}

#[test]
fn everything_goes_on_while_a_guest_s_write_cache_is_switched_off_on_a_slow_disk() {
    let (daemon, [mut first, mut second], [slow, mut healthy]) = slow_and_healthy(json!({}));
    first.run("block-export-add", export(&daemon, "idle", "a", json!({"writable": true})));
    let mut idle = connect(&daemon, "idle");
    let switches = std::thread::spawn(move || idle.connection().set_write_cache(false));
    for client in [&mut first, &mut second] {
        client.run("query-block-exports", json!({}));
        client.run("query-block", json!({}));
        client.run("blockdev-add", json!({"driver": "null-co", "node-name": "c"}));
        client.run("transaction", bitmaps(&["c"]));
        client.run("blockdev-del", json!({"node-name": "c"}));
    }
    healthy.reconnect().unwrap();
    healthy.write(0, &[1; 512]).unwrap();
    assert!(!switches.is_finished());
    // It is answered after a moment, and its end takes longer.
    first.run("block-export-del", json!({"id": "idle"}));
    switches.join().unwrap().unwrap_err();
    second.run("block-export-del", json!({"id": "eb"}));
    assert_eq!(first.event()["data"]["id"], json!("eb"));
    drop(slow);
}

#[test]
fn a_front_end_that_switches_off_a_write_cache_which_cannot_be_flushed_is_heard_again() {
    let (daemon, [mut first, _], _disks) = slow_and_healthy(json!({}));
    let more = json!({"writable": true, "io-timeout": 1});
    first.run("block-export-add", export(&daemon, "idle", "a", more));
    let mut idle = connect(&daemon, "idle");
    idle.connection().set_write_cache(false).unwrap_err();
    idle.reconnect().unwrap();
    assert_eq!(idle.connection().config().unwrap().wce, 0);
    // What may still land keeps its rings back.
    let token = idle.queue(0).submit(&Request::GetId, &Shape::default()).unwrap();
    idle.connection().config().unwrap();
    assert_eq!(idle.queue(0).reap().unwrap(), None, "request {token}");
}

#[test]
fn a_flush_that_stalls_under_a_snapshot_fails_it_in_time_and_leaves_all_as_before() {
    let daemon = two_monitors_with(&[
        "--blockdev",
        "driver=null-co,node-name=a,latency-ns=600000000000",
        "--blockdev",
        "driver=null-co,node-name=b",
    ]);
    let [mut first, mut second] = ["m.sock", "n.sock"].map(|m| Client::connect(&daemon.path(m)));
    let more = json!({"writable": true, "io-timeout": 1});
    first.run("block-export-add", export(&daemon, "ea", "a", more));
    first.run("block-export-add", export(&daemon, "eb", "b", json!({"writable": true})));
    let [mut slow, mut healthy] = ["ea", "eb"].map(|id| connect(&daemon, id));
    let snapshot = |node: &str| {
        let file = daemon.path(&format!("over-{node}.qcow2"));
        json!({"type": "blockdev-snapshot-sync",
               "data": {"node-name": node, "snapshot-file": file,
                        "snapshot-node-name": format!("over-{node}"), "format": "qcow2"}})
    };
    let nodes = first.run("query-named-block-nodes", json!({"flat": true}));
    let actions = json!({"actions": [snapshot("b"), snapshot("a")]});
    let refused = first.refusal("transaction", actions);
    assert_eq!(refused, "Flushing node 'a' has not ended within 1 s");
    assert_eq!(first.run("query-named-block-nodes", json!({"flat": true})), nodes);
    // Both continue, and the healthy one has its snapshot, while the flush is still under way.
    slow.get_id().unwrap();
    healthy.write(0, &[1; 512]).unwrap();
    second.run("transaction", json!({"actions": [snapshot("b")]}));
    healthy.write(0, &[1; 512]).unwrap();
    first.send(
        json!({"execute": "blockdev-del", "arguments": {"node-name": "b"}}).to_string().as_bytes(),
    );
    assert!(first.reply().get("error").is_some(), "it lies below an overlay");
}
