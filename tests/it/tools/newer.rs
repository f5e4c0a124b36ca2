//! Options of later versions of QEMU's tools, which 7.2 lacks.
//!
//! 7.2 reads what is written by them.

use super::{Ended, Place};
use std::os::unix::fs::MetadataExt;

/// Runs lines that must succeed.
fn run(place: &Place, lines: &[&str]) -> String {
    let mut said = String::new();
    for line in lines {
        let Ended { code, stdout, stderr } = place.run(line);
        assert_eq!((code, &*stderr), (Some(0), ""), "{line}: {stdout}");
        said += &stdout;
    }
    said
}

/// The one line that a refusal is.
fn refusal(place: &Place, line: &str) -> String {
    let ended = place.run(line);
    assert_eq!((ended.code, &*ended.stdout), (Some(1), ""), "{line}");
    ended.stderr
}

#[test]
fn all_bitmaps_of_an_image_are_removed_at_once() {
    let place = Place::new(true);
    run(
        &place,
        &[
            "qemu-img create -q -f qcow2 a.qcow2 1M",
            "qemu-img bitmap --add a.qcow2 one",
            "qemu-img bitmap --add --disable a.qcow2 two",
            "qemu-img bitmap --add -g 512 a.qcow2 three",
        ],
    );
    for (line, wanted) in [
        ("--remove-all a.qcow2 one", "Expecting a filename and no bitmap name"),
        (
            "--remove-all --add a.qcow2 one",
            "--remove-all cannot be combined with what is done to one bitmap",
        ),
    ] {
        let line = format!("qemu-img bitmap {line}");
        assert_eq!(refusal(&place, &line), format!("qemu-img: {wanted}\n"));
    }
    assert!(place.run_theirs("qemu-img info a.qcow2").stdout.contains("name: three"));
    run(&place, &["qemu-img bitmap --remove-all a.qcow2", "qemu-img bitmap --remove-all a.qcow2"]);
    let info = place.run_theirs("qemu-img info a.qcow2").stdout;
    assert!(!info.contains("bitmaps"), "{info}");
    let checked = place.run_theirs("qemu-img check a.qcow2");
    assert_eq!(checked.code, Some(0), "{}{}", checked.stdout, checked.stderr);
}

#[test]
fn what_a_rebase_copies_is_compressed() {
    for (options, compressed) in [
        ("", true),
        ("-o cluster_size=4k", true),
        ("-o cluster_size=2M,compression_type=zstd", true),
        ("-o extended_l2=on", true),
        ("-o compat=0.10", true),
    ] {
        let place = Place::new(true);
        let create = format!("qemu-img create -q -f qcow2 -b old.raw -F raw {options} a.qcow2 9M");
        run(
            &place,
            &[
                "qemu-img create -q -f raw old.raw 7000k",
                "qemu-io -f raw -c 'write -P 1 0 3M' -c 'write -P 2 5000k 2000k' old.raw",
                "qemu-img create -q -f qcow2 new.qcow2 8500k",
                "qemu-io -c 'write -P 1 1M 1M' -c 'write -P 5 6M 2300k' new.qcow2",
                &create,
                "qemu-io -c 'write -P 3 100k 300k' -c 'write -P 4 5100k 10k' a.qcow2",
                "qemu-img convert -O raw a.qcow2 before.raw",
            ],
        );
        for base in ["new.qcow2 -F qcow2", "old.raw -F raw", "''"] {
            run(&place, &[&format!("qemu-img rebase -c -b {base} a.qcow2")]);
            let compare = "qemu-img compare -F raw a.qcow2 before.raw";
            for same in [place.run(compare), place.run_theirs(compare)] {
                assert_eq!(same.code, Some(0), "{options} {base}: {}{}", same.stdout, same.stderr);
            }
            let checked = place.run_theirs("qemu-img check a.qcow2");
            assert_eq!(checked.code, Some(0), "{options}: {}{}", checked.stdout, checked.stderr);
            let none = checked.stdout.contains(" 0.00% compressed");
            assert_eq!(!none, compressed, "{options} {base}: {}", checked.stdout);
        }
        let image = std::fs::metadata(place.path().join("a.qcow2")).unwrap();
        // Uncompressed it would be more than 5 MiB.
        let stored = image.blocks() * 512;
        let own = 3 << 20;
        assert!(stored < own || options.contains("2M"), "{options}: {stored} bytes");
    }
}

#[test]
fn an_image_of_version_2_keeps_its_zeroes_when_it_gets_a_backing_file() {
    let place = Place::new(true);
    run(
        &place,
        &[
            "qemu-img create -q -f raw new.raw 1M",
            "qemu-io -f raw -c 'write -P 1 0 1M' new.raw",
            "qemu-img create -q -f qcow2 -o compat=0.10 a.qcow2 1M",
            "qemu-io -c 'write -P 2 0 64k' a.qcow2",
            "qemu-img rebase -b new.raw -F raw a.qcow2",
            "qemu-io -c 'read -P 2 0 64k' -c 'read -P 0 64k 960k' a.qcow2",
        ],
    );
}

