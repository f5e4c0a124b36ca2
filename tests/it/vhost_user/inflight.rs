//! Daemons that are killed under load and restarted.
//!
//! What was in flight is done again and completes once; what was acknowledged is there.

mod overlays;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserInflight;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{Disk, Options};

use super::daemon::{LIMIT, export_of, new_image};
use super::write_cache::assert_durable;
use super::{Daemon, SIZE, seed};

const ENTRIES: u16 = 64;

pub fn options(num_queues: usize) -> Options {
    let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
    Options { num_queues, queue_size: ENTRIES, protocol, limit: LIMIT, ..Options::default() }
}

/// A raw image of [`SIZE`] bytes behind four queues and two threads. It is beside what cargo builds: the system's
/// temporary folder may be of a kind that knows no O_DIRECT.
fn raw_disk() -> Daemon {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    new_image(&dir.path().join("disk.img"), SIZE);
    let file = "file.driver=file,file.filename=DIR/disk.img,file.cache.direct=on";
    let node = format!("driver=raw,node-name=d0,cache.direct=on,{file}");
    let export =
        format!("{},writable=on,num-queues=4,iothread.0=io0,iothread.1=io1", export_of("d0", 0));
    let objects = ["--object", "iothread,id=io0", "--object", "iothread,id=io1"];
    let rest = ["--blockdev", &node, "--export", &export];
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    Daemon::start_in(dir, &program, &[&objects[..], &rest[..]].concat())
}

fn kill(daemon: &mut Daemon) {
    daemon.server.signal(libc::SIGKILL).unwrap();
    daemon.server.wait_exit(LIMIT).unwrap();
}

/// How many requests the daemon began again, by its log.
fn begun_again(daemon: &Daemon) -> usize {
    let log = daemon.server.stderr();
    let lines = log.lines().filter_map(|line| line.strip_suffix(" requests are begun again"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<usize>().unwrap()).sum()
}

/// Blocks of 4 KiB that one queue writes and reads back, each with at most one request in flight.
pub struct Slot {
    sector: u64,
    /// In every sector of the block: what was written last, or is being written.
    stamp: u64,
    /// The request in flight, and whether it reads.
    pub pending: Option<(u64, bool)>,
}

const BLOCK: usize = 4096;

fn stamped(sector: u64, stamp: u64) -> Vec<u8> {
    let mut data = vec![stamp as u8; BLOCK];
    for (n, part) in data.chunks_mut(512).enumerate() {
        part[..8].copy_from_slice(&(sector + n as u64).to_le_bytes());
        part[8..16].copy_from_slice(&stamp.to_le_bytes());
    }
    data
}

/// The load of one queue.
pub struct Load {
    pub queue: usize,
    pub slots: Vec<Slot>,
    pub done: u64,
}

impl Load {
    pub fn new(queue: usize) -> Load {
        let slot = |n: usize| Slot {
            sector: ((queue * 48 + n) * BLOCK / 512) as u64,
            stamp: 0,
            pending: None,
        };
        Load { queue, slots: (0..48).map(slot).collect(), done: 0 }
    }

    /// Begins something on the idle slots, some of them.
    pub fn submit(&mut self, disk: &mut Disk, random: &mut fastrand::Rng) {
        let queue = disk.queue(self.queue);
        for slot in self.slots.iter_mut().filter(|slot| slot.pending.is_none()) {
            if random.u8(..4) == 0 {
                continue;
            }
            let read = random.u8(..3) == 0 && slot.stamp > 0;
            let request = if read {
                Request::In { sector: slot.sector, len: BLOCK }
            } else {
                slot.stamp += 1;
                Request::Out { sector: slot.sector, data: stamped(slot.sector, slot.stamp) }
            };
            let token = queue.add(&request, &Shape::indirect()).unwrap();
            slot.pending = Some((token, read));
        }
        queue.publish().unwrap();
    }

    /// Takes what has come back; each request once, with its data.
    pub fn reap(&mut self, disk: &mut Disk) {
        while let Some(done) = disk.queue(self.queue).reap().unwrap() {
            assert_eq!(done.status, status::OK);
            let slot = self
                .slots
                .iter_mut()
                .find(|slot| slot.pending.is_some_and(|(token, _)| token == done.token))
                .expect("it was in flight");
            let (_, read) = slot.pending.take().unwrap();
            if read {
                assert!(done.data == stamped(slot.sector, slot.stamp), "sector {}", slot.sector);
            }
            self.done += 1;
        }
    }
}

#[test]
fn a_daemon_that_is_killed_under_load_again_and_again_loses_nothing_and_repeats_nothing() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = raw_disk();
    let mut disk = daemon.open(&options(4));
    let mut loads: Vec<Load> = (0..4).map(Load::new).collect();
    let mut kills_in_flight = 0;
    for _ in 0..40 {
        for _ in 0..random.u32(1..40) {
            for load in &mut loads {
                load.submit(&mut disk, &mut random);
                load.reap(&mut disk);
            }
        }
        for load in &mut loads {
            load.submit(&mut disk, &mut random);
        }
        let until = Instant::now() + Duration::from_micros(random.u64(..200));
        while Instant::now() < until {}
        kill(&mut daemon);
        let (announced, file) = disk.inflight().unwrap();
        kills_in_flight += usize::from(flags(announced, file) > 0);
        daemon.restart();
        disk.reconnect().unwrap();
    }
    for load in &mut loads {
        while load.slots.iter().any(|slot| slot.pending.is_some()) {
            disk.queue(load.queue).ring().wait(LIMIT).unwrap();
            load.reap(&mut disk);
        }
        assert!(load.done > 40, "queue {} did {}", load.queue, load.done);
    }
    eprintln!("{kills_in_flight} of 40 kills had requests in flight");
    assert!(kills_in_flight > 0);
    drop(disk);
    daemon.end();
}

