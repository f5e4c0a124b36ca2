//! The commands for internal snapshots, beside qemu-storage-daemon's, and under a writing front end.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

const THEIRS: &str = "qemu-storage-daemon";
const NODES: [&str; 12] = [
    "--blockdev",
    "driver=qcow2,node-name=d0,file.driver=file,file.filename=DIR/a.qcow2",
    "--blockdev",
    "driver=qcow2,node-name=ro,read-only=on,file.driver=file,file.filename=DIR/ro.qcow2",
    "--blockdev",
    "driver=qcow2,node-name=few,file.driver=file,file.filename=DIR/few.qcow2",
    "--blockdev",
    "driver=file,node-name=f,filename=DIR/base.qcow2",
    "--blockdev",
    "driver=qcow2,node-name=top,file=f",
    "--blockdev",
    "driver=blkdebug,node-name=filter,image.driver=qcow2,image.file.driver=file,image.file.filename=DIR/below.qcow2",
];

fn qemu_img(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn create(dir: &Path, name: &str, options: &str) {
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", options, name, "8M"]);
}

fn start(program: &[&str]) -> Daemon {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for name in ["a.qcow2", "ro.qcow2", "base.qcow2", "below.qcow2"] {
        create(dir.path(), name, "cluster_size=64k");
    }
    qemu_img(dir.path(), &["snapshot", "-c", "old", "ro.qcow2"]);
    create(dir.path(), "few.qcow2", "refcount_bits=1");
    let write = ["-f", "qcow2", "-c", "write 0 1M", "few.qcow2"];
    assert!(
        Command::new("qemu-io")
            .args(write)
            .current_dir(dir.path())
            .output()
            .unwrap()
            .status
            .success()
    );
    Daemon::start_in(dir, program, &[&MONITOR[..], &NODES].concat())
}

/// What differs from run to run: when it was. And a clock of a guest: theirs continues without one.
fn mask(value: &mut Value) {
    match value {
        Value::Object(map) => map.iter_mut().for_each(|(key, value)| match &**key {
            "date-sec" | "date-nsec" | "vm-clock-sec" | "vm-clock-nsec" => *value = "TIME".into(),
            _ => mask(value),
        }),
        Value::Array(list) => list.iter_mut().for_each(mask),
        _ => {}
    }
}

#[test]
fn internal_snapshots_are_made_and_deleted_with_qemus_replies() {
    let daemons = [start(&[env!("CARGO_BIN_EXE_vublk"), "daemon"]), start(&[THEIRS])];
    let mut clients = [0, 1].map(|n: usize| Client::connect(&daemons[n].path("m.sock")));
    let (make, delete) =
        ("blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync");
    let mut differences = String::new();
    for (command, arguments) in [
        (make, json!({"device": "d0", "name": "s1"})),
        (make, json!({"device": "d0", "name": "s1"})),
        (make, json!({"device": "d0", "name": "1"})),
        (make, json!({"device": "d0", "name": ""})),
        (make, json!({"device": "d0", "name": "'quoted' \u{e9}"})),
        (make, json!({"device": "d0"})),
        (make, json!({"name": "s2"})),
        (make, json!({"device": "d0", "name": 5})),
        (make, json!({"device": "d0", "name": "x", "more": 1})),
        (make, json!({"device": "nope", "name": "s1"})),
        (make, json!({"device": "ro", "name": "s1"})),
        (make, json!({"device": "f", "name": "s1"})),
        (make, json!({"device": "few", "name": "s1"})),
        (make, json!({"device": "top", "name": "s1"})),
        (make, json!({"device": "filter", "name": "s1"})),
        (delete, json!({"device": "d0"})),
        (delete, json!({"device": "d0", "name": "nope"})),
        (delete, json!({"device": "d0", "id": "17"})),
        (delete, json!({"device": "d0", "id": "17", "name": "s1"})),
        (delete, json!({"device": "d0", "id": "", "name": ""})),
        (delete, json!({"device": "nope", "name": "s1"})),
        (delete, json!({"device": "ro", "name": "old"})),
        (delete, json!({"device": "ro", "name": "s1"})),
        (delete, json!({"device": "d0", "id": "1", "name": "s1"})),
        (delete, json!({"device": "d0", "id": "1"})),
        (delete, json!({"device": "d0", "name": "1"})),
        (delete, json!({"device": "filter", "id": "1"})),
        (make, json!({"device": "d0", "name": "again"})),
    ] {
        let [ours, theirs] = [0, 1].map(|n: usize| {
            let mut reply = clients[n].ask(command, arguments.clone());
            mask(&mut reply);
            reply
        });
        if ours != theirs {
            differences +=
                &format!("\n{command} {arguments}\n  ours:   {ours}\n  theirs: {theirs}");
        }
    }
    assert!(differences.is_empty(), "{differences}");
    let [ours, theirs] = [0, 1].map(|n: usize| {
        let mut nodes = clients[n].run("query-named-block-nodes", json!({}));
        mask(&mut nodes);
        let nodes = nodes.as_array().unwrap().iter();
        let reported =
            nodes.map(|node| (node["node-name"].clone(), node["image"]["snapshots"].clone()));
        // Of a read-only node, theirs forgets what it could not delete.
        let named =
            reported.filter(|(name, _)| name != "ro" && !name.as_str().unwrap().starts_with('#'));
        named.collect::<Vec<_>>()
    });
    assert_eq!(ours, theirs);
    clients.iter_mut().for_each(|client| drop(client.run("quit", json!({}))));
    let lists = daemons.map(|mut daemon| {
        let dir = daemon.path("");
        daemon.server.wait_exit(LIMIT).unwrap();
        ["a.qcow2", "ro.qcow2", "few.qcow2", "base.qcow2", "below.qcow2"].map(|name| {
            if name != "few.qcow2" {
                assert!(qemu_img(&dir, &["check", name]).contains("No errors"), "{name}");
            }
            let list = qemu_img(&dir, &["snapshot", "-l", name]);
            list.lines().map(|line| line[..30.min(line.len())].to_owned()).collect::<Vec<_>>()
        })
    });
    assert_eq!(lists[0], lists[1]);
}
