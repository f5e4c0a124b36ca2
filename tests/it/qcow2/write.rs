//! Writing images of every kind, which QEMU then reads and finds sound.
//!
//! They contain what only QEMU makes: snapshots, compressed clusters, preallocation.

use super::images::{Images, random_commands};
use super::judge::orderly;
use super::read::{KINDS, cluster_size};
use super::sim::{Image, below, disk, image};
use crate::disks::{seed, simulated};
use std::path::Path;
use vublk::block::*;
use vublk::io::IoVec;
use vublk::io::sim::Disorder;
use vublk::protocol::sim::{Change, WriteLog};

fn options_for(path: &Path) -> String {
    format!("driver=qcow2,discard=unmap,file.driver=file,file.filename={}", path.display())
}

/// Changes the disk at random, and `expected` with it.
fn change(options: String, expected: Vec<u8>, seed: u64) -> Vec<u8> {
    simulated(Disorder::wild(seed), |_| async move {
        let mut expected = expected;
        let mut rng = fastrand::Rng::with_seed(seed);
        // Closed and opened again in between.
        for round in 0..3 {
            let image = Image::open(&options).await;
            for n in 0..40u32 {
                one_change(&image.node, &mut expected, &mut rng, (round * 40 + n) as u8).await;
            }
            let mut found = vec![0xee; expected.len()];
            image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
            if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
                panic!("{options}: byte {at} is {}, not {}", found[at], expected[at]);
            }
            image.close().await;
        }
        expected
    })
}

async fn one_change(node: &Node, expected: &mut [u8], rng: &mut fastrand::Rng, byte: u8) {
    let unit = [1, 512, 4096, 65536][rng.usize(0..4)];
    let len = node.len();
    let first = rng.u64(0..len.div_ceil(unit));
    let count = rng.u64(1..=20);
    let at = first * unit;
    let n = (count * unit).min(len - at).min(1 << 20);
    let part = &mut expected[at as usize..(at + n) as usize];
    match rng.u8(0..12) {
        0..7 => {
            part.fill(byte | 1);
            node.write(at, &IoVec::from_ref(part), WriteFlags::empty()).await.unwrap();
        }
        7 => {
            part.fill(0);
            node.zero(at, n, ZeroFlags::empty()).await.unwrap();
        }
        8 | 9 => {
            part.fill(0);
            node.zero(at, n, ZeroFlags::UNMAP).await.unwrap();
        }
        10 => node.flush().await.unwrap(),
        _ => {
            node.discard(at, n).await.unwrap();
            let mut found = vec![0xee; n as usize];
            node.read(at, &IoVec::from_mut(&mut found)).await.unwrap();
            let kept = |n: usize| found[n] == part[n] || found[n] == 0;
            assert!((0..part.len()).all(kept), "a discard changed something else");
            part.copy_from_slice(&found);
        }
    }
}

fn assert_whole(what: &str, images: &Images, name: &str, expected: &[u8]) {
    // Leaks, too, are mistakes: it was closed.
    let said = images.run("qemu-img", &["check", "-f", "qcow2", name]);
    assert!(said.contains("No errors were found"), "{what}: {said}");
    let found = images.contents(name);
    assert_eq!(found.len(), expected.len(), "{what}");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        panic!("{what}: QEMU finds {} at {at}, not {}", found[at], expected[at]);
    }
}

#[test]
fn images_of_every_kind_are_written_and_qemu_agrees() {
    let seed = seed();
    for (n, &(kind, clusters)) in KINDS.iter().enumerate() {
        let seed = seed.wrapping_add(n as u64);
        let what = format!("{kind}, seed {seed}");
        println!("{what}");
        let images = Images::new();
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = cluster_size(kind) * clusters - 512;
        images.fill("a", size, kind, &mut rng, false);
        let has_snapshot = !kind.contains("refcount_bits") || kind.contains("refcount_bits=64");
        let before = images.contents("a");
        if has_snapshot {
            images.run("qemu-img", &["snapshot", "-c", "one", "a"]);
        }
        let after = change(options_for(&images.path("a")), before.clone(), seed);
        assert_whole(&what, &images, "a", &after);
        if has_snapshot {
            let from = ["convert", "-f", "qcow2", "-O", "raw", "-l", "one", "a", "one.raw"];
            images.run("qemu-img", &from);
            let found = std::fs::read(images.path("one.raw")).unwrap();
            assert!(found == before, "{what}: the snapshot has changed");
        }
    }
}

