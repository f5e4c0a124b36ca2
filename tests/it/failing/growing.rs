//! A qcow2 image on a volume that management software enlarges on request.
//!
//! The request is an event that the volume fills up; the software reacts sometimes in time, sometimes late.

use crate::file::Loop;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT, export_of, pattern, seed};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::status;
use vublk_testkit::{MemoryLayout, Options};

const MIB: u64 = 1 << 20;
/// The part of the disk that is written to.
const BLOCKS: u64 = 320;
const BLOCK: u64 = 64 << 10;

/// A volume, and who makes it larger.
struct Volume {
    device: Loop,
    backing: PathBuf,
    size: u64,
    /// How often it was made larger in time, and late.
    grown: [u32; 2],
}

impl Volume {
    fn new(dir: &Path) -> Volume {
        let backing = dir.join("volume");
        let size = 2 * MIB;
        std::fs::File::create(&backing).unwrap().set_len(size).unwrap();
        let device = Loop::new(&backing, &[]);
        Volume { device, backing, size, grown: [0; 2] }
    }

    fn grow(&mut self) {
        self.size += 2 * MIB;
        std::fs::File::options()
            .write(true)
            .open(&self.backing)
            .unwrap()
            .set_len(self.size)
            .unwrap();
        let resized = Command::new("losetup").args(["--set-capacity", &self.device.0]).status();
        assert!(resized.unwrap().success());
    }

    /// To be told when less than 1 MiB is left.
    fn arm(&self, client: &mut Client) {
        let threshold = self.size - MIB;
        let arguments = json!({"node-name": "f0", "write-threshold": threshold});
        client.run("block-set-write-threshold", arguments);
        assert_eq!(threshold_of(client, "f0"), json!(threshold));
    }
}

fn threshold_of(client: &mut Client, node: &str) -> Value {
    let nodes = client.run("query-named-block-nodes", json!({}));
    let node = nodes.as_array().unwrap().iter().find(|one| one["node-name"] == json!(node));
    node.unwrap()["write_threshold"].clone()
}

fn held(client: &mut Client) -> u64 {
    let exports = client.run("query-block-exports", json!({}));
    exports[0].get("x-held").and_then(Value::as_u64).unwrap_or(0)
}

#[test]
fn nothing_is_lost_on_a_volume_that_is_made_larger_when_it_gets_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut volume = Volume::new(dir.path());
    let device = volume.device.0.clone();
    let qemu_img = |arguments: &[&str]| {
        let output = Command::new("qemu-img").args(arguments).arg(&device).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        said
    };
    // The size comes behind the name.
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &device, "64M"]).status();
    assert!(made.unwrap().success());
    let file = format!("driver=host_device,node-name=f0,filename={device}");
    let node = "driver=qcow2,node-name=d0,file=f0,discard=unmap";
    let export = format!("{},writable=on,werror=stop", export_of("d0", 0));
    let more = ["--blockdev", &file, "--blockdev", node, "--export", &export];
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    let home = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(home, &program, &[&MONITOR[..], &more].concat());
    let mut client = Client::connect(&daemon.path("m.sock"));
    volume.arm(&mut client);
    let layout = MemoryLayout::single(32 << 20);
    let options = Options { queue_size: 128, layout, limit: LIMIT, ..Options::default() };
    let mut disk = daemon.open(&options);

    let mut rng = fastrand::Rng::with_seed(seed());
    let mut blocks: Vec<u64> = (0..BLOCKS).collect();
    rng.shuffle(&mut blocks);
    let request = |block: u64| Request::Out {
        sector: block * BLOCK / 512,
        data: pattern(BLOCK as usize, block as u8),
    };
    let (mut sent, mut done, mut is_notified) = (0, 0, false);
    let end = Instant::now() + LIMIT;
    while done < blocks.len() {
        assert!(Instant::now() < end, "{done} of {sent} at {} bytes", volume.size);
        while sent < blocks.len() && sent - done < 16 {
            disk.queue(0).submit(&request(blocks[sent]), &Shape::indirect()).unwrap();
            sent += 1;
        }
        while let Some(one) = disk.queue(0).reap().unwrap() {
            assert_eq!(one.status, status::OK);
            done += 1;
        }
        let held = held(&mut client);
        for event in std::mem::take(&mut client.events) {
            match event["event"].as_str().unwrap() {
                "BLOCK_WRITE_THRESHOLD" => {
                    assert!(!is_notified, "once");
                    is_notified = true;
                    let data = &event["data"];
                    assert_eq!(data["node-name"], json!("f0"));
                    assert_eq!(data["write-threshold"], json!(volume.size - MIB));
                    assert!(data["amount-exceeded"].as_u64().unwrap() > 0);
                    assert_eq!(threshold_of(&mut client, "f0"), json!(0), "it is gone");
                }
                "BLOCK_IO_ERROR" => assert_eq!(event["data"]["nospace"], json!(true)),
                other => panic!("{other}"),
            }
        }
        // Every other time not before the guest waits.
        let is_late = (volume.grown[0] + volume.grown[1]).is_multiple_of(2);
        if is_notified && (!is_late || held > 0) {
            volume.grown[usize::from(is_late)] += 1;
            volume.grow();
            volume.arm(&mut client);
            is_notified = false;
            if held > 0 {
                client.run("x-block-export-retry", json!({"id": "e0"}));
            }
        }
    }
    assert!(volume.grown.iter().all(|&times| times > 2), "{:?}", volume.grown);
    disk.flush().unwrap();
    for block in 0..BLOCKS {
        let mut found = vec![0; BLOCK as usize];
        disk.read(block * BLOCK / 512, &mut found).unwrap();
        assert!(found == pattern(BLOCK as usize, block as u8), "block {block}");
    }
    drop((disk, client));
    daemon.end();
    let said = qemu_img(&["check", "-f", "qcow2"]);
    assert!(said.starts_with("No errors were found on the image."), "{said}");
}
