//! A daemon whose storage is full.
//!
//! Nothing acknowledged is lost, nothing else fails, and a kill in the middle changes nothing.

use super::small::Small;
use super::{block, write_of};
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT, new_image};
use serde_json::{Value, json};
use std::process::Command;
use vublk_testkit::Options;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::{protocol, status};

const MIB: u32 = 8;

/// A daemon with a monitor and the export `e0` of a sparse image of 16 MiB on a file system of 8, of
/// which 1 MiB is left.
fn daemon(policy: &str) -> (Small, Daemon) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small");
    std::fs::create_dir(&path).unwrap();
    let small = Small::mount(&path, MIB);
    new_image(&small.file("disk.img"), 16 << 20);
    small.fill(MIB, 256);
    let enter = small.enter();
    let mut program: Vec<&str> = enter.iter().map(String::as_str).collect();
    program.extend([env!("CARGO_BIN_EXE_vublk"), "daemon"]);
    let node = "driver=raw,node-name=d0,file.driver=file,file.filename=DIR/small/disk.img";
    let export = format!(
        "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=DIR/e0.sock,writable=on,\
         {policy}"
    );
    let daemon = Daemon::start_in(
        dir,
        &program,
        &[&MONITOR[..], &["--blockdev", node, "--export", &export]].concat(),
    );
    (small, daemon)
}

fn options() -> Options {
    let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
    Options { queue_size: 256, protocol, limit: LIMIT, ..Options::default() }
}

fn export(client: &mut Client) -> Value {
    client.run("query-block-exports", json!({}))[0].clone()
}

/// Waits until this many requests are held.
fn wait_held(client: &mut Client, held: usize) -> Value {
    let end = std::time::Instant::now() + LIMIT;
    loop {
        let export = export(client);
        if export.get("x-held").is_some_and(|found| *found == json!(held)) {
            return export;
        }
        assert!(std::time::Instant::now() < end, "{export}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// A monitor serves one client at a time: the other one goes, and comes back.
fn ctl(daemon: &Daemon, client: Client, command: &str) -> Client {
    drop(client);
    let status = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["ctl", "--socket", daemon.path("m.sock").to_str().unwrap(), command, "id=e0"])
        .status()
        .unwrap();
    assert!(status.success());
    Client::connect(&daemon.path("m.sock"))
}

#[test]
fn writes_to_a_full_file_system_are_held_over_a_kill_until_there_is_room() {
    for policy in ["werror=enospc", "werror=stop"] {
        let (small, mut daemon) = daemon(policy);
        let mut client = Client::connect(&daemon.path("m.sock"));
        let mut disk = daemon.open(&options());
        assert!(export(&mut client).get("x-held").is_none());
        // As many as the ring takes.
        let mut add = |number| disk.queue(0).add(&write_of(number), &Shape::indirect());
        let sent = (0..).map_while(|number| add(number).ok()).count();
        disk.queue(0).publish().unwrap();
        // Some fit; those are acknowledged, the others held.
        let mut done = Vec::new();
        let mut reap = |disk: &mut vublk_testkit::Disk| {
            while let Some(one) = disk.queue(0).reap().unwrap() {
                assert_eq!(one.status, status::OK);
                done.push(one.token);
            }
            done.len()
        };
        let mut acknowledged = reap(&mut disk);
        let end = std::time::Instant::now() + LIMIT;
        loop {
            let held = export(&mut client).get("x-held").and_then(Value::as_u64).unwrap_or(0);
            acknowledged = reap(&mut disk).max(acknowledged);
            if held > 0 && acknowledged + held as usize == sent {
                break;
            }
            assert!(std::time::Instant::now() < end, "{acknowledged} + {held} of {sent}");
        }
        let held = sent - acknowledged;
        let event = client.event();
        assert_eq!(event["event"], json!("BLOCK_IO_ERROR"));
        let wanted = json!({"device": "", "node-name": "d0", "operation": "write",
            "action": "stop", "nospace": true, "reason": "No space left on device",
            "x-export": "e0"});
        assert_eq!(event["data"], wanted);
        let last = &export(&mut client)["x-last-error"];
        assert_eq!((&last["operation"], &last["length"]), (&json!("write"), &json!(4096)));
        assert_eq!(last["reason"], json!("No space left on device"));

        daemon.server.signal(libc::SIGKILL).unwrap();
        daemon.server.wait_exit(LIMIT).unwrap();
        daemon.restart();
        disk.reconnect().unwrap();
        let mut client = Client::connect(&daemon.path("m.sock"));
        wait_held(&mut client, held);
        // Other requests continue.
        disk.queue(0).submit(&Request::In { sector: 0, len: 512 }, &Shape::indirect()).unwrap();
        assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);

        small.free();
        client = ctl(&daemon, client, "x-block-export-retry");
        let rest = disk.queue(0).drain().unwrap();
        assert_eq!(rest.len(), held);
        assert!(rest.iter().all(|one| one.status == status::OK));
        assert_eq!(export(&mut client)["x-held"], json!(0));
        let image = std::fs::read(small.file("disk.img")).unwrap();
        for number in 0..sent {
            assert!(image[number * 4096..][..4096] == block(number as u64), "block {number}");
        }
        drop(disk);
        daemon.end();
    }
}

#[test]
fn an_operator_gives_up_on_writes_that_do_not_fit() {
    let (_small, daemon) = daemon("werror=stop");
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut disk = daemon.open(&options());
    let data = vec![7; 4 << 20];
    let shape = Shape::indirect();
    disk.queue(0).submit(&Request::Out { sector: 0, data }, &shape).unwrap();
    wait_held(&mut client, 1);
    client = ctl(&daemon, client, "x-block-export-fail");
    assert_eq!(disk.queue(0).wait().unwrap().status, status::IOERR);
    assert_eq!(export(&mut client)["x-held"], json!(0));
    for command in ["x-block-export-retry", "x-block-export-fail"] {
        let refused = client.refusal(command, json!({"id": "zz"}));
        assert_eq!(refused, "Export 'zz' is not found");
    }
    // Where nobody asked for anything else, what does not fit fails.
    drop(disk);
    client.run("block-export-del", json!({"id": "e0"}));
    let socket = daemon.path("e0.sock");
    client.run(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "e0",
        "node-name": "d0", "writable": true, "addr": {"type": "unix", "path": socket}}),
    );
    let mut disk = daemon.open(&options());
    let request = Request::Out { sector: 0, data: vec![7; 4 << 20] };
    assert_eq!(disk.run(&request).unwrap().status, status::IOERR);
}
