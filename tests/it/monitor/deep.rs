//! Long backing chains under exports: their limit, and taking disks apart again.

use super::overlays::{OURS, export, node, start, tool};
use super::{Client, MONITOR};
use crate::tools::chain_of;
use crate::vhost_user::{Daemon, pattern};
use serde_json::json;
use vublk_testkit::Options;

/// As many images as there can be in a chain.
const LIMIT: usize = 1000;

/// Serves `s0.qcow2` as `e0` through two filters, and puts overlays `s1`, `s2`, … over it. All images are named as
/// users in their folder name them.
fn snapshots_under_filters(count: usize) -> (Daemon, Client) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    tool(dir.path(), "qemu-img", &["create", "-q", "-f", "qcow2", "s0.qcow2", "8M"]);
    let folder = dir.path().to_str().unwrap().to_owned();
    let daemon = Daemon::start_in(dir, &[&["env", "-C", &folder], OURS].concat(), &MONITOR);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let file = json!({"driver": "file", "filename": "s0.qcow2"});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "s0", "file": file}));
    let copier = json!({"driver": "copy-on-read", "node-name": "c", "file": "s0"});
    client.run("blockdev-add", copier);
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "a", "file": "c"}));
    client.run("block-export-add", export(&daemon, "e0", "a"));
    let mut disk = daemon.open(&Options::default());
    for n in 1..=count {
        disk.write(n as u64, &pattern(512, n as u8)).unwrap();
        let (base, name, file) = (format!("s{}", n - 1), format!("s{n}"), format!("s{n}.qcow2"));
        client.run(
            "blockdev-snapshot-sync",
            json!({"node-name": base, "snapshot-file": file, "snapshot-node-name": name}),
        );
    }
    let mut back = vec![0; 512];
    for n in 1..=count {
        disk.read(n as u64, &mut back).unwrap();
        assert!(back == pattern(512, n as u8), "snapshot {n}");
    }
    (daemon, client)
}

/// The top image is sound, and shows what was written before each snapshot.
fn assert_sound(dir: &std::path::Path, count: usize) {
    let top = format!("s{count}.qcow2");
    tool(dir, "qemu-img", &["check", "-q", &top]);
    tool(dir, "qemu-img", &["convert", "-O", "raw", &top, "all.raw"]);
    let all = std::fs::read(dir.join("all.raw")).unwrap();
    for n in 1..=count {
        assert!(all[n * 512..][..512] == pattern(512, n as u8), "snapshot {n}");
    }
}

#[test]
fn an_export_over_filters_over_many_snapshots_goes_when_it_is_deleted() {
    let (daemon, mut client) = snapshots_under_filters(80);
    client.run("block-export-del", json!({"id": "e0"}));
    while client.event()["event"] != json!("BLOCK_EXPORT_DELETED") {}
    assert_eq!(client.run("query-block-exports", json!({})), json!([]));
    for name in ["a", "c"] {
        client.run("blockdev-del", json!({"node-name": name}));
    }
    assert_sound(&daemon.path(""), 80);
}

#[test]
fn a_daemon_with_an_export_over_filters_over_many_snapshots_ends_in_order() {
    let (mut daemon, client) = snapshots_under_filters(80);
    drop(client);
    daemon.server.signal(libc::SIGTERM).unwrap();
    let status = daemon.server.wait_exit(crate::vhost_user::LIMIT).unwrap();
    assert!(status.success(), "{status}:\n{}", daemon.server.stderr());
    assert_sound(&daemon.path(""), 80);
}

/// Works on `e0`, in requests that no fast path takes, too.
fn work_on(daemon: &Daemon) {
    let mut disk = daemon.open(&Options::default());
    let mut back = vec![0; 1 << 20];
    disk.write(1, &pattern(512, 1)).unwrap();
    disk.write(100, &pattern(200 << 10, 2)).unwrap();
    disk.discard(1024, 512, 0).unwrap();
    disk.write_zeroes(1280, 128, true).unwrap();
    disk.flush().unwrap();
    disk.read(0, &mut back).unwrap();
    assert!(
        back[512..1024] == pattern(512, 1)
            && back[100 * 512..][..200 << 10] == pattern(200 << 10, 2)
    );
}

