//! Migration of a guest under load between two QEMU processes on one shared image.
//!
//! Each QEMU has a vublk of its own, and the image's locks move with the guest.

use super::boot::{Guest, RunningGuest, fio_on_disk, until_stopped};
use super::server::{Server, outcome_of, output_of, vublk_serve, vublk_serve_as};
use super::{WRITE_LOCK, images, overlay};
use std::path::Path;
use std::time::Duration;

/// Boots a guest that writes and verifies over two queues, and waits until it does.
fn loaded(server: &Server) -> RunningGuest {
    let guest = Guest::new().with_fio().for_more(Duration::from_secs(180));
    let guest = guest.disk_with_queues(server.socket(0), 2);
    let script = until_stopped(&fio_on_disk(2, 2))
        + r#"
        dmesg | grep -E 'I/O error|is not a head'
        # What was read by other ways than fio's, too.
        mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null
        umount /mnt && e2fsck -fn /dev/vda || exit 1
        echo "sum $(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum)"
        "#;
    let mut guest = guest.boot(&script);
    guest.wait_for("loading");
    guest.wait_for("round");
    guest
}

/// Ends the load. The guest's disk and the image are the same.
fn end(mut guest: RunningGuest, format: &str, image: &Path) {
    guest.say("go");
    let console = guest.finish();
    for error in ["I/O error", "is not a head"] {
        assert!(!console.text().contains(error), "{error}:\n{}", console.text());
    }
    let on_host = image.with_extension("copy");
    let [from, to] = [image, &on_host].map(|path| path.to_str().unwrap());
    // Whoever serves it does not mind.
    output_of("qemu-img", ["convert", "-U", "-f", format, "-O", "raw", from, to]);
    let on_host = output_of("sha256sum", [on_host]);
    assert_eq!(on_host.split(' ').next(), console.value("sum").split(' ').next());
}

/// Nobody has the image: it can be opened for writing.
fn assert_free(format: &str, image: &Path) {
    output_of("qemu-io", ["-f", format, "-c", "read 0 512", image.to_str().unwrap()]);
}

/// Somebody has the image. Those who only look at it may.
fn assert_taken(format: &str, image: &Path) {
    let image = image.to_str().unwrap();
    let (opened, said) = outcome_of("qemu-io", ["-f", format, "-c", "read 0 512", image]);
    assert!(!opened && said.contains(WRITE_LOCK), "{said}");
    let info = output_of("qemu-img", ["info", "-U", "-f", format, image]);
    assert!(info.contains("virtual size: 64 MiB"), "{info}");
}

#[test]
fn a_guest_under_load_moves_to_another_host_and_back() {
    moves("raw");
}

#[test]
fn a_guest_on_an_overlay_moves_to_another_host_and_back() {
    moves("qcow2");
}

fn moves(format: &str) {
    let (_dir, [image]) = images(["disk"], 64);
    if format == "qcow2" {
        overlay(&image);
    }
    let mut here = vublk_serve_as(format, &[&image], &["-v"]).start();
    // The image is locked, and it starts all the same.
    let mut there = vublk_serve_as(format, &[&image], &["-v", "--incoming"]).start();
    let mut guest = loaded(&here);
    assert_taken(format, &image);
    guest.migrate(here.socket(0), there.socket(0));
    here.wait_for("the disk is given up", 1);
    guest.wait_for("round");
    guest.wait_for("round");
    assert_taken(format, &image);
    guest.migrate(there.socket(0), here.socket(0));
    there.wait_for("the disk is given up", 1);
    guest.wait_for("round");
    guest.wait_for("round");
    assert_taken(format, &image);
    end(guest, format, &image);
    here.stop();
    // The other daemon runs still, and holds nothing.
    assert_free(format, &image);
    there.stop();
    if format == "qcow2" {
        output_of("qemu-img", ["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
    }
}

#[test]
fn a_migration_that_is_called_off_leaves_the_guest_its_disk() {
    let (_dir, [image]) = images(["disk"], 64);
    let mut here = vublk_serve(&[&image], &["-v"]).start();
    let there = vublk_serve(&[&image], &["-v", "--incoming"]).start();
    let mut guest = loaded(&here);
    guest.migrate_and_cancel(here.socket(0), there.socket(0));
    guest.wait_for("round");
    assert_taken("raw", &image);
    assert!(!here.log().contains("given up"), "{}", here.log());
    // The next attempt goes through, and leaves nothing behind here.
    guest.migrate(here.socket(0), there.socket(0));
    here.wait_for("the disk is given up", 1);
    guest.wait_for("round");
    end(guest, "raw", &image);
    there.stop();
    assert_free("raw", &image);
    here.stop();
}
