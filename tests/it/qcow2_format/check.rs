//! `check` and its repairs beside qemu-img's, on images that were damaged byte by byte.

use super::*;
use std::fs;
use vublk::block::{CheckReport, Fix, Graph, Perm, Perms};
use vublk::format::qcow2::check;
use vublk::io::{Worker, WorkerOptions};
use vublk::options::Map;

const COPIED: u64 = 1 << 63;

/// What a check said and counted, the second one included that follows a repair.
#[derive(Debug, PartialEq, Eq)]
struct Checked {
    lines: Vec<String>,
    report: CheckReport,
}

/// Our check of an image, as a tool runs it.
fn check_ours(path: &Path, fix: Fix) -> Result<Checked, String> {
    let worker = Worker::start("check", WorkerOptions::default()).unwrap();
    let graph = Graph::new(vublk::drivers::registry());
    let name = path.to_str().unwrap();
    let mut options = Map::from_iter([("driver", "file"), ("filename", name)]);
    options.insert("node-name", "image");
    let node = graph.open_on(&worker, options).unwrap();
    let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let hold = graph.attach(&node, "check", Perms { held, shared: Perm::empty() }, None).unwrap();
    let result = worker.block_on(move || async move {
        let mut lines = Vec::new();
        let mut say = |line: &str| lines.push(line.to_owned());
        let mut report = check::check(hold.node(), fix, &mut say).await?;
        let fixed = (report.corruptions_fixed, report.leaks_fixed);
        if fixed != (0, 0) {
            report = check::check(hold.node(), Fix::Nothing, &mut say).await?;
            (report.corruptions_fixed, report.leaks_fixed) = fixed;
        }
        Ok(Checked { lines, report })
    });
    result.map_err(|error: vublk::block::Error| error.to_string())
}

/// qemu-img's check of an image.
fn check_theirs(path: &Path, fix: Fix) -> Result<Checked, String> {
    let mut arguments = vec!["check", "--output=json", "-f", "qcow2"];
    match fix {
        Fix::Nothing => {}
        Fix::Leaks => arguments.extend(["-r", "leaks"]),
        Fix::All => arguments.extend(["-r", "all"]),
    }
    arguments.push(path.to_str().unwrap());
    let outcome = theirs(path.parent().unwrap(), &arguments);
    let Ok(json) = serde_json::from_str::<serde_json::Value>(&outcome.stdout) else {
        return Err(outcome.stderr.lines().last().unwrap_or_default().to_owned());
    };
    let number = |name: &str| json[name].as_u64().unwrap_or(0);
    let report = CheckReport {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        corruptions_fixed: number("corruptions-fixed"),
        leaks_fixed: number("leaks-fixed"),
        image_end_offset: number("image-end-offset"),
        total_clusters: number("total-clusters"),
        allocated_clusters: number("allocated-clusters"),
        fragmented_clusters: number("fragmented-clusters"),
        compressed_clusters: number("compressed-clusters"),
    };
    // What its end says, which is no finding.
    let findings = outcome.stderr.lines().filter(|line| !line.starts_with("qcow2_free_clusters"));
    let lines = findings.map(str::to_owned).collect();
    Ok(Checked { lines, report })
}

struct Bench(tempfile::TempDir);

impl Bench {
    /// An image with 1 MiB of data, after some commands of qemu-img and qemu-io.
    fn new(options: &str, more: &[&[&str]]) -> (Bench, Vec<u8>) {
        let bench = Bench(crate::file::on_tmpfs());
        let dir = bench.0.path();
        let create = ["create", "-f", "qcow2", "-o", options, "image", "10M"];
        qemu_img(dir, &create);
        let write = ["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "image"];
        assert!(run(dir, &write[..1], &write[1..]).status.success());
        for command in more {
            let output = run(dir, &command[..1], &command[1..]);
            assert!(output.status.success(), "{command:?}: {}", stderr(&output));
        }
        let image = fs::read(dir.join("image")).unwrap();
        (bench, image)
    }

    /// Both checks of an image with bytes changed: the same texts and numbers; and the same bytes
    /// after a repair, if `same` says so, or else an image that qemu-img finds sound.
    fn compare(&self, what: &str, image: &[u8], patches: &[Patch], same: bool) {
        let mut damaged = image.to_vec();
        for (at, patch) in patches {
            damaged[*at as usize..][..patch.len()].copy_from_slice(patch);
        }
        for fix in [Fix::Nothing, Fix::Leaks, Fix::All] {
            let [ours, theirs] = ["ours", "theirs"].map(|name| self.0.path().join(name));
            fs::write(&ours, &damaged).unwrap();
            fs::write(&theirs, &damaged).unwrap();
            let (mine, wanted) = (check_ours(&ours, fix), check_theirs(&theirs, fix));
            assert_eq!(mine, wanted, "{what} {fix:?}");
            let [ours, theirs] = [ours, theirs].map(|path| fs::read(path).unwrap());
            if fix == Fix::Nothing {
                assert!(ours == damaged, "{what}: changed by looking");
            }
            // A failed repair may have begun.
            if wanted.is_ok() && same {
                let at = (0..ours.len() / CLUSTER).find(|&cluster| {
                    let bytes = |image: &[u8]| image[cluster * CLUSTER..][..CLUSTER].to_vec();
                    in_use(&theirs, cluster) && bytes(&ours) != bytes(&theirs)
                });
                assert_eq!((at, ours.len()), (None, theirs.len()), "{what} {fix:?}");
            }
        }
    }
}

/// The big-endian word at `at`.
fn word(image: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(*image[at as usize..].first_chunk().unwrap())
}

const CLUSTER: usize = 65536;

/// Bytes of an image, and where they go.
type Patch<'a> = (u64, &'a [u8]);

