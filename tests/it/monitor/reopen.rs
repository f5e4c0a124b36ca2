//! `blockdev-reopen`: replies beside qemu-storage-daemon's, and its effect on writers.
//!
//! It also makes images writable again that were below an overlay.

use super::Client;
use super::overlays::*;
use crate::vhost_user::{Daemon, LIMIT, pattern};
use serde_json::{Value, json};
use vublk_testkit::Options;

/// Options for several nodes, with `DIR` for the daemon's folder.
fn options(daemon: &Daemon, all: Value) -> Value {
    let dir = daemon.path("");
    let all = all.to_string().replace("DIR", dir.to_str().unwrap().trim_end_matches('/'));
    json!({"options": serde_json::from_str::<Value>(&all).unwrap()})
}

/// Options with more in them.
fn with(base: &Value, more: Value) -> Value {
    let mut all = base.clone();
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

/// What listings tell of the options of all nodes that have a name.
fn reported(client: &mut Client) -> Vec<Value> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let named = nodes
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| !node["node-name"].as_str().unwrap().starts_with('#'));
    let mut reported: Vec<Value> = named
        .map(|node| {
            let keys = ["node-name", "ro", "cache", "detect_zeroes", "backing_file"];
            Value::from(keys.map(|key| node[key].clone()).to_vec())
        })
        .collect();
    reported.sort_by_key(Value::to_string);
    reported
}

