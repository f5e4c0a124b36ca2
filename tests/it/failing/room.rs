//! Image tools on a file system that fills up.
//!
//! They give back space that they took in vain, and report what they could not store.

use super::options;
use super::small::Small;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::{Daemon, export_of};
use serde_json::json;
use std::path::PathBuf;
use std::process::{Command, Output};

const VUBLK: &str = env!("CARGO_BIN_EXE_vublk");
const MIB: u32 = 32;

struct Place {
    _dir: tempfile::TempDir,
    small: Small,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small");
        std::fs::create_dir(&path).unwrap();
        let small = Small::mount(&path, MIB);
        Place { _dir: dir, small }
    }

    fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.small.file(name)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let folder = self.path("");
        Command::new(program).args(arguments).current_dir(folder).output().unwrap()
    }

    fn good(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Takes room away, so that so many KiB are left.
    fn leave(&self, kib: u64) {
        let free = self.free() / 1024;
        assert!(free <= u64::from(MIB) * 1024, "{free} KiB are free: this is another file system");
        std::fs::write(self.path("ballast"), vec![1; (free - kib) as usize * 1024]).unwrap();
    }

    /// How many bytes its file system has free.
    fn free(&self) -> u64 {
        let free = self.good("stat", &["-f", "-c", "%a %S", "."]);
        let numbers = free.split_whitespace().map(|number| number.parse::<u64>().unwrap());
        numbers.product()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_preallocating_resize_that_finds_no_room_gives_back_what_it_took() {
    for kind in ["compat=1.1", "extended_l2=on", "compat=0.10", "data_file=d.raw"] {
        for mode in ["falloc", "full"] {
            let place = Place::new();
            place.good("qemu-img", &["create", "-q", "-f", "qcow2", "-o", kind, "o.qcow2", "16M"]);
            place.good("qemu-io", &["-c", "write -q -P 7 0 1M", "o.qcow2"]);
            let before = (place.path("o.qcow2").metadata().unwrap().len(), place.free());
            let mode = format!("--preallocation={mode}");
            let output = place.run(VUBLK, &["resize", &mode, "o.qcow2", "1G"]);
            assert_eq!(output.status.code(), Some(1), "{kind} {mode}");
            assert!(said(&output).contains("No space left on device"), "{}", said(&output));
            place.good("qemu-img", &["check", "-q", "o.qcow2"]);
            let after = (place.path("o.qcow2").metadata().unwrap().len(), place.free());
            assert_eq!(after, before, "{kind} {mode}");
            place.good("qemu-io", &["-c", "read -q -P 7 0 1M", "-c", "write -q 2M 1M", "o.qcow2"]);
        }
    }
}

#[test]
fn a_resize_that_cannot_write_its_tables_leaves_a_sound_image() {
    let place = Place::new();
    let kind = "cluster_size=512";
    place.good("qemu-img", &["create", "-q", "-f", "qcow2", "-o", kind, "o.qcow2", "1M"]);
    place.good("qemu-io", &["-c", "write -q -P 7 0 1M", "o.qcow2"]);
    place.leave(1024);
    let output = place.run(VUBLK, &["resize", "--preallocation=metadata", "o.qcow2", "256M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("No space left on device"), "{}", said(&output));
    // Where refcounts have no room to be written, clusters may be leaked.
    let check = place.run("qemu-img", &["check", "-q", "o.qcow2"]);
    assert!(matches!(check.status.code(), Some(0 | 3)), "{}", said(&check));
    place.good("qemu-io", &["-c", "read -q -P 7 0 1M", "o.qcow2"]);
}

#[test]
fn a_creation_that_finds_no_room_leaves_no_file() {
    for options in
        ["preallocation=full", "preallocation=falloc", "preallocation=full,data_file=d.raw"]
    {
        let place = Place::new();
        let free = place.free();
        let line = ["create", "-q", "-f", "qcow2", "-o", options, "o.qcow2", "1G"];
        let output = place.run(VUBLK, &line);
        assert_eq!(output.status.code(), Some(1), "{options}");
        assert!(!place.path("o.qcow2").exists() && !place.path("d.raw").exists(), "{options}");
        assert_eq!(place.free(), free, "{options}");
    }
}

/// What is said of bitmaps that could not be stored.
const LOST: &str = "Lost persistent bitmaps during inactivation of node";

/// An image of 16 MiB with three bitmaps that take room once something is written to it.
fn with_bitmaps(place: &Place) {
    place.good("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "16M"]);
    place.good("qemu-io", &["-c", "write -q 0 1M", "a.qcow2"]);
    for name in ["x", "y", "z"] {
        place.good("qemu-img", &["bitmap", "--add", "-g", "512", "a.qcow2", name]);
    }
}

/// The image says itself that its bitmaps are lost, and is sound.
fn assert_lost(place: &Place, from: &str) {
    let info = place.good("qemu-img", &["info", "a.qcow2"]);
    assert_eq!(info.matches("in-use").count(), 3, "{from}: {info}");
    place.good("qemu-img", &["check", "-q", &place.file("a.qcow2")]);
}

#[test]
fn bitmaps_that_find_no_room_when_a_tool_closes_their_image_are_reported() {
    for tool in ["io", "commit"] {
        let place = Place::new();
        with_bitmaps(&place);
        let over = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", "o.qcow2"];
        place.good("qemu-img", &over);
        place.good("qemu-io", &["-c", "write -q 4M 64k", "o.qcow2"]);
        place.leave(130);
        let output = match tool {
            "io" => place.run(VUBLK, &["io", "-c", "write -q 4M 64k", "a.qcow2"]),
            _ => place.run(VUBLK, &["commit", "-d", "o.qcow2"]),
        };
        // QEMU says the same, and its exit code is that of the command.
        assert_eq!(output.status.code(), Some(0), "{tool}: {}", said(&output));
        assert!(said(&output).contains(LOST), "{tool}: {}", said(&output));
        assert_lost(&place, tool);
    }
}

#[test]
fn bitmaps_that_find_no_room_when_a_daemon_closes_their_image_are_reported() {
    for ending in ["SIGTERM", "blockdev-del", "blockdev-snapshot-sync"] {
        let place = Place::new();
        with_bitmaps(&place);
        place.leave(130);
        let enter = place.small.enter();
        let mut program: Vec<&str> = enter.iter().map(String::as_str).collect();
        program.extend([VUBLK, "daemon"]);
        let image = place.small.path.join("a.qcow2");
        let node =
            format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", image.display());
        let export = format!("{},writable=on,num-queues=2", export_of("d0", 0));
        let arguments = [&MONITOR[..], &["--blockdev", &node, "--export", &export]].concat();
        let mut daemon = Daemon::start_in(tempfile::tempdir().unwrap(), &program, &arguments);
        let mut disk = daemon.open(&options(false));
        disk.write(8192, &[5; 64 << 10]).unwrap();
        disk.flush().unwrap();
        let mut client = Client::connect(&daemon.path("m.sock"));
        match ending {
            "SIGTERM" => {}
            "blockdev-del" => {
                drop(disk);
                client.run("block-export-del", json!({"id": "e0"}));
                client.run("blockdev-del", json!({"node-name": "d0"}));
                daemon.wait_log(LOST, 1);
            }
            _ => {
                let arguments = json!({
                    "node-name": "d0", "snapshot-node-name": "over",
                    "snapshot-file": daemon.path("over.qcow2"), "format": "qcow2",
                });
                client.run("blockdev-snapshot-sync", arguments);
            }
        }
        drop(client);
        let log = daemon.end();
        let reported = log.lines().filter(|line| line.contains(LOST)).count();
        assert_eq!(reported, 1, "{ending}: {log}");
        assert!(log.contains("'d0'") && log.contains("No space left on device"), "{log}");
        assert_lost(&place, ending);
        place.good("qemu-io", &["-c", "read -q -P 5 4M 64k", "a.qcow2"]);
    }
}

#[test]
fn bitmaps_that_a_conversion_was_asked_to_keep_and_that_find_no_room_fail_it() {
    let place = Place::new();
    with_bitmaps(&place);
    place.good("qemu-io", &["-c", "write -q 4M 64k", "a.qcow2"]);
    let convert = ["convert", "--bitmaps", "-O", "qcow2", "a.qcow2", "t.qcow2"];
    place.good(VUBLK, &convert);
    let takes = place.free();
    std::fs::remove_file(place.path("t.qcow2")).unwrap();
    let takes = (place.free() - takes) / 1024;
    // There is room for the data, but not for all bitmaps.
    place.leave(takes - 130);
    let output = place.run(VUBLK, &convert);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let failed = "Failed to write bitmap 'z' to file: No space left on device";
    assert!(said(&output).contains(failed), "{}", said(&output));
    place.good("qemu-img", &["check", "-q", "t.qcow2"]);
}
