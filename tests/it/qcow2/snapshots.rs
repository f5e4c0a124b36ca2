//! Internal snapshots in one image that QEMU's tools and ours change alternately.
//!
//! It holds what it should, snapshots included, and both find it sound.

use super::images::Images;
use crate::disks::seed;
use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::process::Command;
use vublk::format::qcow2::header::Header;
use vublk::format::qcow2::snapshots::Snapshot;

/// The tools under QEMU's names that are ours.
struct Ours {
    links: tempfile::TempDir,
}

impl Ours {
    fn new() -> Ours {
        let links = tempfile::tempdir().unwrap();
        for name in ["qemu-img", "qemu-io"] {
            symlink(env!("CARGO_BIN_EXE_vublk"), links.path().join(name)).unwrap();
        }
        Ours { links }
    }

    fn tool(&self, name: &str) -> String {
        self.links.path().join(name).to_str().unwrap().to_owned()
    }
}

/// An image, and what it should hold.
struct Run {
    images: Images,
    ours: Ours,
    rng: fastrand::Rng,
    disk: Vec<u8>,
    /// By name, in the order in which they were made.
    snapshots: BTreeMap<String, Vec<u8>>,
    said: Vec<String>,
}

impl Run {
    /// One of the tools, at random.
    fn tool(&mut self, name: &str) -> String {
        if self.rng.bool() { self.ours.tool(name) } else { name.into() }
    }

    fn run(&mut self, name: &str, arguments: &[&str]) -> String {
        let tool = self.tool(name);
        self.said.push(format!("{tool} {}", arguments.join(" ")));
        self.images.run(&tool, arguments)
    }

    fn step(&mut self, n: usize) {
        let unit = [512, 4096, 16384][self.rng.usize(0..3)];
        let len = self.disk.len() as u64;
        let first = self.rng.u64(0..len / unit);
        let (at, n_bytes) = (first * unit, (self.rng.u64(1..=12) * unit).min(len - first * unit));
        let part = at as usize..(at + n_bytes) as usize;
        let names: Vec<String> = self.snapshots.keys().cloned().collect();
        match self.rng.u8(0..12) {
            0..5 => {
                let byte = (n % 250 + 1) as u8;
                self.disk[part].fill(byte);
                self.io(&format!("write -P {byte} {at} {n_bytes}"));
            }
            5 => {
                self.disk[part].fill(0);
                self.io(&format!("write -z {at} {n_bytes}"));
            }
            6 => {
                self.disk[part].fill(0);
                self.io(&format!("write -zu {at} {n_bytes}"));
            }
            7 | 8 if names.len() < 4 => {
                let name = format!("s{n}");
                self.run("qemu-img", &["snapshot", "-c", &name, "a"]);
                self.snapshots.insert(name, self.disk.clone());
            }
            7..10 if !names.is_empty() => {
                let name = &names[self.rng.usize(0..names.len())];
                self.run("qemu-img", &["snapshot", "-a", name, "a"]);
                self.disk = self.snapshots[name].clone();
            }
            _ if !names.is_empty() => {
                let name = &names[self.rng.usize(0..names.len())];
                self.run("qemu-img", &["snapshot", "-d", name, "a"]);
                self.snapshots.remove(name);
            }
            _ => {}
        }
    }

    fn io(&mut self, command: &str) {
        let said = self.run("qemu-io", &["-d", "unmap", "-f", "qcow2", "-c", command, "a"]);
        assert!(said.contains(" bytes at offset "), "{said}");
    }

    /// Whether all agree.
    fn compare(&mut self) {
        let reported = self.said.join("\n");
        let said = self.images.run("qemu-img", &["check", "-f", "qcow2", "a"]);
        assert!(said.contains("No errors were found"), "{said}{reported}");
        assert!(self.images.contents("a") == self.disk, "another disk:\n{reported}");
        let lists = [String::from("qemu-img"), self.ours.tool("qemu-img")]
            .map(|tool| self.images.run(&tool, &["snapshot", "-l", "a"]));
        assert_eq!(lists[0], lists[1]);
        assert_eq!(lists[0].lines().count().saturating_sub(2), self.snapshots.len(), "{reported}");
        let info = [String::from("qemu-img"), self.ours.tool("qemu-img")]
            .map(|tool| self.images.run(&tool, &["info", "--output=json", "a"]));
        assert_eq!(info[0], info[1]);
        for (name, wanted) in &self.snapshots {
            for tool in [String::from("qemu-img"), self.ours.tool("qemu-img")] {
                let arguments = ["convert", "-f", "qcow2", "-O", "raw", "-l", name, "a", "s.raw"];
                self.images.run(&tool, &arguments);
                let found = std::fs::read(self.images.path("s.raw")).unwrap();
                assert!(found == *wanted, "{tool}: another snapshot {name}:\n{reported}");
            }
        }
    }
}

