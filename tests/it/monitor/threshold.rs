//! `block-set-write-threshold` beside qemu-storage-daemon's: the same writes, the same events, once each.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, export_of, new_image};
use serde_json::{Value, json};
use vublk_testkit::Options;
use vublk_testkit::request::{Range, Request};

/// What is asked of both.
enum Step {
    Ask(Value),
    Run(Request),
}

fn set(node: &str, threshold: Value) -> Step {
    Step::Ask(json!({"node-name": node, "write-threshold": threshold}))
}

fn write(offset: u64, len: usize) -> Step {
    Step::Run(Request::Out { sector: offset / 512, data: vec![7; len] })
}

/// Replies, statuses and events, and what both nodes have in listings.
fn transcript(program: &[&str], steps: &[Step]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    new_image(&dir.path().join("disk.img"), 1 << 20);
    let file = "driver=file,node-name=f0,filename=DIR/disk.img,discard=unmap";
    let node = "driver=raw,node-name=d0,file=f0,discard=unmap";
    let export = format!("{},writable=on", export_of("d0", 0));
    let more = ["--blockdev", file, "--blockdev", node, "--export", &export];
    let daemon = Daemon::start_in(dir, program, &[&MONITOR[..], &more].concat());
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut disk = daemon.open(&Options::default());
    let mut said = Vec::new();
    for step in steps {
        said.push(match step {
            Step::Ask(arguments) => client.ask("block-set-write-threshold", arguments.clone()),
            Step::Run(request) => json!(disk.run(request).unwrap().status),
        });
        let nodes = client.run("query-named-block-nodes", json!({}));
        let of = |name| {
            let mut nodes = nodes.as_array().unwrap().iter();
            nodes.find(|node| node["node-name"] == json!(name)).unwrap()["write_threshold"].clone()
        };
        said.push(json!([of("f0"), of("d0")]));
        for mut event in std::mem::take(&mut client.events) {
            event.as_object_mut().unwrap().remove("timestamp");
            said.push(event);
        }
    }
    said
}

#[test]
fn who_wants_to_know_of_writes_beyond_an_offset_is_reported_once_as_with_qemu() {
    let steps = [
        set("zz", json!(5)),
        Step::Ask(json!({"node-name": "f0"})),
        Step::Ask(json!({"write-threshold": 1})),
        set("f0", json!("1")),
        set("d0", json!(40960)),
        write(0, 4096),
        // Up to it is not beyond it.
        write(36864, 4096),
        write(40960, 512),
        write(40960, 512),
        set("d0", json!(40960)),
        write(0, 65536),
        set("d0", json!(40960)),
        Step::Run(Request::WriteZeroes(vec![Range { sector: 0, sectors: 256, flags: 0 }])),
        set("d0", json!(40960)),
        set("d0", json!(0)),
        write(65536, 4096),
        // Both nodes.
        set("d0", json!(65536)),
        set("f0", json!(100000)),
        write(65536, 4096),
        write(98304, 4096),
        write(98304, 4096),
    ];
    let ours = transcript(&[env!("CARGO_BIN_EXE_vublk"), "daemon"], &steps);
    let theirs = transcript(&["qemu-storage-daemon"], &steps);
    assert_eq!(ours, theirs);
    let events = ours.iter().filter(|said| said.get("event").is_some()).count();
    assert_eq!(events, 5);
}
