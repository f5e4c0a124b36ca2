//! `transaction`: replies beside qemu-storage-daemon's, failures, and simultaneity.
//!
//! A failed transaction leaves nothing behind; several disks are kept as they were at one moment.

use super::overlays::{OURS, THEIRS, export, node, start, tool};
use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use vublk_testkit::Options;

/// An action of each command that is its own type.
fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn bitmap(kind: &str, node: &str, name: &str, more: Value) -> Value {
    let mut data = json!({"node": node, "name": name});
    data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    action(&format!("block-dirty-bitmap-{kind}"), data)
}

fn put(base: &str, overlay: &str) -> Value {
    action("blockdev-snapshot", json!({"node": base, "overlay": overlay}))
}

/// With a new overlay, called as its file.
fn sync(base: &str, name: &str) -> Value {
    let file = format!("DIR{name}");
    let data = json!({"node-name": base, "snapshot-file": file, "snapshot-node-name": name});
    action("blockdev-snapshot-sync", data)
}

fn internal(device: &str, name: &str) -> Value {
    action("blockdev-snapshot-internal-sync", json!({"device": device, "name": name}))
}

/// Bitmaps of all nodes and the nodes of all exports.
fn state(client: &mut Client) -> Value {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let mut bitmaps: Vec<_> = nodes
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| !node["node-name"].as_str().unwrap().starts_with('#'))
        .map(|node| json!([node["node-name"], node["dirty-bitmaps"], node["ro"]]))
        .collect();
    bitmaps.sort_by_key(|one| one[0].as_str().unwrap().to_owned());
    json!([bitmaps, client.run("query-block-exports", json!({}))])
}

#[test]
fn transactions_come_to_what_they_come_to_in_qemu() {
    let daemons = [start(OURS, &[]), start(THEIRS, &[])];
    let mut clients = [0, 1].map(|n: usize| Client::connect(&daemons[n].path("m.sock")));
    for n in [0, 1] {
        for (name, file) in [("a", "q.qcow2"), ("b", "p.qcow2"), ("c", "o.qcow2"), ("d", "x.qcow2")]
        {
            clients[n].run("blockdev-add", node(&daemons[n], name, "qcow2", file, json!({})));
        }
        clients[n].run("blockdev-add", node(&daemons[n], "r", "raw", "a.img", json!({})));
        for (id, name) in [("ea", "a"), ("eb", "b")] {
            clients[n].run("block-export-add", export(&daemons[n], id, name));
        }
    }
    let none = json!({});
    let abort = || action("abort", json!({}));
    let merge = |target: &str, from: &str| {
        let data = json!({"node": "a", "target": target, "bitmaps": [from]});
        action("block-dirty-bitmap-merge", data)
    };
    let grouped = json!({"completion-mode": "grouped"});
    let one = |kind: &str, name: &str| bitmap(kind, "a", name, json!({}));
    let add = |name: &str| bitmap("add", "a", name, json!({}));
    let all = [
        json!({}),
        json!({"actions": 5}),
        json!({"actions": [], "x": 1}),
        json!({"actions": [5]}),
        json!({"actions": [{"type": "abort"}]}),
        json!({"actions": [{"type": "abort", "data": 5}]}),
        json!({"actions": [{"data": {}}]}),
        json!({"actions": [{"type": "abort", "data": {}, "x": 1}]}),
        json!({"actions": [action("abort", json!({"x": 1}))]}),
        json!({"actions": [action("nosuch", none.clone())]}),
        json!({"actions": [abort()], "properties": {"completion-mode": "x"}}),
        json!({"actions": [abort()], "properties": grouped}),
        json!({"actions": [put("a", "c")], "properties": grouped}),
        json!({"actions": []}),
        json!({"actions": [add("b0"), abort()]}),
        json!({"actions": [add("b0"), add("b0")]}),
        json!({"actions": [add("b0"), one("disable", "b0")]}),
        json!({"actions": [one("remove", "b0"), one("disable", "b0")]}),
        json!({"actions": [one("remove", "b0"), add("b0")]}),
        json!({"actions": [one("remove", "b0"), abort()]}),
        json!({"actions": [bitmap("add", "a", "b1", json!({"persistent": true})), one("enable", "b0"),
                           one("clear", "b0"), abort()]}),
        json!({"actions": [add("b1"), merge("b1", "b0"), one("remove", "b0")]}),
        json!({"actions": [bitmap("clear", "nope", "b1", none.clone())]}),
        json!({"actions": [bitmap("add", "nope", "b1", none.clone())]}),
        json!({"actions": [one("clear", "nope")]}),
        json!({"actions": [merge("b1", "nope")]}),
        json!({"actions": [put("a", "c"), put("b", "nope")]}),
        json!({"actions": [put("a", "c"), put("b", "d"), abort()]}),
        json!({"actions": [put("a", "c"), put("b", "r")]}),
        json!({"actions": [put("a", "c"), sync("b", "s")]}),
        json!({"actions": [sync("c", "t"), bitmap("add", "t", "new", none.clone())]}),
        json!({"actions": [sync("t", "u"), sync("u", "v")]}),
        json!({"actions": [sync("v", "v")]}),
        json!({"actions": [sync("v", "w"), abort()]}),
        json!({"actions": [internal("v", "one"), abort()]}),
        json!({"actions": [internal("v", "one")]}),
        json!({"actions": [internal("v", "one")]}),
        json!({"actions": [internal("v", "two"), internal("r", "two")]}),
        json!({"actions": [internal("v", "two"), internal("nope", "two")]}),
    ];
    for arguments in all {
        let [ours, theirs] = [0, 1].map(|n: usize| {
            let dir = daemons[n].path("").to_str().unwrap().to_owned();
            let text = arguments.to_string().replace("DIR", &dir);
            let reply = clients[n].ask("transaction", serde_json::from_str(&text).unwrap());
            let text = json!([reply, state(&mut clients[n])]).to_string().replace(&dir, "DIR");
            serde_json::from_str::<Value>(&text).unwrap()
        });
        assert_eq!(ours, theirs, "{arguments}");
    }
    let jobs =
        json!({"actions": [action("blockdev-backup", json!({"device": "v", "target": "r"}))]});
    let refused = clients[0].refusal("transaction", jobs);
    assert_eq!(refused, "Actions of type 'blockdev-backup' are not available");
    clients.iter_mut().for_each(|client| drop(client.run("quit", json!({}))));
    for mut daemon in daemons {
        daemon.server.wait_exit(LIMIT).unwrap();
        let list = tool(&daemon.path(""), "qemu-img", &["snapshot", "-l", "v"]);
        assert!(list.contains("one") && !list.contains("two"), "{list}");
    }
}

