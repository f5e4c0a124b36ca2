//! Changes of the graph below running clients, and the server's own start and end by a monitor.

use super::client::Client as Nbd;
use super::daemon;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::pattern;
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use vublk::nbd::handshake::OPT_ABORT;
use vublk::nbd::request::*;
use vublk::nbd::{CommandFlags, Headers};

#[test]
fn a_client_under_load_sees_every_write_through_snapshots_and_resizes() {
    let daemon = daemon(&MONITOR);
    let path = daemon.path("nbd.sock");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in 0..2u64 {
            let (path, done) = (&path, &done);
            scope.spawn(move || {
                let mut client = Nbd::connect(path, "vol", Headers::Structured, &[]);
                let mut salt = 0;
                while !done.load(Ordering::Relaxed) || salt < 10 {
                    let at = lane << 20 | u64::from(salt % 16) << 16;
                    let data = pattern(64 << 10, salt);
                    client.write(at, &data);
                    assert_eq!(client.read(at, 64 << 10), data);
                    salt = salt.wrapping_add(1);
                }
            });
        }
        let mut monitor = Client::connect(&daemon.path("m.sock"));
        let mut node = "f".to_owned();
        for n in 0..3 {
            let file = daemon.path(&format!("top{n}.qcow2"));
            let top = format!("top{n}");
            monitor.run(
                "blockdev-snapshot-sync",
                json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": top}),
            );
            node = top;
            let size = (9 + n) << 20;
            monitor.run("block_resize", json!({"node-name": node, "size": size}));
        }
        done.store(true, Ordering::Relaxed);
    });
    // Who comes now sees the new size.
    let mut client = Nbd::connect(&path, "vol", Headers::Simple, &[]);
    client.write((10 << 20) + 512, &[7; 512]);
    assert_eq!(client.read((10 << 20) + 512, 512), [7; 512]);
}

#[test]
fn an_export_in_use_ends_only_if_that_is_meant_and_cuts_its_clients_off() {
    let daemon = daemon(&MONITOR);
    let path = daemon.path("nbd.sock");
    let mut monitor = Client::connect(&daemon.path("m.sock"));
    let mut client = Nbd::connect(&path, "vol", Headers::Simple, &[]);
    assert_eq!(client.read(0, 512), [0; 512]);
    let refused = monitor.ask("block-export-del", json!({"id": "e"}));
    assert_eq!(refused["error"]["desc"], "export 'e' still in use");
    monitor.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert!(client.is_closed());
    // The server goes on, without it.
    let mut client = Nbd::greet(&path);
    assert_eq!(client.option(OPT_ABORT, &[]).len(), 1);
    monitor.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "f"}));
    let mut client = Nbd::connect(&path, "f", Headers::Extended, &[]);
    assert_eq!(client.ask(CMD_WRITE, CommandFlags::PAYLOAD_LEN, (0, 1), b"x"), Err(1));
}

#[test]
fn a_server_that_stops_takes_its_exports_along_and_another_can_start() {
    let daemon = daemon(&MONITOR);
    let path = daemon.path("nbd.sock");
    let mut monitor = Client::connect(&daemon.path("m.sock"));
    for _ in 0..3 {
        let mut client = Nbd::connect(&path, "vol", Headers::Simple, &[]);
        let mut greeted = Nbd::greet(&path);
        monitor.run("nbd-server-stop", json!({}));
        assert!(client.is_closed() && greeted.is_closed());
        assert!(!path.exists());
        assert_eq!(monitor.run("query-block-exports", json!({})), json!([]));
        let addr = json!({"type": "unix", "data": {"path": path}});
        monitor.run("nbd-server-start", json!({"addr": addr, "max-connections": 2}));
        let add = json!({"device": "f", "name": "vol", "writable": true});
        monitor.run("nbd-server-add", add);
    }
    monitor.run("nbd-server-remove", json!({"name": "vol"}));
}