/// Whether a cluster is counted at all, in an image with clusters of 64 KiB, refcounts of 16 bits and
/// one block of them. What is in free clusters is nobody's matter.
fn in_use(image: &[u8], cluster: usize) -> bool {
    let block = word(image, word(image, 48)) as usize;
    image[block + 2 * cluster..][..2] != [0, 0]
}

fn q(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

#[test]
fn damaged_entries_are_reported_and_repaired_as_qemu_img_does() {
    let (bench, image) = Bench::new("cluster_size=64k", &[]);
    let l2 = word(&image, word(&image, 40)) & !COPIED;
    let (l1, block) = (word(&image, 40), word(&image, word(&image, 48)));
    let data = |n: u64| l2 + 8 * n;
    let count = |cluster: u64| block + 2 * cluster;
    let cases: &[(&str, &[Patch])] = &[
        ("nothing", &[]),
        ("a leak", &[(data(15), &q(0))]),
        ("a leak behind the end", &[(count(40), &[0, 1])]),
        ("a flag not set", &[(data(3), &q(0x80000))]),
        ("counted twice", &[(count(8), &[0, 2])]),
        ("referred to twice", &[(data(3), &q(COPIED | 0x50000))]),
        ("unaligned", &[(data(3), &q(COPIED | 0x80200))]),
        ("reserved bits", &[(data(3), &q(COPIED | 0x80002))]),
        ("upper reserved bits", &[(data(3), &q(COPIED | 1 << 57 | 0x80000))]),
        ("beyond the end", &[(data(3), &q(COPIED | 0x1000_0000))]),
        ("far beyond the end", &[(data(3), &q(COPIED | 1 << 50))]),
        ("a zero cluster", &[(data(3), &q(COPIED | 0x80001))]),
        ("a plain zero cluster", &[(data(3), &q(1))]),
        ("an unaligned zero cluster", &[(data(3), &q(COPIED | 0x80201))]),
        ("compressed", &[(data(3), &q(1 << 62 | 3 << 54 | 0x80000))]),
        ("compressed, and its own", &[(data(3), &q(COPIED | 1 << 62 | 0x80000))]),
        ("compressed into the next", &[(data(3), &q(1 << 62 | 3 << 54 | 0x8fe00))]),
        ("compressed far away", &[(data(3), &q(1 << 62 | 3 << 54 | 1 << 50))]),
        ("a table's flag not set", &[(l1, &q(l2))]),
        ("a table's reserved bits", &[(l1, &q(COPIED | l2 | 1))]),
        ("a table beyond the end", &[(l1, &q(COPIED | 0x1000_0000))]),
        ("the header as a table", &[(40, &q(0))]),
        ("dirty", &[(72, &q(1))]),
        ("dirty and corrupt, with a leak", &[(72, &q(3)), (data(15), &q(0))]),
    ];
    for (what, patches) in cases {
        bench.compare(what, &image, patches, true);
    }
    // qemu-img takes the dirty bit away all the same.
    let patches: &[Patch] = &[(72, &q(3)), (data(3), &q(COPIED | 0x80002))];
    bench.compare("corrupt, and stays so", &image, patches, false);
}

#[test]
fn refcounts_that_make_no_sense_are_built_anew() {
    let (bench, image) = Bench::new("cluster_size=64k", &[]);
    let (table, block) = (word(&image, 48), word(&image, word(&image, 48)));
    let cases: &[(&str, &[Patch])] = &[
        ("not counted", &[(block + 12, &[0, 0])]),
        ("the header not counted", &[(block, &[0, 0])]),
        ("the block not counted", &[(block + 4, &[0, 0])]),
        ("no block", &[(table, &q(0))]),
        ("two of one", &[(table + 8, &q(block))]),
    ];
    for (what, patches) in cases {
        bench.compare(what, &image, patches, true);
    }
}

#[test]
fn what_qemu_img_gives_up_on_is_repaired() {
    let (bench, image) = Bench::new("cluster_size=64k", &[]);
    let (table, block) = (word(&image, 48), word(&image, word(&image, 48)));
    let cases: &[(&str, u64, u64)] = &[
        ("unaligned", table, block + 512),
        ("reserved bits", table, block + 1),
        ("outside", table, 0x1000_0000),
        ("another one outside", table + 8, 0x1000_0000),
    ];
    let path = bench.0.path().join("image");
    for &(what, at, value) in cases {
        let mut damaged = image.clone();
        damaged[at as usize..][..8].copy_from_slice(&q(value));
        fs::write(&path, &damaged).unwrap();
        let checked = check_ours(&path, Fix::All).unwrap();
        assert!(checked.report.corruptions_fixed > 0, "{what}: {checked:?}");
        assert_eq!(checked.report.corruptions, 0, "{what}: {checked:?}");
        let outcome = qemu_img(bench.0.path(), &["check", "image"]);
        assert!(outcome.starts_with("No errors were found on the image."), "{what}: {outcome}");
        let verify = ["-f", "qcow2", "-c", "read -P 0xcd 0 1M", "image"];
        let output = run(bench.0.path(), &["qemu-io"], &verify);
        assert!(output.status.success() && !outcome.contains("failed"), "{}", stderr(&output));
    }
}

#[test]
fn snapshots_and_bitmaps_hold_their_clusters() {
    let snapshot: &[&str] = &["qemu-img", "snapshot", "-c", "s1", "image"];
    let write: &[&str] = &["qemu-io", "-f", "qcow2", "-c", "write 64k 64k", "image"];
    let bitmap: &[&str] = &["qemu-img", "bitmap", "--add", "image", "b"];
    let bitmap_2: &[&str] = &["qemu-img", "bitmap", "--add", "--disable", "image", "c"];
    let (bench, image) = Bench::new("cluster_size=64k", &[snapshot, write]);
    let entry = word(&image, 64);
    let table = word(&image, entry);
    let l2 = word(&image, table) & 0xff_ffff_ffff_0000;
    let cases: &[(&str, &[Patch])] = &[
        ("nothing", &[]),
        ("an unaligned L1 table", &[(entry, &q(table + 512))]),
        ("an L1 table far away", &[(entry, &q(1 << 40))]),
        ("two of one", &[(l2 + 8, &q(0x50000))]),
        ("no snapshot any more", &[(60, &[0; 4])]),
    ];
    for (what, patches) in cases {
        bench.compare(what, &image, patches, true);
    }
    // With a snapshot as well, qemu-img 7.2 would forget the snapshot.
    let (bench, image) = Bench::new("cluster_size=64k", &[bitmap, write, bitmap_2]);
    let directory = word(&image, 0x210);
    let table = word(&image, directory);
    for (what, at, value) in [
        ("bitmaps", 0, word(&image, 0)),
        ("a bitmap table far away", directory, 1 << 40),
        ("a bitmap's cluster far away", table, 1 << 40),
        ("a bitmap of ones", table, 1),
    ] {
        // A writer of bitmaps writes them again when it ends.
        bench.compare(what, &image, &[(at, &q(value))], false);
    }
    // Bitmaps that somebody did not keep up with: the warning is another program's.
    let path = bench.0.path().join("image");
    let mut damaged = image.clone();
    damaged[88..96].fill(0);
    fs::write(&path, &damaged).unwrap();
    let checked = check_ours(&path, Fix::Leaks).unwrap();
    assert!(checked.report.leaks_fixed > 0 && checked.report.leaks == 0, "{checked:?}");
    let outcome = qemu_img(bench.0.path(), &["check", "image"]);
    assert!(outcome.starts_with("No errors were found on the image."), "{outcome}");
}

#[test]
fn sound_images_of_every_kind_are_found_sound() {
    let compressed: &[&str] = &["qemu-io", "-f", "qcow2", "-c", "write -c 2M 64k", "image"];
    let zeroes: &[&str] = &["qemu-io", "-f", "qcow2", "-c", "write -z 512k 256k", "image"];
    let scattered: &[&str] =
        &["qemu-io", "-f", "qcow2", "-c", "write 9M 4k", "-c", "write 4M 64k", "image"];
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=2M,refcount_bits=2",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,preallocation=metadata",
        "preallocation=full,refcount_bits=8",
        "data_file=d.raw,data_file_raw=on",
        "compression_type=zstd",
    ] {
        let mut commands = vec![zeroes, scattered];
        if !options.contains("data_file") && !options.contains("preallocation") {
            let len = if options.contains("=512") { "write -c 2M 512" } else { compressed[4] };
            let len = if options.contains("=4k") { "write -c 2M 4k" } else { len };
            let len = if options.contains("=2M") { "write -c 2M 2M" } else { len };
            commands.push(Box::leak(Box::new(["qemu-io", "-f", "qcow2", "-c", len, "image"])));
        }
        let (bench, image) = Bench::new(options, &commands);
        bench.compare(options, &image, &[], false);
    }
}

