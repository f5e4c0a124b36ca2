//! Events of blkdebug: a rule for one makes the same commands fail here and in QEMU.

use super::Place;
use std::os::unix::fs::FileExt;

/// What is prepared by QEMU's programs, what is run with the rule, and the events that rules are for, perhaps
/// with the kind of I/O that is to fail.
struct Case {
    prepare: &'static [&'static str],
    line: &'static str,
    events: &'static [&'static str],
}

const FILLED: &[&str] =
    &["qemu-img create -q -f qcow2 i.qcow2 8M", "qemu-io -c 'write -q -P1 0 1M' i.qcow2"];
const SHARED: &[&str] = &[
    "qemu-img create -q -f qcow2 i.qcow2 8M",
    "qemu-io -c 'write -q -P1 0 1M' i.qcow2",
    "qemu-img snapshot -c a i.qcow2",
];
const OVERLAY: &[&str] = &[
    "qemu-img create -q -f raw b.raw 8M",
    "qemu-io -f raw -c 'write -q -P1 0 1M' b.raw",
    "qemu-img create -q -f qcow2 -F raw -b b.raw i.qcow2",
];
const RAW: &[&str] = &["qemu-img create -q -f raw i.raw 1M"];

/// Compares which commands fail; all differences are told at once.
fn compare(cases: &[Case]) {
    let mut wrong = String::new();
    for case in cases {
        let prepared = Place::new(false);
        for step in case.prepare {
            let ended = prepared.run(step);
            assert_eq!(ended.code, Some(0), "{step}: {}", ended.stderr);
        }
        for rule in case.events {
            let [ours, theirs] =
                [true, false].map(|ours| outcome(&prepared, case.line, rule, ours));
            if ours != theirs {
                wrong +=
                    &format!("\n{rule}: {}\n  ours:   {ours:?}\n  theirs: {theirs:?}\n", case.line);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The exit code and what is printed, but for what is said about closing, of a copy of the files.
fn outcome(prepared: &Place, line: &str, rule: &str, ours: bool) -> (Option<i32>, String) {
    let place = Place::new(ours);
    prepared.copy_to(&place);
    let (event, iotype) = rule.split_once('/').unwrap_or((rule, ""));
    let mut config = format!("[inject-error]\nevent = \"{event}\"\nonce = \"on\"\n");
    if !iotype.is_empty() {
        config += &format!("iotype = \"{iotype}\"\n");
    }
    std::fs::write(place.path().join("c.conf"), config).unwrap();
    let ended = place.run(line);
    let image = place.path().join("i.qcow2");
    if ours && image.exists() {
        // Leaks at worst.
        let check = place.run_theirs("qemu-img check -q i.qcow2");
        assert!(matches!(check.code, Some(0 | 3)), "{rule}: {line}: {check:?}");
    }
    (ended.code, ended.stdout)
}

#[test]
fn commands_fail_at_the_events_of_guest_data() {
    compare(&[
        Case {
            prepare: FILLED,
            line: "qemu-io -c 'write -P2 0 64k' -c 'write 4M 4k' -c 'read 0 4k' -c flush blkdebug:c.conf:i.qcow2",
            events: &[
                "write_aio",
                "write_aio/write",
                "read_aio",
                "cluster_alloc",
                "cluster_alloc_space",
                "cluster_free",
                "l2_load",
                "l2_load/read",
                "l2_update",
                "l2_alloc_write",
                "cow_write",
                "refblock_load",
                "refblock_update_part",
                "refblock_alloc",
                "reftable_load",
                "flush_to_os",
                "flush_to_disk",
                "pwritev",
                "pwritev_done",
                "none",
                "none/flush",
            ],
        },
        Case {
            prepare: FILLED,
            line: "qemu-io -t writeback -c 'read 0 4k' -c 'write 0 4k' -c 'flush' -c 'write 0 4k' blkdebug:c.conf:i.qcow2",
            events: &["none/flush", "write_aio", "cluster_alloc", "flush_to_disk", "flush_to_os"],
        },
        Case {
            prepare: &["qemu-img create -q -f qcow2 i.qcow2 8M"],
            line: "qemu-io -c 'write -z 0 64k' -c 'write 64k 64k' -c 'read 0 64k' blkdebug:c.conf:i.qcow2",
            events: &["l2_load", "pwritev_zero", "cluster_alloc", "cluster_free", "l1_update"],
        },
        Case {
            prepare: &["qemu-img create -q -f qcow2 i.qcow2 8M"],
            line: "qemu-io -c 'write -c 0 64k' -c 'read 1M 4k' -c 'write 4M 4k' blkdebug:c.conf:i.qcow2",
            events: &[
                "write_compressed",
                "read_compressed",
                "cluster_alloc_bytes",
                "l2_update_compressed",
            ],
        },
        Case {
            prepare: OVERLAY,
            line: "qemu-io -c 'read 0 4k' -c 'write 4k 4k' -c 'write 2M 4k' blkdebug:c.conf:i.qcow2",
            events: &["read_backing_aio", "cow_read", "cow_write", "write_aio", "cluster_free"],
        },
        Case {
            prepare: OVERLAY,
            line: "qemu-io -C -c 'read 0 64k' -c 'read 100k 4k' blkdebug:c.conf:i.qcow2",
            events: &["cor_write", "write_aio", "cluster_alloc", "read_backing_aio"],
        },
        Case {
            prepare: FILLED,
            line: "qemu-io -c 'write -b 0 4k' -c 'read -b 0 4k' blkdebug:c.conf:i.qcow2",
            events: &["vmstate_save", "vmstate_load", "write_aio"],
        },
        Case {
            prepare: &[
                "qemu-img create -q -f qcow2 i.qcow2 8M",
                "qemu-img create -q -f raw s.raw 8M",
                "qemu-io -f raw -c 'write -q -P1 0 1M' s.raw",
            ],
            line: "qemu-img convert -n -f raw -O qcow2 s.raw blkdebug:c.conf:i.qcow2",
            events: &["write_aio", "cluster_alloc", "cluster_alloc/write", "l2_load"],
        },
        Case {
            prepare: RAW,
            line: "qemu-io -f raw -c 'write 0 4k' -c 'read 0 4k' -c 'write -z 0 4k' -c 'write 1 1' -c 'discard 0 64k' -c flush -c 'write 0 512' blkdebug:c.conf:i.raw",
            events: &[
                "write_aio",
                "read_aio",
                "pwritev",
                "pwritev_zero",
                "pwritev_done",
                "flush_to_os",
                "flush_to_disk",
                "none",
                "none/discard",
                "none/write-zeroes",
            ],
        },
        Case {
            prepare: RAW,
            line: "qemu-io --image-opts -c 'write 1 600' -c 'write 70000 10' driver=raw,file.driver=blkdebug,file.align=4096,file.config=c.conf,file.image.driver=file,file.image.filename=i.raw",
            events: &[
                // QEMU 7.2 does not notice that one of the reads in between has failed.
                "pwritev_rmw_after_head",
                "pwritev_rmw_after_tail",
                "pwritev",
            ],
        },
    ]);
}

#[test]
fn commands_fail_at_the_events_of_growing_refcounts() {
    compare(&[Case {
        prepare: &["qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 i.qcow2 8M"],
        line: "qemu-io -c 'write 0 1M' -c 'write 1M 1M' -c 'write 3M 4k' blkdebug:c.conf:i.qcow2",
        events: &[
            "reftable_grow",
            "reftable_update",
            "refblock_alloc_hookup",
            "refblock_alloc_write",
            "refblock_alloc_write_blocks",
            "refblock_alloc_write_table",
            "refblock_alloc_switch_table",
        ],
    }]);
}

#[test]
fn commands_fail_at_the_events_of_tables() {
    compare(&[
        Case {
            prepare: SHARED,
            line: "qemu-io -c 'write 0 64k' -c 'write 100k 4k' -c 'write -z 256k 64k' blkdebug:c.conf:i.qcow2",
            events: &[
                "l1_update",
                "l2_alloc_cow_read",
                "l2_alloc_cow_read/read",
                "l2_alloc_write",
                "cow_read",
                "cow_write",
                "cluster_alloc",
                "cluster_free",
            ],
        },
        Case {
            prepare: &["qemu-img create -q -f qcow2 -o cluster_size=512 i.qcow2 1M"],
            line: "qemu-img resize -f qcow2 blkdebug:c.conf:i.qcow2 64M",
            events: &[
                "l1_grow_alloc_table",
                "l1_grow_write_table",
                "l1_grow_activate_table",
                "cluster_alloc",
                "l1_update",
            ],
        },
        Case {
            prepare: &[
                "qemu-img create -q -f qcow2 -o cluster_size=512 i.qcow2 1M",
                "qemu-io -c 'write -q 0 1M' i.qcow2",
            ],
            line: "qemu-img resize -q --shrink -f qcow2 blkdebug:c.conf:i.qcow2 64k",
            events: &["l1_shrink_write_table", "cluster_alloc"],
        },
        Case {
            prepare: FILLED,
            line: "qemu-img snapshot -c a blkdebug:c.conf:i.qcow2",
            events: &["l2_load", "cluster_alloc", "refblock_alloc", "l1_update", "pwritev"],
        },
        Case {
            prepare: SHARED,
            line: "qemu-img snapshot -a a blkdebug:c.conf:i.qcow2",
            events: &["l2_load", "cluster_alloc"],
        },
        Case {
            prepare: FILLED,
            line: "qemu-img amend -f qcow2 -o refcount_bits=64 blkdebug:c.conf:i.qcow2",
            events: &["cluster_alloc", "refblock_alloc", "refblock_load", "l2_load"],
        },
        Case {
            prepare: SHARED,
            line: "qemu-img snapshot -d a blkdebug:c.conf:i.qcow2",
            events: &["l2_load", "cluster_alloc", "cluster_free", "write_aio"],
        },
    ]);
}

#[test]
fn zeroes_go_on_to_the_end_of_the_last_sector() {
    let mut wrong = String::new();
    let prepared = Place::new(false);
    for (name, data, len) in [("dense.raw", 70_001, 70_001), ("holes.raw", 65_536, 196_609)] {
        let file = std::fs::File::create(prepared.path().join(name)).unwrap();
        file.write_all_at(&vec![3; data], 0).unwrap();
        file.set_len(len).unwrap();
    }
    for name in ["dense.raw", "holes.raw"] {
        for image in [
            format!("driver=file,filename={name}"),
            format!(
                "driver=raw,file.driver=blkdebug,file.align=4096,file.image.driver=file,file.image.filename={name}"
            ),
            format!("driver=blkdebug,align=4096,image.driver=file,image.filename={name}"),
        ] {
            let line = format!("qemu-img map --output=json --image-opts {image}");
            let [ours, theirs] = [true, false].map(|ours| {
                let place = Place::new(ours);
                prepared.copy_to(&place);
                place.run(&line)
            });
            if ours != theirs {
                wrong += &format!("\n{line}\n  ours:   {ours:?}\n  theirs: {theirs:?}\n");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn a_commit_that_fails_at_an_event_is_not_called_done() {
    const CHAIN: &[&str] = &[
        "qemu-img create -q -f qcow2 b.qcow2 8M",
        "qemu-img create -q -f qcow2 -F qcow2 -b b.qcow2 i.qcow2",
        "qemu-io -c 'write -q -P9 0 2M' i.qcow2",
    ];
    compare(&[
        Case {
            prepare: CHAIN,
            line: "qemu-img commit blkdebug:c.conf:i.qcow2",
            events: &[
                "read_aio",
                "write_aio",
                "empty_image_prepare",
                "l1_update",
                "refblock_alloc",
                "reftable_update",
                "none/block-status",
            ],
        },
        Case {
            prepare: &[
                "qemu-img create -q -f qcow2 i.qcow2 8M",
                "qemu-img create -q -f qcow2 -F qcow2 -b i.qcow2 t.qcow2",
                "qemu-io -c 'write -q -P9 0 2M' t.qcow2",
                "qemu-img rebase -u -F qcow2 -b blkdebug:c.conf:i.qcow2 t.qcow2",
            ],
            line: "qemu-img commit -f qcow2 t.qcow2",
            events: &["write_aio", "l2_update", "cluster_alloc", "flush_to_disk", "cluster_free"],
        },
        Case {
            prepare: &[
                "qemu-img create -q -f raw i.raw 8M",
                "qemu-img create -q -f qcow2 -F raw -b i.raw t.qcow2",
                "qemu-io -c 'write -q -P9 0 2M' t.qcow2",
                "qemu-img rebase -u -F raw -b blkdebug:c.conf:i.raw t.qcow2",
            ],
            line: "qemu-img commit -f qcow2 t.qcow2",
            events: &["write_aio", "write_aio/write", "pwritev", "flush_to_os", "flush_to_disk"],
        },
    ]);
}
