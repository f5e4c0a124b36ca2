//! VMDK images: QEMU's, some damaged, read by both; ours, read by QEMU; and hand-made ones.
//!
//! The hand-made ones, made by the specification, have what QEMU does not write.

use super::{Ended, Place, assert_same, fixture};
use std::path::PathBuf;

/// Lines that read the image `x.vmdk`.
const READS: [&str; 10] = [
    "qemu-img info x.vmdk",
    "qemu-img info --output=json x.vmdk",
    "qemu-img info --backing-chain x.vmdk",
    "qemu-img check x.vmdk",
    "qemu-img check -f vmdk --output=json x.vmdk",
    "qemu-img map x.vmdk",
    "qemu-img map --output=json x.vmdk",
    "qemu-img snapshot -l x.vmdk",
    "qemu-img resize x.vmdk 20M",
    "qemu-io -r -f vmdk -c 'read -v 65530 20' -c 'read -P 1 0 64k' -c length x.vmdk",
];

/// Requests of qemu-io that leave something everywhere, in whole grains.
const WRITES: &str = "qemu-io -f vmdk -c 'write -P 1 0 64k' -c 'write -P 2 3M 1088k' -c 'write -P 3 512k 64k' x.vmdk";

/// What images there are, and how large they can be.
const KINDS: [(&str, &str); 8] = [
    ("", "8M"),
    ("-o zeroed_grain=on", "5001k"),
    ("-o subformat=monolithicFlat", "5001k"),
    ("-o subformat=twoGbMaxExtentSparse", "5G"),
    ("-o subformat=twoGbMaxExtentFlat", "5G"),
    ("-o subformat=streamOptimized", "5001k"),
    ("-o adapter_type=lsilogic,hwversion=9,toolsversion=5", "10G"),
    ("-o compat6", "20M"),
];

/// A place with an image that QEMU has made and written to.
fn with_image(options: &str, size: &str) -> Place {
    let place = Place::new(true);
    fixture(place.path());
    for line in [&format!("qemu-img create -q -f vmdk {options} x.vmdk {size}"), WRITES] {
        let ended = place.run_theirs(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    }
    place
}

#[test]
fn images_of_every_kind_are_read_as_qemu_reads_them() {
    for (options, size) in KINDS {
        let create = format!("qemu-img create -q -f vmdk {options} x.vmdk {size}");
        assert_same(&[&create, WRITES], &READS);
    }
    let place = with_image("-o subformat=twoGbMaxExtentSparse", "5G");
    let write = "qemu-io -f vmdk -c 'write -P 5 2047M 2M' -c 'write -P 6 5119M 1M' x.vmdk";
    assert_eq!(place.run_theirs(write).code, Some(0));
    let read = "qemu-io -r -f vmdk -c 'read -P 5 2047M 2M' -c 'read -P 6 5119M 1M' -c 'read -P 2 3M 1088k' x.vmdk";
    assert_eq!(place.run(read), place.run_theirs(read));
}

/// A descriptor of these extents.
fn descriptor(create_type: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n{extents}\n"
    )
}

#[test]
fn descriptors_are_read_as_qemu_reads_them() {
    let place = Place::new(true);
    fixture(place.path());
    let make = "qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse s.vmdk 1M";
    assert_eq!(place.run_theirs(make).code, Some(0));
    let write = "qemu-io -f vmdk -c 'write -P 9 0 1M' s.vmdk";
    assert_eq!(place.run_theirs(write).code, Some(0));
    for (create_type, extents) in [
        ("monolithicFlat", "RW 100 FLAT \"a.raw\" 100"),
        ("monolithicFlat", "RW  2000   FLAT    \"a.raw\"   48  "),
        ("monolithicFlat", "RW 2048 FLAT \"a.raw\" 0\r"),
        ("vmfs", "RW 2048 VMFS \"a.raw\""),
        (
            "twoGbMaxExtentFlat",
            "RW 3 FLAT \"a.raw\" 128\nRW 200 FLAT \"long.raw\" 0\nRW 2048 SPARSE \"s-s001.vmdk\"",
        ),
        // Longer than its file.
        ("monolithicFlat", "RW 4096 FLAT \"a.raw\" 0"),
        // What the extent's header says counts.
        ("twoGbMaxExtentSparse", "RW 5 SPARSE \"s-s001.vmdk\"\nRW 9999 SPARSE \"s-s001.vmdk\""),
        ("monolithicFlat", "RW 100 FLAT \"a.raw\""),
        ("monolithicFlat", "RW 100 FLAT \"a.raw\" -1"),
        ("monolithicFlat", "RW 100 FOO \"a.raw\" 0"),
        ("monolithicFlat", "RW 100 VMFS \"a.raw\" 5"),
        ("monolithicFlat", "RW 100 SPARSE \"a.raw\" 0"),
        ("monolithicFlat", "RW 100 SPARSE \"a.raw\""),
        ("monolithicFlat", "RW 100 FLAT \"nope.vmdk\" 0"),
        ("vmfsSparse", "RW 100 VMFSSPARSE \"a.raw\""),
        ("seSparse", "RW 100 SESPARSE \"a.raw\""),
        ("what", "RW 100 FLAT \"a.raw\" 0"),
        ("", "RW 100 FLAT \"a.raw\" 0"),
    ] {
        std::fs::write(place.path().join("x.vmdk"), descriptor(create_type, extents)).unwrap();
        for line in [
            "qemu-img info -f vmdk x.vmdk",
            "qemu-img info -f vmdk --output=json x.vmdk",
            "qemu-img map -f vmdk --output=json x.vmdk",
            "qemu-io -r -f vmdk -c 'read -v 0 512' -c 'read -v 1500 100' x.vmdk",
            "qemu-img convert -f vmdk -O raw x.vmdk out.raw",
        ] {
            // QEMU says nothing of an image whose extents differ.
            let [ours, theirs] = [place.run(line), place.run_theirs(line)].map(|mut ended| {
                ended.stdout = ended.stdout.replace(",\n    \"dirty-flag\": false", "");
                // QEMU counts a file twice that two extents are in.
                let is_size =
                    |line: &&str| line.contains("disk size") || line.contains("actual-size");
                let lines = ended.stdout.lines().filter(|line| !is_size(line));
                ended.stdout = lines.collect::<Vec<_>>().join("\n");
                ended
            });
            assert_eq!(ours, theirs, "{line}\n{create_type}: {extents}");
        }
    }
}