#[test]
fn two_disks_are_kept_as_they_were_at_one_moment() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for name in ["a0", "b0"] {
        tool(dir.path(), "qemu-img", &["create", "-q", "-f", "qcow2", name, "8M"]);
    }
    let mut daemon = Daemon::start_in(dir, OURS, &MONITOR);
    let mut client = Client::connect(&daemon.path("m.sock"));
    for (name, id) in [("a0", "e0"), ("b0", "e1")] {
        client.run("blockdev-add", node(&daemon, name, "qcow2", name, json!({})));
        client.run("block-export-add", export(&daemon, id, name));
    }
    const ROUNDS: usize = 8;
    let stop = AtomicBool::new(false);
    let (a, b) = (daemon.path("e0.sock"), daemon.path("e1.sock"));
    std::thread::scope(|scope| {
        let stop = &stop;
        let guest = scope.spawn(move || {
            let [mut a, mut b] =
                [a, b].map(|path| vublk_testkit::Disk::open(&path, &Options::default()).unwrap());
            let mut turn = 0u64;
            while !stop.load(Ordering::Relaxed) {
                turn += 1;
                let mut block = [0; 512];
                block[..8].copy_from_slice(&turn.to_le_bytes());
                // The second is written when the first is there, so that it is never ahead.
                a.write(0, &block).unwrap();
                b.write(0, &block).unwrap();
            }
        });
        for round in 0..ROUNDS {
            let dir = daemon.path("").to_str().unwrap().to_owned();
            let pair = |abort: bool| {
                let over = |disk: &str| {
                    let next = if abort { "no".to_owned() } else { (round + 1).to_string() };
                    sync(&format!("{disk}{round}"), &format!("{disk}{next}"))
                };
                let mut actions = vec![over("a"), over("b")];
                actions.extend(abort.then(|| action("abort", json!({}))));
                let text = json!({"actions": actions}).to_string().replace("DIR", &dir);
                serde_json::from_str::<Value>(&text).unwrap()
            };
            let refused = client.refusal("transaction", pair(true));
            assert_eq!(refused, "Transaction aborted using Abort action");
            client.run("transaction", pair(false));
        }
        stop.store(true, Ordering::Relaxed);
        guest.join().unwrap();
    });
    client.run("quit", json!({}));
    daemon.server.wait_exit(LIMIT).unwrap();
    let dir = daemon.path("");
    let counter = |name: String| {
        assert!(tool(&dir, "qemu-img", &["check", &name]).contains("No errors"), "{name}");
        tool(&dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &name, "flat"]);
        let bytes = std::fs::read(dir.join("flat")).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    };
    for round in 0..=ROUNDS {
        let (a, b) = (counter(format!("a{round}")), counter(format!("b{round}")));
        assert!(a == b || a == b + 1, "round {round}: {a} and {b}");
    }
}

#[test]
fn an_overlay_is_taken_back_though_what_it_stands_on_asks_more_of_requests() {
    let daemon = start(OURS, &[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let inner = node(&daemon, "q", "qcow2", "q.qcow2", json!({}));
    client.run("blockdev-add", inner);
    let coarse = json!({"driver": "blkdebug", "node-name": "b", "image": "q", "align": 4096});
    client.run("blockdev-add", coarse);
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "a", "file": "b"}));
    client.run("block-export-add", export(&daemon, "e0", "a"));
    let file = daemon.path("s");
    let data = json!({"node-name": "b", "snapshot-file": file, "snapshot-node-name": "s"});
    let actions = [action("blockdev-snapshot-sync", data), action("abort", json!({}))];
    for _ in 0..2 {
        let refused = client.refusal("transaction", json!({"actions": actions}));
        assert_eq!(refused, "Transaction aborted using Abort action");
    }
    // The guest writes to the image, and the overlay is gone.
    let mut disk = daemon.open(&Options::default());
    disk.write(8, &[5; 4096]).unwrap();
    drop(disk);
    client.run("block-export-del", json!({"id": "e0"}));
    while client.event()["event"] != json!("BLOCK_EXPORT_DELETED") {}
    for name in ["a", "b", "q"] {
        client.run("blockdev-del", json!({"node-name": name}));
    }
    let read = ["-r", "-f", "qcow2", "-c", "read -P 5 4k 4k", "q.qcow2"];
    assert!(!tool(&daemon.path(""), "qemu-io", &read).contains("failed"));
}
