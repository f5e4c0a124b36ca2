//! Old snapshots, and images that are converted to another version.

use super::*;

#[test]
fn snapshots_as_old_versions_of_qemu_made_them_are_sound_in_version_2() {
    for (version, left) in ["0.10", "1.1"].iter().flat_map(|v| [0, 8, 16].map(|left| (v, left))) {
        let mut image = Bytes::new(&format!("compat={version}"), &SNAPSHOTS);
        image.cut_extra(left);
        let what = format!("{version} {left}");
        assert_same(&what, &image, &["check", "snapshot -l", "info"]);
        assert_same(&what, &image, &["check -r leaks", "check"]);
        for lines in [
            ["check -r all", "check", "snapshot -l", "snapshot -d s1", "snapshot -l"],
            ["amend -o compat=1.1", "info", "amend -o compat=0.10", "info", "snapshot -l"],
            ["amend -o compat=1.1,size=8M", "info", "io read -P 2 0 64k", "snapshot -l", "info"],
        ] {
            for left in assert_same(&what, &image, &lines) {
                let outcome = check(&left);
                // An image that has version 3 already is amended in nothing.
                let is_complete = *version == "0.10" || left.word(0) & 0xff == 2;
                assert!(outcome.code == Some(0) || !is_complete, "{what}: {outcome:?}");
            }
        }
        let (_, mut left) = run_all(&image, &["amend -o compat=1.1,size=8M"], true);
        let sizes: Vec<u64> = left.snapshots().iter().map(|at| left.word(at + 48)).collect();
        // A snapshot has the size that the disk had.
        if *version == "0.10" {
            assert_eq!(sizes, [4 << 20; 2], "{what}");
        }
        let (seen, _) = run_all(left.set(72, 0), &["snapshot -a s1", "io read -P 1 0 64k"], true);
        assert!(seen.iter().all(|outcome| outcome.code == Some(0)), "{what}: {seen:?}");
    }
}

#[test]
fn an_image_with_snapshots_becomes_one_of_version_2_without_losing_what_they_show() {
    let zeroes = [
        "write -P 1 0 256k",
        "write -z 64k 64k",
        "write -z 1M 128k",
        "!snapshot -c s1",
        "write -P 2 1M 64k",
        "write -z 192k 64k",
        "!snapshot -c s2",
        "write -P 3 0 64k",
        "write -z 3M 64k",
    ];
    let base = "backing_file=base.raw,backing_fmt=raw";
    for options in ["cluster_size=64k", "cluster_size=4k", base] {
        let dir = crate::file::on_tmpfs();
        let make = |commands: &[&str]| {
            // A backing file that would show where a zero cluster only went away.
            qemu_img(dir.path(), &["create", "-q", "-f", "raw", "base.raw", "4M"]);
            let output =
                run(dir.path(), &["qemu-io", "-f", "raw", "-c", "write -P 9 0 4M"], &["base.raw"]);
            assert!(output.status.success());
            qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", options, "image", "4M"]);
            change(dir.path(), commands);
        };
        make(&zeroes);
        let shown = || {
            let read = |snapshot: &[&str]| {
                let line = [&["convert", "-O", "raw"], snapshot, &["image", "shown.raw"]].concat();
                qemu_img(dir.path(), &line);
                fs::read(dir.path().join("shown.raw")).unwrap()
            };
            [read(&[]), read(&["-l", "s1"]), read(&["-l", "s2"])]
        };
        let before = shown();
        let outcome = ours(dir.path(), &["amend", "-o", "compat=0.10", "image"]);
        assert_eq!((outcome.code, &*outcome.stderr), (Some(0), ""), "{options}");
        assert!(qemu_img(dir.path(), &["info", "image"]).contains("compat: 0.10"));
        assert!(shown() == before, "{options}");
        let checked = theirs(dir.path(), &["check", "image"]);
        assert_eq!(checked.code, Some(0), "{options}: {checked:?}");
        // The tables and clusters are each snapshot's own.
        for snapshot in ["s1", "s2"] {
            qemu_img(dir.path(), &["snapshot", "-d", snapshot, "image"]);
            let checked = theirs(dir.path(), &["check", "image"]);
            assert_eq!(checked.code, Some(0), "{options}: {checked:?}");
        }
        qemu_img(dir.path(), &["convert", "-O", "raw", "image", "shown.raw"]);
        assert!(fs::read(dir.path().join("shown.raw")).unwrap() == before[0], "{options}");
    }
}

#[test]
fn version_2_has_no_snapshots_of_disks_of_other_sizes_or_with_long_states_of_machines() {
    let image = Bytes::new("compat=1.1", &SNAPSHOTS);
    let entry = image.snapshots()[0];
    let lines = ["amend -o compat=0.10", "info", "check"];
    assert_same("equal", &image, &lines);
    assert_same("another size", image.clone().set(entry + 48, 8 << 20), &lines);
    assert_same("a long state", image.clone().set(entry + 40, 5 << 32), &lines);
    assert_same("a short state", image.clone().set(entry + 40, (1 << 32) - 1), &lines);
}

#[test]
fn an_image_compressed_by_zstd_becomes_one_of_version_2_if_nothing_in_it_is_compressed() {
    let options = "compression_type=zstd";
    let plain = ["write -P 1 0 64k", "write -z 1M 64k", "!snapshot -c s1", "write -P 2 0 64k"];
    let image = Bytes::new(options, &plain);
    let lines = ["amend -o compat=0.10", "info", "io write -c -P 3 2M 64k", "io read -P 3 2M 64k"];
    assert_same("plain", &image, &lines);
    assert_same("and back", &image, &["amend -o compat=0.10", "amend -o compat=1.1", "info"]);
    let image = Bytes::new(options, &["write -c -P 3 2M 64k"]);
    assert_same("compressed", &image, &["amend -o compat=0.10", "info", "io read -P 3 2M 64k"]);
    let image = Bytes::new("compression_type=zstd,extended_l2=on", &plain);
    assert_same("with subclusters", &image, &["amend -o compat=0.10", "info"]);
    // What a snapshot alone has compressed is lost with qemu-img.
    let image = Bytes::new(options, &["write -c 2M 64k", "!snapshot -c s1", "write 2M 64k"]);
    let (seen, left) = run_all(&image, &["amend -o compat=0.10"], true);
    let refused =
        "Cannot downgrade an image with zstd compression type and existing compressed clusters";
    assert_eq!((seen[0].code, &*seen[0].stderr), (Some(1), refused));
    assert!(left.0 == image.0);
}