#[test]
fn extents_that_qemu_leaves_out_have_their_place() {
    let place = Place::new(true);
    fixture(place.path());
    let text = descriptor(
        "custom",
        "rw 16 FLAT \"odd.raw\" 0\nRW 8 ZERO\n\tRDONLY 8 FLAT \"odd.raw\" 16 \"uuid\"",
    );
    std::fs::write(place.path().join("x.vmdk"), text.replace('\n', "\r\n")).unwrap();
    let read = "qemu-io -r -f vmdk -c 'read -P 3 0 8k' -c 'read -P 0 8k 4k' -c 'read -P 3 12k 4k' -c length x.vmdk";
    let ended = place.run(read);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("16 KiB"), "{ended:?}");
    let ended = place.run("qemu-io -f vmdk -c 'write 0 512' x.vmdk");
    assert!(ended.stderr.contains("The extent 'odd.raw' is read-only"), "{ended:?}");
}

#[test]
fn an_extent_is_not_the_file_of_the_image() {
    let place = Place::new(true);
    std::fs::write(
        place.path().join("x.vmdk"),
        descriptor("monolithicFlat", "RW 1 FLAT \"x.vmdk\" 0"),
    )
    .unwrap();
    let ended = place.run("qemu-img info -f vmdk x.vmdk");
    assert!(ended.stderr.contains("names its own file 'x.vmdk'"), "{ended:?}");
}

/// An image whose bytes are changed.
struct Bytes {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Bytes {
    fn of(place: &Place) -> Bytes {
        let path = place.path().join("x.vmdk");
        Bytes { bytes: std::fs::read(&path).unwrap(), path }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Bytes {
        self.bytes[at..][..bytes.len()].copy_from_slice(bytes);
        self
    }

    fn number(&self, at: usize) -> usize {
        u64::from_le_bytes(*self.bytes[at..].first_chunk().unwrap()) as usize
    }

    fn save(&self) {
        std::fs::write(&self.path, &self.bytes).unwrap();
    }
}

/// What comes of an image that is changed, by our program and by QEMU's.
fn changed(place: &Place, change: impl FnOnce(&mut Bytes)) -> [Ended; 2] {
    let original = Bytes::of(place);
    let mut image = Bytes { path: original.path.clone(), bytes: original.bytes.clone() };
    change(&mut image);
    image.save();
    let line = "qemu-io -r -f vmdk -c 'read -P 1 0 64k' x.vmdk";
    let ended = [place.run(line), place.run_theirs(line)];
    original.save();
    ended
}

#[test]
fn damaged_headers_are_refused_as_qemu_refuses_them() {
    let place = with_image("", "8M");
    for (at, bytes) in [
        (4, &b"\x04"[..]),
        (20, b"\0"),
        (44, b"\0\0"),
        (44, b"\0\x04"),
        // Another name for the same kind of image, and nothing that counts.
        (4, b"\x02"),
        (4, b"\x03"),
        (36, b"\x01"),
        (72, b"\x01"),
    ] {
        let [ours, theirs] = changed(&place, |image| {
            image.put(at, bytes);
        });
        assert_eq!(ours, theirs, "{at}: {bytes:?}");
    }
    let [ours, theirs] = changed(&place, |image| image.bytes.truncate(1000));
    assert_eq!(ours, theirs);
    // What QEMU does not look at.
    for (at, bytes, wanted) in [
        (12, &b"\0\0\0\0\0\0\x10\0"[..], "L1 size too big"),
        (56, b"\xff\xff\xff\x7f", "the grain directory"),
        (20, b"\x81", "grains of 129 sectors"),
        (73, b"x", "line ends"),
    ] {
        let [ours, _] = changed(&place, |image| {
            image.put(at, bytes);
        });
        assert_eq!(ours.code, Some(1), "{at}: {ours:?}");
        assert!(ours.stderr.contains(wanted), "{at}: {ours:?}");
        assert_eq!(ours.stderr.lines().count(), 1, "{ours:?}");
    }
}

#[test]
fn grains_that_cannot_be_are_reported_by_a_check() {
    let place = with_image("", "8M");
    let original = Bytes::of(&place);
    let directory = original.number(56) * 512;
    let table = original.number(directory) as u32 as usize * 512;
    for (entry, wanted) in [
        (0x0010_0000u32, "ERROR: cluster offset for sector 0 points after EOF"),
        (1, "ERROR: cluster offset for sector 0 points to metadata"),
        (0x180, "ERROR: the grain of sector "),
    ] {
        let mut image = Bytes::of(&place);
        image.put(table, &entry.to_le_bytes()).save();
        let ended = place.run("qemu-img check x.vmdk");
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(format!("{}{}", ended.stdout, ended.stderr).contains(wanted), "{ended:?}");
        original.save();
    }
}
