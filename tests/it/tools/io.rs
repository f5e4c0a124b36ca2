//! qemu-io's commands beyond reading and writing: breakpoints, copy-on-read, `reopen`.

use super::{Place, assert_same_disks, fixture};

const PREPARE: &[&str] = &[
    "qemu-img create -q -f qcow2 b.qcow2 1M",
    "qemu-img create -q -f qcow2 -b a.raw -F raw ov.qcow2",
];

#[test]
fn requests_stop_at_breakpoints_until_they_are_reported_to_go_on() {
    let mut lines = Vec::new();
    for event in [
        "write_aio",
        "cluster_alloc",
        "l1_update",
        "l2_alloc_write",
        "cow_read",
        "cow_write",
        "refblock_alloc",
        "refblock_load",
    ] {
        lines.push(format!(
            "qemu-io -c 'break {event} A' -c 'aio_write 64k 4k' -c 'wait_break A' -c 'resume A' -c aio_flush blkdebug::ov.qcow2"
        ));
    }
    lines.push("qemu-io -c 'break read_backing_aio A' -c 'aio_read 64k 4k' -c 'wait_break A' -c 'resume A' -c aio_flush blkdebug::ov.qcow2".into());
    lines.push(
        "qemu-io -c 'break write_compressed A' -c 'write -c 0 64k' -c 'remove_break A' b.qcow2"
            .into(),
    );
    for line in [
        "-c 'break write_aio A' -c 'aio_write 0 64k' -c 'wait_break A' -c 'write 128k 64k' -c 'resume A' -c aio_flush blkdebug::b.qcow2",
        "-c 'break bogus A' -c 'resume B' -c 'remove_break C' -c 'break l2_load L' -c 'remove_break L' blkdebug::b.qcow2",
        "-c 'break write_aio A' -c 'resume A' -c 'remove_break A' b.qcow2",
        "-c 'break write_aio A' -c 'aio_write 0 64k' -c 'wait_break A' -c 'remove_break A' -c aio_flush blkdebug::b.qcow2",
        "-f raw -c 'break pwritev A' -c 'aio_write 0 64k' -c 'wait_break A' -c 'resume A' -c aio_flush blkdebug::b.raw",
    ] {
        lines.push(format!("qemu-io {line}"));
    }
    assert_same_disks(PREPARE, &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn what_is_read_from_a_backing_file_is_copied() {
    assert_same_disks(
        PREPARE,
        &[
            "qemu-io -C -c 'read -P 7 64k 64k' -c map ov.qcow2",
            "qemu-io -C -r -c 'read 0 64k' ov.qcow2",
            "qemu-io -c 'open -C ov.qcow2' -c 'read 128k 4k' -c map",
            "qemu-io -C -f raw -c 'read 0 64k' b.raw",
            "qemu-io -C --image-opts -c 'read 64k 64k' -c 'write 128k 4k' -c 'aio_read 512k 64k' -c aio_flush -c map driver=qcow2,file.filename=ov.qcow2",
            "qemu-io -C -s -c 'read 64k 64k' -c map ov.qcow2",
            "qemu-io -c 'open -C -r ov.qcow2'",
            "qemu-io -c 'open -k b.qcow2' -c length",
            "qemu-io -c 'open -n -k b.qcow2' -c length",
            "qemu-io -k -c length b.qcow2",
            "qemu-io -i native -c length b.qcow2",
            "qemu-io -i native -n -c length b.qcow2",
        ],
    );
}

#[test]
fn an_image_is_reopened_with_other_options() {
    let mut lines = Vec::new();
    for options in [
        "-o lazy-refcounts=on",
        "-o bogus=on",
        "-o l2-cache-size=1M",
        "-o l2-cache-size=x",
        "-o read-only=on",
        "-o read-only=off",
        "-o discard=ignore",
        "-o detect-zeroes=on",
        "-o pass-discard-request=off",
        "-o driver=raw",
        "-c writeback -o cache.direct=on",
        "-r",
        "-r -o read-only=off",
        "-r -w",
        "-o l2-cache-size=1,cache-size=2,refcount-cache-size=3",
    ] {
        lines.push(format!(
            "qemu-io -c 'reopen {options}' -c 'write -P 0 0 64k' -c 'discard 64k 64k' -c map b.qcow2"
        ));
    }
    lines.push("qemu-io -r -c 'reopen -w' -c 'write 0 64k' b.qcow2".into());
    assert_same_disks(PREPARE, &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn breakpoints_that_nothing_can_reach_hold_nobody_up() {
    let place = Place::new(true);
    fixture(place.path());
    let commands = "-c 'break write_aio A' -c 'wait_break A' -c 'aio_write 0 64k'";
    let ended = place.run(&format!("qemu-io -f raw {commands} blkdebug::b.raw"));
    let wanted = "Could not wait for breakpoint A: No such file or directory\n";
    assert!(ended.stdout.starts_with(wanted), "{ended:?}");
    assert_eq!(ended.code, Some(1));
}

#[test]
fn the_state_of_a_machine_lies_behind_the_disk() {
    let shared = "qemu-io -c 'write -b -P 7 0 192k' b.qcow2 && qemu-img snapshot -c one b.qcow2";
    let partly = "qemu-io -c 'write -b -P 9 64k 512' -c 'read -b -P 9 64k 512' -c 'read -b -P 7 66048 65024' b.qcow2";
    let whole = "qemu-img check b.qcow2 && qemu-img snapshot -a one b.qcow2 && qemu-io -c 'read -b -P 7 0 192k' -c 'read -P 0 0 1M' b.qcow2";
    assert_same_disks(
        PREPARE,
        &[
            "qemu-io -c 'write -b -P 7 0 192k' -c 'read -b -P 7 64k 64k' -c 'read -b -P 0 1M 64k' -c map b.qcow2",
            "qemu-io -c 'write -b -P 7 0 64k' -c 'write -b -P 8 512 512' b.qcow2 && qemu-io -c 'read -b -P 8 512 512' -c 'read -b -P 7 0 512' -c 'read -b -P 7 1k 63k' b.qcow2 && qemu-img check b.qcow2",
            "qemu-io -c 'write -b -P 7 4k 4k' -c 'read -b -P 0 0 4k' -c 'read -b -P 0 8k 56k' ov.qcow2 && qemu-img check ov.qcow2",
            "qemu-io -c 'write -b -P 7 600M 4k' -c 'read -b -P 7 600M 4k' b.qcow2 && qemu-img check b.qcow2",
            "qemu-io -c 'write -b 1 512' -c 'write -b 0 100' -c 'read -b 3 512' -c 'read -b 0 1' b.qcow2",
            "qemu-io -c 'write -b -z 0 512' -c 'write -b -f 0 512' -c 'read -b -q 0 512' b.qcow2",
            "qemu-io -r -c 'write -b 0 512' b.qcow2",
            "qemu-io -f raw -c 'write -b 0 512' -c 'read -b 0 512' b.raw",
            // Shared with a snapshot, it is copied where it is written.
            &format!("{shared} && {partly} && {whole}"),
        ],
    );
}
