//! Images with damaged metadata in use: writes over metadata are refused and reported.
//!
//! The image records the damage, and an event reports it, as with qemu-storage-daemon.
//!
//! Where the two differ on purpose: reading continues from an image that was marked as corrupt; what is reserved for
//! later is looked at before it is needed; the header's cluster is never given out.

use crate::monitor::{Client, MONITOR};
use crate::vhost_user::{Daemon, export_of};
use serde_json::{Value, json};
use std::process::Command;
use vublk_testkit::Options;
use vublk_testkit::request::{Range, Request};
use vublk_testkit::spec::status;

const THEIRS: &str = "qemu-storage-daemon";
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const CLUSTER: u64 = 64 << 10;

/// The bytes of an image, and where its tables are.
struct Bytes {
    bytes: Vec<u8>,
    l1: u64,
    refcount_table: u64,
    l2: u64,
    refcount_block: u64,
}

impl Bytes {
    /// Clusters of 64 KiB: two at the start of the disk, one at 4 MiB. A snapshot, and the first cluster written
    /// again; a bitmap.
    fn new() -> Bytes {
        Bytes::of_disk("64M")
    }

    fn of_disk(len: &str) -> Bytes {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let path = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", path, len]);
        let io = |commands: &[&str]| {
            let commands = commands.iter().flat_map(|command| ["-c", command]);
            let status = Command::new("qemu-io").args(commands).arg(path).output().unwrap().status;
            assert!(status.success());
        };
        io(&["write 0 128k", "write 4M 64k"]);
        qemu_img(&["snapshot", "-c", "s1", path]);
        qemu_img(&["bitmap", "--add", path, "b0"]);
        io(&["write 0 64k", "write 4M 64k"]);
        let bytes = std::fs::read(path).unwrap();
        let mut image = Bytes { bytes, l1: 0, refcount_table: 0, l2: 0, refcount_block: 0 };
        image.l1 = image.word(40);
        image.refcount_table = image.word(48);
        image.l2 = image.word(image.l1) & OFFSET;
        image.refcount_block = image.word(image.refcount_table);
        image
    }

    fn word(&self, at: u64) -> u64 {
        let word = &self.bytes[at as usize..][..8];
        word.iter().fold(0, |word, &byte| word << 8 | u64::from(byte))
    }

    fn set(&mut self, at: u64, word: u64) {
        self.bytes[at as usize..][..8].copy_from_slice(&word.to_be_bytes());
    }

    /// Makes the first guest cluster exist.
    fn point_to(&mut self, host: u64) {
        self.set(self.l2, COPIED | host);
    }

    fn set_refcount(&mut self, host: u64, count: u16) {
        let at = self.refcount_block + host / CLUSTER * 2;
        self.bytes[at as usize..][..2].copy_from_slice(&count.to_be_bytes());
    }

    /// The first cluster that counts no references.
    fn first_free(&self) -> u64 {
        let counts = self.bytes[self.refcount_block as usize..].chunks_exact(2);
        counts.take_while(|count| *count != [0, 0]).count() as u64 * CLUSTER
    }

    fn snapshot_table(&self) -> u64 {
        self.word(64)
    }

    fn snapshot_l1(&self) -> u64 {
        self.word(self.snapshot_table())
    }

    fn bitmap_directory(&self) -> u64 {
        let mut at = self.word(96) & 0xffff_ffff;
        loop {
            let head = self.word(at);
            if head >> 32 == 0x2385_2875 {
                return self.word(at + 24);
            }
            at += 8 + (head & 0xffff_ffff).next_multiple_of(8);
        }
    }
}

fn qemu_img(arguments: &[&str]) {
    assert!(Command::new("qemu-img").args(arguments).status().unwrap().success());
}

/// What became of it.
#[derive(Debug, PartialEq)]
struct Outcome {
    statuses: Vec<u8>,
    event: Option<Value>,
    /// The header's corrupt bit, as soon as the guest had its answers.
    is_marked: bool,
}

fn run(program: &[&str], image: &Bytes, node: &str, requests: &[Request]) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.img"), &image.bytes).unwrap();
    let node = format!(
        "driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename=DIR/disk.img{node}"
    );
    let writable = if node.contains("read-only=on") { "off" } else { "on" };
    let export = format!("{},writable={writable}", export_of("d0", 0));
    let more = ["--blockdev", &node, "--export", &export];
    let daemon = Daemon::start_in(dir, program, &[&MONITOR[..], &more].concat());
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut disk = daemon.open(&Options::default());
    let statuses: Vec<_> = requests.iter().map(|one| disk.run(one).unwrap().status).collect();
    let is_marked = daemon.image()[79] & 2 != 0;
    // What was told by now comes before the reply.
    client.run("query-block-exports", json!({}));
    let mut events = std::mem::take(&mut client.events);
    events.retain(|event| event["event"] == json!("BLOCK_IMAGE_CORRUPTED"));
    assert!(events.len() < 2, "{events:?}");
    let event = events.pop().map(|mut event| event["data"].take());
    Outcome { statuses, event, is_marked }
}