const KINDS: &[&str] = &[
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
    "compat=0.10,cluster_size=4k",
    "cluster_size=64k,lazy_refcounts=on",
    "cluster_size=2k,refcount_bits=8,preallocation=metadata",
];

#[test]
fn images_changed_by_qemu_and_by_us_in_turns_keep_their_snapshots() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        let seed = seed.wrapping_add(n as u64);
        println!("{kind}, seed {seed}");
        let images = Images::new();
        let size = 256 << 10;
        images.create("a", size, kind);
        let mut run = Run {
            images,
            ours: Ours::new(),
            rng: fastrand::Rng::with_seed(seed),
            disk: vec![0; size as usize],
            snapshots: BTreeMap::new(),
            said: vec![format!("{kind}, seed {seed}")],
        };
        for n in 0..40 {
            run.step(n);
            if n % 10 == 9 {
                run.compare();
            }
        }
    }
}

#[test]
fn compressed_clusters_are_shared_by_snapshots() {
    let images = Images::new();
    let ours = Ours::new();
    images.create("a", 1 << 20, "cluster_size=4k");
    let compressed = |at: u64, byte: u8| format!("write -c -P {byte} {at} 4k");
    images.io("a", &(0..64).map(|n| compressed(n * 8192, n as u8 + 1)).collect::<Vec<_>>());
    let first = images.contents("a");
    images.run(&ours.tool("qemu-img"), &["snapshot", "-c", "one", "a"]);
    images.io("a", &["write -P 99 0 100k".to_owned()]);
    let second = images.contents("a");
    images.run(&ours.tool("qemu-img"), &["snapshot", "-c", "two", "a"]);
    images.run(&ours.tool("qemu-img"), &["snapshot", "-a", "one", "a"]);
    whole(&images, "a");
    assert!(images.contents("a") == first);
    images.run(&ours.tool("qemu-img"), &["snapshot", "-d", "one", "a"]);
    images.run(&ours.tool("qemu-img"), &["snapshot", "-a", "two", "a"]);
    whole(&images, "a");
    assert!(images.contents("a") == second);
    images.run(&ours.tool("qemu-img"), &["snapshot", "-d", "two", "a"]);
    whole(&images, "a");
    assert!(images.contents("a") == second);
}

fn whole(images: &Images, name: &str) {
    let said = images.run("qemu-img", &["check", "-f", "qcow2", name]);
    assert!(said.contains("No errors were found"), "{said}");
}

