//! Dirty bitmaps through QMP, beside qemu-storage-daemon: replies, listings, contents.
//!
//! Also what a restart and a kill leave of the persistent ones.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

const OURS: [&str; 2] = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
const THEIRS: [&str; 1] = ["qemu-storage-daemon"];

const NODES: [&str; 6] = [
    "--blockdev",
    "driver=file,node-name=f,filename=DIR/t.qcow2",
    "--blockdev",
    "driver=qcow2,node-name=q,file=f",
    "--blockdev",
    "driver=file,node-name=r,filename=DIR/t.raw",
];

fn run(dir: &Path, line: &str) -> String {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap());
    // What belongs together is joined by tabs.
    let words = words.map(|word| word.replace('\t', " "));
    let output = command.args(words).current_dir(dir).output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line}: {out}{err}");
    out.into_owned()
}

/// A daemon with a qcow2 image, in which `p0` has recorded something and `p1` is disabled.
fn start(program: &[&str]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    for line in [
        "qemu-img create -q -f qcow2 t.qcow2 64M",
        "qemu-img bitmap --add t.qcow2 p0",
        "qemu-img bitmap --add --disable t.qcow2 p1",
        "qemu-io -f qcow2 -c write\t64k\t100k t.qcow2",
        "qemu-img create -q -f raw t.raw 1M",
    ] {
        run(dir.path(), line);
    }
    Daemon::start_in(dir, program, &[&MONITOR[..], &NODES].concat())
}

/// The listing of each node's bitmaps.
fn listed(client: &mut Client) -> Vec<(Value, Value)> {
    let nodes = client.run("query-named-block-nodes", json!({}));
    let bitmaps = |node: &Value| (node["node-name"].clone(), node["dirty-bitmaps"].clone());
    nodes.as_array().unwrap().iter().map(bitmaps).collect()
}

