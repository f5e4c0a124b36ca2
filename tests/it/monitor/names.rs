//! The names of nodes in listings, beside qemu-storage-daemon.
//!
//! A plain file name is used where it says everything, else `json:` with the options that decide which data the disk
//! has.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, new_image};
use serde_json::{Value, json};
use std::process::Command;

fn start(program: &[&str]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.img");
    let image = image.to_str().unwrap();
    let recorded = json!({"driver": "raw", "file": {"driver": "file", "filename": image}});
    let recorded = format!("json:{recorded}");
    let base = dir.path().join("q.qcow2");
    for arguments in [
        &["q.qcow2", "8M"][..],
        &["-b", base.to_str().unwrap(), "-F", "qcow2", "o.qcow2"],
        &["-b", image, "-F", "raw", "r.qcow2"],
        &["-u", "-b", &recorded, "-F", "raw", "j.qcow2", "8M"],
        &["-u", "-b", "../q.qcow2", "-F", "qcow2", "sub/s.qcow2", "8M"],
        &["-o", "data_file=d.raw", "d.qcow2", "8M"],
    ] {
        new_image(&dir.path().join("a.img"), 8 << 20);
        std::fs::create_dir_all(dir.path().join("sub")).unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(arguments).current_dir(dir.path());
        assert!(command.status().unwrap().success());
    }
    std::fs::write(dir.path().join("config"), "").unwrap();
    Daemon::start_in(dir, program, &MONITOR)
}

fn file(name: &str) -> Value {
    json!({"driver": "file", "filename": format!("DIR/{name}")})
}

/// A node of this driver with a file, and more options.
fn over(driver: &str, below: Value, more: Value) -> Value {
    let role = if driver == "blkdebug" { "image" } else { "file" };
    let mut node = json!({"driver": driver, role: below});
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    node
}

fn qcow2(name: &str, more: Value) -> Value {
    over("qcow2", file(name), more)
}

#[test]
fn a_nodes_name_says_all_that_decides_which_data_it_has() {
    let none = json!({});
    let raw = |more: Value| over("raw", file("a.img"), more);
    let nodes = [
        file("a.img"),
        raw(none.clone()),
        raw(json!({"offset": 512})),
        raw(json!({"size": 512})),
        raw(json!({"offset": 0})),
        raw(json!({"size": 1024, "offset": 512})),
        over("raw", raw(none.clone()), none.clone()),
        over("raw", qcow2("q.qcow2", none.clone()), none.clone()),
        qcow2("q.qcow2", json!({"l2-cache-size": 1 << 20, "discard": "unmap"})),
        qcow2("o.qcow2", none.clone()),
        qcow2("o.qcow2", json!({"backing": null})),
        qcow2("o.qcow2", json!({"backing": qcow2("q.qcow2", none.clone())})),
        qcow2("o.qcow2", json!({"backing": qcow2("./q.qcow2", none.clone())})),
        qcow2("q.qcow2", json!({"backing": qcow2("q.qcow2", none.clone())})),
        qcow2("r.qcow2", json!({"backing": raw(none.clone())})),
        qcow2("r.qcow2", json!({"backing": raw(json!({"offset": 512}))})),
        qcow2("j.qcow2", none.clone()),
        qcow2("sub/s.qcow2", none.clone()),
        qcow2("sub/s.qcow2", json!({"backing": qcow2("q.qcow2", none.clone())})),
        qcow2("d.qcow2", json!({"data-file": file("a.img")})),
        over("copy-on-read", qcow2("o.qcow2", none.clone()), none.clone()),
        over("preallocate", file("a.img"), json!({"prealloc-size": 1 << 20})),
        over("qcow2", over("preallocate", file("q.qcow2"), none.clone()), none.clone()),
        over("compress", qcow2("q.qcow2", none.clone()), none.clone()),
        over("blkdebug", file("a.img"), none.clone()),
        over("blkdebug", file("a.img"), json!({"config": "DIR/config"})),
        over("blkdebug", file("a.img"), json!({"align": 512})),
        over("blkdebug", file("a.img"), json!({"inject-error": [{"event": "read_aio"}]})),
        over("raw", over("blkdebug", file("a.img"), none.clone()), none.clone()),
        json!({"driver": "null-co"}),
        json!({"driver": "null-co", "size": 1024}),
        json!({"driver": "null-co", "read-zeroes": true}),
        json!({"driver": "null-aio", "latency-ns": 5}),
        over("raw", json!({"driver": "null-co", "size": 1024}), json!({"offset": 512})),
    ];
    let daemons =
        [start(&[env!("CARGO_BIN_EXE_vublk"), "daemon"]), start(&["qemu-storage-daemon"])];
    let mut clients = [0, 1].map(|n: usize| Client::connect(&daemons[n].path("m.sock")));
    for node in &nodes {
        let [ours, theirs] = [0, 1].map(|n: usize| {
            let dir = daemons[n].path("").to_str().unwrap().trim_end_matches('/').to_owned();
            let text = node.to_string().replace("DIR", &dir);
            let mut options: Value = serde_json::from_str(&text).unwrap();
            options["node-name"] = json!("n");
            // A filter that writes to what it reads.
            options["read-only"] = json!(node["driver"] != "copy-on-read");
            clients[n].run("blockdev-add", options);
            let list = clients[n].run("query-named-block-nodes", json!({"flat": true}));
            clients[n].run("blockdev-del", json!({"node-name": "n"}));
            let one = list.as_array().unwrap().iter().find(|one| one["node-name"] == "n").unwrap();
            let image = &one["image"];
            let names = [
                &one["file"],
                &one["backing_file"],
                &image["filename"],
                &image["full-backing-filename"],
            ];
            names.map(|name| name.to_string().replace(&dir, "DIR"))
        });
        assert_eq!(ours, theirs, "{node}");
    }
}
