//! A real Linux guest on disks that `vublk serve` serves.
//!
//! Here is what only a real front end and a real block layer show; the protocol's corners have tests of their own. A
//! boot takes seconds, so one boot carries several checks.

#[allow(dead_code, reason = "shared with tests/soak, which uses more of it")]
pub mod boot;
mod migration;
mod replug;
pub mod server;
mod snapshots;
mod under_load;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::failing::small::Small;
use boot::Guest;
use server::{
    outcome_of, output_of, qemu_storage_daemon, vublk_serve, vublk_serve_as, vublk_serve_in,
};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A folder with an empty, sparse image of `mib` MiB for each name. It is beside what cargo builds: the system's
/// temporary folder may be of a kind that knows no O_DIRECT.
fn images<const N: usize>(names: [&str; N], mib: u64) -> (TempDir, [PathBuf; N]) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let paths = names.map(|name| dir.path().join(name));
    for path in &paths {
        File::create(path).unwrap().set_len(mib * MIB).unwrap();
    }
    (dir, paths)
}

/// Bytes of the host's storage that a file takes.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn fio_verifies_what_it_wrote_over_one_two_and_four_queues() {
    let (_dir, [one, two, four]) = images(["one", "two", "four"], 64);
    let server = vublk_serve(&[&one, &two, &four], &[]).start();
    let console = Guest::new()
        .cpus(4)
        .with_fio()
        .disk_with_queues(server.socket(0), 1)
        .disk_with_queues(server.socket(1), 2)
        .disk_with_queues(server.socket(2), 4)
        .run(
            r#"
            for disk in vda vdb vdc; do
                # One job per processor, so that every queue carries requests.
                fio --name=$disk --filename=/dev/$disk --size=16m --offset_increment=16m --numjobs=4 \
                    --cpus_allowed=0-3 --cpus_allowed_policy=split --rw=randwrite --bsrange=512-128k --blockalign=512 \
                    --ioengine=libaio --iodepth=16 --direct=1 --fsync=32 --verify=crc32c --verify_fatal=1 || exit 1
                echo "queues $(ls /sys/block/$disk/mq | wc -l)"
            done
            # Each queue has an interrupt of its own: name and count summed over the processors.
            awk '/virtio[0-9]+-req/ { print "interrupts " $NF " " $2 + $3 + $4 + $5 }' /proc/interrupts
            "#,
        );
    assert_eq!(console.values("queues").collect::<Vec<_>>(), ["1", "2", "4"]);
    let used = console.values("interrupts").filter(|line| !line.ends_with(" 0")).count();
    assert_eq!(used, 1 + 2 + 4, "some queue carried no request:\n{}", console.text());
    server.stop();
}

#[test]
fn discard_and_fstrim_in_the_guest_free_blocks_of_the_host() {
    let (_dir, [image]) = images(["disk"], 256);
    let server = vublk_serve(&[&image], &["--discard", "unmap"]).start();
    let mut guest = Guest::new().disk(server.socket(0)).boot(
        r#"
        set -e
        sum() { dd if=/dev/vda bs=1M iflag=direct skip=$1 count=$2 2>/dev/null | sha256sum; }
        dd if=/dev/urandom of=/dev/vda bs=1M count=64 conv=fsync 2>/dev/null
        before="$(sum 0 16) $(sum 48 16)"
        echo written; read -r go
        blkdiscard -o 16M -l 32M /dev/vda
        [ "$(sum 16 32)" = "$(dd if=/dev/zero bs=1M count=32 2>/dev/null | sha256sum)" ]
        [ "$(sum 0 16) $(sum 48 16)" = "$before" ]
        echo discarded; read -r go
        blkdiscard /dev/vda
        mke2fs -q -t ext4 /dev/vda
        mount -t ext4 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/file bs=1M count=64 conv=fsync 2>/dev/null
        echo filled; read -r go
        rm /mnt/file
        sync
        fstrim /mnt
        echo trimmed; read -r go
        umount /mnt
        "#,
    );
    let mut allocated_after = |word| {
        guest.wait_for(word);
        let bytes = allocated(&image);
        guest.say("go");
        bytes
    };
    let written = allocated_after("written");
    let discarded = allocated_after("discarded");
    let filled = allocated_after("filled");
    let trimmed = allocated_after("trimmed");
    guest.finish();
    server.stop();
    assert!(written >= 64 * MIB, "64 MiB were written, {written} bytes are allocated");
    // The host's file system may need a block more to tell where the hole is.
    assert!(
        discarded <= written - 31 * MIB,
        "32 MiB were discarded: {written} became {discarded} bytes"
    );
    assert!(filled >= 64 * MIB, "a file of 64 MiB was written, {filled} bytes are allocated");
    // The file system itself may move a little meanwhile.
    assert!(
        trimmed <= filled - 60 * MIB,
        "a file of 64 MiB was trimmed: {filled} became {trimmed} bytes"
    );
}

