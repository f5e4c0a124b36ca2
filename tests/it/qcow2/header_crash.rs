//! Crashes of a machine while an image's header changes.
//!
//! Repairs, amendments, other backing files, bitmaps, snapshots and resizes change it. Whatever is left, the image
//! opens and is sound, and its header has the backing file and the extensions from before the change or from after
//! it.

use super::consistency;
use super::judge::orderly;
use super::sim::{DATA, Disks, Image, Judged, below, disk, image, passing};
use crate::disks::{open_holding, seed, simulated};
use std::cell::RefCell;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::format::qcow2::extensions::Extension;
use vublk::format::qcow2::header::Header;
use vublk::io::IoVec;
use vublk::io::sim::Disorder;
use vublk::options::{Map, Value};
use vublk::protocol::sim::Tries;

const LEN: u64 = 64 << 10;
const MOST: u64 = 2 << 20;
const BACKING: u8 = 200;
/// What was not flushed: every subset of a header's sectors, and some of more.
const TRIES: Tries = Tries { every: 4, most: 6 };

/// A change, in a session of its own.
#[derive(Clone, Copy, Debug)]
enum Change {
    CheckAll,
    /// Option and value.
    Amend(&'static str, &'static str),
    /// A data file's name of this length.
    AmendDataFile(usize),
    /// A name of this length, or none, and a format.
    Rebase(usize, Option<&'static str>),
    AddBitmap(&'static str),
    RemoveBitmap(&'static str),
    Snapshot(&'static str),
    DropSnapshot(&'static str),
    Resize(u64),
    Write,
}

use Change::*;

struct Case {
    create: &'static str,
    /// The length of the name that the image records, or 0.
    backing: usize,
    bitmaps: &'static [&'static str],
    /// Some program did not keep up with the bitmaps.
    is_stale: bool,
    changes: &'static [Change],
}

const CASES: &[Case] = &[
    Case {
        create: "cluster_size=4k",
        backing: 500,
        bitmaps: &["a", "b"],
        is_stale: true,
        changes: &[CheckAll, AddBitmap("c"), Write],
    },
    Case {
        create: "cluster_size=64k",
        backing: 500,
        bitmaps: &["a"],
        is_stale: true,
        changes: &[CheckAll, Amend("compat", "0.10"), CheckAll, Amend("compat", "1.1")],
    },
    Case {
        create: "cluster_size=1k",
        backing: 450,
        bitmaps: &["a"],
        is_stale: true,
        changes: &[CheckAll, Rebase(300, Some("raw")), AddBitmap("a"), RemoveBitmap("a")],
    },
    Case {
        create: "cluster_size=64k",
        backing: 9,
        bitmaps: &[],
        is_stale: false,
        changes: &[
            AddBitmap("a"),
            Rebase(900, Some("qcow2")),
            AddBitmap("b"),
            RemoveBitmap("a"),
            Rebase(20, None),
            RemoveBitmap("b"),
            Rebase(0, None),
            Rebase(1023, Some("raw")),
        ],
    },
    Case {
        create: "cluster_size=4k,compat=0.10",
        backing: 600,
        bitmaps: &[],
        is_stale: false,
        changes: &[
            Amend("compat", "1.1"),
            Snapshot("s"),
            AddBitmap("a"),
            Rebase(601, Some("raw")),
            DropSnapshot("s"),
            RemoveBitmap("a"),
            Amend("compat", "0.10"),
        ],
    },
    Case {
        create: "cluster_size=512",
        backing: 30,
        bitmaps: &["a"],
        is_stale: true,
        changes: &[CheckAll, AddBitmap("b"), Rebase(100, Some("raw")), Resize(2 * LEN)],
    },
    Case {
        create: "cluster_size=64k,data_file=D",
        backing: 300,
        bitmaps: &[],
        is_stale: false,
        changes: &[
            AmendDataFile(450),
            AddBitmap("a"),
            Rebase(700, Some("raw")),
            RemoveBitmap("a"),
            AmendDataFile(3),
        ],
    },
];

/// What of a header must be as before or as after.
#[derive(Clone, Debug, PartialEq)]
struct Shown {
    backing: Option<Vec<u8>>,
    /// But for the feature names, which are for people, and bitmaps, which say themselves whether they
    /// can be trusted.
    extensions: Vec<Extension>,
}

fn shown(state: &[u8]) -> Shown {
    let bits = Header::cluster_bits(state.first_chunk().unwrap()).unwrap();
    let mut cluster = state[..state.len().min(1 << bits)].to_vec();
    cluster.resize(1 << bits, 0);
    let header = Header::parse(&cluster).unwrap_or_else(|error| panic!("{error}"));
    let mut extensions = header.extensions;
    extensions.retain(|one| !matches!(one, Extension::FeatureNames(_) | Extension::Bitmaps(_)));
    Shown { backing: header.backing_file, extensions }
}

fn name(len: usize) -> String {
    (0..len).map(|n| char::from(b'a' + ((n + len) % 23) as u8)).collect()
}

fn prepared(case: &Case) -> Vec<u8> {
    let mut create = case.create.to_owned();
    if case.backing > 0 {
        create += &format!(",backing_fmt=raw,backing_file={}", name(case.backing));
    }
    let mut bytes = image(LEN, &create);
    if !case.bitmaps.is_empty() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        for name in case.bitmaps {
            let image = alone(file.path(), false);
            let command = ["bitmap", "--add", "-g", "4096", &image, name];
            let output = Command::new("qemu-img").args(command).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        bytes = std::fs::read(file.path()).unwrap();
    }
    if case.is_stale {
        bytes[88..96].fill(0);
    }
    bytes
}

/// The name of an image that is to be opened without the files that it needs.
fn alone(path: &std::path::Path, has_data_file: bool) -> String {
    let data = match has_data_file {
        true => r#","data-file":{"driver":"null-co","size":1048576}"#,
        false => "",
    };
    let path = path.display();
    format!(
        r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{path}"}}{data}}}"#
    )
}

async fn change(options: &str, change: Change) {
    let image = Image::open(options).await;
    let node = image.node.clone();
    let driver = || node.driver().image().unwrap();
    match change {
        CheckAll => drop(driver().check(Fix::All, &mut |_| {}).await.unwrap()),
        Amend(option, value) => {
            driver().amend(Map::from_iter([(option, Value::from(value))])).await.unwrap();
        }
        AmendDataFile(len) => {
            let value = Value::from(name(len).as_str());
            driver().amend(Map::from_iter([("data_file", value)])).await.unwrap();
        }
        Rebase(len, format) => {
            let name = (len > 0).then(|| name(len));
            driver().set_backing(name.as_deref(), format, None).await.unwrap();
        }
        AddBitmap(name) => {
            let (name, granularity) = (name.into(), Some(4096));
            let new = NewBitmap { name, granularity, persistent: true, disabled: false };
            node.add_bitmap(new).await.unwrap();
        }
        RemoveBitmap(name) => node.remove_bitmap(name).await.unwrap(),
        Snapshot(name) => {
            let new = NewSnapshot { name, date: Duration::ZERO, icount: None };
            driver().snapshots().unwrap().create(new).await.unwrap();
        }
        DropSnapshot(name) => {
            driver().snapshots().unwrap().delete(SnapshotKey::Name(name)).await.unwrap();
        }
        Resize(len) => image.resize(len).await.unwrap(),
        Write => {
            let bytes = vec![BACKING; 8192];
            node.write(4096, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        }
    }
    drop(node);
    image.close().await;
}

/// What is left, repaired if the image says that its refcounts may be wrong.
fn repaired(state: &[u8], has_data_file: bool) -> Vec<u8> {
    if state[7] < 3 || state[79] & 1 == 0 {
        return state.to_vec();
    }
    let (disk_, options) = passing(state, MOST, |_| {});
    let mut options = format!("driver=qcow2{}", below("file", &options));
    options += &below("backing", &disk(&vec![BACKING; LEN as usize], LEN, |_| {}).1);
    if has_data_file {
        options += &below("data-file", &disk(&vec![0; LEN as usize], LEN, |_| {}).1);
    }
    // Opening it for writing repairs it.
    simulated(orderly(), |_| async move { Image::open(&options).await.close().await });
    disk_.bytes()
}

/// Opens what a crash left, and reads the disk: nobody has written anything else than what it showed.
fn assert_opens(state: &[u8], data: &[u8], backing: u8, at: &str) {
    let (_disk, options) = passing(state, state.len() as u64, |_| {});
    let (_base, base) = passing(&vec![backing; LEN as usize], LEN, |_| {});
    let mut options = format!("driver=qcow2,read-only=on{}", below("file", &options));
    options += &below("backing", &base);
    let data = (!data.is_empty()).then(|| passing(data, data.len() as u64, |_| {}));
    if let Some((_, data)) = &data {
        options += &below("data-file", data);
    }
    let at = at.to_owned();
    simulated(orderly(), |_| async move {
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await;
        let opened = opened.unwrap_or_else(|error| panic!("{at}: {error}"));
        let mut found = vec![0xee; LEN as usize];
        opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        assert!(found.iter().all(|&byte| byte == backing), "{at}: another disk");
    });
}

fn assert_qemu_agrees(state: &[u8], has_data_file: bool, at: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), state).unwrap();
    let image = alone(file.path(), has_data_file);
    let output = Command::new("qemu-img").args(["check", &image]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{at}: {said}");
}

/// How many different states crashes left.
fn run(case: &Case, seed: u64) -> usize {
    let bytes = prepared(case);
    let log = |options: &mut vublk::protocol::sim::SimOptions| options.log = true;
    let (image_disk, options) = disk(&bytes, MOST, log);
    let mut options = format!("driver=qcow2{}", below("file", &options));
    options += &below("backing", &disk(&vec![BACKING; LEN as usize], LEN, |_| {}).1);
    let has_data_file = case.create.contains(DATA);
    let data = has_data_file.then(|| {
        let (data, below_it) = disk(&vec![0; LEN as usize], LEN, log);
        options += &below("data-file", &below_it);
        data
    });
    let disks = Rc::new(Disks { image: image_disk, data });
    // What the header was from which change on.
    let history = Rc::new(RefCell::new(vec![(0, shown(&bytes))]));
    for &one in case.changes {
        let (disks, history, options) = (disks.clone(), history.clone(), options.clone());
        let disorder = Disorder { short: 0.0, ..Disorder::wild(seed) };
        simulated(disorder, |_| async move {
            change(&options, one).await;
            history.borrow_mut().push((disks.changes(), shown(&disks.image.bytes())));
        });
    }
    let history = history.borrow();
    let mut judged = Judged::default();
    let mut count = 0;
    disks.crashes(seed, TRIES, |prefix, state, data| {
        let begun = history.partition_point(|(from, _)| *from <= prefix) - 1;
        if !judged.is_new(prefix, begun, state, data) {
            return;
        }
        let change = case.changes.get(begun);
        let at = format!("{}, {change:?}, after {prefix} changes, seed {seed}", case.create);
        let allowed: Vec<_> = history[begun..].iter().take(2).map(|(_, shown)| shown).collect();
        let found = shown(state);
        assert!(allowed.contains(&&found), "{at}: {found:?}, not one of {allowed:?}");
        let repaired = repaired(state, has_data_file);
        consistency::check(&repaired, true).unwrap_or_else(|error| panic!("{at}: {error}"));
        let backing = if history[0].1.backing.is_some() { BACKING } else { 0 };
        assert_opens(state, data, backing, &at);
        if count % 17 == 0 {
            assert_qemu_agrees(&repaired, has_data_file, &at);
        }
        count += 1;
    });
    count
}

#[test]
fn no_crash_tears_a_header_that_changes() {
    let seed = seed();
    for (n, case) in CASES.iter().enumerate() {
        let count = run(case, seed.wrapping_add(n as u64));
        println!("{} {:?}: {count} states", case.create, case.changes);
        assert!(count > case.changes.len(), "only {count} states");
    }
}
