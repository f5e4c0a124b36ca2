//! Durability: the guest's write-cache switch and its flushes, as they reach the file.
//!
//! What of a file's page cache is not yet on the disk is asked of the kernel (`cachestat`, Linux 6.5); where it
//! cannot say, or the file is in memory anyway, that half of a test is left out.

use std::os::fd::AsRawFd;

use vublk_testkit::request::{Range, Request, Shape};
use vublk_testkit::spec::{self, feature, status};
use vublk_testkit::{Connection, Disk, Options};

use super::daemon::figure;
use super::{Daemon, LIMIT, pattern};

/// Pages of the image that are dirty or in flight, if the kernel can say.
fn dirty_pages(daemon: &Daemon) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let file = std::fs::File::open(daemon.path("disk.img")).unwrap();
    let range = [0u64, 0];
    let mut answer = [0u64; 5];
    // SAFETY: both arrays are laid out as the kernel's structures and live through the calls.
    unsafe {
        let mut fs: libc::statfs64 = std::mem::zeroed();
        if libc::fstatfs64(file.as_raw_fd(), &mut fs) != 0 || fs.f_type as i64 == TMPFS_MAGIC {
            return None;
        }
        let (range, answer) = (range.as_ptr(), answer.as_mut_ptr());
        if libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range, answer, 0) != 0 {
            return None;
        }
    }
    Some(answer[1] + answer[2])
}

/// Every kind of write, each durable once it is acknowledged.
pub fn assert_durable(daemon: &Daemon, disk: &mut Disk) {
    for turn in 0..24u8 {
        let sector = 64 * u64::from(turn);
        match turn % 3 {
            0 => disk.write(sector, &pattern(8192, turn)).unwrap(),
            1 => {
                let queue = disk.queue(0);
                for i in 0..8 {
                    let request =
                        Request::Out { sector: sector + 8 * i, data: pattern(4096, turn) };
                    queue.submit(&request, &Shape::indirect()).unwrap();
                }
                assert!(queue.drain().unwrap().iter().all(|c| c.status == status::OK));
            }
            // Not a whole page: a hole is not punched, so something has to be written.
            _ => disk.write_zeroes(sector + 1, 9, false).unwrap(),
        }
        assert!(dirty_pages(daemon).is_none_or(|pages| pages == 0), "turn {turn}");
    }
}

#[test]
fn without_write_cache_every_acknowledged_write_is_durable() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    disk.connection().set_write_cache(false).unwrap();
    assert_durable(&daemon, &mut disk);
}

#[test]
fn a_write_through_export_makes_every_write_durable() {
    let daemon = Daemon::file("writethrough=on");
    let mut disk = daemon.open(&Options::default());
    assert_durable(&daemon, &mut disk);
}

#[test]
fn a_guest_that_cannot_flush_has_every_write_durable() {
    let daemon = Daemon::file("");
    let features = feature::QEMU & !feature::FLUSH & !feature::CONFIG_WCE;
    let mut disk = daemon.open(&Options { features, ..Options::default() });
    assert_durable(&daemon, &mut disk);
}

#[test]
fn switching_the_write_cache_off_makes_durable_what_was_written_before() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    for turn in 0..10u8 {
        disk.connection().set_write_cache(true).unwrap();
        for i in 0..16 {
            let request = Request::Out { sector: 8 * i, data: pattern(4096, turn) };
            disk.queue(0).submit(&request, &Shape::default()).unwrap();
        }
        disk.queue(0).drain().unwrap();
        disk.connection().set_write_cache(false).unwrap();
        assert!(dirty_pages(&daemon).is_none_or(|pages| pages == 0), "turn {turn}");
    }
}

#[test]
fn a_flush_makes_durable_what_was_acknowledged_on_every_queue() {
    let daemon = Daemon::file("num-queues=4");
    let mut disk = daemon.open(&Options { num_queues: 4, ..Options::default() });
    for turn in 0..10u8 {
        for number in 0..4 {
            disk.queue(number).write(64 * number as u64, &pattern(16384, turn)).unwrap();
        }
        disk.queue(usize::from(turn) % 4).flush().unwrap();
        assert!(dirty_pages(&daemon).is_none_or(|pages| pages == 0), "turn {turn}");
    }
}

#[test]
fn flushes_are_counted_and_reported_at_the_end() {
    let daemon = Daemon::file("num-queues=2");
    let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
    for _ in 0..7 {
        disk.queue(0).flush().unwrap();
        disk.queue(1).flush().unwrap();
        disk.write(0, &[1; 512]).unwrap();
    }
    disk.reconnect().unwrap();
    disk.queue(1).flush().unwrap();
    let zero = vec![Range { sector: u64::MAX, sectors: 1, flags: 0 }];
    assert_eq!(disk.run(&Request::WriteZeroes(zero)).unwrap().status, status::IOERR);
    drop(disk);
    let log = daemon.end();
    assert_eq!((figure(&log, "flushes"), figure(&log, "requests")), (15, 23));
}

/// The write cache as the configuration tells of it.
fn write_cache(disk: &mut Disk) -> u8 {
    disk.connection().config().unwrap().wce
}

#[test]
fn a_write_cache_that_the_guest_switched_off_stays_off_while_its_machine_is_stopped() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    disk.connection().set_write_cache(false).unwrap();
    disk.stop().unwrap();
    // What QEMU does on `cont`: it says nothing of the write cache again.
    disk.connection().set_features().unwrap();
    let base = disk.queue(0).ring().resume_base();
    disk.start_queue(0, base).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    assert_eq!(write_cache(&mut disk), 0);
}

#[test]
fn a_write_cache_that_the_guest_switched_off_stays_off_when_its_front_end_reconnects() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    disk.connection().set_write_cache(false).unwrap();
    disk.reconnect().unwrap();
    assert_eq!(write_cache(&mut disk), 0);
    disk.connection().set_write_cache(true).unwrap();
    disk.reconnect().unwrap();
    assert_eq!(write_cache(&mut disk), 1);
}

#[test]
fn the_write_cache_can_be_switched_off_before_the_driver_is_ready() {
    // QEMU sends SET_FEATURES when the driver says DRIVER_OK; a driver may write the configuration
    // before (virtio 1.2, section 3.1.1, step 7).
    let daemon = Daemon::file("");
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    connection.negotiate(spec::feature::QEMU, spec::protocol::DEFAULT).unwrap();
    connection.set_write_cache(false).unwrap();
    connection.set_features().unwrap();
    assert_eq!(connection.config().unwrap().wce, 0);
}

#[test]
fn a_guest_that_takes_no_features_at_all_is_given_write_through() {
    let daemon = Daemon::file("");
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    connection.negotiate(spec::feature::QEMU, spec::protocol::DEFAULT).unwrap();
    connection.set_exact_features(0).unwrap();
    assert_eq!(connection.config().unwrap().wce, 0);
}

#[test]
fn a_guest_that_cannot_flush_cannot_switch_the_write_cache_on() {
    let daemon = Daemon::file("");
    let features = spec::feature::QEMU & !spec::feature::FLUSH;
    let mut disk = daemon.open(&Options { features, ..Options::default() });
    disk.connection().set_write_cache(true).unwrap();
    assert_eq!(write_cache(&mut disk), 0);
}
