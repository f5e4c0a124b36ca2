//! VHD images that QEMU has made and damaged, read by both; and images that are made and written here, judged by QEMU.

use super::{Ended, Place, assert_same, fixture};

fn run(place: &Place, lines: &[&str]) {
    for line in lines {
        let ended = place.run(line);
        let is_right = ended.code == Some(0) && !ended.stdout.contains("failed");
        assert!(is_right, "{line}: {ended:?}");
    }
}

/// Runs lines of QEMU's.
fn theirs(place: &Place, lines: &[&str]) {
    for line in lines {
        let ended = place.run_theirs(line);
        let is_right = ended.code == Some(0) && !ended.stdout.contains("failed");
        assert!(is_right, "{line}: {ended:?}");
    }
}

fn place() -> Place {
    let place = Place::new(true);
    fixture(place.path());
    place
}

/// Changes bytes of a file.
fn change(place: &Place, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = place.path().join(name);
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// An error of one line that says this.
fn refused(ended: Ended, wanted: &str) {
    let is_named = ended.stderr.contains(wanted) && ended.stderr.lines().count() == 1;
    assert!(ended.code == Some(1) && is_named, "{wanted}: {ended:?}");
}

#[test]
fn images_that_qemu_made_are_read_as_qemu_reads_them() {
    for (options, size) in
        [("", "6M"), ("-o force_size=on", "5001k"), ("-o subformat=fixed", "3M"), ("", "130G")]
    {
        assert_same(
            &[
                &format!("qemu-img create -q -f vpc {options} x.vpc {size}"),
                "qemu-io -f vpc -c 'write -P 1 3M 10k' -c 'write -P 2 1M 1100k' x.vpc",
            ],
            &[
                "qemu-img info -f vpc x.vpc",
                "qemu-img info -f vpc --output=json x.vpc",
                "qemu-img map -f vpc x.vpc",
                "qemu-img map -f vpc --output=json x.vpc",
                "qemu-img resize -f vpc x.vpc +1M",
                "qemu-img measure -O vpc --size 1M",
                "qemu-io -r -f vpc -c 'read -v 1048570 20' -c 'read -P 1 3M 10k' -c 'map' x.vpc",
                "qemu-img info --image-opts driver=vpc,file.filename=x.vpc,force_size_calc=foo",
            ],
        );
    }
}

/// The bytes of an image, without what is different in each: the times, the identifiers, and their checksums.
fn bytes_of(place: &Place, is_fixed: bool) -> Vec<u8> {
    let mut bytes = std::fs::read(place.path().join("x.vpc")).unwrap();
    let end = bytes.len() - 512;
    for footer in [0, end].into_iter().skip(usize::from(is_fixed)) {
        bytes[footer + 24..footer + 28].fill(0);
        bytes[footer + 64..footer + 84].fill(0);
    }
    bytes
}

#[test]
fn new_images_are_what_qemu_makes() {
    for line in [
        "qemu-img create -f vpc x.vpc 0",
        "qemu-img create -f vpc x.vpc 1000",
        "qemu-img create -f vpc x.vpc 5M",
        "qemu-img create -f vpc x.vpc 64M",
        "qemu-img create -f vpc x.vpc 100M",
        "qemu-img create -f vpc x.vpc 10G",
        "qemu-img create -f vpc x.vpc 127G",
        "qemu-img create -f vpc x.vpc 136899993600",
        "qemu-img create -f vpc x.vpc 2040G",
        "qemu-img create -f vpc -o force_size=on x.vpc 1234567",
        "qemu-img create -f vpc -o force_size=on,subformat=dynamic x.vpc 10G",
        "qemu-img create -f vpc -o subformat=fixed x.vpc 1M",
        "qemu-img create -f vpc -o subformat=fixed,force_size=on,preallocation=falloc x.vpc 1M",
    ] {
        let [ours, theirs] = [true, false].map(Place::new);
        assert_eq!(ours.run(line), theirs.run(line), "{line}");
        let is_fixed = line.contains("fixed");
        assert!(bytes_of(&ours, is_fixed) == bytes_of(&theirs, is_fixed), "{line}");
    }
    for line in [
        "qemu-img create -f vpc x.vpc 2041G",
        "qemu-img create -f vpc -o force_size=on x.vpc 2190433321473",
        "qemu-img create -f vpc -o subformat=other x.vpc 1M",
        "qemu-img create -f vpc x.vpc",
    ] {
        let [ours, theirs] = [true, false].map(Place::new);
        assert_eq!(ours.run(line), theirs.run(line), "{line}");
        assert!(ours.files().is_empty(), "{line}: a file is left");
    }
}

#[test]
fn the_size_is_computed_as_it_is_asked_for() {
    let place = place();
    theirs(&place, &["qemu-img create -q -f vpc -o force_size=on x.vpc 3M"]);
    // The size is that of another geometry.
    change(&place, "x.vpc", |bytes| {
        bytes[56..60].copy_from_slice(&[0, 50, 4, 17]);
        bytes[64..68].fill(0);
        let sum = bytes[..512].iter().map(|&byte| u32::from(byte)).sum::<u32>();
        bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
    });
    for (rule, size) in [
        ("", 3145728),
        (",force_size_calc=chs", 1740800),
        (",force_size_calc=current_size", 3145728),
    ] {
        let line = format!("qemu-img info --image-opts driver=vpc,file.filename=x.vpc{rule}");
        for ended in [place.run(&line), place.run_theirs(&line)] {
            assert!(ended.stdout.contains(&format!("({size} bytes)")), "{line}: {ended:?}");
        }
    }
}

#[test]
fn what_is_written_here_qemu_reads() {
    let place = place();
    run(
        &place,
        &[
            "qemu-img create -q -f vpc -o force_size=on x.vpc 10M",
            "qemu-io -f vpc -c 'write -P 1 3M 10k' -c 'write -P 2 1M 3000k' -c 'write -z 1200k 5k' \
             -c 'write -P 3 10484736 1k' -c 'discard 2M 64k' -c 'write -P 4 2M 64k' x.vpc",
            "qemu-img check -f vpc x.vpc",
            "qemu-img create -q -f vpc -o subformat=fixed y.vpc 3M",
            "qemu-io -f vpc -c 'write -P 1 1M 10k' -c 'write -z 1M 4k' -c 'write -P 2 3145216 512' y.vpc",
            "qemu-img check -f vpc y.vpc",
        ],
    );
    // QEMU goes on in the same image, and so do we.
    theirs(
        &place,
        &[
            "qemu-io -f vpc -c 'read -P 2 1M 100k' -c 'read -P 0 1200k 5k' -c 'read -P 3 10484736 1k' \
             -c 'read -P 4 2M 64k' -c 'write -P 5 7M 70k' x.vpc",
            "qemu-io -f vpc -c 'read -P 0 1M 4k' -c 'read -P 1 1028k 6k' -c 'read -P 2 3145216 512' y.vpc",
        ],
    );
    run(
        &place,
        &[
            "qemu-img check -f vpc x.vpc",
            "qemu-io -f vpc -c 'read -P 5 7M 70k' -c 'write -P 6 5M 1k' x.vpc",
            "qemu-img check -f vpc x.vpc",
            "qemu-img convert -f vpc -O raw x.vpc x.raw",
            "qemu-img convert -f raw -O vpc -o force_size=on x.raw z.vpc",
            "qemu-img convert -f raw -O vpc -o force_size=on,subformat=fixed x.raw f.vpc",
        ],
    );
    theirs(
        &place,
        &[
            "qemu-io -f vpc -r -c 'read -P 6 5M 1k' -c 'read -P 0 5121k 100k' x.vpc",
            "qemu-img compare -f vpc -F raw x.vpc x.raw",
            "qemu-img compare -f vpc -F raw z.vpc x.raw",
            "qemu-img compare -f vpc -F raw f.vpc x.raw",
        ],
    );
}

#[test]
fn random_requests_leave_what_they_leave_in_qemus_images() {
    let seed = crate::disks::seed();
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for options in ["force_size=on", "subformat=fixed,force_size=on"] {
        let place = place();
        let create = format!("qemu-img create -q -f vpc -o {options}");
        run(&place, &[&format!("{create} x.vpc 9000k")]);
        theirs(&place, &[&format!("{create} y.vpc 9000k")]);
        for _ in 0..5 {
            let mut requests = String::new();
            for _ in 0..6 {
                let unit = [1, 512, 4096][rng.usize(..3)];
                let (at, len) =
                    (rng.u64(0..8 << 20) / unit * unit, rng.u64(1..900 << 10) / unit * unit);
                let (at, len, value) = (at, len.max(unit).min((9000 << 10) - at), rng.u8(1..));
                requests += &match rng.u8(..5) {
                    0 => format!(" -c 'write -z {at} {len}'"),
                    1 => format!(" -c 'discard {at} {len}' -c 'write -P {value} {at} {len}'"),
                    _ => format!(" -c 'write -P {value} {at} {len}'"),
                };
            }
            run(
                &place,
                &[&format!("qemu-io -f vpc{requests} x.vpc"), "qemu-img check -f vpc x.vpc"],
            );
            theirs(&place, &[&format!("qemu-io -f vpc{requests} y.vpc")]);
        }
        theirs(&place, &["qemu-img compare -f vpc -F vpc x.vpc y.vpc"]);
        // QEMU's image has the zeroes that are written.
        for image in ["x.vpc", "y.vpc"] {
            for what in ["map --output=json", "info", "info --output=json"] {
                let line = format!("qemu-img {what} -f vpc {image}");
                assert_eq!(place.run(&line), place.run_theirs(&line), "seed {seed}: {line}");
            }
        }
        run(&place, &["qemu-img compare -f vpc -F vpc x.vpc y.vpc"]);
    }
}

#[test]
fn one_whole_footer_is_enough() {
    let place = place();
    let reads = "qemu-io -r -f vpc -c 'read -P 1 1M 1k' x.vpc";
    let make = || {
        run(
            &place,
            &[
                "qemu-img create -q -f vpc -o force_size=on x.vpc 6M",
                "qemu-io -f vpc -c 'write -P 1 1M 1k' x.vpc",
            ],
        );
    };
    for at_end in [false, true] {
        make();
        change(&place, "x.vpc", |bytes| {
            let at = if at_end { bytes.len() - 512 } else { 0 };
            bytes[at + 70] ^= 1;
        });
        run(&place, &[reads]);
        let checked = place.run("qemu-img check -f vpc x.vpc");
        assert!(
            checked.code == Some(2) && checked.stderr.contains("footer at the "),
            "{checked:?}"
        );
        // The next write writes both.
        run(&place, &["qemu-io -f vpc -c 'write -P 2 5M 1k' x.vpc", "qemu-img check -f vpc x.vpc"]);
        theirs(&place, &[reads]);
    }
    make();
    change(&place, "x.vpc", |bytes| {
        let end = bytes.len() - 512;
        bytes[70] ^= 1;
        bytes[end + 70] ^= 1;
    });
    refused(place.run(reads), "Incorrect header checksum");
}

#[test]
fn what_the_guest_of_a_fixed_image_writes_makes_it_no_other_image() {
    let place = place();
    run(
        &place,
        &[
            "qemu-img create -q -f vpc -o force_size=on d.vpc 1M",
            "qemu-img create -q -f vpc -o force_size=on,subformat=fixed x.vpc 1M",
            "qemu-io -f vpc -c 'write -s d.vpc 0 2560' x.vpc",
            "qemu-io -r -f vpc -c 'read -P 0 4k 60k' x.vpc",
        ],
    );
    let info = place.run("qemu-img info x.vpc").stdout;
    assert!(info.contains("file format: vpc") && !info.contains("cluster_size"), "{info}");
}

#[test]
fn damage_is_named() {
    let place = place();
    let reads = "qemu-io -r -f vpc -c 'read 0 4k' -c 'read 2M 4k' x.vpc";
    // Where the footer's copy, the header and the table are.
    let changes: [(usize, &[u8], &str); 6] = [
        (512, b"x", "Invalid header magic"),
        (512 + 36, &[0], "VHD dynamic header: the checksum is wrong"),
        (1536, &[0, 0, 0, 1], "over metadata"),
        (1536, &[0x70, 0, 0, 0], "past the end of file"),
        (1540, &[0, 0, 0, 4], "overlap"),
        (1540, &[0xff, 0xff, 0xff, 0xff], "Leaked 1 blocks"),
    ];
    for (at, field, wanted) in changes {
        theirs(
            &place,
            &[
                "qemu-img create -q -f vpc x.vpc 6M",
                "qemu-io -f vpc -c 'write -P 1 0 4k' -c 'write -P 2 2M 4k' -c 'write -P 3 4M 4k' x.vpc",
            ],
        );
        change(&place, "x.vpc", |bytes| bytes[at..at + field.len()].copy_from_slice(field));
        match at < 1536 {
            true => refused(place.run(reads), wanted),
            false => {
                let checked = place.run("qemu-img check -f vpc x.vpc");
                let is_reported =
                    checked.stdout.contains(wanted) || checked.stderr.contains(wanted);
                assert!(
                    matches!(checked.code, Some(2 | 3)) && is_reported,
                    "{wanted}: {checked:?}"
                );
            }
        }
    }
    // A block that leads past the end of the file is in nobody's way, until it is read.
    change(&place, "x.vpc", |bytes| bytes[1536..1540].copy_from_slice(&[0x70, 0, 0, 0]));
    let read = place.run(reads);
    assert!(read.stdout.contains("Input/output error"), "{read:?}");
    refused(place.run("qemu-io -f vpc -c 'write 0 4k' x.vpc"), "points after the end of file");
}
