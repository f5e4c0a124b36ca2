//! Transcripts to `vublk daemon` and to the real `qemu-storage-daemon`: same replies and events.
//!
//! Skipped, with a message, where that program is not installed.
//!
//! Where the two differ on purpose: ours does not offer `oob`, says its own version, names unnamed
//! nodes by other numbers, and refuses to delete an iothread that is in use, which crashes theirs.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, new_image};
use serde_json::{Value, json};

const THEIRS: &str = "qemu-storage-daemon";

/// Both daemons with a monitor, and two images of 8 MiB.
pub(super) fn both() -> [Daemon; 2] {
    let start = |program: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        new_image(&dir.path().join("a.img"), 8 << 20);
        new_image(&dir.path().join("b.img"), 8 << 20);
        Daemon::start_in(dir, program, &MONITOR)
    };
    [start(&[env!("CARGO_BIN_EXE_vublk"), "daemon"]), start(&[THEIRS])]
}

/// Sends each line to both, and compares all that comes back: `count` replies per line, and the
/// events before them.
fn compare(daemons: &[Daemon; 2], negotiate: bool, lines: &[(&str, usize)]) {
    let mut clients = [0, 1].map(|i| {
        let path = daemons[i].path("m.sock");
        if negotiate { Client::connect(&path) } else { Client::greet(&path) }
    });
    let mut differences = Vec::new();
    for (line, count) in lines {
        let [ours, theirs] = [0, 1].map(|i| {
            let dir = daemons[i].path("").to_str().unwrap().trim_end_matches('/').to_owned();
            clients[i].send(line.replace("DIR", &dir).as_bytes());
            let mut said: Vec<Value> = (0..*count).map(|_| clients[i].reply()).collect();
            said.append(&mut clients[i].events);
            for value in &mut said {
                value.as_object_mut().unwrap().remove("timestamp");
            }
            let text = Value::from(said).to_string().replace(&dir, "DIR");
            serde_json::from_str::<Value>(&text).unwrap()
        });
        if ours != theirs {
            differences.push(format!("{line}\n  ours:   {ours}\n  theirs: {theirs}"));
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

#[test]
fn framing_and_negotiation_answer_alike() {
    let daemons = both();
    compare(
        &daemons,
        false,
        &[
            (r#"{"execute":"query-block"}"#, 1),
            (r#"{"execute":"nosuch","id":3}"#, 1),
            (r#"{"execute":"qmp_capabilities","arguments":{"x":1}}"#, 1),
            (r#"{"execute":"qmp_capabilities","id":{"a":[1,null,"\u00e9"]}}"#, 1),
            (r#"{"execute":"qmp_capabilities"}"#, 1),
            ("{'execute':'query-block','id':'x'}{'execute':'query-block'}", 2),
            (r#"{"execute":"nosuch","id":3.5}"#, 1),
            (r#"{"execute":"query-block","arguments":{"a":1}}"#, 1),
            (r#"{"execute":"query-block","arguments":[]}"#, 1),
            (r#"{"execute":"query-block","bogus":1}"#, 1),
            (r#"{"execute":1}"#, 1),
            (r#"{"arguments":{},"id":4}"#, 1),
            ("[]", 1),
            ("12 ", 1),
            ("\"a\"", 1),
            ("null\n", 1),
            ("}", 1),
            ("{]", 1),
            (r#"{"execute":}"#, 1),
            ("abc\n", 1),
            (",,,", 3),
            ("{\"execute\":\"que\nry\"}\n", 2),
            (r#"{"execute":"query-block","id":%d}"#, 2),
            ("# {\"execute\":\"query-block\"}", 2),
            ("@@@{\"execute\":\"query-block\"}", 2),
            (r#"{"execute":"query-block","id":1,"id":2}"#, 1),
            (r#"{"execute":"query-block","#, 0),
            (r#""id":5}"#, 1),
        ],
    );
}

#[test]
fn nodes_objects_and_exports_are_added_listed_and_deleted_alike() {
    let daemons = both();
    const E0: &str = r#""type":"vhost-user-blk","id":"e0","node-name":"r","addr":{"type":"unix","path":"DIR/e0.sock"}"#;
    const E1: &str = r#""type":"vhost-user-blk","id":"e1","node-name":"r","addr":{"type":"unix","path":"DIR/e1.sock"}"#;
    let lines = [
        ("blockdev-add", "".to_owned()),
        ("blockdev-add", r#""driver":"file","filename":"DIR/a.img""#.into()),
        ("blockdev-add", r#""driver":"file","filename":"DIR/a.img","node-name":"f""#.into()),
        ("blockdev-add", r#""driver":"raw","file":"f","node-name":"r""#.into()),
        ("blockdev-add", r#""driver":"raw","file":"f","node-name":"r""#.into()),
        ("blockdev-add", r#""driver":"nosuch","node-name":"z""#.into()),
        ("blockdev-add", r#""driver":"file","filename":"DIR/x","node-name":"g""#.into()),
        (
            "blockdev-add",
            r#""driver":"file","filename":"DIR/a.img","node-name":"g","bogus":1"#.into(),
        ),
        ("query-named-block-nodes", "".into()),
        ("query-named-block-nodes", r#""flat":true"#.into()),
        ("query-named-block-nodes", r#""flat":1"#.into()),
        ("query-named-block-nodes", r#""x":1"#.into()),
        ("blockdev-del", r#""node-name":"f""#.into()),
        ("blockdev-del", r#""node-name":"zz""#.into()),
        ("blockdev-del", "".into()),
        ("object-add", r#""qom-type":"iothread","id":"io0""#.into()),
        ("object-add", r#""qom-type":"iothread","id":"io0""#.into()),
        ("object-add", r#""qom-type":"iothread""#.into()),
        ("object-add", r#""id":"x""#.into()),
        ("object-add", r#""qom-type":"nosuch","id":"x""#.into()),
        ("object-add", r#""qom-type":"iothread","id":"9x""#.into()),
        ("object-add", r#""qom-type":"iothread","id":"y","props":{}"#.into()),
        ("query-block-exports", "".into()),
        ("block-export-add", format!(r#"{E0},"writable":true"#)),
        ("block-export-add", E0.into()),
        ("block-export-add", format!(r#"{E1},"num-queues":0"#)),
        ("block-export-add", format!(r#"{E1},"bogus":0"#)),
        ("block-export-add", E1.replace("\"r\"", "\"zz\"")),
        ("block-export-add", r#""type":"vhost-user-blk","id":"e2","node-name":"r""#.into()),
        ("block-export-add", r#""type":"vhost-user-blk","id":"e2""#.into()),
        ("block-export-add", r#""type":"nosuch","id":"e2""#.into()),
        ("block-export-add", r#""id":"e2""#.into()),
        ("block-export-add", E1.into()),
        ("query-block-exports", "".into()),
        ("blockdev-del", r#""node-name":"r""#.into()),
        ("block_resize", r#""node-name":"r","size":16777216"#.into()),
        ("query-named-block-nodes", r#""flat":true"#.into()),
        ("block_resize", r#""node-name":"zz","size":1"#.into()),
        ("block_resize", r#""size":1"#.into()),
        ("block_resize", r#""device":"r","size":1"#.into()),
        ("block_resize", r#""node-name":"r","size":-1"#.into()),
        ("block_resize", r#""node-name":"r""#.into()),
        ("object-del", r#""id":"nope""#.into()),
        ("object-del", "".into()),
        ("object-del", r#""id":"io0""#.into()),
        ("block-export-del", r#""id":"zz""#.into()),
        ("block-export-del", "".into()),
        ("block-export-del", r#""id":"e0","mode":"x""#.into()),
        ("block-export-del", r#""id":"e0""#.into()),
        ("block-export-del", r#""id":"e0""#.into()),
        ("query-block-exports", "".into()),
        ("block-export-del", r#""id":"e1","mode":"hard""#.into()),
        ("blockdev-del", r#""node-name":"r""#.into()),
        ("blockdev-del", r#""node-name":"f""#.into()),
        ("query-named-block-nodes", "".into()),
        ("quit", r#""x":1"#.into()),
    ];
    let lines: Vec<_> = lines
        .iter()
        .map(|(command, arguments)| {
            format!(r#"{{"execute":"{command}","arguments":{{{arguments}}}}}"#)
        })
        .collect();
    let lines: Vec<_> = lines.iter().map(|line| (line.as_str(), 1)).collect();
    compare(&daemons, true, &lines);
}

#[test]
fn every_command_that_is_listed_is_one_of_theirs_but_for_extensions() {
    let daemons = both();
    let [ours, theirs] = [0, 1].map(|i| {
        let mut client = Client::connect(&daemons[i].path("m.sock"));
        let list = client.run("query-commands", json!({}));
        let names = list.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned());
        names
            .filter(|name| !name.starts_with("x-block-export-"))
            .collect::<std::collections::BTreeSet<_>>()
    });
    assert!(ours.len() >= 14 && ours.is_subset(&theirs), "{ours:?}");
}

#[test]
fn the_nbd_server_and_its_exports_answer_alike() {
    let daemons = both();
    let long = "n".repeat(4097);
    let long = format!(
        r#"{{"execute":"block-export-add","arguments":{{"type":"nbd","id":"l","node-name":"a","name":"{long}"}}}}"#
    );
    let add = |more: &str| {
        format!(
            r#"{{"execute":"block-export-add","arguments":{{"type":"nbd","node-name":"a",{more}}}}}"#
        )
    };
    let [early, e0, again, other, bitmap, policy, full] = [
        r#""id":"e0""#,
        r#""id":"e0","name":"x","description":"d","writable":true"#,
        r#""id":"e0","name":"y""#,
        r#""id":"e1","name":"x""#,
        r#""id":"e1","name":"b","bitmaps":["none"]"#,
        r#""id":"e1","name":"b","werror":"report""#,
        r#""id":"e2","allocation-depth":true"#,
    ]
    .map(add);
    compare(
        &daemons,
        true,
        &[
            (
                r#"{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"a","filename":"DIR/a.img"}}"#,
                1,
            ),
            (r#"{"execute":"nbd-server-stop"}"#, 1),
            (&early, 1),
            (r#"{"execute":"nbd-server-add","arguments":{"device":"a"}}"#, 1),
            (r#"{"execute":"nbd-server-start"}"#, 1),
            (r#"{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix"}}}"#, 1),
            (
                r#"{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"DIR/n"}},"max-connections":5}}"#,
                1,
            ),
            (
                r#"{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"DIR/n2"}}}}"#,
                1,
            ),
            (&e0, 1),
            (&again, 1),
            (&other, 1),
            (&bitmap, 1),
            (&policy, 1),
            (&long, 1),
            (&full, 1),
            (r#"{"execute":"nbd-server-add","arguments":{"device":"none"}}"#, 1),
            (r#"{"execute":"nbd-server-add","arguments":{"device":"a","name":"x"}}"#, 1),
            (
                r#"{"execute":"nbd-server-add","arguments":{"device":"a","name":"old","description":"d"}}"#,
                1,
            ),
            (r#"{"execute":"query-block-exports"}"#, 1),
            (r#"{"execute":"nbd-server-remove","arguments":{"name":"none"}}"#, 1),
            (r#"{"execute":"nbd-server-remove","arguments":{"name":"old","mode":"hard"}}"#, 1),
            (r#"{"execute":"block-export-del","arguments":{"id":"e0"}}"#, 1),
            (r#"{"execute":"query-block-exports"}"#, 1),
            (r#"{"execute":"nbd-server-stop","arguments":{"x":1}}"#, 1),
            (r#"{"execute":"nbd-server-stop"}"#, 1),
            (r#"{"execute":"query-block-exports"}"#, 1),
            (r#"{"execute":"nbd-server-stop"}"#, 1),
        ],
    );
}