#[test]
fn nodes_are_opened_again_with_qemus_replies() {
    let q = json!({"driver": "qcow2", "node-name": "q", "file": "qf"});
    let r = json!({"driver": "raw", "node-name": "r", "file": "rf"});
    let i = json!({"driver": "qcow2", "node-name": "i",
                   "file": {"driver": "file", "filename": "DIR/o.qcow2"}});
    let b = json!({"driver": "qcow2", "node-name": "b", "file": "bf"});
    let qf = json!({"driver": "file", "node-name": "qf", "filename": "DIR/q.qcow2"});
    let rf = json!({"driver": "file", "node-name": "rf", "filename": "DIR/a.img"});
    let bb = json!({"driver": "qcow2", "node-name": "bb",
                    "file": {"driver": "file", "filename": "DIR/x.qcow2"}});
    let n = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
    let add = [
        qf.clone(),
        q.clone(),
        rf.clone(),
        r.clone(),
        i.clone(),
        bb.clone(),
        n.clone(),
        json!({"driver": "file", "node-name": "bf", "filename": "DIR/over.qcow2"}),
        with(&b, json!({"backing": "bb"})),
    ];
    let lazy = |driver: &str| json!({"driver": driver, "node-name": "q", "file": "qf"});
    let inline = |more: Value| with(&json!({"driver": "file", "filename": "DIR/o.qcow2"}), more);
    let steps = [
        json!([q]),
        json!([with(&q, json!({"read-only": true}))]),
        json!([q]),
        json!([with(&q, json!({"discard": "unmap", "detect-zeroes": "unmap"}))]),
        json!([with(&q, json!({"detect-zeroes": "on"}))]),
        json!([with(&q, json!({"cache": {"direct": true}}))]),
        json!([with(&q, json!({"cache": {"no-flush": true}}))]),
        json!([with(&q, json!({"auto-read-only": true}))]),
        json!([q]),
        json!([with(&q, json!({"lazy-refcounts": true}))]),
        json!([with(&q, json!({"cache-size": 1 << 20}))]),
        json!([with(&q, json!({"l2-cache-size": 1, "l2-cache-entry-size": 512}))]),
        json!([with(&q, json!({"refcount-cache-size": 1 << 20, "cache-clean-interval": 0}))]),
        json!([with(
            &q,
            json!({"pass-discard-request": true, "pass-discard-snapshot": false,
                               "pass-discard-other": true})
        )]),
        json!([with(&q, json!({"overlap-check": {"template": "none", "main-header": true}}))]),
        json!([with(&q, json!({"cache-size": 1, "l2-cache-size": 2}))]),
        json!([with(&q, json!({"l2-cache-entry-size": 3}))]),
        json!([with(&q, json!({"bogus": 1}))]),
        json!([with(&q, json!({"lazy-refcounts": "x"}))]),
        json!([lazy("raw")]),
        json!([with(&q, json!({"node-name": "nope"}))]),
        json!([{"driver": "qcow2", "file": "qf"}]),
        json!([{"node-name": "q", "file": "qf"}]),
        json!([{"driver": "qcow2", "node-name": "q"}]),
        json!([with(&q, json!({"backing": null}))]),
        json!([with(&q, json!({"backing": "n"}))]),
        json!([with(&q, json!({"backing": "nope"}))]),
        json!([q]),
        json!([with(&q, json!({"backing": null}))]),
        json!([with(&q, json!({"file": "rf"}))]),
        json!([with(&q, json!({"file": "nope"}))]),
        json!([with(&q, json!({"data-file": "rf"}))]),
        json!([with(&q, json!({"file": qf}))]),
        json!([r]),
        json!([with(&r, json!({"read-only": true}))]),
        json!([with(&r, json!({"detect-zeroes": "on"}))]),
        json!([with(&r, json!({"file": rf}))]),
        json!([rf]),
        json!([with(&rf, json!({"cache": {"direct": true}}))]),
        json!([with(&rf, json!({"read-only": true}))]),
        json!([with(&rf, json!({"filename": "DIR/q.qcow2"}))]),
        json!([rf]),
        json!([with(&qf, json!({"read-only": true}))]),
        json!([with(&q, json!({"read-only": true})), with(&qf, json!({"read-only": true}))]),
        json!([q]),
        json!([qf]),
        json!([q]),
        json!([n]),
        json!([{"driver": "null-co", "node-name": "n"}]),
        json!([with(&n, json!({"size": 2 << 20}))]),
        json!([with(&n, json!({"read-only": true}))]),
        json!([b]),
        json!([with(&b, json!({"backing": "bb", "read-only": true}))]),
        json!([with(&b, json!({"backing": null}))]),
        json!([with(&b, json!({"backing": "r"}))]),
        json!([with(&b, json!({"backing": "bb"}))]),
        json!([with(&b, json!({"backing": bb}))]),
        json!([i]),
        json!([with(&i, json!({"cache": {"direct": true}}))]),
        json!([with(&i, json!({"file": inline(json!({"driver": "host_device"}))}))]),
        json!([with(&i, json!({"file": inline(json!({"filename": "DIR/q.qcow2"}))}))]),
        json!([with(&i, json!({"file": inline(json!({"node-name": "zz"}))}))]),
        json!([with(&i, json!({"file": inline(json!({"cache": {"direct": true}}))}))]),
        json!([with(&i, json!({"file": inline(json!({"read-only": true})), "read-only": true}))]),
        json!([with(&i, json!({"file": inline(json!({"bogus": 1}))}))]),
        json!([i]),
        json!([with(&q, json!({"detect-zeroes": "on"})), with(&r, json!({"read-only": true}))]),
        json!([with(&q, json!({"detect-zeroes": "on"})), with(&r, json!({"detect-zeroes": "on"}))]),
        json!([q, r]),
    ];
    let daemons = [start(OURS, &[]), start(THEIRS, &[])];
    let mut clients = [0, 1].map(|n: usize| Client::connect(&daemons[n].path("m.sock")));
    let mut differences = String::new();
    for (daemon, client) in daemons.iter().zip(&mut clients) {
        for node in &add {
            client.run("blockdev-add", options(daemon, node.clone())["options"].clone());
        }
        client.run("block-export-add", export(daemon, "e0", "r"));
        let mut reads = export(daemon, "e1", "q");
        reads["writable"] = json!(false);
        client.run("block-export-add", reads);
    }
    for step in steps {
        let [ours, theirs] = [0, 1].map(|n: usize| {
            let dir = daemons[n].path("").to_str().unwrap().trim_end_matches('/').to_owned();
            let reply = clients[n].ask("blockdev-reopen", options(&daemons[n], step.clone()));
            let now = reported(&mut clients[n]);
            Value::from(vec![reply, Value::from(now)]).to_string().replace(&dir, "DIR")
        });
        if ours != theirs {
            differences += &format!("\n{step}\n  ours:   {ours}\n  theirs: {theirs}");
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn queues_that_never_rest_lose_nothing_while_their_disk_is_opened_again() {
    let (mut daemon, mut client) = serving("qcow2", "lazy.qcow2");
    for persistent in [false, true] {
        let name = if persistent { "kept" } else { "passing" };
        let bitmap = json!({"node": "q", "name": name, "persistent": persistent});
        client.run("block-dirty-bitmap-add", bitmap);
    }
    let last = written_while(&daemon, || {
        let q = node(&daemon, "q", "qcow2", "lazy.qcow2", json!({}));
        for turn in 0..12 {
            let more = match turn % 6 {
                0 => json!({"discard": "unmap", "detect-zeroes": "unmap"}),
                1 => {
                    json!({"lazy-refcounts": false, "l2-cache-size": 512, "l2-cache-entry-size": 512})
                }
                2 => json!({"overlap-check": "all", "pass-discard-other": true}),
                3 => json!({"cache": {"no-flush": false}, "lazy-refcounts": true}),
                // These are refused, when their successors are there: what was begun is taken back.
                4 => json!({"read-only": true}),
                _ => json!({"backing": "nope"}),
            };
            let reply = client.ask("blockdev-reopen", json!({"options": [with(&q, more)]}));
            assert_eq!(reply.get("return").is_some(), turn % 6 < 4, "{reply}");
        }
    });
    check_written(&daemon, &last);
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let q = nodes.as_array().unwrap().iter().find(|one| one["node-name"] == "q").unwrap();
    let written = last.iter().filter(|&&salt| salt != 0).count() as u64 * (16 << 10);
    for bitmap in q["dirty-bitmaps"].as_array().unwrap() {
        assert!(bitmap["count"].as_u64().unwrap() >= written, "{bitmap}");
        assert_eq!(bitmap["recording"], json!(true));
    }
    assert_eq!(q["dirty-bitmaps"].as_array().unwrap().len(), 2);
    client.run("quit", json!({}));
    daemon.server.wait_exit(LIMIT).unwrap();
    let checked = tool(&daemon.path(""), "qemu-img", &["check", "lazy.qcow2"]);
    assert!(checked.contains("No errors"), "{checked}");
    let info = tool(&daemon.path(""), "qemu-img", &["info", "--output=json", "lazy.qcow2"]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps[0]["flags"], json!(["auto"]), "{info}");
}

#[test]
fn an_image_that_lay_below_an_overlay_is_written_to_again_once_it_is_opened_again() {
    for (driver, image) in [("qcow2", "lazy.qcow2"), ("raw", "a.img")] {
        let (mut daemon, mut client) = serving(driver, image);
        let dir = daemon.path("");
        let mut disk = daemon.open(&Options::default());
        disk.write(0, &pattern(64 << 10, 1)).unwrap();
        client.run("blockdev-snapshot-sync", snapshot(&daemon, "q", "s.qcow2", "s"));
        drop(disk);
        // The overlay ends with its only user.
        client.run("block-export-del", json!({"id": "e0"}));
        let mut again = export(&daemon, "e1", "q");
        let refused = client.refusal("block-export-add", again.clone());
        assert_eq!(refused, "Cannot export read-only node as writable");
        let reopen = json!({"options": [node(&daemon, "q", driver, image, json!({}))]});
        if driver == "qcow2" {
            // Its locks let others read, which have to be done first.
            let reader = start(THEIRS, &[]);
            let mut other = Client::connect(&reader.path("m.sock"));
            let mut theirs = node(&daemon, "q", driver, image, json!({"read-only": true}));
            theirs["file"]["read-only"] = json!(true);
            other.run("blockdev-add", theirs);
            let mut reads = export(&reader, "e0", "q");
            reads["writable"] = json!(false);
            other.run("block-export-add", reads);
            let refused = client.refusal("blockdev-reopen", reopen.clone());
            assert_eq!(refused, "Failed to get \"write\" lock");
            let refused = client.refusal("block-export-add", again.clone());
            assert_eq!(refused, "Cannot export read-only node as writable");
        }
        client.run("blockdev-reopen", reopen);
        again["id"] = json!("e0");
        again["addr"]["path"] = json!(daemon.path("e0.sock"));
        client.run("block-export-add", again);
        let mut disk = daemon.open(&Options::default());
        disk.write(64, &pattern(64 << 10, 2)).unwrap();
        let wanted = [&pattern(64 << 10, 1)[..32 << 10], &pattern(64 << 10, 2)[..]].concat();
        let mut back = vec![0; wanted.len()];
        disk.read(0, &mut back).unwrap();
        assert!(back == wanted);
        drop(disk);
        client.run("quit", json!({}));
        daemon.server.wait_exit(LIMIT).unwrap();
        tool(&dir, "qemu-img", &["convert", "-f", driver, "-O", "raw", image, "after.raw"]);
        assert!(std::fs::read(dir.join("after.raw")).unwrap()[..wanted.len()] == wanted);
        if driver == "qcow2" {
            assert!(tool(&dir, "qemu-img", &["check", image]).contains("No errors"));
        }
    }
}
