//! VHDX images: QEMU's, some damaged, read by both; ours, read by QEMU; and hand-made ones.
//!
//! The hand-made ones, made by the specification, have what QEMU does not write.
//!
//! QEMU 7.2 damages the block allocation table when it changes the first entry of a 4 KiB piece that has others already,
//! so what it is given to write begins with the first block.

mod log;

use super::{Ended, Place, assert_same, assert_same_contents, fixture};
use std::path::PathBuf;
use vublk::options::json;

/// Lines that read the image `x.vhdx`. QEMU's map takes all of it for data.
const READS: [&str; 9] = [
    "qemu-img info x.vhdx",
    "qemu-img info --output=json x.vhdx",
    "qemu-img info --backing-chain x.vhdx",
    "qemu-img check x.vhdx",
    "qemu-img check -f vhdx --output=json x.vhdx",
    "qemu-img snapshot -l x.vhdx",
    "qemu-img resize x.vhdx 20M",
    "qemu-img resize --preallocation=full x.vhdx 20M",
    "qemu-io -r -f vhdx -c 'read -v 1048570 20' -c 'read -P 1 0 10k' -c length x.vhdx",
];

/// Requests of qemu-io that leave something everywhere.
const WRITES: &str = "qemu-io -f vhdx -c 'write -P 1 0 10k' -c 'write -P 2 3M 1100k' -c 'write -z 512k 64k' \
                      -c 'write -P 3 4999k 512' x.vhdx";

