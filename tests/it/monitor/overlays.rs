//! External snapshots: replies beside qemu-storage-daemon's, and their effect on writers.

use super::{Client, MONITOR, is_same_but_for_advice};
use crate::vhost_user::{Daemon, LIMIT, pattern};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use vublk_testkit::spec::{feature, protocol};
use vublk_testkit::{MemoryLayout, Options};

pub const OURS: &[&str] = &[env!("CARGO_BIN_EXE_vublk"), "daemon"];
pub const THEIRS: &[&str] = &["qemu-storage-daemon"];
const SIZE: u64 = 8 << 20;

pub fn tool(dir: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(dir).output().unwrap();
    let (out, err) = (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{program} {arguments:?}: {err}");
    String::from_utf8(out).unwrap()
}

fn create(dir: &Path, name: &str, more: &[&str]) {
    tool(dir, "qemu-img", &[&["create", "-q", "-f", "qcow2", name], more].concat());
}

/// A daemon with `more` in its command line, in a folder with images of 8 MiB.
pub fn start(program: &[&str], more: &[&str]) -> Daemon {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = dir.path();
    for name in ["q.qcow2", "o.qcow2", "p.qcow2", "x.qcow2"] {
        create(at, name, &["8M"]);
    }
    create(at, "lazy.qcow2", &["8M", "-o", "lazy_refcounts=on"]);
    create(at, "over.qcow2", &["-b", "q.qcow2", "-F", "qcow2"]);
    std::fs::File::create(at.join("a.img")).unwrap().set_len(SIZE).unwrap();
    Daemon::start_in(dir, program, &[&MONITOR[..], more].concat())
}

pub fn node(daemon: &Daemon, name: &str, driver: &str, file: &str, more: Value) -> Value {
    let file = json!({"driver": "file", "filename": daemon.path(file)});
    let mut all = json!({"driver": driver, "node-name": name, "file": file});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

pub fn export(daemon: &Daemon, id: &str, node: &str) -> Value {
    let path = daemon.path(&format!("{id}.sock"));
    json!({"type": "vhost-user-blk", "id": id, "node-name": node, "writable": true, "num-queues": 2,
           "addr": {"type": "unix", "path": path}})
}

/// A daemon that serves `q.qcow2` or another image as `e0`, from the node `q`.
pub fn serving(driver: &str, image: &str) -> (Daemon, Client) {
    let daemon = start(OURS, &[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("blockdev-add", node(&daemon, "q", driver, image, json!({"discard": "unmap"})));
    client.run("block-export-add", export(&daemon, "e0", "q"));
    (daemon, client)
}

pub fn snapshot(daemon: &Daemon, base: &str, file: &str, name: &str) -> Value {
    json!({"node-name": base, "snapshot-file": daemon.path(file), "snapshot-node-name": name})
}

#[test]
fn external_snapshots_are_made_with_qemus_replies() {
    let daemons = [start(OURS, &[]), start(THEIRS, &[])];
    let mut clients = [0, 1].map(|n: usize| Client::connect(&daemons[n].path("m.sock")));
    let add = "blockdev-add";
    let sync = |base: &'static str, file: &'static str, name: &'static str, more: Value| {
        move |daemon: &Daemon| {
            let mut all = snapshot(daemon, base, file, name);
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            ("blockdev-snapshot-sync", all)
        }
    };
    let put = |base: &'static str, overlay: &'static str| {
        move |_: &Daemon| ("blockdev-snapshot", json!({"node": base, "overlay": overlay}))
    };
    let plain =
        |command: &'static str, arguments: Value| move |_: &Daemon| (command, arguments.clone());
    type Step = Box<dyn Fn(&Daemon) -> (&'static str, Value)>;
    let none = json!({});
    let steps: Vec<Step> = vec![
        Box::new(|d| (add, node(d, "q", "qcow2", "q.qcow2", json!({})))),
        Box::new(|d| ("block-export-add", export(d, "e0", "q"))),
        Box::new(|d| (add, node(d, "o", "qcow2", "over.qcow2", json!({"backing": null})))),
        Box::new(put("nope", "o")),
        Box::new(put("q", "nope")),
        Box::new(put("q", "q")),
        Box::new(plain("blockdev-snapshot", json!({"node": "q"}))),
        Box::new(plain("blockdev-snapshot", json!({"overlay": "q"}))),
        Box::new(plain("blockdev-snapshot", json!({"node": "q", "overlay": "o", "x": 1}))),
        Box::new(|d| (add, node(d, "r", "raw", "a.img", json!({})))),
        Box::new(put("q", "r")),
        Box::new(put("q", "o")),
        Box::new(put("q", "o")),
        Box::new(plain("query-block-exports", none.clone())),
        Box::new(plain("blockdev-del", json!({"node-name": "q"}))),
        Box::new(plain("blockdev-del", json!({"node-name": "o"}))),
        Box::new(|d| (add, node(d, "p", "qcow2", "p.qcow2", json!({})))),
        Box::new(|d| ("block-export-add", export(d, "e1", "p"))),
        Box::new(put("o", "p")),
        Box::new(|d| ("block-export-add", export(d, "e2", "q"))),
        Box::new(plain("block-export-del", json!({"id": "e1"}))),
        Box::new(|d| (add, node(d, "ro", "qcow2", "x.qcow2", json!({"read-only": true})))),
        Box::new(put("o", "ro")),
        Box::new(put("o", "p")),
        Box::new(plain("query-block-exports", none.clone())),
        Box::new(plain("blockdev-snapshot-sync", json!({"node-name": "p"}))),
        Box::new(plain("blockdev-snapshot-sync", json!({"snapshot-file": "s"}))),
        Box::new(plain("blockdev-snapshot-sync", json!({"device": "p", "snapshot-file": "s"}))),
        Box::new(plain("blockdev-snapshot-sync", json!({"node-name": "p", "snapshot-file": "s"}))),
        Box::new(sync("nope", "s", "s", none.clone())),
        Box::new(sync("p", "s", "q", none.clone())),
        Box::new(sync("p", "s", "9", none.clone())),
        Box::new(sync("p", "s", "s", json!({"format": "nosuch"}))),
        Box::new(sync("p", "s", "s", json!({"format": "raw"}))),
        Box::new(sync("p", "s", "s", json!({"mode": "foo"}))),
        Box::new(sync("p", "no/s", "s", none.clone())),
        Box::new(plain(
            "blockdev-snapshot-sync",
            json!({"node-name": "p", "snapshot-node-name": "s",
                   "snapshot-file": r#"json:{"driver":"raw","file.driver":"null-co"}"#}),
        )),
        Box::new(sync("p", "no", "s", json!({"mode": "existing"}))),
        Box::new(sync("p", "a.img", "s", json!({"mode": "existing"}))),
        Box::new(sync("q", "s", "s", none.clone())),
        Box::new(sync("p", "s", "s", none.clone())),
        Box::new(sync("p", "t", "t", none.clone())),
        Box::new(plain("query-block-exports", none.clone())),
        Box::new(plain("blockdev-del", json!({"node-name": "s"}))),
        Box::new(sync("r", "r", "over-r", none.clone())),
        Box::new(plain("blockdev-del", json!({"node-name": "over-r"}))),
        Box::new(plain("block-export-del", json!({"id": "e0"}))),
        Box::new(plain("blockdev-del", json!({"node-name": "p"}))),
        Box::new(plain("blockdev-del", json!({"node-name": "o"}))),
        Box::new(plain("blockdev-del", json!({"node-name": "q"}))),
    ];
    let mut differences = String::new();
    for step in &steps {
        let [(command, ours), (_, theirs)] = [0, 1].map(|n: usize| {
            let (command, arguments) = step(&daemons[n]);
            let reply = clients[n].ask(command, arguments).to_string();
            let reply = reply.replace(daemons[n].path("").to_str().unwrap(), "DIR/");
            (command, serde_json::from_str::<Value>(&reply).unwrap())
        });
        if !is_same_but_for_advice(&ours, &theirs) {
            let (_, arguments) = step(&daemons[0]);
            differences +=
                &format!("\n{command} {arguments}\n  ours:   {ours}\n  theirs: {theirs}");
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn what_was_written_before_a_snapshot_is_in_the_base_and_what_comes_after_it_in_the_overlay() {
    for (driver, image) in [("qcow2", "lazy.qcow2"), ("raw", "a.img")] {
        let (daemon, mut client) = serving(driver, image);
        let dir = daemon.path("");
        if driver == "qcow2" {
            let bitmap = json!({"node": "q", "name": "b0", "persistent": true});
            client.run("block-dirty-bitmap-add", bitmap);
        }
        let mut disk = daemon.open(&Options::default());
        let (old, new) = (pattern(128 << 10, 1), pattern(64 << 10, 2));
        disk.write(0, &old).unwrap();
        client.run("blockdev-snapshot-sync", snapshot(&daemon, "q", "s.qcow2", "s"));
        // The base is complete, and others can read it, while the guest continues.
        let mut back = vec![0; old.len()];
        disk.read(0, &mut back).unwrap();
        assert!(back == old);
        disk.write(0, &new).unwrap();
        tool(&dir, "qemu-img", &["convert", "-f", driver, "-O", "raw", image, "before.raw"]);
        assert!(std::fs::read(dir.join("before.raw")).unwrap()[..old.len()] == old);
        if driver == "qcow2" {
            assert!(tool(&dir, "qemu-img", &["check", image]).contains("No errors"));
            let info: Value =
                serde_json::from_str(&tool(&dir, "qemu-img", &["info", "--output=json", image]))
                    .unwrap();
            let bitmaps = &info["format-specific"]["data"]["bitmaps"];
            assert_eq!(bitmaps[0]["flags"], json!(["auto"]), "{info}");
            assert_eq!(info["dirty-flag"], json!(false));
            let bitmap = json!({"node": "q", "name": "b0"});
            let refused = client.refusal("block-dirty-bitmap-clear", bitmap.clone());
            assert_eq!(refused, "Bitmap 'b0' is readonly and cannot be modified");
            client.run("block-dirty-bitmap-disable", bitmap);
            let more = json!({"node": "q", "name": "b1", "persistent": true});
            let refused = client.refusal("block-dirty-bitmap-add", more);
            assert!(refused.contains("'b1' persistent in 'q'"), "{refused}");
        }
        let reported = client.run("query-named-block-nodes", json!({"flat": true}));
        let base = reported.as_array().unwrap().iter().find(|one| one["node-name"] == "q").unwrap();
        assert_eq!(base["ro"], json!(true));
        let mut again = export(&daemon, "e1", "q");
        assert_eq!(
            client.refusal("block-export-add", again.clone()),
            "Cannot export read-only node as writable"
        );
        again["writable"] = json!(false);
        client.run("block-export-add", again);
        // A front end that comes back finds the overlay.
        disk.write_zeroes(64, 64, true).unwrap();
        disk.flush().unwrap();
        disk.reconnect().unwrap();
        let mut now = [&new[..], &old[new.len()..]].concat();
        now[32 << 10..64 << 10].fill(0);
        disk.read(0, &mut back).unwrap();
        assert!(back == now);
        drop(disk);
        let mut daemon = daemon;
        client.run("quit", json!({}));
        daemon.server.wait_exit(LIMIT).unwrap();
        let info = tool(&dir, "qemu-img", &["info", "s.qcow2"]);
        let path = dir.join(image);
        assert!(info.contains(&format!("backing file: {}\n", path.display())), "{info}");
        assert!(info.contains(&format!("backing file format: {driver}\n")), "{info}");
        tool(&dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "s.qcow2", "after.raw"]);
        assert!(std::fs::read(dir.join("after.raw")).unwrap()[..now.len()] == now);
        assert!(tool(&dir, "qemu-img", &["check", "s.qcow2"]).contains("No errors"));
    }
}

/// The files that the rings of a daemon keep open, whatever becomes of the process.
fn kept_by_rings(daemon: &Daemon) -> String {
    let infos = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.server.pid())).unwrap();
    let infos = infos.map(|info| std::fs::read_to_string(info.unwrap().path()).unwrap_or_default());
    infos.filter_map(|info| Some(info.split_once("UserFiles")?.1.to_owned())).collect()
}

#[test]
fn rings_that_track_their_requests_keep_the_locks_and_the_journal_of_the_overlay() {
    let (daemon, mut client) = serving("qcow2", "q.qcow2");
    let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
    let mut disk = daemon.open(&Options { protocol, ..Options::default() });
    assert!(disk.inflight().is_some());
    disk.write(0, &pattern(4096, 1)).unwrap();
    assert!(kept_by_rings(&daemon).contains("/q.qcow2"));
    client.run("blockdev-snapshot-sync", snapshot(&daemon, "q", "s.qcow2", "s"));
    assert!(kept_by_rings(&daemon).contains("/s.qcow2"));
    disk.write(0, &pattern(4096, 2)).unwrap();
    let dir = daemon.path("");
    let is_mapped = |image: &str| {
        tool(&dir, "qemu-img", &["map", "-U", "-f", "qcow2", "s.qcow2"]).contains(image)
    };
    assert!(is_mapped("q.qcow2") && !is_mapped("s.qcow2"), "its table waits for a flush");
    disk.flush().unwrap();
    assert!(is_mapped("s.qcow2"));
}

#[test]
fn an_overlay_over_a_filter_over_a_window_records_the_window() {
    let daemon = start(OURS, &[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let data = pattern(1 << 20, 5);
    let file = std::fs::File::options().write(true).open(daemon.path("a.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 4 << 20).unwrap();
    let window = json!({"offset": 4 << 20, "size": 1 << 20});
    client.run("blockdev-add", node(&daemon, "r", "raw", "a.img", window));
    // What a filter does is not recorded.
    client.run("blockdev-add", json!({"driver": "copy-on-read", "node-name": "c", "file": "r"}));
    client.run("block-export-add", export(&daemon, "e0", "c"));
    client.run("blockdev-snapshot-sync", snapshot(&daemon, "c", "s.qcow2", "s"));
    let mut disk = daemon.open(&Options::default());
    disk.write(0, &pattern(4096, 6)).unwrap();
    drop(disk);
    client.run("quit", json!({}));
    let mut daemon = daemon;
    daemon.server.wait_exit(LIMIT).unwrap();
    let dir = daemon.path("");
    for program in ["qemu-img", env!("CARGO_BIN_EXE_vublk")] {
        tool(&dir, program, &["convert", "-f", "qcow2", "-O", "raw", "s.qcow2", "s.raw"]);
        let read = std::fs::read(dir.join("s.raw")).unwrap();
        assert!(read == [&pattern(4096, 6), &data[4096..]].concat(), "{program}");
    }
}

#[test]
fn a_node_that_was_turned_to_another_file_is_no_overlay_and_stays() {
    let (daemon, mut client) = serving("qcow2", "q.qcow2");
    client.run("blockdev-add", node(&daemon, "f", "raw", "o.qcow2", json!({})));
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "o", "file": "f"}));
    // From here on it stands on another node than it was opened with.
    client.run("blockdev-snapshot-sync", snapshot(&daemon, "f", "s.qcow2", "s"));
    let refused = client.refusal("blockdev-snapshot", json!({"node": "q", "overlay": "o"}));
    assert!(refused.starts_with("Node 'o' stands on 's'"), "{refused}");
    client.run("block-export-add", export(&daemon, "e1", "o"));
    let mut disk = daemon.open_number(1, &Options::default());
    disk.write(0, &pattern(4096, 1)).unwrap();
}

/// Of a disk of 8 MiB, in pieces.
const PIECE: usize = 16 << 10;

fn piece(salt: u8) -> Vec<u8> {
    if salt == 0 { vec![0; PIECE] } else { pattern(PIECE, salt) }
}

/// Has two queues of the disk that is served first read and write without a rest while `change` runs: none of them
/// fails, and each reads what it has written. What the pieces hold afterwards.
pub fn written_while(daemon: &Daemon, change: impl FnOnce()) -> Vec<u8> {
    let mut disk = daemon.open(&Options {
        num_queues: 2,
        layout: MemoryLayout::adjacent(2, 4 << 20),
        ..Options::default()
    });
    let mut queues = std::mem::take(&mut disk.queues);
    let stop = AtomicBool::new(false);
    let last: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let work = queues.iter_mut().enumerate().map(|(number, queue)| {
            let stop = &stop;
            scope.spawn(move || {
                // Each has a half of the disk.
                let pieces = SIZE / 2 / PIECE as u64;
                let mut held = vec![0; pieces as usize];
                let mut turn = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let at = turn * 37 % pieces;
                    let sector = (number as u64 * pieces + at) * 32;
                    let mut back = vec![0; PIECE];
                    queue.read(sector, &mut back).unwrap();
                    let was = held[at as usize];
                    assert!(back == piece(was), "queue {number}, piece {at}, turn {turn}");
                    let salt = (turn % 255) as u8 + 1;
                    queue.write(sector, &piece(salt)).unwrap();
                    held[at as usize] = salt;
                    if turn.is_multiple_of(64) {
                        queue.flush().unwrap();
                    }
                }
                held
            })
        });
        let work: Vec<_> = work.collect();
        change();
        stop.store(true, Ordering::Relaxed);
        work.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    disk.queues = queues;
    last.concat()
}

/// Compares the disk that is served first with what [`written_while`] has left there.
pub fn check_written(daemon: &Daemon, last: &[u8]) {
    let mut disk = daemon.open(&Options::default());
    let mut back = vec![0; PIECE];
    for (at, &salt) in last.iter().enumerate() {
        disk.read(at as u64 * 32, &mut back).unwrap();
        assert!(back == piece(salt), "piece {at}");
    }
}

#[test]
fn queues_that_never_rest_lose_nothing_across_ten_snapshots() {
    let (mut daemon, mut client) = serving("qcow2", "q.qcow2");
    let last = written_while(&daemon, || {
        let mut base = "q".to_owned();
        for number in 0..10 {
            let name = format!("s{number}");
            if number % 2 == 0 {
                let new = snapshot(&daemon, &base, &format!("{name}.qcow2"), &name);
                client.run("blockdev-snapshot-sync", new);
            } else {
                let file = format!("{name}.qcow2");
                create(&daemon.path(""), &file, &["8M"]);
                client.run("blockdev-add", node(&daemon, &name, "qcow2", &file, json!({})));
                let put = json!({"node": base, "overlay": name});
                client.run("blockdev-snapshot", put);
            }
            base = name;
        }
    });
    let depth = client.run("query-named-block-nodes", json!({}));
    let top = depth.as_array().unwrap().iter().find(|one| one["node-name"] == "s9").unwrap();
    assert_eq!(top["backing_file_depth"], json!(10));
    check_written(&daemon, &last);
    client.run("quit", json!({}));
    daemon.server.wait_exit(LIMIT).unwrap();
    for name in ["q.qcow2", "s0.qcow2", "s4.qcow2", "s9.qcow2"] {
        assert!(
            tool(&daemon.path(""), "qemu-img", &["check", name]).contains("No errors"),
            "{name}"
        );
    }
}

#[test]
fn an_overlay_that_cannot_be_had_leaves_the_guest_with_what_it_has() {
    let (daemon, mut client) = serving("qcow2", "q.qcow2");
    let dir = daemon.path("");
    let mut disk = daemon.open(&Options::default());
    disk.write(0, &pattern(4096, 1)).unwrap();
    client.run("blockdev-add", node(&daemon, "ro", "qcow2", "o.qcow2", json!({"read-only": true})));
    for _ in 0..2 {
        let refused = client.refusal("blockdev-snapshot", json!({"node": "q", "overlay": "ro"}));
        assert_eq!(refused, "Block node is read-only");
        let exports = client.run("query-block-exports", json!({}));
        assert_eq!(exports[0]["node-name"], json!("q"));
        disk.write(8, &pattern(4096, 2)).unwrap();
    }
    // The one that was asked for is as it was, and the next one is taken.
    client.run("blockdev-del", json!({"node-name": "ro"}));
    client.run("blockdev-add", node(&daemon, "o", "qcow2", "o.qcow2", json!({})));
    client.run("blockdev-snapshot", json!({"node": "q", "overlay": "o"}));
    // The guest may continue with the features that it knows, though the overlay discards nothing.
    disk.reconnect().unwrap();
    assert!(disk.has(feature::DISCARD));
    let mut back = vec![0; 8192];
    disk.read(0, &mut back).unwrap();
    assert!(back == [pattern(4096, 1), pattern(4096, 2)].concat());
    // An image that another process has is refused; what is there is not written over.
    let other = super::daemon(&["--sandbox-path", dir.to_str().unwrap()]);
    let theirs = node(&daemon, "p", "qcow2", "p.qcow2", json!({}));
    Client::connect(&other.path("m.sock")).run("blockdev-add", theirs);
    let refused = client.refusal("blockdev-snapshot-sync", snapshot(&daemon, "o", "p.qcow2", "s"));
    drop(other);
    assert!(refused.contains("lock"), "{refused}");
    disk.write(0, &pattern(4096, 3)).unwrap();
    disk.read(0, &mut back).unwrap();
    assert!(back == [pattern(4096, 3), pattern(4096, 2)].concat());
}
