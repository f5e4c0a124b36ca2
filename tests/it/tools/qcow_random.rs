//! Random scripts on qcow images (version 1), run by vublk and by QEMU on equal images.
//!
//! Every line comes to the same, the images show the same, and their maps are alike.

use super::random::map;
use super::{Place, fixture};
use fastrand::Rng;
use std::collections::BTreeSet;
use std::fmt::Write;

/// How an image is created, the size of its disk in KiB, and of its clusters in bytes.
const KINDS: [(&str, u64, u64); 3] =
    [("", 2000, 4096), ("-b longer.raw -F raw", 700, 512), ("-b odd.raw -F raw", 300, 512)];

/// How many lines a script has, and how many scripts each kind.
const LINES: usize = 8;
const SCRIPTS: u64 = 2;

/// A request of qemu-io. Compressed writes are whole clusters, and none of `plain`, which have been written in another way:
/// QEMU writes what is packed over such a cluster's bytes.
fn request(rng: &mut Rng, size: u64, cluster: u64, plain: &mut BTreeSet<u64>) -> String {
    let value = rng.u8(1..);
    let packed = rng.u64(..size / cluster);
    if rng.u8(..5) == 0 && !plain.contains(&packed) {
        return format!("write -c -P {value} {} {cluster}", packed * cluster);
    }
    let unit = [1, 512, cluster, 8 * cluster][rng.usize(..4)];
    let (at, len) = (rng.u64(..size / unit + 1) * unit, rng.u64(1..=20) * unit);
    plain.extend(at / cluster..=(at + len) / cluster);
    match rng.u8(..8) {
        0..5 => format!("write -P {value} {at} {len}"),
        5 => format!("write -z {at} {len}"),
        6 => format!("write -P 0 {at} {len}"),
        _ => format!("discard {at} {len}"),
    }
}

fn script(rng: &mut Rng, (create, size, cluster): (&str, u64, u64)) -> Vec<String> {
    let mut lines = Vec::new();
    let mut plain = BTreeSet::new();
    for _ in 0..LINES {
        lines.push(match rng.u8(..8) {
            0 if !create.is_empty() => "qemu-img commit -q x.qcow".to_owned(),
            1 => "qemu-img check x.qcow".to_owned(),
            _ => {
                let mut line = "qemu-io -f qcow".to_owned();
                for _ in 0..rng.usize(1..5) {
                    write!(line, " -c '{}'", request(rng, size << 10, cluster, &mut plain))
                        .unwrap();
                }
                format!("{line} x.qcow")
            }
        });
    }
    lines
}

fn run((create, size, _): (&str, u64, u64), script: &[String]) {
    let places = [true, false].map(Place::new);
    let mut done = format!("qemu-img create -q -f qcow {create} x.qcow {size}k\n");
    for place in &places {
        fixture(place.path());
        let ended = place.run_theirs(done.lines().next().unwrap());
        assert_eq!(ended.code, Some(0), "{done}{ended:?}");
    }
    for line in script {
        done += &format!("{line}\n");
        let [ours, theirs] = places.each_ref().map(|place| place.run(line));
        assert_eq!(ours, theirs, "{done}");
    }
    let [ours, theirs] = &places;
    let told = "qemu-img map -f qcow --output=json x.qcow";
    let [by_us, by_them] = [ours.run(told), ours.run_theirs(told)];
    assert_eq!(map(&by_us), map(&by_them), "{done}");
    // Nothing says which clusters below are holes.
    let own = |place: &Place| {
        let all = map(&place.run_theirs(told));
        let is_own = |(_, _, what): &(u64, u64, String)| what.starts_with("depth 0");
        all.into_iter().filter(is_own).collect::<Vec<_>>()
    };
    assert_eq!(own(ours), own(theirs), "{done}");
    let path = |place: &Place| place.path().join("x.qcow").display().to_string();
    let line = format!("qemu-img compare -f qcow -F qcow {} {}", path(ours), path(theirs));
    for same in [ours.run(&line), ours.run_theirs(&line)] {
        assert_eq!(same.code, Some(0), "{done}{line}: {same:?}");
    }
}

#[test]
fn random_scripts_come_to_the_same_in_qcow_images() {
    let seed = crate::disks::seed();
    for (index, kind) in KINDS.into_iter().enumerate() {
        for number in 0..SCRIPTS {
            let mut rng = Rng::with_seed(seed.wrapping_add(index as u64 * 100 + number));
            run(kind, &script(&mut rng, kind));
        }
    }
}
