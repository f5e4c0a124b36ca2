//! VDI images of QEMU, some damaged, read by both; and images written here, checked by QEMU.

use super::{Place, assert_same, assert_same_contents, fixture};

/// Lines that read the image `x.vdi`.
const READS: [&str; 11] = [
    "qemu-img info x.vdi",
    "qemu-img info --output=json x.vdi",
    "qemu-img map x.vdi",
    "qemu-img map --output=json x.vdi",
    "qemu-img check x.vdi",
    "qemu-img check -f vdi --output=json x.vdi",
    "qemu-img convert -O raw x.vdi out.raw",
    "qemu-img convert -f vdi -O raw x.vdi out.raw && qemu-img compare out.raw x.vdi",
    "qemu-img measure -O qcow2 x.vdi",
    "qemu-img dd -f vdi -O raw bs=1000 skip=1 count=99 if=x.vdi of=out.raw",
    "qemu-io -r -c 'read -v 1048570 20' -c 'map' -c 'alloc 0 5M' x.vdi",
];

#[test]
fn images_of_both_kinds_are_read_as_qemu_reads_them() {
    for (options, size) in [("", "6M"), ("", "5001k"), ("-o static=on", "6M"), ("", "3G")] {
        // Copies of a static image are compared below: holes of its file are across pages of the copy's, of which one
        // program stores a few more than the other.
        let is_static = options.contains("static");
        let reads = READS.iter().filter(|line| !is_static || !line.contains("convert"));
        assert_same(
            &[
                &format!("qemu-img create -q -f vdi {options} x.vdi {size}"),
                "qemu-io -f vdi -c 'write -P 1 3M 10k' -c 'write -P 2 1M 1100k' -c 'write -P 3 4900k 512' \
                 -c 'write -z 0 64k' x.vdi",
            ],
            &reads.copied().collect::<Vec<_>>(),
        );
    }
    let place = Place::new(true);
    fixture(place.path());
    for line in [
        "qemu-img create -q -f vdi -o static=on x.vdi 6M",
        "qemu-io -f vdi -c 'write -P 1 3M 10k' -c 'write -P 2 1M 1100k' x.vdi",
    ] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    assert_eq!(place.run("qemu-img convert -f vdi -O raw x.vdi out.raw").code, Some(0));
    assert_eq!(place.run_theirs("qemu-img compare -f vdi -F raw x.vdi out.raw").code, Some(0));
}

/// Changes of single bytes of an image, as qemu-io makes them.
fn bytes(changes: &[(u64, u8)]) -> String {
    let writes = changes.iter().map(|(at, byte)| format!("-c 'write -P {byte} {at} 1' "));
    format!("qemu-io -f raw {}x.vdi", writes.collect::<String>())
}

#[test]
fn headers_that_make_no_sense_are_refused_in_qemus_words() {
    for changes in [
        &[(0x40, 0)][..],
        &[(0x44, 2)],
        &[(0x48, 0)],
        &[(0x4c, 4)],
        &[(0x4c, 2)],
        &[(0x50, 1)],
        &[(0x154, 1)],
        &[(0x158, 1)],
        &[(0x159, 2)],
        &[(0x169, 4)],
        &[(0x170, 1)],
        &[(0x171, 2)],
        &[(0x172, 64)],
        &[(0x177, 1)],
        &[(0x17a, 32)],
        &[(0x17c, 1)],
        &[(0x180, 4)],
        &[(0x183, 32)],
        &[(0x198, 1)],
        &[(0x1a8, 1)],
        &[(0x1c7, 1)],
    ] {
        assert_same(
            &["qemu-img create -q -f vdi x.vdi 5M", &bytes(changes)],
            &[
                "qemu-img info -f vdi x.vdi",
                "qemu-img check -f vdi x.vdi",
                "qemu-io -r -f vdi -c 'read 0 512' x.vdi",
            ],
        );
    }
}

#[test]
fn maps_that_make_no_sense_are_found() {
    for changes in [
        &[(0x184, 1)][..],
        &[(0x204, 0)],
        &[(0x204, 2)],
        &[(0x20c, 1), (0x208, 1)],
        &[(0x204, 7)],
        &[(0x207, 1)],
        &[(0x204, 254), (0x205, 255), (0x206, 255), (0x207, 255)],
        &[(0x204, 4)],
    ] {
        assert_same(
            &[
                "qemu-img create -q -f vdi x.vdi 5M",
                "qemu-io -f vdi -c 'write -P 1 0 2M' -c 'write -P 2 3M 1k' x.vdi",
                &bytes(changes),
            ],
            &[
                "qemu-img check -f vdi x.vdi",
                "qemu-img check -f vdi --output=json x.vdi",
                "qemu-img convert -f vdi -O raw x.vdi out.raw",
            ],
        );
    }
}