#[test]
fn a_rebase_that_can_compress_nothing_is_refused() {
    let place = Place::new(true);
    run(&place, &["qemu-img create -q -f qcow2 a.qcow2 1M", "qemu-img create -q -f raw b.raw 1M"]);
    let said = refusal(&place, "qemu-img rebase -c -u -b b.raw -F raw a.qcow2");
    assert_eq!(said, "qemu-img: Nothing is copied with -u that could be compressed\n");
    let said = refusal(&place, "qemu-img rebase -c -f raw -b '' b.raw");
    assert_eq!(said, "qemu-img: Compression not supported for this file format\n");
}

#[test]
fn a_data_file_that_is_kept_is_the_disk() {
    let place = Place::new(true);
    run(
        &place,
        &[
            "qemu-img create -q -f raw d.raw 3M",
            "qemu-io -f raw -c 'write -P 1 0 100k' -c 'write -P 2 2900k 172k' d.raw",
            "qemu-img convert -O raw d.raw same.raw",
        ],
    );
    let create = |options: &str| {
        format!("qemu-img create -f qcow2 -o keep_data_file=on,{options} a.qcow2 3M")
    };
    for (options, wanted) in [
        ("lazy_refcounts=on", "keep-data-file requires data-file"),
        ("data_file=nope.raw", "Could not open 'nope.raw': No such file or directory"),
        ("data_file=a.qcow2", "Could not open 'a.qcow2': No such file or directory"),
        (
            "data_file=d.raw,preallocation=falloc",
            "Preallocating more than only metadata would overwrite the external data file's content \
             and is therefore incompatible with 'keep_data_file=on'",
        ),
    ] {
        let ended = place.run(&create(options));
        assert_eq!(ended.stderr, format!("qemu-img: a.qcow2: {wanted}\n"));
        assert_eq!(ended.code, Some(1));
        assert!(!place.path().join("a.qcow2").exists());
    }
    let ended = place.run(&create("data_file=d.raw").replace("3M", "4M"));
    assert!(ended.stderr.contains("must not be shorter") && ended.code == Some(1), "{ended:?}");
    let kept = |place: &Place| {
        let read = |name: &str| std::fs::read(place.path().join(name)).unwrap();
        assert!(read("d.raw") == read("same.raw"));
    };
    for options in ["data_file_raw=on", "preallocation=metadata"] {
        run(&place, &[&create(&format!("data_file=d.raw,{options}"))]);
        kept(&place);
        let compare = "qemu-img compare -F raw a.qcow2 same.raw";
        for same in [place.run(compare), place.run_theirs(compare)] {
            assert_eq!(same.code, Some(0), "{options}: {}{}", same.stdout, same.stderr);
        }
    }
    // Without an entry nothing of it is seen.
    run(&place, &[&create("data_file=d.raw"), "qemu-io -c 'read -P 0 0 3M' a.qcow2"]);
    kept(&place);
    let line = "qemu-img convert -O qcow2 -o data_file=d.raw,keep_data_file=on same.raw b.qcow2";
    let said = refusal(&place, line);
    assert_eq!(said, "qemu-img: A conversion makes its data file: keep_data_file cannot be on\n");
    kept(&place);
}

#[test]
fn the_limits_of_requests_are_reported() {
    let place = Place::new(true);
    run(&place, &["qemu-img create -q -f qcow2 a.qcow2 1M"]);
    let plain = run(&place, &["qemu-img info a.qcow2"]);
    let reported = run(&place, &["qemu-img info --limits a.qcow2"]);
    let limits = reported.strip_prefix(&*plain).unwrap();
    assert!(limits.starts_with("Block limits:\n    request alignment: 1\n"), "{limits}");
    let json =
        |line: &str| -> serde_json::Value { serde_json::from_str(&run(&place, &[line])).unwrap() };
    let reported = json("qemu-img info --limits --output=json a.qcow2");
    assert_eq!(reported["limits"]["request-alignment"], 1);
    assert_eq!(reported["limits"]["opt-transfer"], 65536);
    assert_eq!(json("qemu-img info --output=json a.qcow2").get("limits"), None);
    // Around the page cache the storage's own blocks count.
    let direct = json("qemu-img info -t none --limits --output=json --backing-chain a.qcow2");
    assert!(direct[0]["limits"]["request-alignment"].as_u64() >= Some(512), "{direct}");
    let said = refusal(&place, "qemu-img info -t sometimes a.qcow2");
    assert_eq!(said, "qemu-img: Invalid cache option: sometimes\n");
}