#[test]
fn what_was_acknowledged_before_a_kill_is_in_the_image() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = raw_disk();
    let mut disk = daemon.open(&options(2));
    let mut loads: Vec<Load> = (0..2).map(Load::new).collect();
    for _ in 0..10 {
        for _ in 0..random.u32(1..20) {
            for load in &mut loads {
                load.submit(&mut disk, &mut random);
                load.reap(&mut disk);
            }
        }
        kill(&mut daemon);
        // Nobody serves now; what came back before the kill counts too.
        let image = daemon.image();
        for load in &mut loads {
            load.reap(&mut disk);
            for slot in load.slots.iter().filter(|slot| slot.pending.is_none() && slot.stamp > 0) {
                let found = &image[slot.sector as usize * 512..][..BLOCK];
                assert!(found == stamped(slot.sector, slot.stamp), "sector {}", slot.sector);
            }
        }
        daemon.restart();
        disk.reconnect().unwrap();
    }
}

#[test]
fn what_is_in_flight_on_each_of_256_queues_at_a_kill_is_done_again() {
    vublk::io::descriptors::raise_limit();
    let mut daemon = Daemon::null("latency-ns=500000000", "num-queues=256");
    let mut disk = daemon.open(&Options { queue_size: 16, ..options(256) });
    for index in 0..256 {
        let request = Request::In { sector: 0, len: 512 };
        disk.queue(index).submit(&request, &Shape::indirect()).unwrap();
    }
    kill(&mut daemon);
    // As many as the daemon had come to.
    let left = disk.inflight().map_or(0, |(announced, file)| flags(announced, file));
    daemon.restart();
    disk.reconnect().unwrap();
    for index in 0..256 {
        assert_eq!(disk.queue(index).wait().unwrap().status, status::OK, "queue {index}");
    }
    assert_eq!(begun_again(&daemon), left);
    drop(disk);
    daemon.end();
}