#[test]
fn an_image_whose_map_is_cut_off_is_refused() {
    let place = Place::new(true);
    fixture(place.path());
    let cut = "qemu-img resize -q --shrink -f raw x.vdi 512";
    for line in ["qemu-img create -q -f vdi x.vdi 5M", cut] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let ended = place.run("qemu-img info -f vdi x.vdi");
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("The VDI block map ends at 0x214"), "{ended:?}");
}

/// Where the blocks of an image begin in its file, its bytes before them, without the text for people, the identifiers and
/// that place, and how long the file is behind them.
fn parts_of(place: &Place, name: &str) -> (usize, Vec<u8>, usize) {
    let mut bytes = std::fs::read(place.path().join(name)).unwrap();
    let data = u32::from_le_bytes(*bytes[0x158..].first_chunk().unwrap()) as usize;
    let behind = bytes.split_off(data);
    assert!(behind.iter().all(|&byte| byte == 0));
    let map = u32::from_le_bytes(*bytes[0x180..].first_chunk().unwrap()) as usize * 4;
    assert!(bytes.split_off(512 + map).iter().all(|&byte| byte == 0));
    bytes[..64].fill(0);
    bytes[0x158..0x15c].fill(0);
    bytes[0x188..0x1a8].fill(0);
    (data, bytes, behind.len())
}

#[test]
fn new_images_are_what_qemu_makes() {
    for line in [
        "qemu-img create -f vdi x.vdi 5M",
        "qemu-img create -f vdi -o static=on x.vdi 5M",
        "qemu-img create -f vdi x.vdi 0",
        "qemu-img create -f vdi x.vdi 1000",
        "qemu-img create -f vdi x.vdi 3T",
        "qemu-img create -f vdi -o static=off,preallocation=falloc x.vdi 2M",
    ] {
        let [ours, theirs] = [true, false].map(Place::new);
        assert_eq!(ours.run(line), theirs.run(line), "{line}");
        let [(data, head, len), (_, their_head, their_len)] =
            [&ours, &theirs].map(|place| parts_of(place, "x.vdi"));
        assert!(head == their_head && len == their_len, "{line}");
        assert_eq!(data % (1 << 20), 0, "{line}: a page of the guest is one of the file");
        let first = std::fs::read(ours.path().join("x.vdi")).unwrap();
        assert_eq!(ours.run(line).code, Some(0), "{line}");
        let second = std::fs::read(ours.path().join("x.vdi")).unwrap();
        let id = |bytes: &[u8]| bytes[0x188..0x1a8].to_vec();
        assert_ne!(id(&first), id(&second), "{line}: each image has identifiers of its own");
    }
    assert_same(
        &["qemu-img create -q -f raw b.img 3M"],
        &[
            "qemu-img create -f vdi -o help",
            "qemu-img measure -O vdi --size 1M",
            "qemu-img convert -c -O vdi b.img y.vdi",
        ],
    );
    let place = Place::new(true);
    fixture(place.path());
    for (options, size, wanted) in [
        ("cluster_size=1M", "1M", "Invalid parameter 'cluster_size'"),
        ("static=maybe", "1M", "Parameter 'static' expects 'on' or 'off'"),
        (
            "static=off",
            "600T",
            "Unsupported VDI image size (size is 0x2580000000000, max supported is 0x1fffff8000000)",
        ),
    ] {
        let ended = place.run(&format!("qemu-img create -q -f vdi -o {options} n.vdi {size}"));
        assert_eq!(ended.stderr, format!("qemu-img: n.vdi: {wanted}\n"), "{options}");
        assert!(!place.path().join("n.vdi").exists(), "{options}");
    }
}

#[test]
fn what_is_written_is_what_qemu_reads() {
    for options in ["", "-o static=on"] {
        let create = format!("qemu-img create -q -f vdi {options} x.vdi 6001k");
        assert_same_contents(
            "vdi",
            &[&create],
            &[
                "qemu-io -f vdi -c 'write -P 1 0 10k' -c 'write -P 2 1000k 70k' -c 'write -z 4M 64k' x.vdi",
                "qemu-io -f vdi -c 'write -P 3 5M 881k' -c 'write -z 5M 100k' -c 'write -P 4 130000 5' x.vdi",
                "qemu-io -f vdi -c 'write -z -u 0 1M' -c 'write -P 5 512 512' -c 'read -P 0 1024 512' x.vdi",
                "qemu-io -f vdi -c 'discard 5M 512k' -c 'write -P 6 5M 512k' x.vdi",
                "qemu-img resize x.vdi 9M",
                "qemu-img resize --shrink x.vdi 2M",
                "qemu-img check -r all x.vdi",
            ],
        );
    }
    let base = ["qemu-img create -q -f raw b.img 5M", "qemu-io -f raw -c 'write -P 9 0 2M' b.img"];
    assert_same_contents(
        "vdi",
        &base,
        &[
            "qemu-img convert -f raw -O vdi b.img x.vdi",
            "qemu-img compare -f raw -F vdi b.img x.vdi",
            "qemu-img convert -n -f raw -O vdi b.img x.vdi",
        ],
    );
}

