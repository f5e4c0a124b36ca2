//! Random scripts of command lines by vublk and by QEMU's programs on equal images.
//!
//! Every line has the same result, the images show the same and are sound, and both programs describe them alike.

use super::{Ended, Place, fixture, snapshots};
use fastrand::Rng;
use std::fmt::Write;
use std::path::Path;

/// How many lines a script has.
const LINES: usize = 10;

/// The cluster size of a kind of image, and how `top.qcow2` is created.
const KINDS: &[(u64, &str)] = &[
    (64 << 10, "2M"),
    (4 << 10, "-o cluster_size=4k 1000k"),
    (64 << 10, "-o extended_l2=on 2M"),
    (64 << 10, "-b a.raw -F raw 2M"),
    (4 << 10, "-o cluster_size=4k -b base.qcow2 -F qcow2 1500k"),
    (64 << 10, "-o extended_l2=on -b base.qcow2 -F qcow2 2M"),
    (64 << 10, "-o compat=0.10 -b longer.raw -F raw 1M"),
    (4 << 10, "-o compat=0.10,cluster_size=4k 1M"),
];

/// What [`KINDS`] and rebasing stand on.
const BASES: &[&str] = &[
    "qemu-img create -q -f qcow2 -b b.raw -F raw base.qcow2 1500k",
    "qemu-io -c 'write -P 5 100k 100k' -c 'write -z 256k 128k' -c 'write -c -P 6 512k 64k' base.qcow2",
    "qemu-img create -q -f qcow2 -o cluster_size=4k other.qcow2 2M",
    "qemu-io -c 'write -P 7 64k 70k' -c 'write -P 9 1200k 100k' -c 'write -z 1400k 64k' other.qcow2",
];

/// A request of qemu-io: mostly of whole sectors, at times of whole clusters or of any bytes.
fn request(rng: &mut Rng, cluster: u64, compresses: bool) -> String {
    let mut range = |unit: u64, most: u64| {
        let (at, len) = (rng.u64(..(2 << 20) / unit), rng.u64(1..=most / unit));
        format!("{} {}", at * unit, len * unit)
    };
    let clusters = range(cluster, 6 * cluster);
    let (one, sectors, bytes) =
        (range(cluster, cluster), range(512, 3 * cluster), range(1, 3 * cluster));
    let any = [&sectors, &sectors, &clusters, &bytes][rng.usize(..4)];
    let value = rng.u8(1..);
    match rng.u8(..12) {
        0..5 => format!("write -P {value} {any}"),
        5 => format!("write -P 0 {any}"),
        6 => format!("write -z {any}"),
        7 => format!("write -z -u {any}"),
        8 | 9 if compresses => format!("write -c -P {value} {one}"),
        11 => format!("discard {clusters}"),
        _ => format!("discard {any}"),
    }
}

/// A line of a script.
fn line(rng: &mut Rng, cluster: u64, compresses: bool) -> String {
    let name = ["one", "two"][rng.usize(..2)];
    let base = ["-b a.raw -F raw", "-b longer.raw -F raw", "-b other.qcow2 -F qcow2", "-b ''"];
    match rng.u8(..20) {
        0..10 => {
            let mut line = "qemu-io".to_owned();
            for _ in 0..rng.usize(1..5) {
                write!(line, " -c '{}'", request(rng, cluster, compresses)).unwrap();
            }
            line + " top.qcow2"
        }
        10 => format!("qemu-img resize top.qcow2 +{}", rng.u64(1..1000) * 512),
        11 => format!("qemu-img resize --shrink top.qcow2 -{}", rng.u64(1..1000) * 512),
        12..14 => format!("qemu-img snapshot -c {name} top.qcow2"),
        14 => format!("qemu-img snapshot -a {name} top.qcow2"),
        15 => format!("qemu-img snapshot -d {name} top.qcow2"),
        16 => "qemu-img commit top.qcow2".to_owned(),
        17 => format!("qemu-img rebase {} top.qcow2", base[rng.usize(..base.len())]),
        18 => "qemu-img snapshot -l top.qcow2".to_owned(),
        _ => "qemu-img check -r leaks top.qcow2".to_owned(),
    }
}

/// What `map` says of an image, without where its data is.
pub fn map(ended: &Ended) -> Vec<(u64, u64, String)> {
    let entries: Vec<serde_json::Value> = serde_json::from_str(&ended.stdout).unwrap();
    let mut extents: Vec<(u64, u64, String)> = Vec::new();
    for entry in entries {
        let [start, len] = ["start", "length"].map(|key| entry[key].as_u64().unwrap());
        let what =
            format!("depth {} zero {} data {}", entry["depth"], entry["zero"], entry["data"]);
        match extents.last_mut() {
            Some((_, end, before)) if *before == what => *end = start + len,
            _ => extents.push((start, start + len, what)),
        }
    }
    extents
}

