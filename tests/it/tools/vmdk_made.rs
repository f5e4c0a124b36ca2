//! VMDK images that the test makes by the specification, as no tool here does.
//!
//! libyal's reader judges those that vublk makes.

use super::{Place, fixture};
use std::process::Command;

const SECTOR: usize = 512;

/// A hosted sparse extent of 8 MiB.
struct Hosted {
    /// In sectors.
    grain: usize,
    table_entries: usize,
    version: u32,
    flags: u32,
    has_copy: bool,
    /// Tables that are not there, by their numbers.
    missing: &'static [usize],
    descriptor: String,
}

const CAPACITY: usize = 16384;

impl Hosted {
    /// The extent with these grains, by their numbers, each full of one byte; 0 is one that is said to be zeroes. Tables
    /// lie behind the grains, those with higher numbers first.
    fn bytes(&self, grains: &[(usize, u8)]) -> Vec<u8> {
        let tables = CAPACITY.div_ceil(self.grain * self.table_entries);
        let table_len = (self.table_entries * 4).next_multiple_of(SECTOR);
        let directory_len = (tables * 4).next_multiple_of(SECTOR);
        let descriptor_len = self.descriptor.len().next_multiple_of(SECTOR).max(SECTOR);
        let overhead = (SECTOR + descriptor_len + 2 * directory_len)
            .next_multiple_of(self.grain.max(1) * SECTOR);
        let mut bytes = vec![0; overhead];
        bytes[SECTOR..][..self.descriptor.len()].copy_from_slice(self.descriptor.as_bytes());
        let mut entries = vec![0u32; tables * self.table_entries];
        for &(number, value) in grains {
            entries[number] = match value {
                0 => 1,
                _ => (bytes.len() / SECTOR) as u32,
            };
            let len = if value == 0 { 0 } else { self.grain * SECTOR };
            bytes.resize(bytes.len() + len, value);
        }
        let places = [SECTOR + descriptor_len, SECTOR + descriptor_len + directory_len];
        let copies = if self.has_copy { 2 } else { 1 };
        for &directory in places.iter().rev().take(copies) {
            for number in (0..tables).rev().filter(|number| !self.missing.contains(number)) {
                let place = (bytes.len() / SECTOR) as u32;
                put(&mut bytes, directory + number * 4, &place.to_le_bytes());
                let of_table = &entries[number * self.table_entries..][..self.table_entries];
                bytes.extend(of_table.iter().flat_map(|entry| entry.to_le_bytes()));
                bytes.resize(bytes.len().next_multiple_of(table_len.min(SECTOR)), 0);
            }
        }
        let sectors = |len: usize| (len / SECTOR) as u64;
        put(&mut bytes, 0, b"KDMV");
        put(&mut bytes, 4, &self.version.to_le_bytes());
        put(&mut bytes, 8, &self.flags.to_le_bytes());
        for (at, number) in [
            (12, CAPACITY as u64),
            (20, self.grain as u64),
            (28, 1),
            (36, sectors(descriptor_len)),
            (48, if self.has_copy { sectors(places[0]) } else { 0 }),
            (56, sectors(places[1])),
            (64, sectors(overhead)),
        ] {
            put(&mut bytes, at, &number.to_le_bytes());
        }
        put(&mut bytes, 44, &(self.table_entries as u32).to_le_bytes());
        put(&mut bytes, 73, b"\n \r\n");
        bytes
    }
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..][..what.len()].copy_from_slice(what);
}

fn text(id: &str, line: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\n{id}\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n{line}\n"
    )
}

fn assert_reads(place: &Place, line: &str, judges: &[bool]) {
    for &ours in judges {
        let ended = if ours { place.run(line) } else { place.run_theirs(line) };
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{line}: {ended:?}");
    }
}