#[test]
fn requests_through_as_many_filters_as_there_can_be_fit_the_stack_of_a_worker() {
    let daemon = start(OURS, &[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client
        .run("blockdev-add", node(&daemon, "n0", "qcow2", "q.qcow2", json!({"discard": "unmap"})));
    // The image and its file are two of the 64.
    for n in 1..=62 {
        let (driver, below) = match n % 3 {
            0 => ("raw", "file"),
            1 => ("copy-on-read", "file"),
            _ => ("blkdebug", "image"),
        };
        let name = format!("n{n}");
        let mut filter = json!({"driver": driver, "node-name": name, "discard": "unmap"});
        filter[below] = json!(format!("n{}", n - 1));
        client.run("blockdev-add", filter);
    }
    let more = json!({"driver": "raw", "node-name": "n63", "file": "n62"});
    assert_eq!(client.refusal("blockdev-add", more), "'n63' is more than 64 nodes deep");
    client.run("block-export-add", export(&daemon, "e0", "n62"));
    work_on(&daemon);
    daemon.end();
}

#[test]
fn requests_through_images_with_filters_between_them_fit_the_stack_of_a_worker() {
    let daemon = start(OURS, &[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("blockdev-add", node(&daemon, "i0", "qcow2", "q.qcow2", json!({})));
    for n in 1..=62 {
        let (filter, image) = (format!("f{n}"), format!("i{n}.qcow2"));
        let below = json!({"driver": "raw", "node-name": filter, "file": format!("i{}", n - 1)});
        client.run("blockdev-add", below);
        std::fs::copy(daemon.path("o.qcow2"), daemon.path(&image)).unwrap();
        let over = node(&daemon, &format!("i{n}"), "qcow2", &image, json!({"backing": filter}));
        client.run("blockdev-add", over);
    }
    client.run("block-export-add", export(&daemon, "e0", "i62"));
    work_on(&daemon);
    daemon.end();
}

#[test]
fn a_chain_under_an_export_grows_to_the_limit_and_no_further() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    chain_of(dir.path(), LIMIT - 1);
    // More descriptors than most shells give.
    let program = [&["prlimit", "--nofile=4096:4096"], OURS].concat();
    let daemon = Daemon::start_in(dir, &program, &MONITOR);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let top = format!("i{:04}.qcow2", LIMIT - 2);
    client.run("blockdev-add", node(&daemon, "q", "qcow2", &top, json!({})));
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "a", "file": "q"}));
    client.run("block-export-add", export(&daemon, "e0", "a"));
    let snapshot = |base: &str, name: &str| {
        let file = daemon.path(&format!("{name}.qcow2"));
        json!({"node-name": base, "snapshot-file": file, "snapshot-node-name": name})
    };
    client.run("blockdev-snapshot-sync", snapshot("q", "o"));
    for _ in 0..2 {
        assert_eq!(
            client.refusal("blockdev-snapshot-sync", snapshot("o", "p")),
            "Cannot put an overlay over 'o': 'a' has more than 1000 images in its backing chain"
        );
        assert!(!daemon.path("p.qcow2").exists());
    }
    // The bottom is read, on the fast path and on the slow one, and written over.
    let mut disk = daemon.open(&Options::default());
    let mut back = vec![0; 1 << 20];
    disk.read(0, &mut back).unwrap();
    assert!(back.iter().all(|&byte| byte == 7));
    disk.write(1, &pattern(512, 3)).unwrap();
    disk.read(0, &mut back).unwrap();
    assert!(back[512..1024] == pattern(512, 3) && back[1024..].iter().all(|&byte| byte == 7));
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().unwrap().len(), 2 * LIMIT + 1);
    client.run("block-export-del", json!({"id": "e0"}));
    while client.event()["event"] != json!("BLOCK_EXPORT_DELETED") {}
    drop(disk);
    client.run("blockdev-del", json!({"node-name": "a"}));
}