#[test]
fn bad_subcluster_bitmaps_are_reported() {
    let (bench, image) = Bench::new("cluster_size=64k,extended_l2=on", &[]);
    let l2 = word(&image, word(&image, 40)) & !COPIED;
    for (what, at, value) in [
        ("allocated and zero", l2 + 8, 1 << 32 | 1),
        ("allocated nowhere", l2 + 16 * 100 + 8, 1),
        ("a zero flag", l2, word(&image, l2) | 1),
    ] {
        bench.compare(what, &image, &[(at, &q(value))], true);
    }
}

/// Where references may be missing, our new refcount structure goes behind everything that was ever
/// counted, and QEMU's into clusters that seem free: the file may then be longer, never shorter.
fn align_ends(mine: &mut Result<Checked, String>, wanted: &Result<Checked, String>) {
    if let (Ok(mine), Ok(wanted)) = (mine, wanted) {
        let (end, least) = (&mut mine.report.image_end_offset, wanted.report.image_end_offset);
        if (least..=least + 3 * CLUSTER as u64).contains(end) {
            *end = least;
        }
    }
}

const PAST_END: &str = "exceeding the end of the file";

/// Whether QEMU has rebuilt the refcounts of an image with entries that lead past its end. Our new structure goes
/// there, behind what the entries lead to, which becomes a part of the file; QEMU still reports it.
fn rebuilds_beyond(wanted: &Result<Checked, String>) -> bool {
    wanted.as_ref().is_ok_and(|wanted| {
        let has = |text: &str| wanted.lines.iter().any(|line| line.contains(text));
        has("Rebuilding refcount structure") && has(PAST_END)
    })
}

