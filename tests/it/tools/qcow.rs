//! qcow images (version 1), made, written and read by both programs.

use super::{Place, assert_same, fixture};

/// Lines that read the image `x.qcow`.
const READS: [&str; 14] = [
    "qemu-img info x.qcow",
    "qemu-img info --output=json x.qcow",
    "qemu-img info --backing-chain x.qcow",
    "qemu-img map x.qcow",
    "qemu-img map --output=json x.qcow",
    "qemu-img check x.qcow",
    "qemu-img check -f qcow --output=json x.qcow",
    "qemu-img convert -f qcow -O raw x.qcow out.raw",
    "qemu-img convert -O raw x.qcow out.raw && qemu-img compare out.raw x.qcow",
    "qemu-img measure -O qcow2 x.qcow",
    "qemu-img snapshot -l x.qcow",
    "qemu-img dd -f qcow -O raw bs=1000 skip=1 count=99 if=x.qcow of=out.raw",
    "qemu-io -r -c 'read -v 4090 20' -c 'map' -c 'alloc 0 1M' x.qcow",
    "qemu-img create -q -f qcow2 -b x.qcow -F qcow over.qcow2 && qemu-img map over.qcow2",
];

/// Clusters of both kinds, packed ones among them.
const WRITES: &str = "qemu-io -f qcow -c 'write -P 1 0 10k' -c 'write -P 2 700k 70k' -c 'write -z 128k 64k' \
     -c 'write -c -P 3 800k 4k' -c 'write -c -P 4 900k 4k' -c 'write -P 5 810k 512' x.qcow";

#[test]
fn images_of_every_shape_are_read_as_qemu_reads_them() {
    for size in ["4M", "1000k", "5001k"] {
        let create = format!("qemu-img create -q -f qcow x.qcow {size}");
        assert_same(&[&create, WRITES], &READS);
    }
}

#[test]
fn chains_of_images_are_read_as_qemu_reads_them() {
    for (below, format) in
        [("-f raw b.img", "raw"), ("-f qcow2 b.img", "qcow2"), ("-f qcow b.img", "qcow")]
    {
        let prepare = [
            format!("qemu-img create -q {below} 2M"),
            format!("qemu-io -f {format} -c 'write -P 9 0 1M' -c 'write -P 8 1536k 1k' b.img"),
            format!("qemu-img create -q -f qcow -b b.img -F {format} x.qcow 4M"),
            "qemu-io -f qcow -c 'write -P 1 4k 10k' -c 'write -c -P 2 512k 512' -c 'write -P 3 3M 1k' x.qcow"
                .to_owned(),
        ];
        assert_same(&prepare.each_ref().map(|line| &**line), &READS);
    }
}

/// Changes of single bytes of an image, as qemu-io makes them.
fn bytes(changes: &[(u64, u8)]) -> String {
    let writes = changes.iter().map(|(at, byte)| format!("-c 'write -P {byte} {at} 1' "));
    format!("qemu-io -f raw {}x.qcow", writes.collect::<String>())
}

#[test]
fn headers_that_make_no_sense_are_refused_in_qemus_words() {
    let lines = [
        "qemu-img info -f qcow x.qcow",
        "qemu-img check -f qcow x.qcow",
        "qemu-io -r -f qcow -c 'read 0 512' x.qcow",
    ];
    for changes in [
        &[(0, 0)][..],
        &[(4, 1)],
        &[(7, 0)],
        &[(7, 2)],
        &[(7, 3)],
        &[(24, 255)],
        &[(25, 255)],
        &[(29, 0), (30, 0), (31, 1)],
        &[(31, 1)],
        &[(32, 8)],
        &[(32, 17)],
        &[(33, 5)],
        &[(33, 14)],
        &[(36, 1)],
        &[(39, 2)],
        &[(15, 48), (18, 4)],
        &[(15, 48)],
        &[(20, 1), (34, 1)],
    ] {
        assert_same(&["qemu-img create -q -f qcow x.qcow 1M", &bytes(changes)], &lines);
    }
    for (changes, wanted) in [
        (&[(39, 1)][..], "Encrypted qcow images are not supported"),
        (&[(47, 4)], "The L1 table begins at 0x4, in the header"),
        (
            &[(40, 1)],
            "The L1 table begins at 0x100000000000030 and has 0x8 bytes, but the file ends at 0x400",
        ),
    ] {
        let place = Place::new(true);
        fixture(place.path());
        for line in ["qemu-img create -q -f qcow x.qcow 1M", &bytes(changes)] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let ended = place.run("qemu-img info -f qcow x.qcow");
        assert_eq!(ended.stderr, format!("qemu-img: Could not open 'x.qcow': {wanted}\n"));
    }
}