#[test]
fn a_read_only_disk_is_read_and_mounted_and_takes_flushes_but_no_writes() {
    let (dir, [image]) = images(["disk"], 64);
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let content: String = (0..200_000).map(|i| format!("line {i}\n")).collect();
    fs::write(tree.join("file"), content).unwrap();
    let sum = output_of("sha256sum", [tree.join("file")]);
    output_of(
        "mke2fs",
        ["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), image.to_str().unwrap()],
    );
    let image_sum = output_of("sha256sum", [&image]);

    let server = vublk_serve(&[&image], &["--read-only"]).start();
    let console = Guest::new().disk(server.socket(0)).run(
        r#"
        echo "ro $(cat /sys/block/vda/ro)"
        mount -o ro -t ext4 /dev/vda /mnt || exit 1
        echo "sum $(sha256sum </mnt/file | cut -d' ' -f1)"
        umount /mnt
        dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && echo "written yes"
        mount -o rw -t ext4 /dev/vda /mnt 2>/dev/null && grep -q ' /mnt ext4 rw' /proc/mounts && echo "written yes"
        sync /dev/vda || exit 1
        echo "flushes $(awk '{ print $16 }' /sys/block/vda/stat)"
        dmesg | grep 'I/O error'
        true
        "#,
    );
    server.stop();
    assert_eq!(console.value("ro"), "1");
    assert_eq!(console.value("sum"), sum.split(' ').next().unwrap());
    assert_eq!(console.values("written").count(), 0, "a write went through:\n{}", console.text());
    assert_ne!(console.value("flushes"), "0", "no flush was sent:\n{}", console.text());
    assert!(!console.text().contains("I/O error"), "a request failed:\n{}", console.text());
    assert_eq!(output_of("sha256sum", [&image]), image_sum, "the image changed");
}

#[test]
fn two_disks_of_one_daemon_keep_their_own_data_when_the_front_end_goes_and_a_new_one_comes() {
    let (_dir, [a, b]) = images(["a", "b"], 32);
    let server = vublk_serve(&[&a, &b], &[]).start();
    // Both disks are written at the same time. The guest then powers off without closing anything.
    let first = Guest::new().disk(server.socket(0)).disk(server.socket(1)).run(
        r#"
        for disk in vda vdb; do
            dd if=/dev/urandom of=/dev/$disk bs=64k count=512 oflag=direct 2>/dev/null &
        done
        wait
        for disk in vda vdb; do echo "$disk $(sha256sum </dev/$disk)"; done
        "#,
    );
    // The second one has as many queues for a disk as QEMU would give 66 processors.
    let second = Guest::new().disk(server.socket(0)).disk_with_queues(server.socket(1), 66).run(
        r#"
        for disk in vda vdb; do echo "$disk $(sha256sum </dev/$disk)"; done
        dd if=/dev/vda of=/dev/vdb bs=1M count=1 conv=fsync 2>/dev/null
        "#,
    );
    server.stop();
    for (disk, image) in [("vda", &a), ("vdb", &b)] {
        assert_eq!(first.value(disk), second.value(disk), "{disk} changed between the front ends");
        assert_eq!(fs::metadata(image).unwrap().len(), 32 * MIB);
    }
    assert_ne!(first.value("vda"), first.value("vdb"));
    let on_host = output_of("sha256sum", [&a]);
    assert_eq!(
        on_host.split(' ').next(),
        first.value("vda").split(' ').next(),
        "the image differs from the disk"
    );
    let (a, b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
    assert!(a[..MIB as usize] == b[..MIB as usize], "the second front end's write is missing");
}

#[test]
fn a_file_system_made_by_the_guest_survives_remounts_and_is_clean_on_the_host() {
    let (_dir, [image]) = images(["disk"], 256);
    let server = vublk_serve(&[&image], &["--serial", "test-disk-7"]).start();
    let console = Guest::new().disk(server.socket(0)).run(
        r#"
        set -e
        echo "serial $(cat /sys/block/vda/serial)"
        echo "cache $(cat /sys/block/vda/queue/write_cache)"
        mke2fs -q -t ext4 /dev/vda
        mount -t ext4 /dev/vda /mnt
        mkdir /tmp/files
        for i in $(seq 40); do dd if=/dev/urandom of=/tmp/files/$i bs=${i}k count=25 2>/dev/null; done
        (cd /tmp/files && sha256sum *) >/tmp/sums
        cp /tmp/files/* /mnt/
        sync
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        mount -t ext4 /dev/vda /mnt
        cd /mnt && sha256sum -c /tmp/sums | grep -vc ': OK$' | sed 's/^/wrong /'
        cd / && umount /mnt
        e2fsck -fn /dev/vda
        "#,
    );
    server.stop();
    assert_eq!(console.value("serial"), "test-disk-7");
    // A guest that sees write through sends no flush, and its syncs mean nothing.
    assert_eq!(console.value("cache"), "write back");
    assert_eq!(console.value("wrong"), "0");
    output_of("e2fsck", ["-fn", image.to_str().unwrap()]);
}

#[test]
fn every_fsync_in_the_guest_reaches_the_file() {
    let (_dir, [image]) = images(["disk"], 16);
    let server = vublk_serve(&[&image], &["-v"]).start();
    Guest::new().disk(server.socket(0)).run(
        r#"
        for i in $(seq 20); do
            dd if=/dev/urandom of=/dev/vda bs=4k count=1 seek=$i conv=notrunc,fsync 2>/dev/null || exit 1
        done
        "#,
    );
    let log = server.stop();
    let flushes: u32 = log
        .split_whitespace()
        .find_map(|word| word.strip_prefix("flushes=")?.parse().ok())
        .unwrap_or_else(|| panic!("no flushes=N in the daemon's messages:\n{log}"));
    assert!(flushes >= 20, "20 fsyncs became {flushes} flushes");
}

/// Makes a qcow2 overlay instead of an image, which becomes its backing file and is random bytes.
fn overlay(image: &Path) {
    let base = image.with_extension("base");
    let mut bytes = vec![0; fs::metadata(image).unwrap().len() as usize];
    fastrand::fill(&mut bytes);
    fs::write(&base, bytes).unwrap();
    let [base, image] = [&base, image].map(|path| path.to_str().unwrap());
    output_of("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image]);
}

#[test]
fn what_a_guest_writes_to_a_snapshot_is_gone_with_the_daemon() {
    let (_dir, [raw, qcow2]) = images(["raw", "qcow2"], 16);
    overlay(&qcow2);
    for (format, image) in [("raw", &raw), ("qcow2", &qcow2)] {
        let before = fs::read(image).unwrap();
        let server = vublk_serve_as(format, &[image], &["--snapshot"]).start();
        let console = Guest::new().disk(server.socket(0)).run(
            r#"
            mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt || exit 1
            dd if=/dev/urandom of=/mnt/file bs=1M count=4 conv=fsync 2>/dev/null
            sum=$(sha256sum </mnt/file)
            umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /mnt || exit 1
            [ "$sum" = "$(sha256sum </mnt/file)" ] && echo "kept yes"
            "#,
        );
        assert_eq!(console.value("kept"), "yes");
        server.stop();
        assert!(fs::read(image).unwrap() == before, "{format}: the image was written to");
    }
}

#[test]
fn a_guest_waits_for_room_on_a_full_host_and_sees_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small");
    fs::create_dir(&path).unwrap();
    let small = Small::mount(&path, 64);
    let image = small.path.join("disk");
    File::create(small.file("disk")).unwrap().set_len(64 * MIB).unwrap();
    small.fill(64, 8 << 10);
    let options = ["--werror", "enospc", "--rerror", "stop", "--cache", "writeback", "-v"];
    let mut server = vublk_serve_in(&small.enter(), &[&image], &options).start();
    let mut guest = Guest::new().reconnecting_disk(server.socket(0), 2).boot(
        r#"
        set -e
        dd if=/dev/urandom of=/tmp/data bs=1M count=24 2>/dev/null
        echo writing
        dd if=/tmp/data of=/dev/vda bs=1M oflag=direct 2>/dev/null
        echo written
        echo "data $(sha256sum </tmp/data)"
        echo 3 >/proc/sys/vm/drop_caches
        echo "disk $(dd if=/dev/vda bs=1M count=24 2>/dev/null | sha256sum)"
        dmesg | grep 'I/O error' || true
        "#,
    );
    guest.wait_for("writing");
    server.wait_for("No space left on device", 1);
    server.wait_for("held, and tried again in 1 s", 1);
    // It holds on over a kill.
    server.kill_and_restart();
    server.wait_for("requests are begun again", 1);
    server.wait_for("held, and tried again in 1 s", 2);
    small.free();
    guest.wait_for("written");
    let console = guest.finish();
    assert_eq!(console.value("data"), console.value("disk"));
    assert!(!console.text().contains("I/O error"), "a request failed:\n{}", console.text());
    server.stop();
}

#[test]
fn a_guest_that_is_reset_while_requests_are_held_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small");
    fs::create_dir(&path).unwrap();
    let small = Small::mount(&path, 16);
    let image = small.path.join("disk");
    File::create(small.file("disk")).unwrap().set_len(64 * MIB).unwrap();
    small.fill(16, 1 << 10);
    let options = ["--werror", "stop", "--cache", "writeback", "-v"];
    let mut server = vublk_serve_in(&small.enter(), &[&image], &options).start();
    let guest =
        Guest::new().reconnecting_disk(server.socket(0), 2).qemu(&["-action", "reboot=reset"]);
    let mut guest = guest.boot(
        r#"
        set -e
        if dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | grep -q second; then
            for i in $(seq 64); do
                dd if=/dev/vda of=/dev/null bs=4k count=8 skip=$i iflag=direct 2>/dev/null
                dd if=/dev/zero of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null
            done
            echo "errors $(dmesg | grep -c 'I/O error')" || true
            exit 0
        fi
        echo second | dd of=/dev/vda bs=512 count=1 conv=sync oflag=direct 2>/dev/null
        dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=8 oflag=direct 2>/dev/null &
        echo writing; read -r go
        echo b >/proc/sysrq-trigger
        sleep 60
        "#,
    );
    guest.wait_for("writing");
    server.wait_for("held, and tried again", 1);
    guest.say("go");
    let console = guest.finish();
    assert_eq!(console.value("errors"), "0");
    // What the guest before the reset wanted is not done on the rings of the one after it.
    assert!(!server.log().contains("begun again"), "{}", server.log());
    small.free();
    server.stop();
}

/// What QEMU says when it wants to write and another holder does not share that.
const WRITE_LOCK: &str = "Failed to get \"write\" lock";

/// What QEMU says when it does not share writing and another holder writes. qemu-storage-daemon's
/// exports do share, so this is how a server that does not learns of one.
const SHARED_WRITE_LOCK: &str = "Failed to get shared \"write\" lock";

#[test]
fn qemu_is_refused_an_image_that_vublk_serves() {
    let (_dir, [image]) = images(["disk"], 1);
    let path = image.to_str().unwrap();
    let server = vublk_serve(&[&image], &[]).start();
    let said = qemu_storage_daemon(&image, true).refused();
    assert!(said.contains(WRITE_LOCK), "{said}");
    let (written, said) = outcome_of("qemu-io", ["-f", "raw", "-c", "write 0 512", path]);
    assert!(!written && said.contains(WRITE_LOCK), "{said}");
    server.stop();
    output_of("qemu-io", ["-f", "raw", "-c", "write 0 512", path]);
}

#[test]
fn vublk_is_refused_an_image_that_qemu_serves() {
    let (_dir, [image]) = images(["disk"], 1);
    let server = qemu_storage_daemon(&image, true).start();
    let said = vublk_serve(&[&image], &[]).refused();
    assert!(said.contains(SHARED_WRITE_LOCK), "{said}");
    assert!(said.contains("\nIt is held by qemu-storage-da (pid "), "{said}");
    server.stop();
    vublk_serve(&[&image], &[]).start().stop();
}

#[test]
fn vublk_and_qemu_share_an_image_that_both_only_read() {
    let (_dir, [image]) = images(["disk"], 1);
    let ours = vublk_serve(&[&image], &["--read-only"]).start();
    let theirs = qemu_storage_daemon(&image, false).start();
    ours.stop();
    let ours = vublk_serve(&[&image], &["--read-only"]).start();
    theirs.stop();
    let said = qemu_storage_daemon(&image, true).refused();
    assert!(said.contains(WRITE_LOCK), "{said}");
    ours.stop();
}
