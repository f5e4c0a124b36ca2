//! Differencing VHDX images, which QEMU lacks, beside chains of qcow2 images in QEMU.
//!
//! Images with partially present blocks are made by the specification.

use super::{Ended, Place};
use std::path::PathBuf;

/// In images with a log of 1 MiB.
const BAT: usize = 0x200000;
/// Of blocks of 2 MiB: behind those of a chunk.
const BITMAP_ENTRY: usize = 2048;

fn run(place: &Place, lines: &[&str]) {
    for line in lines {
        let ended = place.run(line);
        let is_right = ended.code == Some(0) && !ended.stdout.contains("failed");
        assert!(is_right, "{line}: {ended:?}");
    }
}

/// A parent with some data, and a child without any.
fn family(size: &str) -> Place {
    let place = Place::new(true);
    run(
        &place,
        &[
            "qemu-img create -q -f vhdx -o block_size=1M p.vhdx 9M",
            "qemu-io -f vhdx -c 'write -P 1 0 3M' -c 'write -P 2 5M 700k' p.vhdx",
            &format!("qemu-img create -q -f vhdx -b p.vhdx -F vhdx c.vhdx {size}"),
        ],
    );
    place
}

fn bytes(place: &Place, name: &str) -> (PathBuf, Vec<u8>) {
    let path = place.path().join(name);
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

/// An error of one line that says this.
fn refused(ended: Ended, wanted: &str) {
    let is_named = ended.stderr.contains(wanted) && ended.stderr.lines().count() == 1;
    assert!(ended.code == Some(1) && is_named, "{wanted}: {ended:?}");
}

#[test]
fn what_a_child_has_not_is_its_parents() {
    let place = family("");
    run(
        &place,
        &[
            "qemu-io -r -f vhdx -c 'read -P 1 0 3M' -c 'read -P 0 3M 2M' -c 'read -P 2 5M 700k' c.vhdx",
            "qemu-img compare -f vhdx -F vhdx p.vhdx c.vhdx",
            "qemu-io -f vhdx -c 'write -P 3 1M 1k' -c 'write -P 4 4095k 2k' c.vhdx",
            "qemu-io -r -f vhdx -c 'read -P 1 0 1M' -c 'read -P 3 1M 1k' -c 'read -P 1 1025k 2047k' \
             -c 'read -P 0 3M 1023k' -c 'read -P 4 4095k 2k' -c 'read -P 0 4097k 1023k' -c 'read -P 2 5M 700k' c.vhdx",
            "qemu-io -f vhdx -c 'write -z 0 2M' -c 'write -z 5200k 100k' -c 'write -z 6M 3M' c.vhdx",
            "qemu-io -r -f vhdx -c 'read -P 0 0 2M' -c 'read -P 1 2M 1M' -c 'read -P 2 5M 80k' \
             -c 'read -P 0 5200k 100k' -c 'read -P 2 5300k 520k' -c 'read -P 0 6M 3M' c.vhdx",
            "qemu-img check -f vhdx c.vhdx",
            "qemu-io -r -f vhdx -c 'read -P 1 0 3M' -c 'read -P 2 5M 700k' p.vhdx",
        ],
    );
    let info = place.run("qemu-img info -f vhdx c.vhdx").stdout;
    for line in ["backing file: ./p.vhdx", "backing file format: vhdx", "cluster_size: 2097152"] {
        assert!(info.contains(line), "{line}: {info}");
    }
}

#[test]
fn random_requests_leave_what_they_leave_in_a_chain_of_qcow2_images() {
    let seed = crate::disks::seed();
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let size = 12 << 20;
    let above_size = 14 << 20;
    let requests: Vec<String> = (1..40)
        .map(|n| {
            let end = if n <= 15 { size } else { above_size };
            let at = rng.u64(0..end - 512) / 512 * 512;
            let len = (rng.u64(512..3 << 20) / 512 * 512).min(end - at);
            match n % 4 {
                0 => format!("-c 'write -z {at} {len}'"),
                _ => format!("-c 'write -P {n} {at} {len}'"),
            }
        })
        .collect();
    let (below, above) = (requests[..15].join(" "), &requests[15..]);
    let mut found = Vec::new();
    for format in ["vhdx", "qcow2"] {
        let place = Place::new(format == "vhdx");
        run(
            &place,
            &[
                &format!("qemu-img create -q -f {format} p.img 12M"),
                &format!("qemu-io -f {format} {below} p.img"),
            ],
        );
        run(&place, &[&format!("qemu-img create -q -f {format} -b p.img -F {format} c.img 14M")]);
        for part in above.chunks(8) {
            run(&place, &[&format!("qemu-io -f {format} {} c.img", part.join(" "))]);
        }
        run(&place, &[&format!("qemu-img convert -f {format} -O raw c.img c.raw")]);
        run(&place, &[&format!("qemu-img check -q -f {format} c.img")]);
        found.push(bytes(&place, "c.raw").1);
    }
    assert!(found[0] == found[1], "seed {seed}: other bytes");
}

#[test]
fn a_parent_is_followed_below_the_folder_of_its_child_only() {
    let place = family("");
    let child = bytes(&place, "c.vhdx");
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let name = utf16(".\\p.vhdx");
    let at = child.1.windows(name.len()).position(|window| window == name).unwrap();
    for path in ["..\\p.vhd", "\\p.vhdx.", "/p.vhdx.", "nbd:\\x:1", "a\\..\\..\\", "c:p.vhdx"] {
        let mut bytes = child.1.clone();
        bytes[at..][..name.len()].copy_from_slice(&utf16(path));
        std::fs::write(&child.0, &bytes).unwrap();
        let ended = place.run("qemu-io -r -f vhdx -c 'read 0 512' c.vhdx");
        refused(ended, "does not lie below the folder of the image");
        // Options say more.
        let options =
            "driver=vhdx,file.filename=c.vhdx,backing.driver=vhdx,backing.file.filename=p.vhdx";
        run(&place, &[&format!("qemu-io -r --image-opts -c 'read -P 1 0 3M' {options}")]);
    }
    let long = std::fs::canonicalize(place.path()).unwrap().join("p.vhdx");
    for parent in ["../p.vhdx", &*long.to_string_lossy()] {
        let ended = place.run(&format!("qemu-img create -f vhdx -b {parent} -F vhdx n.vhdx 9M"));
        assert_eq!(ended.code, Some(1), "{parent}: {ended:?}");
        assert!(!place.path().join("n.vhdx").exists(), "{parent}");
    }
    // Itself.
    let mut bytes = child.1.clone();
    bytes[at..][..name.len()].copy_from_slice(&utf16(".\\c.vhdx"));
    std::fs::write(&child.0, &bytes).unwrap();
    refused(place.run("qemu-io -r -f vhdx -c 'read 0 512' c.vhdx"), "infinite loop");
}

#[test]
fn a_parent_that_has_changed_is_refused_unless_the_child_knows() {
    let place = family("12M");
    run(&place, &["qemu-img create -q -f vhdx -b c.vhdx -F vhdx g.vhdx"]);
    run(&place, &["qemu-io -f vhdx -c 'write -P 7 1M 1M' -c 'write -P 8 10M 1M' g.vhdx"]);
    // What is committed changes the child, of which the grandchild is told.
    run(&place, &["qemu-img commit -q -f vhdx g.vhdx"]);
    run(
        &place,
        &[
            "qemu-io -r -f vhdx -c 'read -P 7 1M 1M' -c 'read -P 8 10M 1M' -c 'read -P 1 0 1M' g.vhdx",
        ],
    );
    run(
        &place,
        &[
            "qemu-io -r -f vhdx -c 'read -P 7 1M 1M' -c 'read -P 8 10M 1M' -c 'read -P 1 0 1M' c.vhdx",
        ],
    );
    run(&place, &["qemu-io -f vhdx -c 'write -P 9 0 512' p.vhdx"]);
    refused(
        place.run("qemu-io -r -f vhdx -c 'read 0 512' c.vhdx"),
        "has changed since the image was made",
    );
    assert_eq!(place.run("qemu-img info -f vhdx c.vhdx").code, Some(0));
    let options =
        "driver=vhdx,file.filename=c.vhdx,backing.driver=vhdx,backing.file.filename=p.vhdx";
    run(
        &place,
        &[&format!("qemu-io -r --image-opts -c 'read -P 1 0 512' -c 'read -P 7 1M 1M' {options}")],
    );
}

#[test]
fn new_children_need_a_vhdx_parent() {
    let place = family("");
    run(&place, &["qemu-img create -q -f raw b.raw 1M"]);
    for (line, wanted) in [
        ("qemu-img create -q -f vhdx -b b.raw -F raw n.vhdx", "has to be a VHDX image"),
        (
            "qemu-img create -q -f vhdx -b p.vhdx -F vhdx -o subformat=fixed n.vhdx",
            "cannot have a parent",
        ),
        ("qemu-img create -q -f vhdx -u -b q.vhdx -F vhdx n.vhdx 1M", "q.vhdx"),
    ] {
        let ended = place.run(line);
        assert!(ended.code == Some(1) && ended.stderr.contains(wanted), "{line}: {ended:?}");
        assert!(!place.path().join("n.vhdx").exists(), "{line}");
    }
    let options = "driver=vhdx,file.filename=p.vhdx,backing.driver=raw,backing.file.filename=b.raw";
    let ended = place.run(&format!("qemu-io -r --image-opts -c 'read 0 512' {options}"));
    refused(ended, "has no parent");
}

#[test]
fn a_rebase_names_another_parent_and_shows_the_same() {
    let place = family("");
    run(
        &place,
        &[
            "qemu-io -f vhdx -c 'write -P 3 1M 1k' -c 'write -P 4 4095k 2k' c.vhdx",
            "qemu-img create -q -f vhdx q.vhdx 12M",
            "qemu-io -f vhdx -c 'write -P 9 2M 5M' q.vhdx",
            "qemu-img create -q -f raw b.raw 9M",
            "qemu-img convert -f vhdx -O raw c.vhdx before.raw",
        ],
    );
    std::fs::create_dir(place.path().join("a folder with quite a long name")).unwrap();
    let far = "a folder with quite a long name/far.vhdx";
    run(&place, &[&format!("qemu-img create -q -f vhdx '{far}' 9M")]);
    for parent in ["q.vhdx", far] {
        run(
            &place,
            &[
                &format!("qemu-img rebase -q -f vhdx -b '{parent}' -F vhdx c.vhdx"),
                "qemu-img compare -f vhdx -F raw c.vhdx before.raw",
            ],
        );
        let info = place.run("qemu-img info -f vhdx c.vhdx").stdout;
        assert!(info.contains(&format!("backing file: ./{parent}")), "{info}");
    }
    // More than there is room for, if the room of old names were never used again.
    let long = "long/".repeat(6000) + "p.vhdx";
    for parent in [&*long; 18].into_iter().chain([far]) {
        run(&place, &[&format!("qemu-img rebase -u -f vhdx -b '{parent}' -F vhdx c.vhdx")]);
    }
    run(
        &place,
        &["qemu-img compare -f vhdx -F raw c.vhdx before.raw", "qemu-img check -f vhdx c.vhdx"],
    );
    for (line, wanted) in [
        ("qemu-img rebase -u -f vhdx -b ../p.vhdx -F vhdx c.vhdx", "a path below its own folder"),
        ("qemu-img rebase -f vhdx -b b.raw -F raw c.vhdx", "has to be a VHDX image"),
        ("qemu-img rebase -f vhdx -b '' c.vhdx", "needs a parent"),
        ("qemu-img rebase -f vhdx -b q.vhdx -F vhdx p.vhdx", "Operation not supported"),
    ] {
        let ended = place.run(line);
        assert!(ended.code == Some(1) && ended.stderr.contains(wanted), "{line}: {ended:?}");
        run(&place, &["qemu-img compare -f vhdx -F raw c.vhdx before.raw"]);
    }
    // The parent that it names has to stay what it is.
    run(&place, &[&format!("qemu-io -f vhdx -c 'write -P 1 0 1k' '{far}'")]);
    let ended = place.run("qemu-io -r -f vhdx -c 'read 0 512' c.vhdx");
    refused(ended, "has changed since the image was made");
}

/// A child whose first block has every other 64 KiB, and the last sector.
fn with_partial_block() -> Place {
    let place = family("");
    run(&place, &["qemu-io -f vhdx -c 'write -P 5 0 2M' c.vhdx"]);
    let (path, mut bytes) = bytes(&place, "c.vhdx");
    let bitmap = bytes.len().next_multiple_of(1 << 20);
    bytes.resize(bitmap + (1 << 20), 0);
    for sector in 0..4096usize {
        if sector / 128 % 2 == 1 || sector == 4095 {
            bytes[bitmap + sector / 8] |= 1 << (sector % 8);
        }
    }
    assert_eq!(bytes[BAT] & 7, 6);
    bytes[BAT] |= 7;
    bytes[BAT + 8 * BITMAP_ENTRY..][..8].copy_from_slice(&(bitmap as u64 | 6).to_le_bytes());
    std::fs::write(path, bytes).unwrap();
    place
}

/// What is read of the first block.
fn expected() -> Vec<u8> {
    let own = |at: usize| at / 65536 % 2 == 1 || at >= (2 << 20) - 512;
    (0..2 << 20).map(|at| if own(at) { 5 } else { 1 }).collect()
}

fn first_block(place: &Place) -> Vec<u8> {
    run(place, &["qemu-img convert -f vhdx -O raw c.vhdx c.raw", "qemu-img check -f vhdx c.vhdx"]);
    bytes(place, "c.raw").1[..2 << 20].to_vec()
}

#[test]
fn sectors_of_a_block_that_are_not_there_are_the_parents() {
    let place = with_partial_block();
    assert!(first_block(&place) == expected());
    let map = place.run("qemu-img map --output=json -f vhdx c.vhdx").stdout;
    let first: Vec<&str> = map.lines().take(2).collect();
    assert!(first[0].contains("\"start\": 0, \"length\": 65536, \"depth\": 1"), "{map}");
    assert!(first[1].contains("\"start\": 65536, \"length\": 65536, \"depth\": 0"), "{map}");
    // Bytes that begin and end within sectors.
    run(
        &place,
        &[
            "qemu-io -r -f vhdx -c 'read -P 1 65000 536' -c 'read -P 5 65536 3' -c 'read -P 5 131000 72' c.vhdx",
        ],
    );
}

#[test]
fn a_write_makes_such_a_block_whole() {
    for (at, len) in [(70_000, 10), (0, 65536), (65_536, 200_000), (1_000_000, 512), (0, 2 << 20)] {
        let place = with_partial_block();
        run(&place, &[&format!("qemu-io -f vhdx -c 'write -P 6 {at} {len}' c.vhdx")]);
        let mut wanted = expected();
        wanted[at..at + len].fill(6);
        assert!(first_block(&place) == wanted, "{at} {len}");
        assert_eq!(bytes(&place, "c.vhdx").1[BAT] & 7, 6);
    }
    for (at, len) in [(0, 2 << 20), (65_000, 1000), (0, 65536)] {
        let place = with_partial_block();
        run(&place, &[&format!("qemu-io -f vhdx -c 'write -z {at} {len}' c.vhdx")]);
        let mut wanted = expected();
        wanted[at..at + len].fill(0);
        assert!(first_block(&place) == wanted, "zeroes: {at} {len}");
    }
}

#[test]
fn a_sector_bitmap_that_makes_no_sense_costs_an_error() {
    for entry in [0u64, 7, 6, 1 << 20 | 6, 1 << 40 | 6] {
        let place = with_partial_block();
        let (path, mut bytes) = bytes(&place, "c.vhdx");
        bytes[BAT + 8 * BITMAP_ENTRY..][..8].copy_from_slice(&entry.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
        let ended = place.run("qemu-io -r -f vhdx -c 'read 0 512' -c 'read -P 0 3M 1M' c.vhdx");
        assert!(ended.stdout.contains("failed: Input/output error"), "{entry:#x}: {ended:?}");
        assert!(ended.stdout.contains("read 1048576/1048576"), "{entry:#x}: {ended:?}");
        let checked = place.run("qemu-img check -f vhdx c.vhdx");
        assert_eq!(checked.code, Some(2), "{entry:#x}: {checked:?}");
    }
}