fn write(offset: u64) -> Request {
    Request::Out { sector: offset / 512, data: vec![7; 4096] }
}

fn read(offset: u64) -> Request {
    Request::In { sector: offset / 512, len: 4096 }
}

type Damage = fn(&mut Bytes);

#[test]
fn what_would_be_written_over_metadata_marks_an_image_as_corrupt_as_it_does_with_qemu() {
    let damages: [(&str, Damage); 19] = [
        ("header", |image| image.point_to(0)),
        ("l1", |image| image.point_to(image.l1)),
        ("l2", |image| image.point_to(image.l2)),
        ("refcount table", |image| image.point_to(image.refcount_table)),
        ("refcount block", |image| image.point_to(image.refcount_block)),
        ("snapshot table", |image| image.point_to(image.snapshot_table())),
        ("inactive l1", |image| image.point_to(image.snapshot_l1())),
        ("inactive l2", |image| image.point_to(image.word(image.snapshot_l1()) & OFFSET)),
        ("bitmap directory", |image| image.point_to(image.bitmap_directory())),
        ("unaligned data", |image| image.set(image.l2, image.word(image.l2) | 0x200)),
        ("unaligned zero", |image| image.set(image.l2, image.word(image.l2) | 0x201)),
        ("unaligned l2", |image| image.set(image.l1, image.word(image.l1) | 0x200)),
        ("unaligned refcount block", |image| {
            image.set(image.refcount_table, image.refcount_block | 0x200);
        }),
        ("l2 over l1", |image| image.set(image.l1, COPIED | image.l1)),
        ("free header", |image| image.set_refcount(0, 0)),
        ("free l1", |image| image.set_refcount(image.l1, 0)),
        ("free l2", |image| image.set_refcount(image.l2, 0)),
        ("free refcount block", |image| image.set_refcount(image.refcount_block, 0)),
        ("free snapshot table", |image| image.set_refcount(image.snapshot_table(), 0)),
    ];
    let modes = ["", ",overlap-check=constant", ",overlap-check=all"];
    let flags = [
        ",overlap-check.template=none,overlap-check.active-l2=on",
        ",overlap-check.template=all,overlap-check.inactive-l2=off,overlap-check.main-header=off",
    ];
    let mut marked = 0;
    for (what, damage) in damages {
        let mut image = Bytes::new();
        damage(&mut image);
        for node in modes.iter().chain(&flags) {
            // The first is written over, the others need new clusters.
            let new = (0..if what.starts_with("free") { 12 } else { 1 })
                .map(|n| write(n << 20 | 8 << 20));
            let requests: Vec<_> = [write(0)].into_iter().chain(new).chain([write(0)]).collect();
            let ours = run(&[env!("CARGO_BIN_EXE_vublk"), "daemon"], &image, node, &requests);
            let theirs = run(&[THEIRS], &image, node, &requests);
            let key = format!("{what}{node}");
            if what == "free header" && node.contains("template") {
                // Unless it is told to look, theirs writes a guest's data over the header.
                assert!(ours.is_marked && ours.statuses.ends_with(&[status::IOERR]), "{ours:?}");
                continue;
            }
            // Theirs writes on after an error that it marked nothing for; the rest is alike.
            assert_eq!(ours.is_marked, theirs.is_marked, "{key}: {ours:?} {theirs:?}");
            assert_eq!(ours.statuses[0], theirs.statuses[0], "{key}: {ours:?} {theirs:?}");
            assert_eq!(
                ours.statuses.last() == Some(&status::OK),
                theirs.statuses.last() == Some(&status::OK),
                "{key}: {ours:?} {theirs:?}"
            );
            let reported = |outcome: &Outcome| {
                let mut event = outcome.event.clone()?;
                if what.starts_with("free") {
                    // Of what is reserved, theirs of the one cluster.
                    let map = event.as_object_mut().unwrap();
                    assert!(map.remove("offset").is_some() && map.remove("size").is_some());
                }
                Some(event)
            };
            assert_eq!(reported(&ours), reported(&theirs), "{key}");
            marked += usize::from(ours.is_marked);
        }
    }
    assert!(marked > 60, "{marked}");
}

#[test]
fn what_makes_no_sense_to_a_reader_is_reported_once_and_is_fatal_only_where_it_could_be_written() {
    let damages: [(&str, Damage); 2] = [
        ("data", |image| image.set(image.l2, image.word(image.l2) | 0x200)),
        ("l2", |image| image.set(image.l1, image.word(image.l1) | 0x200)),
    ];
    for (what, damage) in damages {
        let mut image = Bytes::new();
        damage(&mut image);
        for node in ["", ",read-only=on"] {
            let requests = [read(0), read(0)];
            let ours = run(&[env!("CARGO_BIN_EXE_vublk"), "daemon"], &image, node, &requests);
            let theirs = run(&[THEIRS], &image, node, &requests);
            assert_eq!(ours, theirs, "{what}{node}");
            assert_eq!(ours.event.unwrap()["fatal"], json!(node.is_empty()));
        }
    }
}

