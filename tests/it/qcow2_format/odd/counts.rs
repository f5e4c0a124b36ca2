//! Refcount tables and blocks that are missing or misplaced.

use super::*;

#[test]
fn a_refcount_table_of_no_clusters_is_reported_and_built_anew() {
    for version in ["0.10", "1.1"] {
        let mut image = Bytes::new(&format!("compat={version}"), &SNAPSHOTS);
        image.put(56, &[0; 4]);
        for at in [image.word(48), 0] {
            image.set(48, at);
            for lines in [
                ["check", "check --output=json", "info"],
                ["check -r leaks", "info", "amend -o compat=1.1"],
                ["check -r all", "info", "check"],
                ["io read 0 4k", "snapshot -l", "resize image 8M"],
            ] {
                let [ours, _] = assert_same(version, &image, &lines);
                assert!(lines[0] == "check -r all" || ours.0 == image.0, "{version}: {lines:?}");
            }
        }
    }
    let mut image = Bytes::new("compat=1.1", &SNAPSHOTS);
    image.put(56, &[0; 4]).put(79, &[1]);
    assert_same("dirty", &image, &["io read 0 4k"]);
}

#[test]
fn an_unaligned_refcount_block_is_reported_and_marked_whatever_meets_it() {
    for version in ["0.10", "1.1"] {
        let mut image = Bytes::new(&format!("compat={version}"), &SNAPSHOTS);
        let table = image.word(48);
        image.set(table, image.word(table) | 0x200);
        for lines in [
            ["check", "check --output=json"],
            ["check -r leaks", "info"],
            ["check -q", "info"],
            ["snapshot -c s3", "info"],
            ["snapshot -a s1", "info"],
        ] {
            let [ours, theirs] = assert_same(version, &image, &lines);
            assert_eq!(is_corrupt(&ours), is_corrupt(&theirs), "{version}: {lines:?}");
        }
        let found = "qcow2: Marking image as corrupt: Refblock offset 0x20200 unaligned (reftable \
                     index: 0); further corruption events will be suppressed";
        for line in [
            "io write 1M 4k",
            "io write -c 1M 64k",
            "io discard 0 64k",
            "snapshot -d s1",
            "resize --shrink image 1M",
            "amend -o compat=1.1,refcount_bits=8",
            "check -r leaks",
        ] {
            if version == "0.10" && line.starts_with("resize") {
                // Such a disk with snapshots keeps its size.
                continue;
            }
            let (seen, left) = run_all(&image, &[line], true);
            assert!(seen[0].stderr.contains(found), "{version} {line}: {seen:?}");
            assert_eq!(is_corrupt(&left), version == "1.1", "{version} {line}");
        }
        // What qemu-img gives up on is repaired, and says so.
        let (seen, left) = run_all(&image, &["check -r all"], true);
        assert!(seen[0].stderr.contains(found), "{seen:?}");
        assert_eq!((seen[0].code, check(&left).code), (Some(0), Some(0)), "{seen:?}");
        assert!(!is_corrupt(&left));
    }
    // Another block's place, which only what goes through the whole table meets.
    let mut image = Bytes::new("compat=1.1", &SNAPSHOTS);
    let table = image.word(48);
    image.set(table + 8, image.word(table) | 0x200);
    for line in ["amend -o refcount_bits=8", "resize --shrink image 1M"] {
        let (seen, left) = run_all(&image, &[line], true);
        assert!(seen[0].stderr.contains("(reftable index: 0x1)"), "{line}: {seen:?}");
        assert!(seen[0].code == Some(1) && is_corrupt(&left), "{line}: {seen:?}");
    }
}
