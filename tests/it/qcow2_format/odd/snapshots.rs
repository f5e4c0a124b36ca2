//! Damaged snapshot entries and tables, which block changes through them.
//!
//! What would free or copy through them stops before anything changes.

use super::*;

/// What is damaged, and how, in an image with two snapshots.
type Damage = fn(&mut Bytes, u64);

fn damaged(damage: Damage) -> Bytes {
    let mut image = Bytes::new("compat=1.1", &SNAPSHOTS);
    let entry = image.snapshots()[0];
    damage(&mut image, entry);
    image
}

fn l2_of(image: &Bytes, entry: u64) -> u64 {
    image.word(image.word(entry)) & OFFSET
}

const DAMAGES: [(&str, Damage); 15] = [
    ("an unaligned L1 table", |image, entry| _ = image.set(entry, image.word(entry) | 0x200)),
    ("an L1 table far away", |image, entry| _ = image.set(entry, 1 << 40)),
    ("an L1 table nowhere", |image, entry| _ = image.set(entry, !0xffff)),
    ("the header as an L1 table", |image, entry| _ = image.set(entry, 0)),
    ("the disk's L1 table", |image, entry| _ = image.set(entry, image.word(40))),
    ("another's L1 table", |image, entry| {
        image.set(entry, image.word(image.snapshots()[1]));
    }),
    ("the longest L1 table", |image, entry| _ = image.put(entry + 8, &[255; 4])),
    ("an L1 table too long", |image, entry| _ = image.put(entry + 8, &[0, 0x40, 0, 1])),
    ("an L1 table past the end", |image, entry| _ = image.put(entry + 8, &[0, 4, 0, 0])),
    ("an unaligned L2 table", |image, entry| {
        image.set(image.word(entry), l2_of(image, entry) | 0x200);
    }),
    ("an L2 table far away", |image, entry| _ = image.set(image.word(entry), 1 << 40)),
    ("an L2 table with reserved bits", |image, entry| {
        image.set(image.word(entry), l2_of(image, entry) | 1);
    }),
    ("unaligned data", |image, entry| {
        let l2 = l2_of(image, entry);
        image.set(l2, image.word(l2) | 0x200);
    }),
    ("data far away", |image, entry| _ = image.set(l2_of(image, entry), 1 << 40)),
    ("data that is not counted", |image, entry| {
        let l2 = l2_of(image, entry);
        let cluster = (image.word(l2) & OFFSET) >> 16;
        let block = image.word(image.word(48));
        image.put(block + 2 * cluster, &[0, 0]);
    }),
];

#[test]
fn a_damaged_snapshot_is_not_deleted_or_applied() {
    for (what, damage) in DAMAGES {
        let image = damaged(damage);
        for line in ["snapshot -d s1", "snapshot -a s1"] {
            if line.ends_with("-a s1") && (what.contains("disk's") || what.contains("another's")) {
                // That reads, and can be had.
                continue;
            }
            let (seen, mut left) = run_all(&image, &[line, "snapshot -l"], true);
            assert_eq!(seen[0].code, Some(1), "{what} {line}: {seen:?}");
            let text = if line.contains("-d") { "delete" } else { "apply" };
            let refused = format!("Could not {text} snapshot 's1': ");
            assert!(seen[0].stderr.contains(&refused), "{what} {line}: {seen:?}");
            assert!(
                seen[1].stdout.contains("s1") && seen[1].stdout.contains("s2"),
                "{what}: {seen:?}"
            );
            // But for the bit that says it is corrupt, and the dirty one while references are raised.
            left.set(72, image.word(72));
            let (mine, before) =
                (run_all(&left, &["check"], true), run_all(&image, &["check"], true));
            assert_eq!(mine.0, before.0, "{what} {line}");
        }
    }
}

#[test]
fn damaged_snapshots_are_checked_and_reported_as_by_qemu_img() {
    for (what, damage) in DAMAGES {
        let image = damaged(damage);
        // What an L1 table past the end of the file might name is not looked for.
        let is_too_much = ["nowhere", "past the end"].iter().any(|end| what.ends_with(end));
        if !is_too_much {
            assert_same(what, &image, &["check", "snapshot -l"]);
        }
        // What the disk itself has is as good as ever.
        for line in ["io read -P 2 0 64k", "convert -O raw image out.raw"] {
            assert_same(what, &image, &[line]);
        }
    }
}

#[test]
fn an_image_with_damaged_snapshots_does_not_become_one_of_version_2() {
    for (what, damage) in DAMAGES {
        let is_readable =
            ["the header", "disk's", "another's"].iter().any(|part| what.contains(part));
        if is_readable {
            continue;
        }
        let image = damaged(damage);
        let (seen, mut left) = run_all(&image, &["amend -o compat=0.10"], true);
        let refused = "Failed to turn zero into data clusters: ";
        assert!(seen[0].code == Some(1) && seen[0].stderr.contains(refused), "{what}: {seen:?}");
        left.set(72, image.word(72));
        assert!(left.0 == image.0, "{what}");
    }
}

#[test]
fn a_snapshot_of_a_disk_of_no_possible_size_is_not_applied() {
    for size in [1000, 1 << 63, u64::MAX] {
        let mut image = Bytes::new("compat=1.1", &SNAPSHOTS);
        let entry = image.snapshots()[0];
        image.set(entry + 48, size);
        let (seen, left) = run_all(&image, &["snapshot -a s1"], true);
        let refused = "Could not apply snapshot 's1': Failed to load snapshot: Invalid argument";
        assert_eq!((seen[0].code, &*seen[0].stderr), (Some(1), refused), "{size}");
        assert!(left.0 == image.0);
    }
}

#[test]
fn a_snapshot_table_that_cannot_be_read_stops_what_goes_by_it() {
    let damages: [Damage; 4] = [
        |image, entry| _ = image.put(entry + 36, &1032u32.to_be_bytes()),
        |image, entry| _ = image.put(entry + 36, &[255; 4]),
        |image, _| _ = image.put(60, &[255; 4]),
        |image, _| _ = image.set(64, image.word(64) | 0x200),
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        let image = damaged(damage);
        for line in [
            "snapshot -c s3",
            "snapshot -d s1",
            "snapshot -a s1",
            "snapshot -l",
            "resize image 8M",
            "resize --shrink image 1M",
            "amend -o compat=0.10",
            "amend -o size=8M",
        ] {
            let (seen, left) = run_all(&image, &[line], true);
            assert_eq!(seen[0].code, Some(1), "{n} {line}: {seen:?}");
            assert!(left.0 == image.0, "{n} {line}: {seen:?}");
        }
    }
}
