//! Tests that run inside the guest, with `vublk daemon` on a real VFIO device there.
//!
//! The front end is our own. The tests of [`super::served`] start this same program in the guest, and look at the
//! drives' files afterwards; outside of a guest these tests are ignored.

use crate::vhost_user::inflight::Load;
use crate::vhost_user::{Daemon, LIMIT, seed};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::request::{Cut, Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{Disk, MemoryLayout, Options, Queue, Segment};

/// The controller behind a root port, which can be cut off from outside, and that port.
const CONTROLLER: &str = "0000:01:00.0";
const ROOT_PORT: &str = "0000:00:1c.0";

const QUEUES: usize = 4;
const MIB: u64 = 1 << 20;

fn options() -> Options {
    let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
    Options { num_queues: QUEUES, queue_size: 64, protocol, limit: LIMIT, ..Options::default() }
}

/// A daemon with two workers that serves a namespace raw.
fn daemon(more: &str) -> Daemon {
    daemon_on(CONTROLLER, more, "", "")
}

/// The same with options of the controller, the raw node and the export.
fn daemon_on(controller: &str, nvme: &str, raw: &str, export: &str) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let node = format!("driver=nvme,device={controller},namespace=1{nvme}").replace(',', ",file.");
    let raw = format!("driver=raw,node-name=d0{raw},file.{node}");
    let export = format!(
        "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=DIR/e0.sock,\
         writable=on,num-queues=4,iothread.0=io0,iothread.1=io1{export}"
    );
    let program = [crate::cli::VUBLK, "daemon"];
    let options = [
        ["--object", "iothread,id=io0"],
        ["--object", "iothread,id=io1"],
        ["--blockdev", &raw],
        ["--export", &export],
    ];
    Daemon::start_in(dir, &program, options.as_flattened())
}

/// Loads on all queues, each on its own blocks.
struct Loads(Vec<Load>);

impl Loads {
    fn new() -> Loads {
        Loads((0..QUEUES).map(Load::new).collect())
    }

    fn turn(&mut self, disk: &mut Disk, random: &mut fastrand::Rng) {
        for load in &mut self.0 {
            load.submit(disk, random);
            load.reap(disk);
        }
    }

    /// Until so many more requests are done.
    fn run(&mut self, disk: &mut Disk, random: &mut fastrand::Rng, requests: u64) {
        let (until, end) = (self.done() + requests, Instant::now() + LIMIT);
        while self.done() < until {
            self.turn(disk, random);
            assert!(Instant::now() < end, "{} of {until} requests are done", self.done());
        }
    }

    fn done(&self) -> u64 {
        self.0.iter().map(|load| load.done).sum()
    }

    /// Waits for all that is in flight.
    fn drain(&mut self, disk: &mut Disk) {
        for load in &mut self.0 {
            while load.slots.iter().any(|slot| slot.pending.is_some()) {
                disk.queue(load.queue).ring().wait(LIMIT).unwrap();
                load.reap(disk);
            }
        }
    }
}

#[test]
#[ignore = "runs in a guest"]
fn queues_of_two_workers() {
    let mut random = fastrand::Rng::with_seed(seed());
    let daemon = daemon("");
    let mut disk = daemon.open(&options());
    let mut loads = Loads::new();
    loads.run(&mut disk, &mut random, 1500);
    loads.drain(&mut disk);
    // What the host looks for: every MiB from the fourth on begins with its own number, over a queue of its own, in
    // requests of all sizes; every other is in pieces that pages cannot tell.
    for number in 4..16u64 {
        let len = 512 << (number - 4);
        let data = vec![number as u8; len];
        let queue = disk.queue(number as usize % QUEUES);
        if number % 2 == 1 {
            let cut = Cut::Each(len / 20 + 13);
            queue.shape = Shape { readable: cut.clone(), writable: cut, ..Shape::default() };
        }
        queue.write(number * MIB / 512, &data).unwrap();
        let mut back = vec![0; len];
        queue.read(number * MIB / 512, &mut back).unwrap();
        assert!(back == data, "{number}");
    }
    disk.flush().unwrap();
    disk.write_zeroes(15 * MIB / 512 + 8, 8, false).unwrap();
    drop(disk);
    daemon.end();
}