#[test]
fn tables_that_make_no_sense_cost_their_reader_an_error_and_nobody_elses_data() {
    // The L1 table is at 48, the L2 table at 4 KiB, the data from 8 KiB on.
    for (changes, reads) in [
        // The middle of a sector, the header, a table behind the end, in the header and far off.
        (&[(0x1007, 1)][..], false),
        (&[(0x1006, 0), (0x1007, 0x30)], false),
        (
            &[
                (0x1000, 0x7f),
                (0x1001, 255),
                (0x1002, 255),
                (0x1003, 255),
                (0x1004, 255),
                (0x1005, 255),
                (0x1006, 254),
            ],
            false,
        ),
        (&[(0x1000, 0x80)], false),
        (&[(50, 1)], false),
        (&[(54, 0), (55, 8)], false),
        (&[(48, 128)], false),
        // What is behind the end of the file reads as zeroes.
        (&[(0x1004, 1)], true),
    ] {
        let place = Place::new(true);
        fixture(place.path());
        for line in [
            "qemu-img create -q -f qcow x.qcow 1M",
            "qemu-io -f qcow -c 'write -P 1 0 16k' x.qcow",
            &bytes(changes),
        ] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let read = place.run("qemu-io -r -f qcow -c 'read -P 0 0 4k' x.qcow");
        assert_eq!(read.code, Some(i32::from(!reads)), "{changes:?}: {read:?}");
        if !reads {
            assert!(read.stdout.contains("read failed: Input/output error"), "{read:?}");
            continue;
        }
        // It is written elsewhere: another cluster may have been given the place.
        let written = place.run("qemu-io -f qcow -c 'write -P 7 0 1k' -c 'read -P 0 1k 3k' x.qcow");
        assert_eq!(written.code, Some(0), "{written:?}");
        let read = "qemu-io -r -f qcow -c 'read -P 7 0 1k' -c 'read -P 1 4k 12k' x.qcow";
        let read = place.run_theirs(read);
        assert_eq!(read.code, Some(0), "{read:?}");
        assert!(std::fs::metadata(place.path().join("x.qcow")).unwrap().len() < 1 << 16);
    }
}

#[test]
fn new_images_are_what_qemu_makes() {
    assert_same(
        &["qemu-img create -q -f raw b.img 3M"],
        &[
            "qemu-img create -f qcow x.qcow 5M",
            "qemu-img create -f qcow x.qcow 1000",
            "qemu-img create -f qcow x.qcow 1",
            "qemu-img create -f qcow x.qcow 70G",
            "qemu-img create -f qcow -b b.img -F raw x.qcow",
            "qemu-img create -f qcow -b b.img -F raw x.qcow 7M",
            "qemu-img create -f qcow -u -b a_longer_name_of_a_file.img -F raw x.qcow 7M",
            "qemu-img create -f qcow -o help",
            "qemu-img create -f qcow -o cluster_size=4k x.qcow 1M",
            "qemu-img create -q -f qcow -o encryption=off x.qcow 1M",
            "qemu-img measure -O qcow --size 1M",
            "qemu-img create -q -f qcow x.qcow 1M && qemu-img resize x.qcow 2M",
            "qemu-img create -q -f qcow x.qcow 1M && qemu-img amend -f qcow -o size=2M x.qcow",
            "qemu-img create -q -f qcow x.qcow 1M && qemu-img snapshot -c a x.qcow",
        ],
    );
    // QEMU leaves an empty file where the options make no sense.
    let place = Place::new(true);
    fixture(place.path());
    let no_encryption = "Encryption of qcow images is not supported";
    for (options, size, wanted) in [
        ("", "0", "Image size is too small, cannot be zero length"),
        ("", "17T", "Image too large"),
        ("-o encryption=on", "1M", no_encryption),
        ("-o encrypt.format=aes,encrypt.key-secret=s", "1M", no_encryption),
    ] {
        let ended = place.run(&format!("qemu-img create -q -f qcow {options} n.qcow {size}"));
        assert_eq!(ended.stderr, format!("qemu-img: n.qcow: {wanted}\n"), "{options} {size}");
        assert!(!place.path().join("n.qcow").exists(), "{options} {size}");
    }
}

