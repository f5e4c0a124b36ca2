//! Crashes of a machine with persistent bitmaps.
//!
//! Afterwards the image can be opened, nothing is corrupt, and a bitmap is right unless it says that it is out of
//! date.

use super::judge::{orderly, sound};
use super::sim::{Image, below, disk, passing};
use crate::disks::{crashes, open_holding, seed, simulated};
use std::borrow::Cow;
use std::sync::Arc;
use vublk::block::*;
use vublk::io::IoVec;
use vublk::io::sim::Disorder;
use vublk::protocol::sim::Tries;

const LEN: u64 = 64 << 10;
const MOST: u64 = 2 << 20;
const BASE: u64 = 4096;

struct Case {
    create: &'static str,
    /// The name of a backing file that the image records, which moves when the header grows.
    backing: Option<usize>,
    /// Of requests to the disk below.
    align: u32,
    /// What is past the image's end reads as garbage.
    garbage: bool,
    /// Bitmaps that the image has to begin with.
    bitmaps: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case { create: "cluster_size=64k", backing: None, align: 1, garbage: false, bitmaps: &[] },
    Case {
        create: "cluster_size=4k",
        backing: Some(9),
        align: 512,
        garbage: false,
        bitmaps: &["a"],
    },
    Case { create: "cluster_size=4k", backing: Some(9), align: 1, garbage: false, bitmaps: &[] },
    Case { create: "cluster_size=4k", backing: Some(600), align: 1, garbage: false, bitmaps: &[] },
    Case {
        create: "cluster_size=1k",
        backing: Some(300),
        align: 1,
        garbage: false,
        bitmaps: &["a", "b"],
    },
    Case {
        create: "cluster_size=512",
        backing: Some(20),
        align: 512,
        garbage: false,
        bitmaps: &["a"],
    },
    Case {
        create: "cluster_size=4k,lazy_refcounts=on",
        backing: None,
        align: 512,
        garbage: false,
        bitmaps: &["a"],
    },
    Case { create: "cluster_size=4k", backing: None, align: 1, garbage: true, bitmaps: &["a"] },
    Case {
        create: "cluster_size=512",
        backing: Some(20),
        align: 512,
        garbage: true,
        bitmaps: &["a", "b"],
    },
];

fn new(name: &str) -> NewBitmap {
    let granularity = Some(BASE);
    NewBitmap { name: name.into(), granularity, persistent: true, disabled: false }
}

/// Writes, and changes of the bitmaps; then the image is closed.
async fn session(options: &str, rng: &mut fastrand::Rng, value: &mut u8) {
    let image = Image::open(options).await;
    let node = image.node.clone();
    for _ in 0..rng.u32(0..5) {
        *value += 1;
        let at = rng.u64(0..LEN / SECTOR) * SECTOR;
        let len = (rng.u64(1..40) * SECTOR).min(LEN - at);
        match rng.u8(0..8) {
            0..4 => {
                let bytes = vec![*value; len as usize];
                node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
            }
            4 => node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
            5 => node.flush().await.unwrap(),
            6 => change(&node, rng).await,
            _ => {
                let name = format!("n{}", *value);
                node.add_bitmap(new(&name)).await.unwrap();
            }
        }
    }
    drop(node);
    image.close().await;
}

async fn change(node: &Arc<Node>, rng: &mut fastrand::Rng) {
    let all = node.bitmaps().all();
    // The first ones stay, and record, so that there is something to compare.
    let Some(bitmap) = all.get(rng.usize(2..8)) else { return };
    match rng.u8(0..3) {
        0 => node.remove_bitmap(bitmap.name()).await.unwrap(),
        1 => node.enable_bitmap(bitmap.name(), rng.bool()).await.unwrap(),
        _ => node
            .merge_bitmaps(all[0].name(), &[(node.clone(), bitmap.name().into())])
            .await
            .unwrap(),
    }
}

/// What is on a disk, and its bitmaps: the sectors that each has as dirty, or none if it is
/// inconsistent.
type Contents = (Vec<u8>, Vec<(String, Option<Vec<bool>>)>);

fn contents(state: &[u8], backing: &str) -> Contents {
    let (_disk, options) = passing(state, state.len() as u64, |_| {});
    let options = format!("driver=qcow2,read-only=on{}{backing}", below("file", &options));
    simulated(orderly(), |_| async move {
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
        let mut found = vec![0xee; LEN as usize];
        opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        let bitmaps = opened.node.bitmaps().all().into_iter().map(|bitmap| {
            let words: Vec<u64> = bitmap.bits().words().collect();
            let granularity = bitmap.granularity();
            let is_dirty = |sector: u64| {
                let bit = sector * SECTOR / granularity;
                words[bit as usize / 64] >> (bit % 64) & 1 == 1
            };
            let dirty = (0..LEN / SECTOR).map(is_dirty).collect();
            (bitmap.name().to_owned(), (!bitmap.flags().inconsistent).then_some(dirty))
        });
        (found, bitmaps.collect())
    })
}