#[test]
fn requests_in_flight_at_a_kill_are_begun_again_whatever_base_the_front_end_gives() {
    // Half a second each: they are in flight when the daemon is killed.
    let mut daemon = Daemon::null("latency-ns=500000000", "num-queues=2");
    let mut disk = daemon.open(&options(2));
    // Some that are done, so that the used index is not the first one's.
    disk.read(0, &mut [0; 512]).unwrap();
    for number in 0..2 {
        for sector in 0..20 {
            let queue = disk.queue(number);
            queue.add(&Request::In { sector, len: 512 }, &Shape::indirect()).unwrap();
        }
        disk.queue(number).publish().unwrap();
    }
    wait_in_flight(&disk, 40);
    kill(&mut daemon);
    daemon.restart();
    disk.reconnect().unwrap();
    daemon.wait_log("requests are begun again", 2);
    assert_eq!(begun_again(&daemon), 40);
    // In the middle of it: stopped, and started at a base that is wrong.
    disk.connection().stop_queue(0).unwrap();
    disk.start_queue(0, 999).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    for number in 0..2 {
        let done = disk.queue(number).drain().unwrap();
        assert_eq!(done.len(), 20);
        assert!(done.iter().all(|one| one.status == status::OK));
        disk.queue(number).read(3, &mut [0; 512]).unwrap();
    }
    assert_eq!(begun_again(&daemon), 40);
}

/// The region's flags, over all queues.
fn flags(announced: &VhostUserInflight, file: &File) -> usize {
    let (queues, entries) = (usize::from(announced.num_queues), usize::from(announced.queue_size));
    let mut bytes = vec![0; announced.mmap_size as usize];
    file.read_exact_at(&mut bytes, announced.mmap_offset).unwrap();
    // What follows the queues' parts is the server's own.
    let parts = bytes.chunks((16 + 16 * entries).next_multiple_of(64)).take(queues);
    parts.map(|part| (0..entries).filter(|n| part[16 + 16 * n] != 0).count()).sum()
}

pub fn wait_in_flight(disk: &Disk, count: usize) {
    let (announced, file) = disk.inflight().expect("it is offered");
    while flags(announced, file) != count {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_daemon_that_is_reported_to_end_leaves_nothing_in_flight() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = raw_disk();
    let mut disk = daemon.open(&options(4));
    let mut loads: Vec<Load> = (0..4).map(Load::new).collect();
    for _ in 0..5 {
        for _ in 0..10 {
            for load in &mut loads {
                load.submit(&mut disk, &mut random);
                load.reap(&mut disk);
            }
        }
        daemon.server.signal(libc::SIGTERM).unwrap();
        assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
        let (announced, file) = disk.inflight().unwrap();
        assert_eq!(flags(announced, file), 0);
        daemon.restart();
        disk.reconnect().unwrap();
        assert_eq!(begun_again(&daemon), 0);
    }
    for load in &mut loads {
        while load.slots.iter().any(|slot| slot.pending.is_some()) {
            disk.queue(load.queue).ring().wait(LIMIT).unwrap();
            load.reap(&mut disk);
        }
    }
}

#[test]
fn a_lock_that_is_given_up_a_moment_later_is_waited_for() {
    let mut daemon = raw_disk();
    kill(&mut daemon);
    let image = File::open(daemon.path("disk.img")).unwrap();
    // As the daemon holds it: nobody else may write.
    let lock = libc::flock {
        l_type: libc::F_RDLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 201,
        l_len: 1,
        l_pid: 0,
    };
    let fd = image.as_raw_fd();
    // SAFETY: the kernel reads one such structure.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &lock) }, 0);
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(image);
    });
    daemon.restart();
    holder.join().unwrap();
    daemon.assert_serves(0);
}

#[test]
fn a_guest_that_has_switched_its_write_cache_off_has_it_off_after_a_kill() {
    let mut daemon = raw_disk();
    let mut disk = daemon.open(&options(1));
    for off in [true, false, true] {
        disk.connection().set_write_cache(!off).unwrap();
        kill(&mut daemon);
        daemon.restart();
        disk.reconnect().unwrap();
        assert_eq!(disk.connection().config().unwrap().wce, u8::from(!off));
    }
    assert_durable(&daemon, &mut disk);
    // What the guest says to the daemon that lives counts more than what the memory holds.
    disk.stop().unwrap();
    disk.connection().set_write_cache(true).unwrap();
    let (announced, file) = disk.inflight().unwrap();
    let trailer = announced.mmap_offset + announced.mmap_size - BEHIND_QUEUES;
    file.write_all_at(&[1], trailer + 8).unwrap();
    disk.reconnect().unwrap();
    assert_eq!(disk.connection().config().unwrap().wce, 1);
    let mut off = [9];
    file_of(&disk).read_exact_at(&mut off, trailer + 8).unwrap();
    assert_eq!(off, [0]);
}