/// A place with an image that QEMU has made and written to.
fn with_image(options: &str, size: &str) -> Place {
    let place = Place::new(true);
    fixture(place.path());
    for line in [&format!("qemu-img create -q -f vhdx {options} x.vhdx {size}"), WRITES] {
        let ended = place.run_theirs(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    }
    place
}

/// An image whose bytes are changed.
struct Bytes {
    path: PathBuf,
    bytes: Vec<u8>,
}

const HEADERS: [usize; 2] = [0x10000, 0x20000];
const TABLES: [usize; 2] = [0x30000, 0x40000];
/// In images with a log of 1 MiB.
const LOG: usize = 0x100000;
const BAT: usize = 0x200000;
const ITEMS: usize = 0x310000;

impl Bytes {
    fn of(place: &Place) -> Bytes {
        let path = place.path().join("x.vhdx");
        Bytes { bytes: std::fs::read(&path).unwrap(), path }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Bytes {
        self.bytes[at..][..bytes.len()].copy_from_slice(bytes);
        self
    }

    /// To the same place of both copies, which have the right checksums then.
    fn put_twice(&mut self, copies: [usize; 2], at: usize, bytes: &[u8]) -> &mut Bytes {
        let len = if copies == HEADERS { 4096 } else { 65536 };
        for copy in copies {
            self.put(copy + at, bytes).put(copy + 4, &[0; 4]);
            let checksum = crc32c::crc32c(&self.bytes[copy..][..len]);
            self.put(copy + 4, &checksum.to_le_bytes());
        }
        self
    }

    fn entry(&self, index: usize) -> u64 {
        u64::from_le_bytes(*self.bytes[BAT + 8 * index..].first_chunk().unwrap())
    }

    fn put_entry(&mut self, index: usize, entry: u64) -> &mut Bytes {
        self.put(BAT + 8 * index, &entry.to_le_bytes())
    }

    fn save(&self) {
        std::fs::write(&self.path, &self.bytes).unwrap();
    }
}

/// A fresh copy of the image in a place, changed.
fn changed(place: &Place, original: &Bytes, change: impl FnOnce(&mut Bytes)) -> Ended {
    let mut image = Bytes { path: original.path.clone(), bytes: original.bytes.clone() };
    change(&mut image);
    image.save();
    place.run("qemu-io -r -f vhdx -c 'read -P 1 0 10k' x.vhdx")
}

#[test]
fn images_of_every_kind_are_read_as_qemu_reads_them() {
    for (options, size) in [
        ("", "8M"),
        ("-o block_size=1M", "5001k"),
        ("-o block_size=1M,block_state_zero=off", "9M"),
        ("-o block_size=2M,log_size=3M", "9M"),
        ("-o subformat=fixed,block_state_zero=off", "9M"),
        ("-o subformat=fixed,block_size=1M", "5001k"),
        ("-o block_size=256M", "300M"),
    ] {
        assert_same(
            &[&format!("qemu-img create -q -f vhdx {options} x.vhdx {size}"), WRITES],
            &READS,
        );
        let place = with_image(options, size);
        for line in [
            "qemu-img convert -f vhdx -O raw x.vhdx out.raw",
            "qemu-img compare -f vhdx -F raw x.vhdx out.raw",
        ] {
            assert_eq!(place.run(line).code, Some(0), "{options}: {line}");
            assert_eq!(place.run_theirs("qemu-img compare x.vhdx out.raw").code, Some(0));
        }
    }
}

#[test]
fn a_disk_with_several_chunks_is_read_behind_the_entries_of_sector_bitmaps() {
    assert_same(
        &[
            "qemu-img create -q -f vhdx -o block_size=1M x.vhdx 9G",
            "qemu-io -f vhdx -c 'write -P 1 4095M 2M' -c 'write -P 2 8G 1M' -c 'write -P 3 9215M 1M' x.vhdx",
        ],
        &[
            "qemu-io -r -f vhdx -c 'read -P 1 4095M 2M' -c 'read -P 2 8G 1M' -c 'read -P 3 9215M 1M' x.vhdx",
            "qemu-img check -f vhdx x.vhdx",
        ],
    );
}

#[test]
fn what_is_written_is_what_qemu_reads() {
    for options in [
        "",
        "-o block_size=1M",
        "-o block_size=2M,block_state_zero=off,log_size=2M",
        "-o subformat=fixed,block_size=1M",
        "-o subformat=fixed,block_state_zero=off",
    ] {
        let create = format!("qemu-img create -q -f vhdx {options} x.vhdx 9000k");
        let lines = [
            "qemu-io -f vhdx -c 'write -P 1 0 10k' -c 'write -P 2 700k 70k' -c 'write -z 128k 64k' x.vhdx",
            "qemu-io -f vhdx -c 'write -P 3 5M 1M' -c 'write -z 5M 100k' -c 'write -P 4 130000 5' x.vhdx",
            "qemu-io -f vhdx -c 'write -z 0 1M' -c 'write -P 5 512 512' -c 'read -P 0 1024 512' x.vhdx",
            "qemu-io -f vhdx -c 'write -z 2M 3M' -c 'write -P 6 8999k 1k' -c 'write -z 8900k 100k' x.vhdx",
            "qemu-io -f vhdx -c 'write -P 7 1000k 7000k' -c 'read -P 7 1000k 7000k' x.vhdx",
        ];
        assert_same_contents("vhdx", &[&create], &lines);
        // Of the images that each makes itself.
        let all: Vec<&str> = [&*create].into_iter().chain(lines).collect();
        assert_same_contents("vhdx", &[], &all);
    }
    let base =
        ["qemu-img create -q -f raw b.img 20M", "qemu-io -f raw -c 'write -P 9 1M 12M' b.img"];
    for options in ["", "-o block_size=1M", "-o subformat=fixed"] {
        assert_same_contents(
            "vhdx",
            &base,
            &[
                &format!("qemu-img convert -f raw -O vhdx {options} b.img x.vhdx"),
                "qemu-img compare -f raw -F vhdx b.img x.vhdx",
            ],
        );
    }
}

#[test]
fn random_requests_leave_the_bytes_that_qemu_leaves() {
    let seed = crate::disks::seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    for options in
        ["block_size=1M", "block_size=1M,subformat=fixed,block_state_zero=off", "log_size=2M"]
    {
        let size = 6 << 20;
        let create = format!("qemu-img create -q -f vhdx -o {options} x.vhdx {size}");
        let mut lines = vec!["qemu-io -f vhdx -c 'write -P 255 0 512' x.vhdx".to_owned()];
        for run in 0..3 {
            let mut line = "qemu-io -f vhdx".to_owned();
            for n in 0..12 {
                let at = rng.u64(0..size - 512) / 512 * 512;
                let len = (rng.u64(1..2 << 20)).min(size - at).next_multiple_of(512).min(size - at);
                line += &match rng.u8(0..4) {
                    0 => format!(" -c 'write -z {at} {len}'"),
                    _ => format!(" -c 'write -P {} {at} {len}'", run * 20 + n + 1),
                };
            }
            lines.push(line + " x.vhdx");
        }
        let lines: Vec<&str> = lines.iter().map(|line| &**line).collect();
        println!("seed {seed}");
        assert_same_contents("vhdx", &[&create], &lines);
    }
}

#[test]
fn discarded_blocks_read_as_anything_but_the_others_stay() {
    for options in ["-o block_size=1M", "-o subformat=fixed,block_size=1M"] {
        let place = Place::new(true);
        for line in [
            &format!("qemu-img create -q -f vhdx {options} x.vhdx 5M"),
            "qemu-io -f vhdx -d unmap -c 'write -P 1 0 5M' -c 'discard 1M 2M' -c 'write -P 2 2M 64k' x.vhdx",
            "qemu-io -f vhdx -c 'read -P 1 0 1M' -c 'read -P 2 2M 64k' -c 'read -P 1 3M 2M' x.vhdx",
        ] {
            let ended = place.run(line);
            let is_right = ended.code == Some(0) && !ended.stdout.contains("failed");
            assert!(is_right, "{options}: {line}: {ended:?}");
        }
        let read = "qemu-io -r -f vhdx -c 'read -P 1 0 1M' -c 'read -P 2 2M 64k' -c 'read -P 1 3M 2M' x.vhdx";
        assert_eq!(place.run_theirs(read).code, Some(0), "{options}");
        assert_eq!(place.run_theirs("qemu-img check -f vhdx x.vhdx").code, Some(0), "{options}");
    }
}

#[test]
fn new_images_say_what_those_of_qemu_say() {
    let mut lines = Vec::new();
    for options in [
        "",
        "-o block_size=1M",
        "-o block_size=512k",
        "-o block_size=1500k",
        "-o block_size=512M",
        "-o log_size=1",
        "-o log_size=3000000",
        "-o subformat=dynamic",
        "-o subformat=fixed",
        "-o subformat=fixed,block_state_zero=off",
        "-o block_state_zero=on",
    ] {
        lines.push(format!("qemu-img create -f vhdx {options} x.vhdx 5000"));
    }
    for size in ["1G", "1073742336", "100G", "101G", "32T", "33T", "64T"] {
        lines.push(format!("qemu-img create -f vhdx x.vhdx {size}"));
    }
    for line in lines {
        let reported = [true, false].map(|ours| {
            let place = Place::new(ours);
            let made = place.run(&line);
            // Each is read by the other.
            let info = match ours {
                true => place.run_theirs("qemu-img info --output=json x.vhdx"),
                false => Place::run(&place, "qemu-img info --output=json x.vhdx"),
            };
            let text = info.stdout.lines().filter(|line| !line.contains("actual-size"));
            (made, info.code, text.collect::<Vec<_>>().join("\n"))
        });
        assert_eq!(reported[0], reported[1], "{line}");
    }
    assert_same(
        &[],
        &[
            "qemu-img create -f vhdx -o help",
            "qemu-img measure -O vhdx --size 1M",
            "qemu-img create -f vhdx -o encryption=on x.vhdx 1M",
        ],
    );
    // QEMU leaves a file where the options make no sense.
    let place = Place::new(true);
    for (options, wanted) in [
        ("block_size=3M", "Block size must be a power of two"),
        ("log_size=0", "Log size must be a multiple of 1 MB"),
        ("log_size=4G", "Log size must be smaller than 4 GB"),
        ("subformat=foo", "Parameter 'subformat' does not accept value 'foo'"),
        ("size=65T", "Image size too large; max of 64TB"),
    ] {
        let size = if options.contains("size=65T") { "" } else { "1M" };
        let line = format!("qemu-img create -q -f vhdx -o {options} n.vhdx {size}");
        let ended = place.run(&line);
        assert_eq!(ended.stderr, format!("qemu-img: n.vhdx: {wanted}\n"), "{options}");
        assert_eq!(place.run_theirs(&line).stderr, ended.stderr, "{options}");
        let _ = std::fs::remove_file(place.path().join("n.vhdx"));
    }
}

#[derive(Clone, Copy)]
enum Part {
    Plain,
    Header,
    Table,
}

#[test]
fn what_makes_no_sense_is_refused_with_its_name() {
    let place = with_image("-o block_size=1M", "8M");
    let original = Bytes::of(&place);
    // Where, and what: both headers and both region tables with the right checksums, or plain bytes.
    let cases: &[(Part, usize, &[u8], &str)] = &[
        (Part::Plain, 0, b"x", "not in VHDX format"),
        (Part::Header, 0, b"x", "No valid VHDX header found: the first has no signature"),
        (Part::Header, 66, &[2], "not of version 1"),
        (Part::Header, 64, &[2], "log version 2"),
        (Part::Header, 73, &[2], "log offset 0x100200"),
        (Part::Header, 68, &[2], "log length 0x100002"),
        (Part::Table, 0, b"x", "No valid VHDX region table"),
        (Part::Table, 8, &[1], "there is no metadata region"),
        (Part::Table, 9, &[16], "4098 entries"),
        (Part::Table, 16, b"x", "there is no block allocation table"),
        (Part::Table, 34, &[0x30], "overlap"),
        (Part::Table, 34, &[0x10], "overlaps the log"),
        (Part::Plain, 0x300000, b"x", "the table has no signature"),
        (Part::Plain, 0x300020, b"x", "required and unknown"),
        (Part::Plain, 0x30000a, &[4], "no physical sector size"),
        (Part::Plain, ITEMS, &[1], "block size 0x100001"),
        (Part::Plain, ITEMS + 3, &[0x20], "block size 0x20100000"),
        (Part::Plain, ITEMS + 8, &[1], "virtual disk size 0x800001"),
        (Part::Plain, ITEMS + 15, &[1], "virtual disk size 0x100000000800000"),
        (Part::Plain, ITEMS + 13, &[1], "block allocation table"),
        (Part::Plain, ITEMS + 33, &[1], "logical sector size 256"),
        (Part::Plain, ITEMS + 37, &[8], "physical sector size 2048"),
    ];
    for &(part, at, bytes, wanted) in cases {
        let change = |image: &mut Bytes| {
            match part {
                Part::Plain => image.put(at, bytes),
                Part::Header => image.put_twice(HEADERS, at, bytes),
                Part::Table => image.put_twice(TABLES, at, bytes),
            };
        };
        let ended = changed(&place, &original, change);
        let is_named = ended.stderr.contains(wanted) && ended.stderr.lines().count() == 1;
        assert!(ended.code == Some(1) && is_named, "{wanted}: {ended:?}");
    }
    // One copy of each is enough.
    let ended = changed(&place, &original, |image| {
        image.put(HEADERS[0], b"x").put(TABLES[0], b"x");
    });
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let ended = changed(&place, &original, |image| {
        let entry =
            [b"abcdefghijklmnop", &[0, 0, 0x60, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0][..]];
        image.put_twice(TABLES, 80, &entry.concat()).put_twice(TABLES, 8, &[3]);
    });
    assert_eq!(ended.code, Some(0), "a region that is not required: {ended:?}");
}

#[test]
fn every_state_of_a_block_is_read_as_the_specification_says() {
    let place = with_image("-o block_size=1M", "8M");
    let original = Bytes::of(&place);
    let first = original.entry(0);
    for state in [1, 2, 3, 5] {
        for place_of in [0, first & !0xfffff] {
            let ended = changed(&place, &original, |image| {
                image.put_entry(0, place_of | state);
            });
            assert!(ended.stdout.contains("Pattern verification failed"), "{state}: {ended:?}");
            let read = "qemu-io -r -f vhdx -c 'read -P 0 0 1M' -c 'read -P 2 3M 1M' x.vhdx";
            for ended in [place.run(read), place.run_theirs(read)] {
                assert!(ended.code == Some(0), "{state}: {ended:?}");
            }
            // A write makes a block of it.
            let write = "qemu-io -f vhdx -c 'write -P 4 4k 512' -c 'read -P 0 0 4k' x.vhdx";
            assert_eq!(place.run(write).code, Some(0), "{state}");
            let read = "qemu-io -r -f vhdx -c 'read -P 4 4k 512' -c 'read -P 0 8k 1000k' x.vhdx";
            assert_eq!(place.run_theirs(read).code, Some(0), "{state}");
        }
    }
    let file_mib = original.bytes.len() as u64 >> 20;
    for (entry, what) in [
        (first & !7 | 4, "state 4"),
        (first & !7 | 7, "state 7"),
        (6, "over metadata"),
        (1 << 20 | 6, "over metadata"),
        (2 << 20 | 6, "over metadata"),
        (3 << 20 | 6, "over metadata"),
        (file_mib << 20 | 6, "after end of file"),
        (u64::MAX << 20 | 6, "after end of file"),
        (original.entry(3), "that of another block"),
    ] {
        let ended = changed(&place, &original, |image| {
            image.put_entry(0, entry);
        });
        if !what.contains("another") {
            let is_failed = ended.stdout.contains("failed: Input/output error");
            assert!(ended.code == Some(1) && is_failed, "{what}: {ended:?}");
        }
        let checked = place.run("qemu-img check -f vhdx x.vhdx");
        assert!(checked.code == Some(2) && checked.stderr.contains(what), "{what}: {checked:?}");
        // Others are read all the same.
        let read = place.run("qemu-io -r -f vhdx -c 'read -P 2 3M 1M' x.vhdx");
        assert_eq!(read.code, Some(0), "{what}: {read:?}");
    }
}

#[test]
fn a_chunk_of_an_image_with_large_sectors_has_more_blocks() {
    for (sector, index) in [(512u32, 4097), (4096, 4096)] {
        let place = Place::new(true);
        let create = "qemu-img create -q -f vhdx -o block_size=1M x.vhdx 6G";
        assert_eq!(place.run(create).code, Some(0));
        let mut image = Bytes::of(&place);
        image.put(ITEMS + 32, &sector.to_le_bytes());
        // Entries of sector bitmaps say nothing.
        image.put_entry(4096, if sector == 512 { 0 } else { 2 });
        image.save();
        let write = "qemu-io -f vhdx -c 'write -P 1 4G 64k' -c 'write -P 2 4095M 64k' x.vhdx";
        assert_eq!(place.run(write).code, Some(0));
        let image = Bytes::of(&place);
        assert_eq!((image.entry(4095) & 7, image.entry(index) & 7), (6, 6), "{sector}");
        let read = "qemu-io -r -f vhdx -c 'read -P 1 4G 64k' -c 'read -P 2 4095M 64k' x.vhdx";
        assert_eq!(place.run(read).code, Some(0));
        let info = place.run("qemu-img info --output=json x.vhdx");
        assert!(json::parse(&info.stdout).is_ok(), "{info:?}");
    }
}

#[test]
fn each_opening_that_writes_changes_the_guids_and_the_header_in_turns() {
    let place = with_image("-o block_size=1M", "8M");
    let field = |image: &Bytes, n: usize, at: usize, len: usize| {
        image.bytes[HEADERS[n] + at..][..len].to_vec()
    };
    let current = |image: &Bytes| {
        let sequence =
            |n| u64::from_le_bytes(*image.bytes[HEADERS[n] + 8..].first_chunk().unwrap());
        usize::from(sequence(1) > sequence(0))
    };
    let before = Bytes::of(&place);
    assert_eq!(place.run("qemu-io -f vhdx -c 'read 0 512' x.vhdx").code, Some(0));
    assert!(Bytes::of(&place).bytes == before.bytes, "reading changes nothing");
    // Over what is there: no entry changes, and the log is not used.
    assert_eq!(place.run("qemu-io -f vhdx -c 'write -P 9 0 512' x.vhdx").code, Some(0));
    let after = Bytes::of(&place);
    let (old, new) = (current(&before), current(&after));
    assert_ne!(old, new, "the other header was written");
    for at in [16, 32] {
        assert_ne!(field(&before, old, at, 16), field(&after, new, at, 16));
    }
    assert_eq!(field(&after, old, 0, 4096), field(&before, old, 0, 4096));
    assert_eq!(field(&after, new, 48, 16), [0; 16], "the log is empty");
    // With an allocation.
    assert_eq!(place.run("qemu-io -f vhdx -c 'write -P 9 6M 512' x.vhdx").code, Some(0));
    let after = Bytes::of(&place);
    assert_eq!(field(&after, current(&after), 48, 16), [0; 16], "the log is empty again");
    assert_eq!(place.run_theirs("qemu-io -r -f vhdx -c 'read -P 9 6M 512' x.vhdx").code, Some(0));
}