#[test]
#[ignore = "runs in a guest"]
fn copied_where_the_device_may_not_reach_guests_memory() {
    let mut random = fastrand::Rng::with_seed(seed());
    let daemon = daemon(",guest-dma=off");
    let mut disk = daemon.open(&options());
    let mut loads = Loads::new();
    loads.run(&mut disk, &mut random, 1000);
    loads.drain(&mut disk);
    drop(disk);
    daemon.end();
}

#[test]
#[ignore = "runs in a guest"]
fn killed_and_started_again() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = daemon("");
    let mut disk = daemon.open(&options());
    let mut loads = Loads::new();
    for _ in 0..4 {
        loads.run(&mut disk, &mut random, 200);
        loads.0.iter_mut().for_each(|load| load.submit(&mut disk, &mut random));
        daemon.server.signal(libc::SIGKILL).unwrap();
        daemon.server.wait_exit(LIMIT).unwrap();
        daemon.restart();
        disk.reconnect().unwrap();
    }
    loads.drain(&mut disk);
    drop(disk);
    daemon.end();
}

#[test]
#[ignore = "runs in a guest"]
fn reset_by_somebody_else() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = daemon("");
    let mut disk = daemon.open(&options());
    let mut loads = Loads::new();
    for times in 1..=2 {
        loads.run(&mut disk, &mut random, 300);
        let reset = format!("/sys/bus/pci/devices/{CONTROLLER}/reset");
        fs::write(reset, "1").unwrap();
        // Nothing fails; what was in flight is given to the controller again.
        loads.run(&mut disk, &mut random, 300);
        daemon.wait_log("the controller works again", times);
    }
    loads.drain(&mut disk);
    drop(disk);
    daemon.end();
}

/// Writes the command register of a function, as nobody should.
fn set_command(function: &str, value: u16) {
    let path = format!("/sys/bus/pci/devices/{function}/config");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&value.to_le_bytes(), 4).unwrap();
}

/// Requests until one fails, which is by the time that the daemon's own limits allow.
fn run_until_failure(disk: &mut Disk) {
    let end = Instant::now() + LIMIT;
    let shape = Shape::default();
    loop {
        let queue = disk.queue(1);
        queue.submit(&Request::In { sector: 0, len: 4096 }, &shape).unwrap();
        if queue.wait().unwrap().status == status::IOERR {
            return;
        }
        assert!(Instant::now() < end, "nothing fails");
    }
}

#[test]
#[ignore = "runs in a guest"]
fn gone_and_back() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut first = daemon("");
    let mut disk = first.open(&options());
    let mut loads = Loads::new();
    loads.run(&mut disk, &mut random, 300);
    loads.drain(&mut disk);
    // The port forwards nothing any more.
    set_command(ROOT_PORT, 4);
    run_until_failure(&mut disk);
    first.wait_log("the device is gone", 1);
    drop(disk);
    first.end();
    set_command(ROOT_PORT, 7);
    let daemon = daemon("");
    let mut disk = daemon.open(&options());
    loads.run(&mut disk, &mut random, 300);
    loads.drain(&mut disk);
    drop(disk);
    daemon.end();
}