#[test]
fn sparse_extents_of_other_shapes_are_read_and_written() {
    let place = Place::new(true);
    let descriptor = text("CID=12345678", "RW 16384 SPARSE \"x.vmdk\"");
    let plain = Hosted {
        grain: 128,
        table_entries: 512,
        version: 1,
        flags: 3,
        has_copy: true,
        missing: &[],
        descriptor,
    };
    let zeroed =
        |grain, missing| Hosted { grain, version: 2, flags: 7, missing, ..plain_of(&plain) };
    for image in [
        Hosted { grain: 8, ..plain_of(&plain) },
        Hosted { grain: 1, has_copy: false, flags: 0, ..plain_of(&plain) },
        Hosted { grain: 16, table_entries: 128, ..plain_of(&plain) },
        Hosted { grain: 8, missing: &[1, 3], ..plain_of(&plain) },
        Hosted { grain: 4, has_copy: false, flags: 1, missing: &[0, 7], ..plain_of(&plain) },
        Hosted { grain: 2048, ..plain_of(&plain) },
        zeroed(8, &[]),
        zeroed(32, &[]),
    ] {
        let what = format!("grains of {}, version {}", image.grain, image.version);
        // The last grain that there can be, some at the beginning, and one of zeroes.
        let has_table = |number: usize| !image.missing.contains(&(number / image.table_entries));
        let last = (0..CAPACITY / image.grain).rev().find(|&number| has_table(number)).unwrap();
        let mut grains = vec![(last, 4)];
        grains.extend(
            [(0, 1), (2, 2)].into_iter().filter(|&(number, _)| has_table(number) && number < last),
        );
        if image.version == 2 {
            grains.push((1, 0));
        }
        std::fs::write(place.path().join("x.vmdk"), image.bytes(&grains)).unwrap();
        let of = |number: usize| number * image.grain * SECTOR;
        let mut read = "qemu-io -r -f vmdk -c 'read -v 4k 100'".to_owned();
        for &(number, value) in &grains {
            read += &format!(" -c 'read -P {value} {} {}'", of(number), image.grain * SECTOR);
        }
        assert_reads(&place, &format!("{read} x.vmdk"), &[true, false]);
        for line in [
            "qemu-img info --output=json x.vmdk",
            "qemu-img check x.vmdk",
            "qemu-img map --output=json x.vmdk",
        ] {
            let [ours, theirs] = [place.run(line), place.run_theirs(line)];
            assert_eq!(ours, theirs, "{what}: {line}");
        }
        let write = "qemu-io -f vmdk -c 'write -P 9 3M 1M' -c 'write -P 8 5000 3000' -c 'write -P 7 7M 1M' x.vmdk";
        assert_reads(&place, write, &[true]);
        let again = "qemu-io -r -f vmdk -c 'read -P 9 3M 1M' -c 'read -P 8 5000 3000' -c 'read -P 7 7M 1M' x.vmdk";
        assert_reads(&place, again, &[true, false]);
        assert_reads(&place, "qemu-img check x.vmdk", &[true, false]);
    }
}

fn plain_of(image: &Hosted) -> Hosted {
    Hosted { descriptor: image.descriptor.clone(), ..*image }
}

