//! Listings of nodes, beside qemu-storage-daemon.
//!
//! Where the two differ on purpose: unnamed nodes have other numbers, and exports' requests are counted
//! for their nodes, and listed by themselves, where theirs counts none of them.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, export_of, new_image};
use serde_json::{Value, json};
use std::process::Command;
use vublk_testkit::Options;
use vublk_testkit::request::{Range, Request};
use vublk_testkit::spec::status;

fn start(program: &[&str]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let qemu_img = |arguments: &[&str]| {
        let mut command = Command::new("qemu-img");
        assert!(command.args(arguments).current_dir(dir.path()).status().unwrap().success());
    };
    qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "mid.qcow2",
        "8M",
    ]);
    let options = "cluster_size=4k,lazy_refcounts=on,compression_type=zstd";
    let top = ["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "-o", options];
    qemu_img(&[&top[..], &["top.qcow2", "16M"]].concat());
    qemu_img(&["snapshot", "-c", "before", "top.qcow2"]);
    qemu_img(&["bitmap", "--add", "--disable", "top.qcow2", "b0"]);
    new_image(&dir.path().join("raw.img"), 1 << 20);
    let raw = "driver=raw,node-name=r,file.driver=file,file.filename=DIR/raw.img,cache.direct=on";
    let qcow2 = "driver=qcow2,node-name=q,file=f,discard=unmap,detect-zeroes=unmap";
    let filter = "driver=copy-on-read,node-name=c,file=q";
    let export = format!("{},writable=on", export_of("q", 0));
    let more = [
        "--blockdev",
        "driver=file,node-name=f,filename=DIR/top.qcow2,discard=unmap",
        "--blockdev",
        qcow2,
        "--blockdev",
        raw,
        "--blockdev",
        "driver=blkdebug,node-name=d,image=r",
        "--blockdev",
        "driver=null-co,node-name=n,size=65536,read-only=on,cache.no-flush=on",
        "--blockdev",
        filter,
        "--export",
        &export,
    ];
    Daemon::start_in(dir, program, &[&MONITOR[..], &more].concat())
}

/// Without what differs on purpose.
fn plain(value: Value, dir: &str) -> Value {
    let text = value.to_string().replace(dir, "DIR");
    let mut value: Value = serde_json::from_str(&text).unwrap();
    fn unname(value: &mut Value) {
        match value {
            Value::Object(map) => {
                if map.get("node-name").is_some_and(|n| n.as_str().unwrap().starts_with('#')) {
                    map.insert("node-name".into(), json!("#"));
                }
                // When the snapshot was made.
                for moment in ["date-sec", "date-nsec"] {
                    map.remove(moment);
                }
                map.values_mut().for_each(unname);
            }
            Value::Array(list) => list.iter_mut().for_each(unname),
            _ => {}
        }
    }
    unname(&mut value);
    // What has no name of its own comes in another order.
    if let Some(list) = value["return"].as_array_mut() {
        let key = |node: &Value| {
            let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
            (text("node-name"), text("drv"), text("file"), node["driver-specific"].is_object())
        };
        list.sort_by_key(key);
    }
    value
}

/// Where two values differ.
fn differ(path: &str, a: &Value, b: &Value, found: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let none = Value::Null;
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            for key in keys {
                let [a, b] = [a, b].map(|map| map.get(key).unwrap_or(&none));
                differ(&format!("{path}.{key}"), a, b, found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                differ(&format!("{path}[{n}]"), a, b, found);
            }
        }
        _ if a == b => {}
        _ => found.push(format!("{path}: ours {a}, theirs {b}")),
    }
}

fn both() -> [(Daemon, Client); 2] {
    [&[env!("CARGO_BIN_EXE_vublk"), "daemon"][..], &["qemu-storage-daemon"]].map(|program| {
        let daemon = start(program);
        let client = Client::connect(&daemon.path("m.sock"));
        (daemon, client)
    })
}

fn ask(side: &mut (Daemon, Client), command: &str, arguments: Value) -> Value {
    let dir = side.0.path("").to_str().unwrap().trim_end_matches('/').to_owned();
    plain(side.1.ask(command, arguments), &dir)
}