#[test]
#[ignore = "runs in a guest"]
fn asked_for_by_the_host() {
    let mut random = fastrand::Rng::with_seed(seed());
    let daemon = daemon("");
    let mut disk = daemon.open(&options());
    let mut loads = Loads::new();
    loads.run(&mut disk, &mut random, 300);
    println!("unplug-me");
    let asked = || daemon.server.stderr().contains("wants the device back");
    let end = Instant::now() + LIMIT;
    while !asked() {
        loads.turn(&mut disk, &mut random);
        assert!(Instant::now() < end, "{}", daemon.server.stderr());
    }
    // Its user continues until it is told to end; then the device goes.
    loads.run(&mut disk, &mut random, 300);
    loads.drain(&mut disk);
    drop(disk);
    daemon.end();
    let end = Instant::now() + LIMIT;
    while Path::new("/sys/bus/pci/devices").join(CONTROLLER).exists() {
        assert!(Instant::now() < end, "the device is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Regions of a guest's memory that come and go, and the bytes of each.
const REGIONS: usize = 12;
const REGION: usize = 2 * MIB as usize;

#[test]
#[ignore = "runs in a guest"]
fn memory_comes_and_goes() {
    let mut random = fastrand::Rng::with_seed(seed());
    let daemon = daemon("");
    let mut layout = vec![(0, 8 << 20)];
    layout.extend((0..REGIONS).map(|n| (((4 + n as u64) << 30), REGION)));
    let mut disk = daemon.open(&Options {
        layout: MemoryLayout(layout),
        regions: Some(1),
        memory_messages: MemoryMessages::Slots,
        ..options()
    });
    let memory = disk.memory().clone();
    let mut queues = std::mem::take(&mut disk.queues);
    let (crossing, loaded) = queues.split_last_mut().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads = (0..).zip(loaded).map(|(number, queue)| {
            let stop = &stop;
            scope.spawn(move || crate::vhost_user::memory::load(queue, number, stop))
        });
        let loads: Vec<_> = loads.collect();
        let mut order: Vec<usize> = (1..=REGIONS).collect();
        for turn in 0..6 {
            random.shuffle(&mut order);
            for &region in &order {
                disk.connection().add_region(&memory.regions()[region]).unwrap();
                // At once, while it is pinned, and copied where it is not.
                there_and_back(crossing, region, turn);
            }
            random.shuffle(&mut order);
            for &region in &order {
                there_and_back(crossing, region, turn + 100);
                disk.connection().remove_region(&memory.regions()[region]).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        for load in loads {
            assert!(load.join().unwrap() > 0);
        }
    });
    drop(queues);
    drop(disk);
    daemon.end();
}

/// Writes from a region, and reads back to it.
fn there_and_back(queue: &mut Queue, region: usize, salt: u8) {
    let memory = queue.ring().memory().clone();
    let (at, len) = (memory.regions()[region].guest_addr(), 192 << 10);
    let data = crate::vhost_user::pattern(len, salt ^ region as u8);
    let sector = 32 * MIB / 512 + region as u64 * 512;
    let [header, ended] = [16, 1].map(|len| memory.alloc_in(0, len, 16).unwrap());
    for writes in [true, false] {
        header.write(&[&u64::from(writes).to_le_bytes()[..], &sector.to_le_bytes()].concat());
        ended.write(&[0xee]);
        memory.write(at, &if writes { data.clone() } else { vec![0; len] });
        let piece =
            |addr, len: usize, device_writes| Segment { addr, len: len as u32, device_writes };
        let chain = [
            piece(header.addr(), 16, false),
            piece(at, len, !writes),
            piece(ended.addr(), 1, true),
        ];
        queue.ring().add(&chain, false).unwrap();
        queue.ring().publish().unwrap();
        queue.ring().wait(LIMIT).unwrap();
        queue.ring().pop().unwrap().unwrap();
        assert_eq!(ended.to_vec(), [status::OK]);
    }
    let mut back = vec![0; len];
    memory.read(at, &mut back);
    assert!(back == data, "region {region}");
}

#[test]
#[ignore = "runs in a guest"]
fn requests_that_take_too_long() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = daemon(",io-timeout=2");
    let mut disk = daemon.open(&options());
    let mut loads = Loads::new();
    loads.run(&mut disk, &mut random, 300);
    println!("throttle-me");
    let end = Instant::now() + LIMIT;
    let text = |daemon: &Daemon| daemon.server.stderr();
    while !text(&daemon).contains("takes longer than 2 s: aborting it") {
        loads.turn(&mut disk, &mut random);
        assert!(Instant::now() < end, "{}", text(&daemon));
    }
    println!("go-on-again");
    // Aborted or not, reset or not: every request comes back once, with its own data.
    loads.run(&mut disk, &mut random, 1000);
    loads.drain(&mut disk);
    daemon.wait_log("aborting it", 1);
    drop(disk);
    daemon.end();
}

/// Another controller of the same namespace.
const SECOND: &str = "0000:00:11.0";

#[test]
#[ignore = "runs in a guest"]
fn goes_over_to_another_controller() {
    let mut random = fastrand::Rng::with_seed(seed());
    let first = daemon_on("0000:00:10.0", "", "", "");
    let second = daemon_on(SECOND, "", ",active=off", ",allow-inactive=on");
    let mut disk = first.open(&options());
    let mut loads = Loads::new();
    loads.run(&mut disk, &mut random, 500);
    loads.drain(&mut disk);
    disk.queue(0).write(40 * MIB / 512, &[77; 65536]).unwrap();
    drop(disk);
    first.end();
    let mut disk = second.open(&options());
    let mut back = vec![0; 65536];
    disk.queue(0).read(40 * MIB / 512, &mut back).unwrap();
    assert!(back == [77; 65536]);
    loads.run(&mut disk, &mut random, 500);
    loads.drain(&mut disk);
    drop(disk);
    second.end();
}
