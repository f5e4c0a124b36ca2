//! A guest under load across live snapshots of its qcow2 overlay, one of which is then reverted to.

use super::boot::{Guest, until_stopped};
use super::server::output_of;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::Daemon;
use serde_json::json;
use std::time::Duration;

const VUBLK: &str = env!("CARGO_BIN_EXE_vublk");

/// A daemon with the image of this folder.
fn serve(dir: tempfile::TempDir) -> Daemon {
    let disk = [
        "--blockdev",
        "driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename=DIR/disk.qcow2,\
         file.discard=unmap",
        "--export",
        "type=vhost-user-blk,id=e0,node-name=d0,writable=on,num-queues=2,addr.type=unix,\
         addr.path=DIR/e0.sock",
    ];
    Daemon::start_in(dir, &[VUBLK, "daemon"], &[&MONITOR[..], &disk].concat())
}

#[test]
fn a_guest_under_load_loses_nothing_across_live_snapshots_and_is_turned_back_to_one() {
    let images = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = images.path().join("disk.qcow2");
    std::fs::File::create(&image).unwrap().set_len(96 << 20).unwrap();
    super::overlay(&image);
    let image = image.to_str().unwrap();
    // The daemon's folder goes with it.
    let links = || {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(image, dir.path().join("disk.qcow2")).unwrap();
        dir
    };
    let daemon = serve(links());
    let load = until_stopped(
        "fio --name=load --directory=/mnt --size=8m --numjobs=2 --rw=randwrite --bsrange=4k-64k \
         --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --randrepeat=0 \
         --loops=2",
    );
    let before = r#"
        mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt || exit 1
        dd if=/dev/urandom of=/mnt/kept bs=1M count=8 conv=fsync 2>/dev/null
        echo "sum $(sha256sum </mnt/kept | cut -d' ' -f1)"
        sync
    "#;
    let after = r#"
        rm /mnt/kept
        dd if=/dev/urandom of=/mnt/other bs=1M count=16 conv=fsync 2>/dev/null
        umount /mnt && e2fsck -fn /dev/vda || exit 1
        echo "errors $(dmesg | grep -c 'I/O error')"
    "#;
    let mut guest = Guest::new()
        .cpus(2)
        .with_fio()
        .for_more(Duration::from_secs(120))
        .disk_with_queues(&daemon.path("e0.sock"), 2)
        .boot(&[before, &load, after].concat());
    guest.wait_for("loading");
    guest.wait_for("round");
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut make = |name: &str| {
        let arguments = json!({"device": "d0", "name": name});
        client.run("blockdev-snapshot-internal-sync", arguments);
    };
    make("wanted");
    for n in 0..4 {
        make(&format!("more{n}"));
    }
    for n in [1, 0, 3] {
        let arguments = json!({"device": "d0", "name": format!("more{n}")});
        client.run("blockdev-snapshot-delete-internal-sync", arguments);
    }
    guest.wait_for("round");
    guest.say("go");
    let console = guest.finish();
    assert_eq!(console.value("errors"), "0");
    drop(client);
    daemon.end();
    assert!(output_of("qemu-img", ["check", image]).contains("No errors were found"));
    let list = output_of(VUBLK, ["snapshot", "-l", image]);
    assert_eq!(list, output_of("qemu-img", ["snapshot", "-l", image]));
    assert_eq!(list.lines().count(), 4, "{list}");

    output_of(VUBLK, ["snapshot", "-a", "wanted", image]);
    output_of(VUBLK, ["snapshot", "-d", "more2", image]);
    assert!(output_of("qemu-img", ["check", image]).contains("No errors were found"));
    let daemon = serve(links());
    let again = Guest::new().disk_with_queues(&daemon.path("e0.sock"), 2).run(
        r#"
        mount -t ext4 /dev/vda /mnt || exit 1
        echo "sum $(sha256sum </mnt/kept | cut -d' ' -f1)"
        [ -e /mnt/other ] && exit 1
        umount /mnt && e2fsck -fn /dev/vda || exit 1
        "#,
    );
    assert_eq!(again.value("sum"), console.value("sum"));
    daemon.end();
    assert!(output_of("qemu-img", ["check", image]).contains("No errors were found"));
}
