//! Parallels images: QEMU's, some damaged, read by both; and ours, checked by QEMU.

use super::{Place, assert_same, assert_same_contents, fixture};

/// Lines that read the image `x.parallels`.
const READS: [&str; 9] = [
    "qemu-img info x.parallels",
    "qemu-img info --output=json x.parallels",
    "qemu-img map x.parallels",
    "qemu-img map --output=json x.parallels",
    "qemu-img check x.parallels",
    "qemu-img check -f parallels --output=json x.parallels",
    "qemu-img convert -O raw x.parallels out.raw && qemu-img compare out.raw x.parallels",
    "qemu-img measure -O qcow2 x.parallels",
    "qemu-io -r -c 'read -v 1048570 20' -c 'map' -c 'alloc 0 5M' x.parallels",
];

const WRITES: &str = "qemu-io -f parallels -c 'write -P 1 3M 10k' -c 'write -P 2 1M 1100k' -c 'write -P 3 4900k 512' \
                      x.parallels";

#[test]
fn images_of_all_cluster_sizes_are_read_as_qemu_reads_them() {
    for (cluster, size) in [("1M", "6M"), ("4k", "5001k"), ("32256", "6M"), ("258048", "3G")] {
        let create =
            format!("qemu-img create -q -f parallels -o cluster_size={cluster} x.parallels {size}");
        assert_same(&[&create, WRITES], &READS);
    }
}