/// Without dates, sizes of files, and how the clusters happen to be.
fn masked(ended: Ended) -> Ended {
    let mut stdout = snapshots::mask(&ended.stdout);
    if let (Some(from), Some(to)) = (stdout.find(" allocated, "), stdout.find(" fragmented, ")) {
        stdout.replace_range(from..to, " allocated, …");
    }
    Ended { stdout, ..ended }
}

/// Whether the image is of version 2 and has no backing file: QEMU forgets its zeroes when it gets one.
fn stands_alone(place: &Place) -> bool {
    let reported = place.run("qemu-img info top.qcow2").stdout;
    reported.contains("compat: 0.10") && !reported.contains("backing file:")
}

/// Runs a script in both places. `false`: QEMU's own image is not sound after some line, and there is
/// nothing to compare with.
fn run(prepared: &Place, script: &[String]) -> bool {
    let [ours, theirs] = [true, false].map(Place::new);
    prepared.copy_to(&ours);
    prepared.copy_to(&theirs);
    let mut done = String::new();
    let mut differences = String::new();
    for line in script {
        if line.contains(" rebase ") && stands_alone(&theirs) {
            continue;
        }
        let both = [&ours, &theirs].map(|place| masked(place.run(line)));
        writeln!(done, "{line}").unwrap();
        if theirs.run("qemu-img check top.qcow2").code != Some(0) {
            println!("QEMU's image is not sound behind\n{done}");
            return false;
        }
        if both[0] != both[1] {
            writeln!(differences, "{line}\n  ours: {:?}\n  theirs: {:?}", both[0], both[1])
                .unwrap();
        }
    }
    // With no holes in images: QEMU's map goes by those of a file that has few blocks for its clusters.
    let [ours, theirs] = [ours, theirs].map(|place| {
        let copy = Place::new(place.ours);
        place.copy_to(&copy);
        copy
    });
    // Our programs and theirs say the same of our image, to the byte.
    for line in [
        "qemu-img check top.qcow2",
        "qemu-img info --backing-chain top.qcow2",
        "qemu-img map --output=json top.qcow2",
    ] {
        let [a, b] = [ours.run(line), ours.run_theirs(line)];
        if a != b || a.code != Some(0) {
            writeln!(differences, "{line} of ours\n  ours: {a:?}\n  theirs: {b:?}").unwrap();
        }
    }
    // Both images are alike.
    let path = |place: &Place, name: &str| place.path().join(name).display().to_string();
    let images = ["top.qcow2", "base.qcow2", "a.raw", "longer.raw", "other.qcow2"];
    for name in images {
        let format = Path::new(name).extension().unwrap().display();
        let line = format!(
            "qemu-img compare -f {format} -F {format} {} {}",
            path(&ours, name),
            path(&theirs, name)
        );
        for same in [ours.run(&line), ours.run_theirs(&line)] {
            if same.code != Some(0) {
                writeln!(differences, "{line}\n  {same:?}").unwrap();
            }
        }
    }
    let both = |line: &str| [&ours, &theirs].map(|place| place.run_theirs(line));
    let [a, b] = both("qemu-img info top.qcow2").map(masked);
    if a != b {
        writeln!(differences, "info\n  ours: {a:?}\n  theirs: {b:?}").unwrap();
    }
    // What commit leaves in a base may be of finer pieces, and a cluster that a snapshot shares is copied whole
    // where QEMU copies the subclusters from the first to the last.
    let has = |what: &str| script.iter().any(|line| line.contains(what));
    let is_extended = a.stdout.contains("extended l2: true");
    let is_coarser = is_extended && has("snapshot -c");
    if !has(" commit ") && !is_coarser {
        let [a, b] = both("qemu-img map --output=json top.qcow2").map(|ended| map(&ended));
        if a != b {
            writeln!(differences, "map\n  ours: {a:?}\n  theirs: {b:?}").unwrap();
        }
    }
    assert!(differences.is_empty(), "behind\n{done}there differs\n{differences}");
    true
}

#[test]
fn random_scripts_come_to_the_same() {
    let seed = crate::disks::seed();
    let mut compared = 0;
    for (index, (cluster, create)) in KINDS.iter().enumerate() {
        let mut rng = Rng::with_seed(seed.wrapping_add(index as u64));
        let prepared = Place::new(false);
        fixture(prepared.path());
        let create = format!("qemu-img create -q -f qcow2 top.qcow2 {create}");
        for step in BASES.iter().copied().chain([&*create]) {
            let ended = prepared.run(step);
            assert_eq!(ended.code, Some(0), "{step}: {}", ended.stderr);
        }
        // A range of zeroes that ends inside a compressed cluster is written out whole by QEMU then.
        let compresses = !create.contains("extended_l2");
        let script: Vec<String> =
            (0..LINES).map(|_| line(&mut rng, *cluster, compresses)).collect();
        println!("{create}\n{}", script.join("\n"));
        compared += usize::from(run(&prepared, &script));
    }
    // At times QEMU spoils its own image, and there is nothing to compare with; that is rare.
    assert!(compared * 2 >= KINDS.len(), "only {compared} of {} compared", KINDS.len());
}