/// Runs the lines with our tools and with QEMU's; QEMU then finds the same bytes, information and map.
fn assert_same_contents(prepare: &[&str], lines: &[&str]) {
    let mut contents = Vec::new();
    for ours in [true, false] {
        let place = Place::new(ours);
        fixture(place.path());
        for line in prepare {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let ended: Vec<_> = lines.iter().map(|line| place.run(line)).collect();
        let copied = place.run_theirs("qemu-img convert -f qcow -O raw x.qcow all.raw");
        assert_eq!(copied.code, Some(0), "ours: {ours}: {copied:?}");
        let shown = |line: &str, without: &str| {
            let ended = place.run_theirs(line);
            let parts = |line: &str| line.split(without).next().unwrap_or_default().to_owned();
            ended.stdout.lines().map(parts).collect::<Vec<_>>().join("\n")
        };
        let info = shown("qemu-img info -f qcow --output=json x.qcow", "actual-size");
        let map = shown("qemu-img map -f qcow --output=json x.qcow", ", \"offset\"");
        let bytes = std::fs::read(place.path().join("all.raw")).unwrap();
        contents.push((ended, info, merged(&map), bytes));
    }
    assert_eq!(contents[0].0, contents[1].0);
    assert_eq!(contents[0].1, contents[1].1);
    assert_eq!(contents[0].2, contents[1].2);
    assert!(contents[0].3 == contents[1].3, "{lines:?}: other bytes");
}

/// The extents of a map without where they are: those that are alike and side by side as one.
fn merged(map: &str) -> Vec<(u64, String)> {
    let mut all: Vec<(u64, String)> = Vec::new();
    for line in map.lines() {
        let number = |key: &str| {
            let at = line.find(key).map_or(0, |at| at + key.len());
            let digits = line[at..].trim_start_matches([':', ' ']);
            let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
            digits[..end].parse::<u64>().unwrap_or(0)
        };
        let kind = line[line.find("\"depth\"").unwrap_or(0)..].trim_end_matches(['}', ',', ']']);
        // What the other image has of it depends on how it was copied.
        let kind = if kind.starts_with("\"depth\": 0") { kind } else { "below" };
        let end = number("\"start\"") + number("\"length\"");
        match all.last_mut() {
            Some((last, same)) if same == kind => *last = end,
            _ => all.push((end, kind.to_owned())),
        }
    }
    all
}

#[test]
fn what_is_written_is_what_qemu_reads() {
    assert_same_contents(
        &["qemu-img create -q -f qcow x.qcow 6M"],
        &[
            "qemu-io -f qcow -c 'write -P 1 0 10k' -c 'write -P 2 700k 70k' -c 'write -z 128k 64k' x.qcow",
            "qemu-io -f qcow -c 'write -P 3 5M 1M' -c 'write -z 5M 100k' -c 'write -P 4 130000 5' x.qcow",
            "qemu-io -f qcow -c 'write -z -u 0 1M' -c 'write -P 5 512 512' -c 'read -P 0 1024 512' x.qcow",
            "qemu-io -f qcow -c 'discard 5M 512k' -c 'write -P 6 5M 512k' x.qcow",
            "qemu-io -f qcow -c 'write -c -P 7 2M 4k' -c 'write -c -P 8 2052k 4k' -c 'read -P 8 2052k 4k' x.qcow",
            "qemu-io -f qcow -c 'write -P 9 2050k 3k' -c 'write -P 1 3M 1k' x.qcow",
        ],
    );
    let base = ["qemu-img create -q -f raw b.img 2M", "qemu-io -f raw -c 'write -P 9 0 2M' b.img"];
    let over = "qemu-img create -q -f qcow -b b.img -F raw x.qcow 4M";
    assert_same_contents(
        &[base[0], base[1], over],
        &[
            "qemu-io -f qcow -c 'write -P 1 4k 10k' -c 'write -z 512k 64k' -c 'write -z 700k 1k' x.qcow",
            "qemu-io -f qcow -c 'write -P 2 2097100 1000' -c 'write -P 3 3M 1k' -c 'write -c -P 4 1M 512' x.qcow",
            "qemu-io -f qcow -c 'write -P 5 1048700 10' -c 'discard 0 1M' x.qcow",
        ],
    );
    let more = "qemu-io -f raw -c 'write -P 3 5000 70k' -c 'write -z 1M 500k' b.img";
    for convert in ["-O qcow", "-S 0 -O qcow"] {
        assert_same_contents(
            &[base[0], base[1], more],
            &[
                &format!("qemu-img convert -f raw {convert} b.img x.qcow"),
                "qemu-img compare -f raw -F qcow b.img x.qcow",
            ],
        );
    }
}

#[test]
fn a_disk_is_converted_to_packed_clusters_at_which_qemu_fails() {
    for (disk, convert) in [
        ("longer.raw", "-c -O qcow"),
        ("longer.raw", "-c -W -m 16 -O qcow"),
        ("odd.raw", "-c -O qcow"),
        ("a.raw", "-c -S 0 -O qcow"),
    ] {
        let place = Place::new(true);
        fixture(place.path());
        let ended = place.run(&format!("qemu-img convert -f raw {convert} {disk} x.qcow"));
        assert_eq!(ended.code, Some(0), "{convert}: {ended:?}");
        let compared = place.run_theirs(&format!("qemu-img compare -f raw -F qcow {disk} x.qcow"));
        assert_eq!(compared.code, Some(0), "{convert}: {compared:?}");
        let len = std::fs::metadata(place.path().join("x.qcow")).unwrap().len();
        assert!(len < 40 << 10, "{convert}: {len} bytes");
    }
}

#[test]
fn a_commit_empties_the_image() {
    let base = "qemu-img create -q -f raw b.img 2M";
    assert_same_contents(
        &[base, "qemu-img create -q -f qcow -b b.img -F raw x.qcow 2M"],
        &[
            "qemu-io -f qcow -c 'write -P 1 4k 1000k' -c 'write -c -P 2 1536k 512' x.qcow",
            "qemu-img commit -q x.qcow",
            "qemu-io -r -f qcow -c 'read -P 1 4k 1000k' -c 'read -P 2 1536k 512' x.qcow",
            "qemu-io -f qcow -c 'write -P 3 0 100k' x.qcow",
            "qemu-img commit -q -d x.qcow",
        ],
    );
    let place = Place::new(true);
    fixture(place.path());
    for line in [base, "qemu-img create -q -f qcow -b b.img -F raw x.qcow 2M"] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let len = || std::fs::metadata(place.path().join("x.qcow")).unwrap().len();
    for line in ["qemu-io -f qcow -c 'write -P 1 4k 1000k' x.qcow", "qemu-img commit -q x.qcow"] {
        assert_eq!(place.run(line).code, Some(0), "{line}");
    }
    assert!(len() <= 1024, "{} bytes are left", len());
}

#[test]
fn another_backing_file_is_recorded_which_qemu_cannot() {
    let place = Place::new(true);
    fixture(place.path());
    let long = format!("{}b.img", "./".repeat(400));
    for line in [
        "qemu-img create -q -f raw b.img 2M",
        "qemu-io -f raw -c 'write -P 9 0 2M' b.img",
        "qemu-img create -q -f qcow -b b.img -F raw x.qcow 2M",
        "qemu-io -f qcow -c 'write -P 1 4k 10k' x.qcow",
    ] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let reads = "qemu-io -r -f qcow -c 'read -P 9 0 4k' -c 'read -P 1 4k 10k' -c 'read -P 9 14k 2034k' x.qcow";
    for (line, name) in [
        (format!("qemu-img rebase -u -b {long} -F raw x.qcow"), Some(&*long)),
        ("qemu-img rebase -u -b b.img -F raw x.qcow".to_owned(), Some("b.img")),
        ("qemu-img rebase -f qcow -b '' x.qcow".to_owned(), None),
    ] {
        let ended = place.run(&line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
        let info = place.run_theirs("qemu-img info -f qcow x.qcow").stdout;
        let shown = info.lines().find_map(|line| line.strip_prefix("backing file: "));
        let shown = shown.map(|shown| shown.split(" (").next().unwrap());
        assert_eq!(shown, name, "{line}");
        let read = place.run_theirs(reads);
        assert_eq!((read.code, read.stdout.contains("failed")), (Some(0), false), "{line}");
    }
    let ended = place.run(&format!("qemu-img rebase -u -b {} -F raw x.qcow", "a".repeat(1024)));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("Backing file name too long"), "{ended:?}");
}