/// Runs a command that must fail; what it says, without the name of the program.
fn refusal(images: &Images, tool: &str, arguments: &[&str]) -> String {
    let folder = images.path("");
    let output = Command::new(tool).args(arguments).current_dir(folder).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_snapshot_that_would_count_too_many_references_changes_nothing() {
    let images = Images::new();
    let tool = Ours::new();
    let tool = tool.tool("qemu-img");
    for (bits, most) in [(1, 0), (2, 2)] {
        images.create("a", 1 << 20, &format!("refcount_bits={bits},cluster_size=4k"));
        images.io("a", &["write -P 1 0 200k".to_owned(), "write -P 2 600k 200k".to_owned()]);
        for n in 0..most {
            images.run(&tool, &["snapshot", "-c", &format!("s{n}"), "a"]);
        }
        let before = std::fs::read(images.path("a")).unwrap();
        let said = refusal(&images, &tool, &["snapshot", "-c", "x", "a"]);
        assert!(
            said.ends_with("Could not create snapshot 'x': -22 (Invalid argument)\n"),
            "{said}"
        );
        whole(&images, "a");
        let after = std::fs::read(images.path("a")).unwrap();
        assert_eq!(Header::parse(&before[..4096]), Header::parse(&after[..4096]));
        if most > 0 {
            let said = refusal(&images, &tool, &["snapshot", "-a", "s0", "a"]);
            assert!(
                said.contains("Could not apply snapshot 's0': Failed to load snapshot: Invalid")
            );
            images.run(&tool, &["snapshot", "-d", "s1", "a"]);
            images.run(&tool, &["snapshot", "-a", "s0", "a"]);
            whole(&images, "a");
        }
    }
}

#[test]
fn a_snapshot_has_the_size_that_the_disk_had() {
    let images = Images::new();
    let ours = Ours::new();
    let (qemu_img, ours) = ("qemu-img".to_owned(), ours.tool("qemu-img"));
    for tool in [&ours, &qemu_img] {
        images.create("a", 1 << 20, "cluster_size=512");
        images.io("a", &["write -P 1 0 1M".to_owned()]);
        images.run(tool, &["snapshot", "-c", "small", "a"]);
        images.run("qemu-img", &["resize", "-q", "a", "5M"]);
        images.io("a", &["write -P 2 0 5M".to_owned()]);
        images.run(tool, &["snapshot", "-c", "large", "a"]);
        for (name, len, byte) in
            [("small", 1 << 20, 1), ("large", 5 << 20, 2), ("small", 1 << 20, 1)]
        {
            images.run(&ours, &["snapshot", "-a", name, "a"]);
            whole(&images, "a");
            assert!(images.contents("a") == vec![byte; len], "{name}");
        }
        images.io("a", &["write -P 3 0 1M".to_owned()]);
        images.run(&ours, &["snapshot", "-d", "large", "a"]);
        images.run(&ours, &["snapshot", "-d", "small", "a"]);
        whole(&images, "a");
        assert!(images.contents("a") == vec![3; 1 << 20]);
    }
}

/// The entries of an image's snapshot table.
fn entries(images: &Images, name: &str) -> Vec<Snapshot> {
    let bytes = std::fs::read(images.path(name)).unwrap();
    let header = Header::parse(&bytes[..1 << bytes[23]]).unwrap();
    let mut at = header.snapshots_offset as usize;
    let parse = |_| {
        let (snapshot, len) = Snapshot::parse(&bytes[at..]).unwrap();
        at += len;
        snapshot
    };
    (0..header.nb_snapshots).map(parse).collect()
}

/// Puts another entry instead of the only one, which it may be longer than.
fn replace_entry(images: &Images, name: &str, entry: &Snapshot) {
    let path = images.path(name);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let entry = entry.encode();
    bytes.resize(bytes.len().max(at + entry.len()), 0);
    bytes[at..at + entry.len()].copy_from_slice(&entry);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_an_entry_says_of_a_machine_and_what_we_do_not_know_is_kept() {
    let images = Images::new();
    let ours = Ours::new();
    let tool = ours.tool("qemu-img");
    images.create("a", 1 << 20, "");
    images.run("qemu-img", &["snapshot", "-c", "one", "a"]);
    let mut entry = entries(&images, "a").remove(0);
    entry.vm_state_size = 123_456;
    entry.vm_clock = 987_654_321_012;
    entry.extra = Snapshot::extra(123_456, 1 << 20, Some(77));
    entry.extra.extend(b"something from the future");
    replace_entry(&images, "a", &entry);
    images.run(&tool, &["snapshot", "-c", "two", "a"]);
    assert_eq!(entries(&images, "a")[0], entry);
    let list = images.run(&tool, &["snapshot", "-l", "a"]);
    assert_eq!(list, images.run("qemu-img", &["snapshot", "-l", "a"]));
    assert!(list.contains("121 KiB") && list.contains("00:16:27.654         77"), "{list}");
    // As old programs wrote it: what is missing is filled in when the table is written.
    images.run(&tool, &["snapshot", "-d", "two", "a"]);
    entry.extra.clear();
    replace_entry(&images, "a", &entry);
    images.run(&tool, &["snapshot", "-c", "three", "a"]);
    assert_eq!(entries(&images, "a")[0].extra, Snapshot::extra(123_456, 1 << 20, None));
    whole(&images, "a");
}

#[test]
fn many_snapshots_with_long_names_take_a_table_of_many_clusters() {
    let images = Images::new();
    let ours = Ours::new();
    let tool = ours.tool("qemu-img");
    images.create("a", 64 << 10, "cluster_size=512");
    let name = |n: u32| format!("{n}{}", "x".repeat(200));
    for n in 0..40 {
        images.io("a", &[format!("write -P {} 0 4k", n + 1)]);
        images.run(&tool, &["snapshot", "-c", &name(n), "a"]);
    }
    whole(&images, "a");
    for n in (0..40).step_by(2) {
        images.run(&tool, &["snapshot", "-d", &name(n), "a"]);
    }
    whole(&images, "a");
    let ids: Vec<_> = entries(&images, "a").into_iter().map(|entry| entry.id).collect();
    let odd = (0..40).filter(|n| n % 2 == 1).map(|n: u32| (n + 1).to_string().into_bytes());
    assert_eq!(ids, odd.collect::<Vec<_>>());
    images.run(&tool, &["snapshot", "-a", &name(7), "a"]);
    assert!(images.contents("a")[..4096] == [8; 4096]);
}

#[test]
fn bitmaps_in_the_image_keep_it_from_being_turned_back() {
    let images = Images::new();
    let ours = Ours::new();
    images.create("a", 1 << 20, "");
    images.run("qemu-img", &["snapshot", "-c", "one", "a"]);
    images.run("qemu-img", &["bitmap", "--add", "a", "b"]);
    let [a, b] = ["qemu-img".to_owned(), ours.tool("qemu-img")].map(|tool| {
        let said = refusal(&images, &tool, &["snapshot", "-a", "one", "a"]);
        said.split_once(": ").unwrap().1.to_owned()
    });
    assert_eq!(a, b);
    images.run(&ours.tool("qemu-img"), &["snapshot", "-d", "one", "a"]);
    whole(&images, "a");
}

#[test]
fn the_state_of_a_machine_stays_in_its_snapshot() {
    let images = Images::new();
    let ours = Ours::new();
    images.create("a", 1 << 20, "");
    // Where QEMU keeps it: past the end of the disk.
    images.run("qemu-io", &["-f", "qcow2", "-c", "write -b -P 5 0 300k", "a"]);
    images.run(&ours.tool("qemu-img"), &["snapshot", "-c", "one", "a"]);
    images.run("qemu-io", &["-f", "qcow2", "-c", "write -b -P 6 0 300k", "a"]);
    whole(&images, "a");
    images.run(&ours.tool("qemu-img"), &["snapshot", "-a", "one", "a"]);
    whole(&images, "a");
    let said = images.run("qemu-io", &["-f", "qcow2", "-c", "read -b -P 5 0 300k", "a"]);
    assert!(!said.contains("failed"), "{said}");
    images.run(&ours.tool("qemu-img"), &["snapshot", "-d", "one", "a"]);
    whole(&images, "a");
}

#[test]
fn a_table_that_nobody_can_read_is_named_and_nothing_is_changed() {
    let images = Images::new();
    let ours = Ours::new();
    let tool = ours.tool("qemu-img");
    images.create("a", 1 << 20, "");
    images.run("qemu-img", &["snapshot", "-c", "one", "a"]);
    let path = images.path("a");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    bytes[at + 36..at + 40].copy_from_slice(&2000u32.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let said = refusal(&images, &tool, &["snapshot", "-l", "a"]);
    let wanted = "Could not open 'a': Too much extra metadata in snapshot table entry 0\nYou can \
                  force-remove this extra metadata with qemu-img check -r all\n";
    assert!(said.ends_with(wanted), "{said}");
    for arguments in [["-c", "x"], ["-d", "one"], ["-a", "one"]] {
        refusal(&images, &tool, &["snapshot", arguments[0], arguments[1], "a"]);
    }
    assert!(std::fs::read(&path).unwrap() == bytes);
    // An L1 table where none can be.
    bytes[at + 36..at + 40].copy_from_slice(&24u32.to_be_bytes());
    bytes[at..at + 8].copy_from_slice(&0x1234u64.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    for arguments in [&["snapshot", "-d", "one", "a"][..], &["convert", "-l", "one", "a", "b"]] {
        let [theirs, ours] = ["qemu-img", &tool].map(|tool| refusal(&images, tool, arguments));
        assert_eq!(ours.split_once(": ").unwrap().1, theirs.split_once(": ").unwrap().1);
    }
}