#[test]
fn nodes_are_listed_with_all_that_they_stand_on_as_qemu_lists_them() {
    let [mut ours, mut theirs] = both();
    for arguments in [json!({}), json!({"flat": true}), json!({"flat": false})] {
        let [ours, theirs] = [&mut ours, &mut theirs]
            .map(|side| ask(side, "query-named-block-nodes", arguments.clone()));
        let (a, b) = (ours["return"].as_array().unwrap(), theirs["return"].as_array().unwrap());
        assert_eq!(a.len(), b.len());
        assert!(a.len() > 9);
        let mut found = Vec::new();
        for (a, b) in a.iter().zip(b) {
            differ(a["node-name"].as_str().unwrap(), a, b, &mut found);
        }
        let is_meant = |line: &String| {
            let path = line.split(':').next().unwrap();
            // Two files with the same bytes may take a block more or less; a bitmap is marked as in use
            // with the first write.
            path.ends_with("image.actual-size") || path.ends_with("bitmaps[0].flags")
        };
        found.retain(|line| !is_meant(line));
        assert!(found.is_empty(), "{arguments}:\n{}", found.join("\n"));
    }
    for command in ["query-block", "query-blockstats"] {
        let arguments = json!({"query-nodes": 1});
        let [a, b] = [&mut ours, &mut theirs].map(|side| ask(side, command, arguments.clone()));
        assert_eq!(a, b);
    }
    let [a, b] = [&mut ours, &mut theirs].map(|side| ask(side, "query-block", json!({})));
    assert_eq!(a, b);
}

#[test]
fn what_was_written_how_far_and_how_often_is_reported_of_each_node() {
    let [mut ours, mut theirs] = both();
    let write = |offset: u64, len| Request::Out { sector: offset / 512, data: vec![7; len] };
    let range = |sector, sectors| Range { sector, sectors, flags: 0 };
    let requests = [
        write(0, 4096),
        write(4 << 20, 65536),
        Request::In { sector: 0, len: 8192 },
        Request::In { sector: 8, len: 512 },
        Request::Flush,
        Request::WriteZeroes(vec![range(128, 64)]),
        Request::Discard(vec![range(8192, 64)]),
        // Outside.
        Request::In { sector: 1 << 40, len: 512 },
        write(1 << 50, 512),
    ];
    for (daemon, _) in [&ours, &theirs] {
        let mut disk = daemon.open(&Options::default());
        let statuses: Vec<_> = requests.iter().map(|one| disk.run(one).unwrap().status).collect();
        assert!(statuses[..7].iter().all(|&status| status == status::OK), "{statuses:?}");
    }
    let nodes = json!({"query-nodes": true});
    let [mut a, b] =
        [&mut ours, &mut theirs].map(|side| ask(side, "query-blockstats", nodes.clone()));
    let stats = |listing: &Value, name: &str| {
        let mut list = listing["return"].as_array().unwrap().iter();
        list.find(|node| node["node-name"] == json!(name)).unwrap()["stats"].clone()
    };
    let counted = stats(&a, "q");
    let wanted = json!({"rd_operations": 2, "rd_bytes": 8704, "wr_operations": 3,
        "wr_bytes": 4096 + 65536 + 64 * 512, "flush_operations": 1, "unmap_operations": 1,
        "unmap_bytes": 64 * 512, "failed_rd_operations": 1, "failed_wr_operations": 1,
        "failed_flush_operations": 0, "wr_highest_offset": (4 << 20) + 65536});
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(counted[key], *value, "{key}: {counted}");
    }
    assert_eq!(stats(&b, "q")["wr_highest_offset"], wanted["wr_highest_offset"]);
    // Of exports, ours alone lists something.
    let devices = ask(&mut ours, "query-blockstats", json!({}));
    let device = &devices["return"][0];
    assert_eq!(device["device"], json!("e0"));
    assert_eq!(device["stats"], counted);
    assert!(device["parent"]["stats"]["wr_highest_offset"].as_u64().unwrap() > 0);
    assert_eq!(device["parent"]["node-name"], json!("f"));
    assert!(device["backing"]["backing"]["parent"].is_object(), "{device}");
    assert_eq!(ask(&mut theirs, "query-blockstats", json!({}))["return"], json!([]));
    // All else is alike but for what was counted, and where each puts its tables.
    let keys = |listing: &Value| listing["return"].as_array().unwrap().len();
    assert_eq!(keys(&a), keys(&b));
    fn blank(value: &mut Value) {
        match value {
            Value::Object(map) => map.iter_mut().for_each(|(key, value)| {
                let is_name = ["node-name", "driver"].contains(&key.as_str());
                match value {
                    Value::Object(_) => blank(value),
                    _ if !is_name => *value = Value::Null,
                    _ => {}
                }
            }),
            Value::Array(list) => list.iter_mut().for_each(blank),
            _ => {}
        }
    }
    let mut b = b;
    blank(&mut a["return"]);
    blank(&mut b["return"]);
    let mut found = Vec::new();
    differ("", &a, &b, &mut found);
    assert!(found.is_empty(), "{}", found.join("\n"));
}