#[test]
fn overlays_are_written_and_what_is_below_stays() {
    let seed = seed();
    for (n, (below, above)) in [(80u64, 50u64), (50, 80)].into_iter().enumerate() {
        for kind in [
            "cluster_size=4k",
            "extended_l2=on,cluster_size=16k",
            "compat=0.10",
            "cluster_size=64k",
        ] {
            let images = Images::new();
            let seed = seed.wrapping_add(n as u64);
            let mut rng = fastrand::Rng::with_seed(seed);
            let (below, above) = (below * 16384 + 512, above * 16384);
            let base: Vec<u8> = (0..below).map(|at| (at / 512) as u8 | 1).collect();
            std::fs::write(images.path("base"), &base).unwrap();
            images.create("top", above, &format!("backing_file=base,backing_fmt=raw,{kind}"));
            let cluster = cluster_size(kind);
            images.io(
                "top",
                &random_commands(&mut rng, above, 512, cluster, true, kind.contains("extended_l2"))
                    [..20],
            );
            let before = images.contents("top");
            let after = change(options_for(&images.path("top")), before, seed);
            assert_whole(kind, &images, "top", &after);
            assert!(std::fs::read(images.path("base")).unwrap() == base, "{kind}");
        }
    }
}

#[test]
fn a_data_file_is_written_and_stays_an_image_if_it_is_raw() {
    let seed = seed();
    for (raw, kind) in
        [("off", "cluster_size=4k"), ("on", "cluster_size=4k"), ("off", "extended_l2=on")]
    {
        let images = Images::new();
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = (100 << 12) - 512;
        images.create("a", size, &format!("{kind},data_file=d,data_file_raw={raw}"));
        images.io("a", &random_commands(&mut rng, size, 512, 4096, false, false)[..20]);
        let before = images.contents("a");
        let options = options_for(&images.path("a"));
        let data = images.path("d");
        let options =
            format!("{options},data-file.driver=file,data-file.filename={}", data.display());
        let after = change(options, before, seed);
        let output = images.run("qemu-img", &["check", "-f", "qcow2", "a"]);
        assert!(output.contains("No errors were found"), "{output}");
        assert!(images.contents("a") == after, "{raw}");
        if raw == "on" {
            let raw = std::fs::read(data).unwrap();
            let len = raw.len().min(after.len());
            assert!(raw[..len] == after[..len], "the data file is another disk");
        }
    }
}

#[test]
fn an_image_that_was_not_closed_cleanly_is_repaired_when_it_is_opened_for_writing() {
    let images = Images::new();
    images.create("a", 8 << 20, "lazy_refcounts=on");
    let mut abort = std::process::Command::new("qemu-io");
    abort.args(["-f", "qcow2", "-c", "write -P 7 1M 256k", "-c", "abort", "a"]);
    let folder = images.path("a").parent().unwrap().to_owned();
    assert!(!abort.current_dir(folder).output().unwrap().status.success());
    let bytes = std::fs::read(images.path("a")).unwrap();
    assert_eq!(bytes[79] & 1, 1, "it is not dirty");
    let mut expected = vec![0; 8 << 20];
    expected[1 << 20..][..256 << 10].fill(7);
    let after = change(options_for(&images.path("a")), expected, 1);
    assert_whole("after the repair", &images, "a", &after);
    assert_eq!(std::fs::read(images.path("a")).unwrap()[79] & 1, 0, "it is still dirty");
}

