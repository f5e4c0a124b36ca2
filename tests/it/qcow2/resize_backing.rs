//! Enlarging a disk over a backing file of any length.
//!
//! What the backing file showed stays, and the new part reads as zeroes, wherever the ends are in clusters and
//! subclusters. QEMU must get the same result.

use super::images::Images;
use crate::cli::VUBLK;
use crate::disks::seed;
use std::process::Command;

const KINDS: [&str; 5] =
    ["", "extended_l2=on", "compat=0.10", "cluster_size=4k", "data_file=d.raw"];
const MODES: [&str; 4] = ["off", "metadata", "falloc", "full"];
/// Lengths of the disk, of the backing file and of the longer disk: at the ends of clusters of 64 KiB and of their
/// subclusters of 2 KiB, before them and behind them.
const OLD: [u64; 6] = [65536, 131072, 131584, 153600, 154624, 196096];
const BACKING: [u64; 10] =
    [512, 67584, 131072, 131584, 134072, 153600, 154112, 196608, 300000, 2 << 20];
const NEW: [u64; 5] = [158208, 196608, 262144, 300032, 1 << 20];

/// What the resize came to, and the disk then.
fn resized(kind: &str, mode: &str, lengths: [u64; 3], ours: bool) -> (Option<i32>, Vec<u8>) {
    let [old, backing, new] = lengths;
    let images = Images::new();
    std::fs::write(images.path("b.raw"), vec![0x11; backing as usize]).unwrap();
    let options = format!("{kind},backing_file=b.raw,backing_fmt=raw");
    images.create("o.qcow2", old, options.trim_start_matches(','));
    images.run("qemu-io", &["-c", "write -q -P 5 1k 1k", "o.qcow2"]);
    let program = if ours { VUBLK } else { "qemu-img" };
    let mode = format!("--preallocation={mode}");
    let arguments = ["resize", "-q", &mode, "o.qcow2", &new.to_string()];
    let output =
        Command::new(program).args(arguments).current_dir(images.path("")).output().unwrap();
    images.run("qemu-img", &["check", "-q", "o.qcow2"]);
    (output.status.code(), images.contents("o.qcow2"))
}

fn assert_kept(kind: &str, mode: &str, lengths: [u64; 3]) {
    let [old, backing, new] = lengths;
    let what = format!("{kind} {mode}: {old} bytes over {backing}, to {new}");
    let [theirs, ours] = [false, true].map(|ours| resized(kind, mode, lengths, ours));
    assert_eq!(ours.0, theirs.0, "{what}");
    assert!(ours.1 == theirs.1, "{what}: QEMU's disk has other contents");
    if ours.0 == Some(0) {
        let mut wanted = vec![0x11; backing.min(old) as usize];
        wanted.resize(new as usize, 0);
        wanted[1024..2048].fill(5);
        if backing < 2048 {
            wanted[backing as usize..1024].fill(0);
        }
        assert!(ours.1 == wanted, "{what}: the disk has other contents than it had");
    }
}

#[test]
fn a_longer_disk_goes_on_showing_what_the_backing_file_has_of_its_last_cluster() {
    for kind in KINDS {
        for mode in MODES {
            assert_kept(kind, mode, [153600, 153600, 1 << 20]);
        }
        assert_kept(kind, "full", [154624, 134072, 158208]);
        assert_kept(kind, "falloc", [153600, 300000, 262144]);
    }
}

#[test]
fn a_longer_disk_has_the_same_contents_as_qemus_at_all_ends() {
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..40 {
        let kind = KINDS[rng.usize(..KINDS.len())];
        let mode = MODES[rng.usize(..MODES.len())];
        let old = OLD[rng.usize(..OLD.len())];
        let longer: Vec<u64> = NEW.iter().copied().filter(|&new| new > old).collect();
        let new = longer[rng.usize(..longer.len())];
        assert_kept(kind, mode, [old, BACKING[rng.usize(..BACKING.len())], new]);
    }
}