#[test]
fn bitmaps_are_added_changed_listed_and_refused_alike() {
    let daemons = [start(&OURS), start(&THEIRS)];
    let mut clients = [0, 1].map(|i| Client::connect(&daemons[i].path("m.sock")));
    let long = "x".repeat(1024);
    let (add, remove, clear) =
        ("block-dirty-bitmap-add", "block-dirty-bitmap-remove", "block-dirty-bitmap-clear");
    let (enable, disable, merge) =
        ("block-dirty-bitmap-enable", "block-dirty-bitmap-disable", "block-dirty-bitmap-merge");
    let sha256 = "x-debug-block-dirty-bitmap-sha256";
    let mut lines = vec![
        (add, json!({"node": "q", "name": "p0"})),
        (add, json!({"node": "q", "name": ""})),
        (add, json!({"node": "q", "name": long})),
        (add, json!({"node": "q", "name": long, "persistent": true})),
        (add, json!({"node": "zz", "name": "x"})),
        (add, json!({"node": "q", "name": "t0", "granularity": 0})),
        (add, json!({"node": "q", "name": "t0", "granularity": 100})),
        (add, json!({"node": "q", "name": "t0", "granularity": 513})),
        (add, json!({"node": "q", "name": "t0", "granularity": 1u64 << 32})),
        (add, json!({"node": "q", "name": "t0", "granularity": -1})),
        (add, json!({"node": "q", "name": "t9", "granularity": 1u64 << 31})),
        (add, json!({"node": "q", "name": "t0"})),
        (add, json!({"node": "q", "name": "t1", "disabled": true, "granularity": 512})),
        (add, json!({"node": "q", "name": "pp", "persistent": true})),
        (add, json!({"node": "q", "name": "p2", "persistent": true, "granularity": 4096})),
        (add, json!({"node": "r", "name": "rr", "persistent": true})),
        (add, json!({"node": "r", "name": "rr"})),
        (add, json!({"node": "f", "name": "ff", "persistent": true})),
        (add, json!({"name": "ff"})),
        (add, json!({"node": "q"})),
        (add, json!({"node": "q", "name": 1})),
        (add, json!({"node": "q", "name": "t7", "foo": 1})),
        (add, json!({"node": "q", "name": "t7", "persistent": "on"})),
        (enable, json!({"node": "q", "name": "p1"})),
        (enable, json!({"node": "q", "name": "p1"})),
        (disable, json!({"node": "q", "name": "p0"})),
        (merge, json!({"node": "q", "target": "t0", "bitmaps": ["p1", "p0"]})),
        (merge, json!({"node": "q", "target": "p0", "bitmaps": ["p1", "no"]})),
        (merge, json!({"node": "q", "target": "nope", "bitmaps": ["p1", "no"]})),
        (merge, json!({"node": "q", "target": "p0", "bitmaps": ["p0"]})),
        (merge, json!({"node": "q", "target": "p0", "bitmaps": [{"node": "r", "name": "rr"}]})),
        (merge, json!({"node": "q", "target": "p0", "bitmaps": [{"node": "zz", "name": "rr"}]})),
        (merge, json!({"node": "q", "target": "p0", "bitmaps": [{"node": "q", "name": "rr"}]})),
        (merge, json!({"node": "q", "target": "p2", "bitmaps": [{"node": "q", "name": "p0"}]})),
        (merge, json!({"node": "q", "target": "t1", "bitmaps": ["p2", "p0"]})),
        (merge, json!({"node": "q", "target": "t9", "bitmaps": ["p2"]})),
        (merge, json!({"node": "q", "bitmaps": ["p2"]})),
    ];
    for command in [remove, clear, enable, disable, sha256] {
        lines.push((command, json!({"node": "q", "name": "nope"})));
        lines.push((command, json!({"node": "nn", "name": "nope"})));
        lines.push((command, json!({"node": "q"})));
    }
    for name in ["p0", "p1", "p2", "t0", "t1", "t9", "pp"] {
        lines.push((sha256, json!({"node": "q", "name": name})));
    }
    lines.extend([
        (clear, json!({"node": "q", "name": "t0"})),
        (remove, json!({"node": "q", "name": "pp"})),
        (remove, json!({"node": "q", "name": "p1"})),
        (remove, json!({"node": "q", "name": "t9"})),
        (sha256, json!({"node": "q", "name": "t0"})),
        (sha256, json!({"node": "r", "name": "rr"})),
    ]);
    let mut differences = Vec::new();
    for (command, arguments) in lines {
        let [ours, theirs] = [0, 1].map(|i| {
            let mut reply = clients[i].ask(command, arguments.clone());
            reply.as_object_mut().unwrap().remove("timestamp");
            (reply, listed(&mut clients[i]))
        });
        if ours != theirs {
            differences.push(format!("{command} {arguments}\n  {ours:?}\n  {theirs:?}"));
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
    // What they store is the same.
    let stored = [0, 1].map(|i| {
        clients[i].run("quit", json!({}));
        let path = daemons[i].path("");
        while path.join("pid").exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        run(&path, "qemu-img check t.qcow2");
        let info = run(&path, "qemu-img info --output=json t.qcow2");
        serde_json::from_str::<Value>(&info).unwrap()["format-specific"].clone()
    });
    assert_eq!(stored[0], stored[1]);
}

/// The bitmaps of the image that a daemon's directory has, as qemu-img tells of them.
fn stored(daemon: &Daemon) -> Value {
    let info = run(&daemon.path(""), "qemu-img info -U --output=json t.qcow2");
    serde_json::from_str::<Value>(&info).unwrap()["format-specific"]["data"]["bitmaps"].clone()
}

#[test]
fn persistent_bitmaps_survive_a_restart_and_those_of_a_killed_daemon_are_inconsistent() {
    let mut daemon = start(&OURS);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let untouched = stored(&daemon);
    assert_eq!(untouched[0]["flags"], json!(["auto"]), "nothing was written yet");
    let new = json!({"node": "q", "name": "new", "persistent": true, "granularity": 4096});
    client.run("block-dirty-bitmap-add", new);
    client
        .run("block-dirty-bitmap-merge", json!({"node": "q", "target": "new", "bitmaps": ["p0"]}));
    client.run("block-dirty-bitmap-add", json!({"node": "q", "name": "gone"}));
    assert_eq!(stored(&daemon)[0]["flags"], json!(["in-use", "auto"]));
    let sum = json!({"node": "q", "name": "new"});
    let before = client.run("x-debug-block-dirty-bitmap-sha256", sum.clone());
    client.run("quit", json!({}));
    daemon.server.wait_exit(LIMIT).unwrap();
    let kept = stored(&daemon);
    let names: Vec<_> = kept.as_array().unwrap().iter().map(|b| b["name"].clone()).collect();
    assert_eq!(names, ["p0", "p1", "new"]);

    daemon.restart();
    let mut client = Client::connect(&daemon.path("m.sock"));
    assert_eq!(client.run("x-debug-block-dirty-bitmap-sha256", sum.clone()), before);
    drop(client);
    // Nothing was written: they are as they were.
    daemon.server.kill();
    assert_eq!(stored(&daemon), kept);

    daemon.restart();
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("block-dirty-bitmap-clear", sum.clone());
    drop(client);
    daemon.server.kill();
    let flags: Vec<_> =
        stored(&daemon).as_array().unwrap().iter().map(|b| b["flags"][0].clone()).collect();
    assert_eq!(flags, ["in-use", "in-use", "in-use"]);

    daemon.restart();
    let mut client = Client::connect(&daemon.path("m.sock"));
    let words = "Bitmap 'new' is inconsistent and cannot be used";
    assert_eq!(client.refusal("block-dirty-bitmap-clear", sum.clone()), words);
    assert_eq!(
        client.refusal("block_resize", json!({"node-name": "q", "size": 128 << 20})),
        "Bitmap 'p0' is inconsistent and cannot be used"
    );
    let reported = &listed(&mut client)[1];
    assert_eq!(reported.0, "q");
    assert_eq!(reported.1[0]["inconsistent"], json!(true));
    client.run("block-dirty-bitmap-remove", sum);
    client.run("quit", json!({}));
    daemon.server.wait_exit(LIMIT).unwrap();
    let names: Vec<_> =
        stored(&daemon).as_array().unwrap().iter().map(|b| b["name"].clone()).collect();
    assert_eq!(names, ["p0", "p1"]);
    run(&daemon.path(""), "qemu-img check t.qcow2");
}