#[test]
fn a_marked_image_is_read_on_and_can_be_opened_to_be_read_only() {
    let mut image = Bytes::new();
    image.point_to(image.l1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, &image.bytes).unwrap();
    let node =
        "driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename=DIR/disk.img";
    let export = format!("{},writable=on", export_of("d0", 0));
    let more = ["--blockdev", node, "--export", &export];
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    let daemon = Daemon::start_in(dir, &program, &[&MONITOR[..], &more].concat());
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut disk = daemon.open(&Options::default());
    // Another cluster of the same table is in the cache, and written over on the fast path or not.
    let other = write(CLUSTER);
    assert_eq!(disk.run(&other).unwrap().status, status::OK);
    assert_eq!(disk.run(&write(0)).unwrap().status, status::IOERR);
    // The export tells of the failed request itself, before or after.
    let corrupted = (0..2).map(|_| client.event()).find(|e| e["event"] == "BLOCK_IMAGE_CORRUPTED");
    assert_eq!(corrupted.expect("it is told")["data"]["fatal"], json!(true));
    assert_eq!(disk.run(&other).unwrap().status, status::IOERR);
    let zeroes = Request::WriteZeroes(vec![Range { sector: 0, sectors: 128, flags: 0 }]);
    assert_eq!(disk.run(&zeroes).unwrap().status, status::IOERR);
    let found = disk.run(&read(CLUSTER)).unwrap();
    assert_eq!((found.status, &found.data[..4096]), (status::OK, &[7; 4096][..]));
    // The tables are as they were.
    let now = daemon.image();
    assert!(now[image.l1 as usize..][..4096] == image.bytes[image.l1 as usize..][..4096]);
    drop((disk, client));
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy.img");
    std::fs::copy(daemon.path("disk.img"), &copy).unwrap();
    daemon.end();
    let open = |option: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.args(["io", "-f", "qcow2"]).args(option).args(["-c", "read 64k 4k"]).arg(&copy);
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    };
    let (is_open, said) = open(&[]);
    assert!(!is_open && said.contains("Image is corrupt; cannot be opened read/write"), "{said}");
    let (is_open, said) = open(&["-r"]);
    assert!(is_open, "{said}");
}

#[test]
fn a_cluster_that_an_entry_names_is_not_given_out_again() {
    let mut image = Bytes::new();
    let data = image.word(image.l2 + 8) & OFFSET;
    image.set_refcount(data, 0);
    image.set(image.l2 + 8, COPIED | data);
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    // Its entry is in memory before the cluster is looked for.
    let requests = [read(CLUSTER), write(8 << 20), write(16 << 20), read(CLUSTER)];
    let outcome = run(&program, &image, "", &requests);
    let failed = status::IOERR;
    assert_eq!(outcome.statuses, [status::OK, failed, failed, status::OK]);
    assert!(outcome.is_marked);
    let message = outcome.event.unwrap()["msg"].as_str().unwrap().to_owned();
    let wanted = format!("Preventing invalid allocation of cluster {data:#x}, which is in use");
    assert_eq!(message, wanted);
}

/// Clusters on their way from the refcounts to a table: counted, reserved, written, named.
#[test]
fn an_entry_that_is_loaded_while_its_cluster_becomes_a_table_is_not_written_through() {
    for event in ["refblock_update_part", "l2_alloc_write", "l1_update"] {
        let mut image = Bytes::of_disk("1G");
        let free = image.first_free();
        image.point_to(free);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, &image.bytes).unwrap();
        let commands = [
            &format!("break {event} A"),
            // Where there is no L2 table: what is free first becomes one.
            "aio_write -P 9 512M 4k",
            "wait_break A",
            "read 0 4k",
            "resume A",
            "aio_flush",
            "write -P 7 0 4k",
            "read -P 9 512M 4k",
        ];
        let mut tool = Command::new(env!("CARGO_BIN_EXE_vublk"));
        tool.args(["io", "-f", "qcow2"]);
        tool.args(commands.iter().flat_map(|command| ["-c", command]));
        let output = tool.arg(format!("blkdebug::{}", path.display())).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert!(said.contains("write failed: Input/output error"), "{event}: {said}");
        assert!(!said.contains("verification failed"), "{event}: {said}");
        image.bytes = std::fs::read(&path).unwrap();
        assert!(image.bytes[79] & 2 != 0, "{event}: it is marked");
        assert_eq!(image.word(image.l1 + 8), COPIED | free, "{event}");
    }
}