/// Entries that are wrong in ways nobody thought of.
#[test]
fn random_damage_is_reported_as_qemu_img_tells_it_and_its_repair_is_sound() {
    let seed = crate::disks::seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let snapshot: &[&str] = &["qemu-img", "snapshot", "-c", "s1", "image"];
    let write: &[&str] = &["qemu-io", "-f", "qcow2", "-c", "write 64k 128k", "image"];
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let (bench, image) = Bench::new(options, &[snapshot, write]);
        let l2 = word(&image, word(&image, 40)) & !COPIED;
        let old_l2 = word(&image, word(&image, word(&image, 64))) & !COPIED;
        let block = word(&image, word(&image, 48));
        'images: for _ in 0..12 {
            let mut damaged = image.clone();
            let mut put = |at: u64, bytes: &[u8]| {
                damaged[at as usize..][..bytes.len()].copy_from_slice(bytes);
            };
            for _ in 0..rng.u64(1..4) {
                let step = if options.contains("extended") { 16 } else { 8 };
                let table = if rng.bool() { l2 } else { old_l2 };
                let place = rng.u64(..32) << 16 | if rng.u8(..4) == 0 { rng.u64(..512) } else { 0 };
                let flags = [0, COPIED, COPIED, 1 << 62, COPIED | 1, 1][rng.usize(..6)];
                let far = if rng.u8(..6) == 0 { rng.u64(..1 << 40) << 16 } else { 0 };
                match rng.u8(..3) {
                    0 => put(block + 2 * rng.u64(..24), &[0, rng.u8(1..4)]),
                    _ => put(table + step * rng.u64(..24), &q(flags | (place ^ far))),
                }
            }
            let [ours, theirs] = ["ours", "theirs"].map(|name| bench.0.path().join(name));
            for fix in [Fix::Nothing, Fix::Leaks, Fix::All] {
                fs::write(&ours, &damaged).unwrap();
                fs::write(&theirs, &damaged).unwrap();
                let (mut mine, wanted) = (check_ours(&ours, fix), check_theirs(&theirs, fix));
                align_ends(&mut mine, &wanted);
                if rebuilds_beyond(&wanted) {
                    let left = check_theirs(&ours, Fix::Nothing).unwrap().lines;
                    assert!(!left.iter().any(|line| line.contains("reference=")), "{left:?}");
                    continue 'images;
                }
                assert_eq!(mine, wanted, "VUBLK_SEED={seed} {fix:?}");
            }
            let mut again = check_theirs(&ours, Fix::Nothing);
            let left = check_theirs(&theirs, Fix::Nothing);
            align_ends(&mut again, &left);
            assert_eq!(again, left, "VUBLK_SEED={seed}");
        }
    }
}
