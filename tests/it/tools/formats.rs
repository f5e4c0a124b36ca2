//! Random scripts of requests by vublk and by QEMU on images of formats beside qcow2.
//!
//! Every line has the same result, the images show the same and are sound, and both programs describe each alike.

use super::random::map;
use super::{Place, fixture};
use fastrand::Rng;
use std::fmt::Write;

/// A format, how its images are created, the size of their disks in KiB, and of their clusters in bytes.
const KINDS: [(&str, &str, u64, u64); 15] = [
    ("qed", "", 3000, 64 << 10),
    ("qed", "-o cluster_size=4k,table_size=2", 1500, 4 << 10),
    ("qed", "-o cluster_size=128k,table_size=16", 3000, 128 << 10),
    ("qed", "-o cluster_size=4k,table_size=2 -b longer.raw -F raw", 2000, 4 << 10),
    ("qed", "-b longer.raw -F raw", 3000, 64 << 10),
    ("vdi", "", 6000, 1 << 20),
    ("vdi", "", 2048, 1 << 20),
    ("vdi", "-o static=on", 5001, 1 << 20),
    ("vmdk", "", 3000, 64 << 10),
    ("vmdk", "-o zeroed_grain=on", 3000, 64 << 10),
    ("vmdk", "-o subformat=twoGbMaxExtentSparse", 3000, 64 << 10),
    ("vmdk", "-o subformat=monolithicFlat", 3000, 64 << 10),
    ("parallels", "", 6000, 1 << 20),
    ("parallels", "-o cluster_size=4k", 1500, 4 << 10),
    // No power of two, as in images of old programs.
    ("parallels", "-o cluster_size=32256", 3000, 32256),
];

/// How many lines a script has.
const LINES: usize = 8;

/// A request of qemu-io inside the disk, or at times past its end.
fn request(rng: &mut Rng, size: u64, cluster: u64, zeroes: bool) -> String {
    let unit = [1, 512, 4096, cluster][rng.usize(..4)];
    let most = (3 * cluster / unit).min(600 << 10);
    let (at, len) = (rng.u64(..size / unit + 1) * unit, rng.u64(1..=most) * unit);
    let value = rng.u8(1..);
    match rng.u8(..10) {
        0..6 => format!("write -P {value} {at} {len}"),
        6 if zeroes => format!("write -z {at} {len}"),
        7 if zeroes => format!("write -z -u {at} {len}"),
        // What a discard leaves is not the same, so it is written over.
        8 => format!("discard {at} {len}' -c 'write -P {value} {at} {len}"),
        _ => format!("write -P 0 {at} {len}"),
    }
}

/// A script, whose lines work on `x.FORMAT`.
fn script(
    rng: &mut Rng,
    (format, create, size, cluster): (&str, &str, u64, u64),
    zeroes: bool,
) -> Vec<String> {
    let mut lines = Vec::new();
    for _ in 0..LINES {
        lines.push(match rng.u8(..8) {
            // QEMU refuses to make an image longer whose backing file would show.
            0 if !create.contains("-b ") => {
                format!("qemu-img resize x.{format} +{}", rng.u64(1..900) * 512)
            }
            1 => format!("qemu-img resize --shrink x.{format} -{}", rng.u64(1..900) * 512),
            _ => {
                let mut line = format!("qemu-io -f {format}");
                for _ in 0..rng.usize(1..5) {
                    let request = request(rng, size << 10, cluster, zeroes);
                    write!(line, " -c '{request}'").unwrap();
                }
                format!("{line} x.{format}")
            }
        });
    }
    lines
}

/// Runs a script in both places, and compares. Without zeroes, both images map the same.
fn run(kind: (&str, &str, u64, u64), script: &[String], zeroes: bool) {
    let (format, create, size, _) = kind;
    let image = format!("x.{format}");
    let places = [true, false].map(Place::new);
    let mut done = format!("qemu-img create -q -f {format} {create} {image} {size}k\n");
    for place in &places {
        fixture(place.path());
        let ended = place.run(done.lines().next().unwrap());
        assert_eq!(ended.code, Some(0), "{done}{ended:?}");
    }
    for line in script {
        done += &format!("{line}\n");
        let [ours, theirs] = places.each_ref().map(|place| place.run(line));
        assert_eq!(ours, theirs, "{done}");
    }
    let [ours, theirs] = &places;
    for line in [
        format!("qemu-img check -f {format} {image}"),
        format!("qemu-img check -f {format} --output=json {image}"),
        format!("qemu-img info -f {format} {image}"),
        format!("qemu-img info -f {format} --output=json {image}"),
        format!("qemu-img map -f {format} --output=json {image}"),
    ] {
        let [by_us, by_them] = [ours.run(&line), ours.run_theirs(&line)];
        assert_eq!(by_us, by_them, "{done}{line}");
        assert_eq!(by_us.code, Some(0), "{done}{line}: {by_us:?}");
        if !zeroes && line.contains(" map ") {
            let [ours, theirs] = [by_us, theirs.run_theirs(&line)];
            match format {
                // Where blocks begin elsewhere, other bytes of them are holes.
                "vdi" if create.contains("static") => {}
                // QEMU has its tables behind the data that they were made for, and blocks begin right behind the map.
                "qed" | "vdi" => assert_eq!(map(&ours), map(&theirs), "{done}{line}"),
                _ => assert_eq!(ours, theirs, "{done}{line}"),
            }
        }
    }
    let path = |place: &Place| place.path().join(&image).display().to_string();
    let line = format!("qemu-img compare -f {format} -F {format} {} {}", path(ours), path(theirs));
    for same in [ours.run(&line), ours.run_theirs(&line)] {
        assert_eq!(same.code, Some(0), "{done}{line}: {same:?}");
    }
}

#[test]
fn random_scripts_come_to_the_same_in_every_format() {
    let seed = crate::disks::seed();
    for (index, kind) in KINDS.into_iter().enumerate() {
        for zeroes in [false, true] {
            let mut rng = Rng::with_seed(seed.wrapping_add(index as u64 * 2 + u64::from(zeroes)));
            run(kind, &script(&mut rng, kind, zeroes), zeroes);
        }
    }
}