/// Subclusters of 4 KiB, in order: `.` where the backing file shows, `0` where there are zeroes, `1`
/// where there is data. How many bytes the write puts into the new host cluster, and what is where
/// afterwards.
#[test]
fn of_a_cluster_that_a_snapshot_shares_a_write_copies_the_subclusters_that_hold_something() {
    const SIZE: usize = 128 << 10;
    const BEFORE: &str = "..11............1.......00.....1";
    const CASES: [(usize, usize, usize, &str); 9] = [
        // Apart from the others, in part and as a whole.
        (32 << 10, 4096, 5, "..11....1.......1.......00.....1"),
        (33 << 10, 1024, 5, "..11....1.......1.......00.....1"),
        // Beside one, in one, over one.
        (16 << 10, 4096, 5, "..111...........1.......00.....1"),
        (65 << 10, 1024, 4, "..11............1.......00.....1"),
        (10 << 10, 60 << 10, 17, "..1111111111111111......00.....1"),
        // In zeroes, at the ends, everywhere.
        (100 << 10, 512, 5, "..11............1.......01.....1"),
        (0, 512, 5, "1.11............1.......00.....1"),
        (127 << 10, 1024, 4, "..11............1.......00.....1"),
        (0, SIZE, 32, "11111111111111111111111111111111"),
    ];
    for ((at, len, units, after), base) in
        CASES.into_iter().flat_map(|one| [(one, ""), (one, "base")])
    {
        let what = format!("{len} bytes at {at}, over {base:?}");
        let images = Images::new();
        std::fs::write(images.path("base"), vec![7; SIZE]).unwrap();
        let mut create = "cluster_size=128k,extended_l2=on".to_owned();
        if !base.is_empty() {
            create += ",backing_file=base,backing_fmt=raw";
        }
        images.create("a", SIZE as u64, &create);
        let commands =
            ["write -P 1 8k 8k", "write -P 1 64k 4k", "write -z 96k 8k", "write 124k 4k"];
        images.io("a", &commands.map(str::to_owned));
        assert_eq!(subclusters(&images).0, BEFORE, "{what}");
        let mut expected = images.contents("a");
        images.run("qemu-img", &["snapshot", "-c", "one", "a"]);
        expected[at..at + len].fill(9);
        let log = write_once(&images, at, len, !base.is_empty());
        assert_whole(&what, &images, "a", &expected);
        let (found, host) = subclusters(&images);
        assert_eq!(found, after, "{what}");
        let written = log.changes().iter().filter_map(|change| match change {
            Change::Write { offset, data, .. }
                if (host..host + SIZE).contains(&(*offset as usize)) =>
            {
                Some(data.len())
            }
            _ => None,
        });
        // Zeroes around the data that are there already need not be written.
        let written = written.sum::<usize>();
        assert_eq!(written.div_ceil(4096), units, "{what}: {written} bytes");
    }
}

/// What a table names past the end of the file no check can repair.
#[test]
fn with_lazy_refcounts_too_the_file_is_durably_longer_before_a_table_is_put_there() {
    let bytes = image(1 << 20, "cluster_size=64k,lazy_refcounts=on");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let (l1, blocks) = (word(40), word(word(48) as usize));
    let (file, options) = disk(&bytes, 8 << 20, |options| options.log = true);
    let options = format!("driver=qcow2,lazy-refcounts=on{}", below("file", &options));
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        image.node.write(0, &IoVec::from_ref(&[7; 4096]), WriteFlags::empty()).await.unwrap();
        image.close().await;
    });
    let log = file.log();
    let first_write = |cluster: u64| {
        let is_match = |change: &Change| match change {
            Change::Write { offset, .. } => offset >> 16 == cluster >> 16,
            _ => false,
        };
        log.changes().iter().position(is_match).expect("it is written")
    };
    let (counted, named) = (first_write(blocks), first_write(l1));
    let between = &log.changes()[counted..named];
    let is_durable =
        |change: &Change| matches!(change, Change::Flush { covers } if *covers > counted);
    assert!(between.iter().any(is_durable), "{between:?}");
}

/// Writes 9s to the image `a`, which may have a backing file of 7s; what became of its file.
fn write_once(images: &Images, at: usize, len: usize, has_backing: bool) -> WriteLog {
    let bytes = std::fs::read(images.path("a")).unwrap();
    let (file, options) = disk(&bytes, 8 << 20, |options| options.log = true);
    let mut options = format!("driver=qcow2{}", below("file", &options));
    let (_backing, backing) = disk(&vec![7; 1 << 20], 1 << 20, |_| {});
    if has_backing {
        options += &below("backing", &backing);
    }
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let (at, bytes) = (at as u64, vec![9; len]);
        image.node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        image.close().await;
    });
    std::fs::write(images.path("a"), file.bytes()).unwrap();
    file.log()
}

/// What qemu-img tells of the only cluster: a character for each of its subclusters, and where it is.
fn subclusters(images: &Images) -> (String, usize) {
    let said = images.run("qemu-img", &["map", "--output=json", "a"]);
    let list: serde_json::Value = serde_json::from_str(&said).unwrap();
    let (mut kinds, mut host) = (String::new(), 0);
    for one in list.as_array().unwrap() {
        let number = |key: &str| one[key].as_u64().unwrap() as usize;
        let kind = match (one["present"].as_bool(), one["data"].as_bool(), number("depth")) {
            (Some(true), Some(true), 0) => "1",
            (Some(true), Some(false), 0) => "0",
            _ => ".",
        };
        if kind == "1" {
            host = number("offset") - number("start");
        }
        kinds += &kind.repeat(number("length") / 4096);
    }
    (kinds, host)
}