/// The map's entries and the number of allocated blocks.
fn map_of(place: &Place, entries: usize) -> (Vec<u32>, u32) {
    let bytes = std::fs::read(place.path().join("x.vdi")).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    ((0..entries).map(|entry| word(0x200 + entry * 4)).collect(), word(0x184))
}

#[test]
fn blocks_at_the_end_that_were_discarded_are_given_back() {
    const NEVER: u32 = u32::MAX;
    const DISCARDED: u32 = u32::MAX - 1;
    let place = Place::new(true);
    let run = |line: &str| {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    };
    run("qemu-img create -q -f vdi x.vdi 5M");
    run(
        "qemu-io -d unmap -f vdi -c 'write -P 1 3M 1M' -c 'write -P 2 0 1M' -c 'write -P 3 4M 1k' x.vdi",
    );
    assert_eq!(map_of(&place, 5), (vec![1, NEVER, NEVER, 0, 2], 3));
    // A block that others are behind keeps its place.
    run("qemu-io -d unmap -f vdi -c 'discard 0 1M' x.vdi");
    assert_eq!(map_of(&place, 5), (vec![1, NEVER, NEVER, 0, 2], 3));
    run("qemu-io -d unmap -f vdi -c 'write -z -u 4M 1M' x.vdi");
    assert_eq!(map_of(&place, 5), (vec![DISCARDED, NEVER, NEVER, 0, DISCARDED], 1));
    assert_eq!(std::fs::metadata(place.path().join("x.vdi")).unwrap().len(), 2 << 20);
    for line in [
        "qemu-img check -f vdi x.vdi",
        "qemu-io -f vdi -c 'read -P 0 0 3M' -c 'read -P 1 3M 1M' -c 'read -P 0 4M 1M' x.vdi",
        "qemu-io -f vdi -c 'write -P 5 1M 1M' -c 'write -P 6 0 1k' x.vdi",
        "qemu-img check -f vdi x.vdi",
    ] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    run(
        "qemu-io -f vdi -c 'write -P 7 4M 1k' -c 'read -P 1 3M 1M' -c 'read -P 5 1M 1M' -c 'read -P 6 0 1k' x.vdi",
    );
    assert_eq!(map_of(&place, 5), (vec![2, 1, NEVER, 0, 3], 4));
}

#[test]
fn an_image_whose_header_miscounts_is_counted_again_when_it_is_written() {
    // 0x184: the number of blocks; the second entry of the map is block 1 of 0, 1, 2.
    for changes in [
        &[(0x184, 9)][..],
        &[(0x184, 1)],
        &[(0x204, 255), (0x205, 255), (0x206, 255), (0x207, 255)],
        &[(0x200, 254), (0x201, 255), (0x202, 255), (0x203, 255), (0x184, 2)],
    ] {
        let place = Place::new(true);
        for line in [
            "qemu-img create -q -f vdi x.vdi 5M",
            "qemu-io -f vdi -c 'write -P 1 0 2M' -c 'write -P 2 3M 1M' x.vdi",
            &bytes(changes),
        ] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let before = place.run("qemu-io -r -f vdi -c 'read -v 1048000 1000' x.vdi");
        let write = "qemu-io -f vdi -c 'write -P 4 4M 1k' x.vdi";
        let ended = place.run(write);
        assert_eq!(ended.code, Some(0), "{changes:?}: {ended:?}");
        let checked = place.run_theirs("qemu-img check -f vdi x.vdi");
        assert_eq!(checked.code, Some(0), "{changes:?}: {checked:?}");
        assert_eq!(
            place
                .run_theirs("qemu-io -r -f vdi -c 'read -v 1048000 1000' x.vdi")
                .stdout
                .lines()
                .next(),
            before.stdout.lines().next()
        );
        for line in [
            "qemu-io -f vdi -c 'write -P 5 2M 1M' -c 'read -P 2 3M 1M' -c 'read -P 4 4M 1k' x.vdi",
            "qemu-img check -f vdi x.vdi",
        ] {
            let ended = place.run_theirs(line);
            assert_eq!(ended.code, Some(0), "{changes:?}: {line}: {ended:?}");
        }
    }
}

#[test]
fn an_image_whose_map_is_damaged_is_not_written() {
    for changes in [&[(0x204, 0)][..], &[(0x204, 7)], &[(0x207, 1)]] {
        let place = Place::new(true);
        for line in [
            "qemu-img create -q -f vdi x.vdi 5M",
            "qemu-io -f vdi -c 'write -P 1 0 2M' x.vdi",
            &bytes(changes),
        ] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let before = place.files();
        let ended = place.run("qemu-io -f vdi -c 'write 0 512' x.vdi");
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("The VDI block map is damaged"), "{ended:?}");
        assert!(before == place.files(), "{changes:?}");
    }
}
