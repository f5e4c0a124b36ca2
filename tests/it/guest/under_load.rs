//! Guests that write and verify over four queues while their daemon is killed or replaced.
//!
//! They notice nothing, whatever kind of disk they have.

use super::boot::{Guest, fio_on_disk, until_stopped};
use super::server::{self, output_of, vublk_serve_as};
use super::{images, overlay};
use crate::disks::{REGISTRY, judge};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vublk::block::registry::Kind;

/// What the disk of a guest under load is.
#[derive(Clone, Copy, PartialEq)]
enum Disk {
    Raw,
    /// A new image of this format.
    Image(&'static str),
    /// A qcow2 image over a raw one that is full.
    Overlay,
    /// A qcow2 image with an external data file, which may have to be a disk image by itself.
    DataFile {
        raw: bool,
    },
}

impl Disk {
    fn format(self) -> &'static str {
        match self {
            Disk::Raw => "raw",
            Disk::Image(format) => format,
            Disk::Overlay | Disk::DataFile { .. } => "qcow2",
        }
    }

    /// Makes the disk instead of an empty raw image.
    fn make(self, image: &Path) {
        match self {
            Disk::Raw => {}
            Disk::Image(format) => {
                let len = fs::metadata(image).unwrap().len().to_string();
                output_of(
                    "qemu-img",
                    ["create", "-q", "-f", format, image.to_str().unwrap(), &len],
                );
            }
            Disk::Overlay => overlay(image),
            Disk::DataFile { raw } => {
                let len = fs::metadata(image).unwrap().len().to_string();
                let raw = if raw { "on" } else { "off" };
                let data = image.with_extension("data");
                let options = format!("data_file={},data_file_raw={raw}", data.display());
                let image = image.to_str().unwrap();
                output_of("qemu-img", ["create", "-q", "-f", "qcow2", "-o", &options, image, &len]);
            }
        }
    }

    /// Where the guest's disk is, as it is or byte for byte, once nobody serves it.
    fn raw_images(self, image: &Path) -> Vec<PathBuf> {
        if self == Disk::Raw {
            return vec![image.to_owned()];
        }
        // Clusters may leak, no more: who was killed had some in reserve.
        let format = self.format();
        let check = Command::new(judge(format)).args(["check", "-f", format]).arg(image).output();
        let check = check.unwrap();
        // 63: the format has no check.
        assert!(matches!(check.status.code(), Some(0 | 3 | 63)), "{check:?}");
        let converted = image.with_extension("raw");
        let [from, to] = [image, &converted].map(|path| path.to_str().unwrap());
        output_of("qemu-img", ["convert", "-f", format, "-O", "raw", from, to]);
        match self {
            Disk::DataFile { raw: true } => vec![converted, image.with_extension("data")],
            _ => vec![converted],
        }
    }
}

/// A guest writes to a disk over four queues and verifies what it wrote, again and again, while
/// `disturb` ends its server in some way and starts it again. Calls it with the server and with how
/// often it was called, until it says that it has been enough; then nothing may have gone wrong.
fn under_load(
    disk: Disk,
    disturb: impl Fn(&mut server::Server, usize, &mut fastrand::Rng) -> bool,
) {
    let mut random = fastrand::Rng::with_seed(crate::disks::seed());
    let (_dir, [image]) = images(["disk"], 64);
    disk.make(&image);
    let mut server = vublk_serve_as(disk.format(), &[&image], &["-v"]).start();
    let guest = Guest::new().cpus(4).with_fio().for_more(kills() as u32 * LONGEST_ABSENCE);
    let script = until_stopped(&fio_on_disk(4, 4))
        + r#"
        dmesg | grep -E 'I/O error|is not a head'
        echo "sum $(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum)"
        "#;
    let mut guest = guest.reconnecting_disk(server.socket(0), 4).boot(&script);
    guest.wait_for("loading");
    // fio takes a moment to begin.
    guest.wait_for("round");
    for times in 0.. {
        std::thread::sleep(Duration::from_millis(random.u64(50..900)));
        let enough = disturb(&mut server, times, &mut random);
        server.wait_for("front end connected", times + 2);
        if enough {
            break;
        }
    }
    guest.say("go");
    let console = guest.finish();
    for error in ["I/O error", "is not a head"] {
        assert!(!console.text().contains(error), "{error}:\n{}", console.text());
    }
    server.stop();
    for raw in disk.raw_images(&image) {
        let on_host = output_of("sha256sum", [&raw]);
        assert_eq!(on_host.split(' ').next(), console.value("sum").split(' ').next(), "{raw:?}");
    }
}

/// How long a front end may be without its server, reckoned generously.
const LONGEST_ABSENCE: Duration = Duration::from_secs(10);

/// How often the server is killed; `VUBLK_KILLS` says it for a longer run.
fn kills() -> usize {
    std::env::var("VUBLK_KILLS").map_or(6, |kills| kills.parse().expect("VUBLK_KILLS: a number"))
}

#[test]
fn a_guest_under_load_notices_nothing_when_its_daemon_is_killed_and_started_again() {
    killed_under_load(Disk::Raw);
}

#[test]
fn a_guest_on_an_overlay_notices_nothing_when_its_daemon_is_killed_and_started_again() {
    killed_under_load(Disk::Overlay);
}

#[test]
fn a_guest_on_an_image_of_another_format_notices_nothing_when_its_daemon_is_killed() {
    // One that keeps entries in the front end's memory, and one with a log of its own; a longer run takes all.
    let some = ["vmdk", "vhdx"];
    let are_all = std::env::var_os("VUBLK_KILLS").is_some();
    let others = REGISTRY.iter().filter(|entry| entry.kind == Kind::Format && !entry.is_raw());
    // LUKS images need a secret, which the daemon is not given here.
    let others = others.filter(|entry| entry.create.is_some());
    let others = others.filter(|entry| !["qcow2", "luks"].contains(&entry.name));
    for entry in others.filter(|entry| are_all || some.contains(&entry.name)) {
        println!("{}", entry.name);
        killed_under_load(Disk::Image(entry.name));
    }
}

#[test]
fn a_guest_on_a_data_file_notices_nothing_when_its_daemon_is_killed_and_started_again() {
    killed_under_load(Disk::DataFile { raw: false });
}

#[test]
fn a_raw_data_file_is_the_guests_disk_however_often_its_daemon_is_killed() {
    killed_under_load(Disk::DataFile { raw: true });
}

fn killed_under_load(disk: Disk) {
    let wanted = kills();
    under_load(disk, |server, times, _| {
        server.kill_and_restart();
        // Now and then nothing is in flight.
        let in_flight = server.log().matches("requests are begun again").count();
        assert!(
            times < wanted + 24,
            "{in_flight} queues had requests in flight:\n{}",
            server.log()
        );
        times + 1 >= wanted && in_flight > 0
    });
}

#[test]
fn a_guest_under_load_notices_nothing_when_its_daemon_is_replaced_by_another() {
    under_load(Disk::Raw, |server, times, random| {
        if times % 2 == 0 {
            server.stop_and_restart();
        } else {
            // It waits for the image until the first has let it go.
            server.start_next_and_stop(Duration::from_millis(random.u64(..500)));
        }
        let again = server.log().contains("requests are begun again");
        assert!(!again, "something was left in flight:\n{}", server.log());
        times + 1 == 6
    });
}
