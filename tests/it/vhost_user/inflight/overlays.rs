//! Kills of daemons that serve a qcow2 overlay whose tables were not yet written.

use super::*;

/// An overlay of a file that is full of one byte.
fn overlay() -> Daemon {
    overlay_with("")
}

/// The same, with more options of its export.
fn overlay_with(options: &str) -> Daemon {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::write(dir.path().join("below.raw"), vec![7; SIZE as usize]).unwrap();
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "below.raw", "disk.qcow2"])
        .current_dir(dir.path())
        .status();
    assert!(made.unwrap().success());
    let node = "driver=qcow2,node-name=d0,file.driver=file,file.filename=DIR/disk.qcow2";
    let export = format!("{},writable=on{options}", export_of("d0", 0));
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    Daemon::start_in(dir, &program, &["--blockdev", node, "--export", &export])
}

/// What of an image is its own, by qemu-img, which finds nothing worse in it than leaks.
fn allocated(image: &std::path::Path) -> String {
    qemu("qemu-img", &["check", "-f", "qcow2"], image, &[0, 3]);
    qemu("qemu-img", &["map", "-f", "qcow2"], image, &[0])
}

#[test]
fn what_a_guest_wrote_over_a_backing_file_is_there_although_its_table_was_never_written() {
    let mut daemon = overlay();
    let path = daemon.path("disk.qcow2");
    let mut disk = daemon.open(&options(1));
    let clusters = SIZE / (64 << 10);
    let block = |n: u64| stamped(n * 128 + 8, n + 1);
    for n in 0..clusters {
        disk.write(n * 128 + 8, &block(n)).unwrap();
    }
    kill(&mut daemon);
    assert!(!allocated(&path).contains("disk.qcow2"), "the table waits for a flush");
    daemon.restart();
    disk.reconnect().unwrap();
    daemon.wait_log(&format!("{clusters} clusters that were written before"), 1);
    let mut found = vec![0; 64 << 10];
    for n in 0..clusters {
        disk.read(n * 128, &mut found).unwrap();
        let mut wanted = vec![7; 64 << 10];
        wanted[4096..4096 + BLOCK].copy_from_slice(&block(n));
        assert!(found == wanted, "cluster {n}");
    }
    kill(&mut daemon);
    assert!(allocated(&path).contains("disk.qcow2"), "they are in the table");
}

#[test]
fn who_has_changed_an_image_meanwhile_keeps_the_guest_from_going_on_with_it() {
    let mut daemon = overlay();
    let mut disk = daemon.open(&options(1));
    disk.write(0, &[1; BLOCK]).unwrap();
    kill(&mut daemon);
    let write = ["-f", "qcow2", "-c", "write -P 9 0 64k"];
    qemu("qemu-io", &write, &daemon.path("disk.qcow2"), &[0]);
    daemon.restart();
    disk.reconnect().unwrap_err();
    let says = "what was written at 0x0 before the daemon was killed cannot be taken up: the image \
                has changed since";
    daemon.wait_log(says, 1);
    daemon.wait_log("accept the loss (x-block-export-accept-loss, or a start with accept-loss)", 1);
    // A guest that has not seen the disk before is served.
    let mut found = vec![0; BLOCK];
    daemon.open(&options(1)).read(0, &mut found).unwrap();
    assert_eq!(found, [9; BLOCK]);
}

#[test]
fn an_operator_who_accepts_the_loss_lets_a_guest_go_on_with_an_image_that_was_changed_meanwhile() {
    let mut daemon = overlay_with(",accept-loss=on");
    let path = daemon.path("disk.qcow2");
    let mut disk = daemon.open(&options(1));
    disk.write(0, &[1; BLOCK]).unwrap();
    disk.write(1 << 10, &[2; BLOCK]).unwrap();
    kill(&mut daemon);
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 64k"], &path, &[0]);
    daemon.restart();
    disk.reconnect().unwrap();
    daemon.wait_log("2 clusters that were written before the daemon was killed are given up", 1);
    let mut found = vec![0; BLOCK];
    for (sector, holds) in [(0, 9), (1 << 10, 7)] {
        disk.read(sector, &mut found).unwrap();
        assert_eq!(found, [holds; BLOCK], "sector {sector}");
    }
    disk.write(1 << 10, &[3; BLOCK]).unwrap();
    drop(disk);
    daemon.server.signal(libc::SIGTERM).unwrap();
    assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
    let said = qemu("qemu-img", &["check", "-f", "qcow2"], &path, &[0]);
    assert!(said.contains("No errors were found"), "{said}");
}