/// Bytes of a trailer and of the journal.
const BEHIND_QUEUES: u64 = 64 + (160 << 10);

/// Runs one of QEMU's tools on an image as soon as the locks of a killed daemon are gone; its output,
/// and that it ended with one of these codes.
pub fn qemu(program: &str, arguments: &[&str], image: &std::path::Path, codes: &[i32]) -> String {
    let until = Instant::now() + LIMIT;
    loop {
        let mut command = std::process::Command::new(program);
        let out = command.args(arguments).arg(image).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        if said.contains("lock") && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        assert!(codes.contains(&out.status.code().unwrap()), "{program} {arguments:?}: {said}");
        return String::from_utf8(out.stdout).unwrap();
    }
}

fn file_of(disk: &Disk) -> &File {
    disk.inflight().map(|(_, file)| file).expect("it is offered")
}

#[test]
fn memory_of_another_back_end_ends_with_its_queues_and_knows_of_no_write_cache() {
    let mut daemon = raw_disk();
    let mut disk = daemon.open(&options(1));
    disk.connection().set_write_cache(false).unwrap();
    let (announced, file) = disk.inflight().unwrap();
    let (announced, file) = (*announced, file.try_clone().unwrap());
    let queues = announced.mmap_size - BEHIND_QUEUES;
    for (size, magic, wce) in
        [(announced.mmap_size, true, 0), (queues, true, 1), (announced.mmap_size, false, 1)]
    {
        if !magic {
            file.write_all_at(b"somebody", queues).unwrap();
        }
        kill(&mut daemon);
        daemon.restart();
        let mut other = daemon.open(&options(1));
        other.stop().unwrap();
        let announced = VhostUserInflight { mmap_size: size, ..announced };
        other.connection().set_inflight(&announced, &file).unwrap();
        assert_eq!(other.connection().config().unwrap().wce, wce, "{size} {magic}");
    }
}

#[test]
fn an_inflight_region_that_is_wrong_costs_the_connection_only() {
    let mut daemon = Daemon::null("", "num-queues=2");
    let good = daemon.open(&options(2)).inflight().map(|(announced, _)| *announced).unwrap();
    let with =
        |size, offset, queues, entries| VhostUserInflight::new(size, offset, queues, entries);
    let len = good.mmap_size;
    for (times, (announced, says)) in [
        (with(4096, 0, 2, 1024), "2 queues of 1024 take"),
        (with(len, 1 << 40, 2, ENTRIES), "its file ends at"),
        (with(u64::MAX, 0, 16, 1024), "its file ends at"),
        (with(len, 0, 1, ENTRIES / 2), "1024 entries (version 1 and 32 entries"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut disk = daemon.open(&options(2));
        disk.stop().unwrap();
        let (_, file) = disk.inflight().unwrap();
        let file = file.try_clone().unwrap();
        disk.connection().set_inflight(&announced, &file).unwrap_err();
        let log = daemon.wait_log("inflight region", times + 1);
        assert!(log.contains(says), "{log}");
    }
    // More queues than there are, and a region that comes while rings run.
    let mut disk = daemon.open(&options(2));
    disk.stop().unwrap();
    disk.connection().get_inflight(3, ENTRIES).map(drop).unwrap_err();
    daemon.wait_log("inflight region for 3 queues: the disk has 2", 1);
    let mut disk = daemon.open(&options(2));
    disk.connection().get_inflight(2, ENTRIES).map(drop).unwrap_err();
    daemon.wait_log("inflight region: queue 0 is running", 1);
    // What a hostile front end wrote: the ring is refused.
    let mut disk = daemon.open(&options(2));
    disk.stop().unwrap();
    let (_, file) = disk.inflight().unwrap();
    file.write_all_at(&[0xff; 1000], 12).unwrap();
    disk.reconnect().unwrap_err();
    daemon.wait_log("queue 0: the inflight region", 1);
    daemon.assert_serves(0);
}