#[test]
fn descriptors_are_read_and_kept_as_people_and_programs_write_them() {
    let place = Place::new(true);
    fixture(place.path());
    let line = "RW 2048 FLAT \"a.raw\" 0";
    let usual = text("CID=0123abcd", line);
    let utf16 = |text: &str, mark: [u8; 2]| -> Vec<u8> {
        let units = text.encode_utf16();
        let bytes = units.flat_map(|unit| match mark {
            [0xff, _] => unit.to_le_bytes(),
            _ => unit.to_be_bytes(),
        });
        mark.into_iter().chain(bytes).collect()
    };
    for (what, bytes, is_written) in [
        ("CR LF", usual.replace('\n', "\r\n").into_bytes(), true),
        ("CR", usual.replace('\n', "\r").into_bytes(), true),
        ("a mark of its byte order", format!("\u{feff}{usual}").into_bytes(), true),
        ("spaces", usual.replace('=', " =\t ").replace("RW", "  RW").into_bytes(), true),
        (
            "capitals",
            usual.replace("createType", "CREATETYPE").replace("CID", "cid").into_bytes(),
            true,
        ),
        ("comments", usual.replace('\n', "\n# RW 5 FLAT \"no\" 0\n\n").into_bytes(), true),
        ("no end of its last line", usual.trim_end().as_bytes().to_vec(), true),
        ("few digits", usual.replace("0123abcd", "1").into_bytes(), true),
        ("UTF-16", utf16(&usual, [0xff, 0xfe]), false),
        ("UTF-16, the other way", utf16(&usual, [0xfe, 0xff]), false),
    ] {
        let path = place.path().join("x.vmdk");
        std::fs::write(&path, &bytes).unwrap();
        let info = place.run("qemu-img info --output=json x.vmdk");
        assert!(info.stdout.contains("\"virtual-size\": 1048576"), "{what}: {info:?}");
        assert_reads(&place, "qemu-img compare -f vmdk -F raw x.vmdk a.raw", &[true]);
        let written = place.run("qemu-io -f vmdk -c 'write -P 5 0 512' x.vmdk");
        let now = std::fs::read(&path).unwrap();
        if is_written {
            assert_eq!(written.code, Some(0), "{what}: {written:?}");
            // All but the digits stays.
            let differs = bytes.iter().zip(&now).filter(|(old, new)| old != new).count();
            let is_short = what == "few digits";
            assert!(now != bytes && (differs <= 8 || is_short), "{what}: {differs}");
            assert_reads(&place, "qemu-img compare -f vmdk -F raw x.vmdk a.raw", &[true]);
        } else {
            assert!(written.stderr.contains("UTF-16"), "{what}: {written:?}");
            assert!(now == bytes, "{what}");
        }
    }
}

/// What libyal's reader tells of an image.
fn vmdkinfo(place: &Place) -> String {
    let mut command = Command::new("vmdkinfo");
    let output = command.arg("x.vmdk").current_dir(place.path()).output();
    let output = output.expect("vmdkinfo (tests/setup.sh)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn another_reader_finds_in_new_images_and_rebased_ones_what_was_asked_for() {
    for (subformat, kind, extents) in [
        ("monolithicSparse", "Monolithic sparse", 1),
        ("monolithicFlat", "Monolithic flat", 1),
        ("twoGbMaxExtentSparse", "2GB extent sparse", 2),
        ("twoGbMaxExtentFlat", "2GB extent flat", 2),
        ("streamOptimized", "Stream optimized", 1),
    ] {
        let place = Place::new(true);
        let create = format!("qemu-img create -q -f vmdk -o subformat={subformat} x.vmdk 3G");
        assert_eq!(place.run(&create).code, Some(0));
        let before = vmdkinfo(&place);
        for wanted in [kind, "(3221225472 bytes)", &format!("Number of extents:\t\t{extents}\n")] {
            assert!(before.contains(wanted), "{subformat}: {wanted}: {before}");
        }
        assert_eq!(place.run("qemu-io -f vmdk -c 'write 0 64k' x.vmdk").code, Some(0));
        let id =
            |text: &str| text.lines().find(|line| line.contains("Content id")).map(str::to_owned);
        let after = vmdkinfo(&place);
        assert!(id(&before) != id(&after) && id(&after).is_some(), "{subformat}: {after}");
    }
    let place = Place::new(true);
    let long = "a-name-that-is-longer-than-the-first-one.vmdk";
    for line in [
        "qemu-img create -q -f vmdk p.vmdk 8M",
        &format!("qemu-img create -q -f vmdk {long} 8M"),
        "qemu-img create -q -f vmdk -F vmdk -b p.vmdk -o subformat=twoGbMaxExtentSparse x.vmdk",
        &format!("qemu-img rebase -u -f vmdk -F vmdk -b {long} x.vmdk"),
    ] {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    }
    let told = vmdkinfo(&place);
    assert!(told.contains(long) && !told.contains("p.vmdk\n"), "{told}");
}