fn prepared(case: &Case) -> Vec<u8> {
    let name = case.backing.map(|len| "b".repeat(len));
    let create = match &name {
        Some(name) => format!("{},backing_fmt=raw,backing_file={name}", case.create),
        None => case.create.to_owned(),
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = std::process::Command::new("qemu-img");
    command.args(["create", "-q", "-u", "-f", "qcow2", "-o", &create]).arg(file.path());
    assert!(command.arg(LEN.to_string()).status().unwrap().success());
    for name in case.bitmaps {
        let mut command = std::process::Command::new("qemu-img");
        let option = format!("driver=qcow2,file.filename={},backing=", file.path().display());
        command.args(["bitmap", "--add", "-g", "4096", "--image-opts"]);
        let output = command.args([option.as_str(), name]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    std::fs::read(file.path()).unwrap()
}

/// What qemu-img says of an image whose backing file is not there, if it cannot read it.
fn info(state: &[u8]) -> Result<(), String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), state).unwrap();
    let mut command = std::process::Command::new("qemu-img");
    let output = command.args(["info", "-f", "qcow2"]).arg(file.path()).output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// How many of the states that crashes left had to be repaired.
fn run(case: &Case, seed: u64, tries: Tries, sample: usize) -> usize {
    let mut bytes = prepared(case);
    if case.garbage {
        let mut rng = fastrand::Rng::with_seed(seed);
        bytes.resize(bytes.len().next_multiple_of(65536), 0);
        bytes.resize_with(MOST as usize, || rng.u8(240..250));
    }
    let (disk_, options) = disk(&bytes, MOST, |options| {
        options.log = true;
        options.traits.request_align = case.align;
        options.traits.buffer_align = case.align;
    });
    let mut options = format!("driver=qcow2,discard=unmap{}", below("file", &options));
    // What the image says alone makes nothing lazy.
    if case.create.contains("lazy_refcounts=on") {
        options += ",lazy-refcounts=on";
    }
    let mut backing = String::new();
    if case.backing.is_some() {
        let (_, base) = disk(&vec![200; LEN as usize], LEN, |_| {});
        backing = below("backing", &base);
        options += &backing;
    }
    let what = format!("{}, {:?}, {:?}, seed {seed}", case.create, case.backing, case.bitmaps);
    println!("{what}");
    let short = if case.align == 1 { 0.0 } else { 0.2 };
    // Where each session ended.
    let ends: Vec<usize> = simulated(Disorder { short, ..Disorder::wild(seed) }, |_| {
        let disk = disk_.clone();
        async move {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut value, mut ends) = (0, Vec::new());
            for _ in 0..3 {
                session(&options, &mut rng, &mut value).await;
                ends.push(disk.log().changes().len());
            }
            ends
        }
    });
    let log = disk_.log();
    let (initial, first) = contents(&bytes, &backing);
    let first: Vec<_> = first.into_iter().map(|(name, _)| name).collect();
    let judge_bitmaps = |state: &[u8], at: &str, is_end: bool| {
        let (found, bitmaps) = contents(state, &backing);
        for (name, dirty) in bitmaps {
            let Some(dirty) = dirty else {
                assert!(!is_end, "{at}: bitmap {name} is inconsistent after the image was closed");
                continue;
            };
            if !first.contains(&name) {
                continue;
            }
            let sectors = found.chunks(SECTOR as usize).zip(initial.chunks(SECTOR as usize));
            for (n, (now, before)) in sectors.enumerate() {
                assert!(dirty[n] || now == before, "{at}: bitmap {name} has missed sector {n}");
            }
        }
    };
    let mut repaired = 0;
    for (n, crash) in log.crashes(seed, tries).enumerate() {
        let at = format!("{what}, after {} of {} changes", crash.prefix, log.changes().len());
        let is_end = ends.contains(&crash.prefix);
        let (state, is_sampled) = (log.image(&crash), is_end || n % sample == 0);
        // qemu-img checks no image without its backing file.
        let sound = sound(case.create, &state, is_sampled && case.backing.is_none(), &at);
        if is_sampled && case.backing.is_some() {
            info(&state).unwrap_or_else(|error| panic!("{at}: {error}"));
        }
        judge_bitmaps(&state, &at, is_end);
        if let Cow::Owned(state) = &sound {
            judge_bitmaps(state, &format!("{at}, and a repair"), is_end);
            repaired += 1;
        }
    }
    repaired
}

#[test]
fn no_crash_leaves_a_bitmap_that_is_silently_out_of_date_or_an_image_that_is_corrupt() {
    let seed = seed();
    for (n, case) in CASES.iter().enumerate() {
        let repaired = run(case, seed.wrapping_add(n as u64), crashes(4), 101);
        assert_eq!(repaired > 0, case.create.contains("lazy_refcounts=on"), "{repaired} repaired");
    }
}