/// Changes of a field of an image: its offset, and its bytes.
type Fields<'a> = &'a [(usize, &'a [u8])];

/// Changes fields of an image, and makes its file longer or shorter.
fn damage(place: &Place, fields: Fields, longer: i64) {
    let path = place.path().join("x.parallels");
    let mut bytes = std::fs::read(&path).unwrap();
    for (at, field) in fields {
        bytes[*at..at + field.len()].copy_from_slice(field);
    }
    bytes.resize((bytes.len() as i64 + longer) as usize, 0);
    std::fs::write(&path, bytes).unwrap();
}

/// An image in clusters of 1 MiB: the second and the fourth are the file's first two.
fn damaged(is_ours: bool, fields: Fields, longer: i64) -> Place {
    let place = Place::new(is_ours);
    let write = "qemu-io -f parallels -c 'write -P 1 1M 4k' -c 'write -P 2 3M 1k' x.parallels";
    for line in ["qemu-img create -q -f parallels x.parallels 5M", write] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    damage(&place, fields, longer);
    place
}

const OLD: &[u8] = b"WithoutFreeSpace";
const IN_USE: &[u8] = &[0x59, 0x6e, 0x6f, 0x74];
const CLOSED: &[u8] = b"v2.1";

/// Asserts that lines come to the same in images with equal damage.
fn assert_same_damaged(cases: &[(Fields, i64)], lines: &[&str]) {
    for (fields, longer) in cases {
        let [ours, theirs] = [true, false].map(|is_ours| damaged(is_ours, fields, *longer));
        for line in lines {
            assert_eq!(ours.run(line), theirs.run(line), "{fields:?}, {longer}: {line}");
        }
    }
}

#[test]
fn headers_that_make_no_sense_are_refused_in_qemus_words() {
    assert_same_damaged(
        &[
            (&[(0, b"X")], 0),
            (&[(16, &[3])], 0),
            (&[(28, &[0, 0])], 0),
            (&[(28, &[0, 0, 0x40, 0])], 0),
            (&[(32, &[0xff; 4])], 0),
            (&[(36, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0])], 0),
        ],
        &[
            "qemu-img info -f parallels x.parallels",
            "qemu-img check -f parallels x.parallels",
            "qemu-io -r -f parallels -c 'read 0 512' x.parallels",
        ],
    );
    let place = damaged(true, &[(32, &[0, 0, 0x10])], 0);
    let ended = place.run("qemu-img info -f parallels x.parallels");
    assert!(ended.stderr.contains("The Parallels catalogue ends at 0x400040"), "{ended:?}");
}

#[test]
fn images_of_both_kinds_are_read_checked_and_repaired_as_by_qemu() {
    let sectors = [&[0, 8, 0, 0][..], &[0, 16, 0, 0]];
    assert_same_damaged(
        &[
            // Not closed; closed by a newer program; no such value.
            (&[(44, IN_USE)], 0),
            (&[(44, CLOSED)], 0),
            (&[(44, &[5])], 0),
            // The older kind, whose size has 32 bits, and without a place for data.
            (&[(0, OLD), (68, sectors[0]), (76, sectors[1])], 0),
            (&[(0, OLD), (40, &[5]), (68, sectors[0]), (76, sectors[1])], 0),
            (&[(0, OLD), (48, &[0, 0]), (68, sectors[0]), (76, sectors[1])], 0),
            // The disk is longer than the catalogue, and shorter.
            (&[(36, &[1])], 0),
            (&[(32, &[4])], 0),
            // Space is lost.
            (&[], 1 << 20),
            (&[], 1000),
            (&[(44, IN_USE)], 1000),
        ],
        &[
            "qemu-img info --output=json x.parallels",
            "qemu-img map --output=json x.parallels",
            "qemu-img check x.parallels",
            "qemu-img check --output=json x.parallels",
            "qemu-io -r -c 'read -P 1 1M 4k' -c 'read -P 2 3M 1k' x.parallels",
            "qemu-img check -r all x.parallels",
            "qemu-img check x.parallels",
        ],
    );
    assert_same_damaged(
        &[(&[(68, &[9])], 0), (&[(68, &[0xff; 4])], 0)],
        &[
            "qemu-img check -f parallels x.parallels",
            "qemu-img check -f parallels -r leaks x.parallels",
        ],
    );
    assert_same_damaged(
        &[(&[], 1 << 20), (&[(44, IN_USE)], 1000)],
        &["qemu-img check -r leaks x.parallels"],
    );
    let place = damaged(true, &[(68, &[9])], 0);
    let repaired = place.run("qemu-img check -r all x.parallels");
    assert!(repaired.stderr.contains("Repairing cluster 1 is outside image"), "{repaired:?}");
    assert_eq!(place.run_theirs("qemu-img check x.parallels").code, Some(0));
}

#[test]
fn a_cluster_with_two_owners_is_found_and_each_gets_its_own() {
    let place = damaged(true, &[(76, &[1])], 0);
    let found = place.run("qemu-img check x.parallels");
    assert!(found.stderr.contains("ERROR duplicate offset in BAT entry 3"), "{found:?}");
    assert_eq!(found.code, Some(2));
    let refused = place.run("qemu-io -c 'write 0 512' x.parallels");
    assert!(refused.stderr.contains("has two owners): repair the image"), "{refused:?}");
    assert_eq!(place.run("qemu-img check -r all x.parallels").code, Some(0));
    for line in [
        "qemu-img check x.parallels",
        "qemu-io -c 'read -P 1 1M 4k' -c 'read -P 1 3M 4k' -c 'write -P 7 3M 4k' x.parallels",
        "qemu-io -c 'read -P 1 1M 4k' -c 'read -P 7 3M 4k' x.parallels",
    ] {
        let ended = place.run_theirs(line);
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{line}: {ended:?}");
    }
}

#[test]
fn an_image_that_was_not_closed_is_brought_to_order_when_it_is_written() {
    let place = damaged(true, &[(44, IN_USE)], 5 << 20);
    let written = place.run("qemu-io -c 'write -P 3 0 4k' -c 'read -P 1 1M 4k' x.parallels");
    assert_eq!(written.code, Some(0), "{written:?}");
    for line in ["qemu-img check x.parallels", "qemu-io -c 'read -P 3 0 4k' x.parallels"] {
        let ended = place.run_theirs(line);
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{line}: {ended:?}");
    }
}

#[test]
fn new_images_are_what_qemu_makes() {
    for line in [
        "qemu-img create -f parallels x.parallels 5M",
        "qemu-img create -f parallels x.parallels 0",
        "qemu-img create -f parallels x.parallels 1000",
        "qemu-img create -f parallels x.parallels 8T",
        "qemu-img create -f parallels -o cluster_size=1000000 x.parallels 10M",
        "qemu-img create -f parallels -o cluster_size=1 x.parallels 1M",
        "qemu-img create -f parallels -o cluster_size=63k,preallocation=falloc x.parallels 2M",
        "qemu-img create -f parallels -o cluster_size=2G x.parallels 2M",
        "qemu-img create -f parallels -o cluster_size=0 x.parallels 2M",
        "qemu-img create -f parallels x.parallels 4P",
    ] {
        let [ours, theirs] = [true, false].map(Place::new);
        [&ours, &theirs].iter().for_each(|place| fixture(place.path()));
        let [by_us, by_them] = [ours.run(line), theirs.run(line)];
        assert_eq!(by_us, by_them, "{line}");
        if by_us.code == Some(0) {
            let [ours, theirs] = [ours, theirs]
                .map(|place| std::fs::read(place.path().join("x.parallels")).unwrap());
            assert!(ours == theirs, "{line}");
        }
    }
    assert_same(
        &["qemu-img create -q -f raw b.img 3M", "qemu-img create -q -f parallels z.parallels 3M"],
        &[
            "qemu-img create -f parallels -o help",
            "qemu-img measure -O parallels --size 1M",
            "qemu-img convert -c -O parallels b.img y.parallels",
            "qemu-img create -f parallels -b b.img -F raw y.parallels",
            "qemu-img convert -O parallels -B b.img -F raw b.img y.parallels",
            "qemu-img rebase -b b.img -F raw z.parallels",
            "qemu-img rebase -u -b b.img -F raw z.parallels",
            "qemu-img commit z.parallels",
        ],
    );
}

#[test]
fn what_is_written_is_what_qemu_reads() {
    for cluster in ["1M", "64k", "32256"] {
        let create =
            format!("qemu-img create -q -f parallels -o cluster_size={cluster} x.parallels 6001k");
        assert_same_contents(
            "parallels",
            &[&create],
            &[
                "qemu-io -f parallels -c 'write -P 1 0 10k' -c 'write -P 2 1000k 70k' -c 'write -z 4M 64k' x.parallels",
                "qemu-io -f parallels -c 'write -P 3 5M 881k' -c 'write -z 5M 100k' -c 'write -P 4 130000 5' x.parallels",
                "qemu-io -f parallels -c 'write -z -u 0 1M' -c 'write -P 5 512 512' -c 'read -P 0 1024 512' x.parallels",
                "qemu-io -f parallels -c 'discard 5M 512k' -c 'write -P 6 5M 512k' x.parallels",
                "qemu-img resize x.parallels 9M",
            ],
        );
    }
    let base = ["qemu-img create -q -f raw b.img 5M", "qemu-io -f raw -c 'write -P 9 0 2M' b.img"];
    assert_same_contents(
        "parallels",
        &base,
        &[
            "qemu-img convert -f raw -O parallels b.img x.parallels",
            "qemu-img compare -f raw -F parallels b.img x.parallels",
            "qemu-img convert -n -f raw -O parallels b.img x.parallels",
        ],
    );
}

#[test]
fn a_backing_file_shows_where_the_image_has_nothing_and_its_growth_is_an_option() {
    let place = Place::new(true);
    for line in [
        "qemu-img create -q -f raw b.img 4M",
        "qemu-io -f raw -c 'write -P 9 0 4M' b.img",
        "qemu-img create -q -f parallels -o cluster_size=64k x.parallels 4M",
    ] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let image =
        "driver=parallels,file.filename=x.parallels,backing.driver=raw,backing.file.filename=b.img";
    for (options, commands) in [
        (
            "",
            "-c 'write -P 1 1M 4k' -c 'write -z 2M 100k' -c 'discard 1M 4k' -c 'write -P 2 1M 4k'",
        ),
        (",prealloc-mode=truncate", "-c 'write -P 3 3M 4k'"),
        (",prealloc-mode=falloc,prealloc-size=1M", "-c 'write -P 4 3500k 4k'"),
    ] {
        let ended = place.run(&format!("qemu-io --image-opts {commands} {image}{options}"));
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{ended:?}");
    }
    let reads = format!(
        "qemu-io -r --image-opts -c 'read -P 9 0 1M' -c 'read -P 2 1M 4k' -c 'read -P 9 1028k 1020k' \
         -c 'read -P 0 2M 100k' -c 'read -P 9 2148k 924k' -c 'read -P 3 3M 4k' -c 'read -P 4 3500k 4k' {image}"
    );
    for ended in [place.run(&reads), place.run_theirs(&reads)] {
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{ended:?}");
    }
    for (options, wanted) in
        [(",prealloc-mode=never", "'never'"), (",prealloc-size=x", "prealloc-size")]
    {
        let ended = place.run(&format!("qemu-io --image-opts -c 'read 0 1' {image}{options}"));
        assert!(ended.code == Some(1) && ended.stderr.contains(wanted), "{ended:?}");
    }
}

/// Gives an image of 5 MiB in clusters of 1 MiB, of which the file has three, an extension with one feature, and a cluster
/// that belongs to it.
fn extend(place: &Place, feature: u64, flags: u64, data: &[u8]) {
    let path = place.path().join("x.parallels");
    let mut bytes = std::fs::read(&path).unwrap();
    let mut rest = [feature, flags, data.len() as u64].map(u64::to_le_bytes).concat();
    rest.extend(data);
    rest.resize((1 << 20) - 24, 0);
    bytes.resize(3 << 20, 0);
    bytes.extend(0xab23_4cef_23dc_ea87_u64.to_le_bytes());
    bytes.extend(<md5::Md5 as md5::Digest>::digest(&rest));
    bytes.extend(rest);
    bytes.resize(5 << 20, 5);
    bytes[56..64].copy_from_slice(&6144_u64.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
}

/// A dirty bitmap of a disk of 5 MiB, whose bits are in a cluster at this sector.
fn bitmap(sector: u64) -> Vec<u8> {
    let id: Vec<u8> = (1..=16).collect();
    let fields = [128_u32, 1].map(u32::to_le_bytes).concat();
    [&10240_u64.to_le_bytes()[..], &id, &fields, &sector.to_le_bytes()].concat()
}

const BITMAP: u64 = 0x2038_5fae_252c_b34a;

#[test]
fn dirty_bitmaps_are_shown_until_the_image_is_written() {
    let place = damaged(true, &[], 0);
    extend(&place, BITMAP, 0, &bitmap(8192));
    let theirs = place.run_theirs("qemu-img info x.parallels");
    let shown = "    bitmaps:\n        [0]:\n            name: 01020304-0506-0708-090a-0b0c0d0e0f10\n            \
                 granularity: 65536\n";
    let info = place.run("qemu-img info x.parallels");
    assert_eq!(info.stdout, format!("{}Format specific information:\n{shown}", theirs.stdout));
    // Their clusters are in use.
    let checked = place.run("qemu-img check x.parallels");
    assert!(
        checked.code == Some(0) && checked.stdout.contains("end offset: 5242880"),
        "{checked:?}"
    );
    let written = place.run("qemu-io -c 'write -P 3 0 4k' -c 'read -P 1 1M 4k' x.parallels");
    assert!(written.code == Some(0) && !written.stdout.contains("failed"), "{written:?}");
    for line in ["qemu-img info x.parallels", "qemu-img check x.parallels"] {
        assert_eq!(place.run(line), place.run_theirs(line), "{line}");
    }
}

#[test]
fn an_extension_that_makes_no_sense_costs_the_bitmaps_alone() {
    let place = damaged(true, &[], 0);
    extend(&place, BITMAP, 0, &bitmap(1 << 40));
    let info = place.run("qemu-img info x.parallels");
    assert!(info.code == Some(0) && !info.stdout.contains("bitmaps"), "{info:?}");
    let checked = place.run("qemu-img check x.parallels");
    assert!(
        checked.stderr.contains("ERROR Format Extension: A cluster of the bitmap"),
        "{checked:?}"
    );
    assert_eq!(place.run("qemu-img check -r all x.parallels").code, Some(0));
    assert_eq!(place.run_theirs("qemu-img check x.parallels").code, Some(0));
    // Bitmaps in clusters of the disk are not cut off with it.
    extend(&place, BITMAP, 0, &bitmap(2048));
    let checked = place.run("qemu-img check -r all x.parallels");
    assert!(checked.stderr.contains("its clusters hold data of the disk"), "{checked:?}");
    let read = place.run_theirs("qemu-io -r -c 'read -P 1 1M 4k' -c 'read -P 2 3M 1k' x.parallels");
    assert!(read.code == Some(0) && !read.stdout.contains("failed"), "{read:?}");
}

#[test]
fn an_image_with_a_feature_that_must_be_understood_is_not_changed() {
    let place = damaged(true, &[], 0);
    extend(&place, 9, 1, b"abc");
    let before = std::fs::read(place.path().join("x.parallels")).unwrap();
    for (line, code) in [
        ("qemu-io -c 'write 0 4k' x.parallels", 1),
        ("qemu-img check -r all x.parallels", 1),
        ("qemu-img check x.parallels", 0),
        ("qemu-io -r -c 'read -P 1 1M 4k' x.parallels", 0),
    ] {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(code), "{line}: {ended:?}");
        assert!(code == 0 || ended.stderr.contains("must be understood"), "{ended:?}");
    }
    assert!(std::fs::read(place.path().join("x.parallels")).unwrap() == before);
}
