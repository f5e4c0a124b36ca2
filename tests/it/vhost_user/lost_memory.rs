//! A front end that truncates the file behind its memory loses its connection.
//!
//! The daemon and its other disks continue.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use vublk_testkit::request::{Placement, Request, Shape};
use vublk_testkit::ring::Desc;
use vublk_testkit::spec::{desc_flag, protocol, status};
use vublk_testkit::{Disk, MemoryLayout, Options};

use super::daemon::{LIMIT, SIZE, export_of, new_image};
use super::{Daemon, pattern};

const CLOSED: &str = "e0: connection closed: the front end has taken away memory that it shares";

/// Two disks on one worker: `d0`, made with `blockdev`, and `d1`, on a file.
fn two_disks(blockdev: &str) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    new_image(&dir.path().join("disk.img"), SIZE);
    new_image(&dir.path().join("other.img"), SIZE);
    let export =
        |node, number| format!("{},writable=on,num-queues=4,iothread=a", export_of(node, number));
    Daemon::start_in(
        dir,
        &[env!("CARGO_BIN_EXE_vublk"), "daemon"],
        &[
            "--object",
            "iothread,id=a",
            "--blockdev",
            blockdev,
            "--blockdev",
            "driver=file,node-name=d1,filename=DIR/other.img",
            "--export",
            &export("d0", 0),
            "--export",
            &export("d1", 1),
        ],
    )
}

/// Does `work` while the second disk is under load, all of whose data must come back right.
fn beside_load(daemon: &mut Daemon, work: impl FnOnce(&mut Daemon)) {
    let mut other = daemon.open_number(1, &Options::default());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| super::memory::load(other.queue(0), 1, &stop));
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(daemon)));
        stop.store(true, Ordering::Relaxed);
        assert!(load.join().unwrap() > 0);
        worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Bytes of data of a request: more than a worker copies by itself.
const DATA_LEN: usize = 128 << 10;

/// The region of each part of a request.
const RINGS: usize = 0;
const HEADER: usize = 1;
const DATA: usize = 2;
const TABLE: usize = 3;
const STATUS: usize = 4;

fn open(daemon: &Daemon, protocol: u64) -> Disk {
    daemon.open(&Options {
        layout: MemoryLayout::gapped(5, 1 << 20),
        regions: Some(5),
        protocol: protocol::DEFAULT | protocol,
        ..Options::default()
    })
}

/// A second descriptor of a region's file.
fn file_of(disk: &Disk, region: usize) -> File {
    // SAFETY: the descriptor is open as long as the disk's memory.
    let fd = unsafe { BorrowedFd::borrow_raw(disk.memory().regions()[region].fd()) };
    File::from(fd.try_clone_to_owned().unwrap())
}

/// Lays a transfer of 128 KiB out over the regions and makes it available, without a kick. Gives the
/// guest address of its data.
fn prepare(disk: &mut Disk, writes: bool) -> u64 {
    let memory = disk.memory().clone();
    let at = |region: usize| memory.regions()[region].guest_addr();
    memory.write(at(HEADER), &[u8::from(writes), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    memory.write(at(DATA), &pattern(DATA_LEN, 9));
    memory.write(at(STATUS), &[0xee]);
    let to_device = if writes { 0 } else { desc_flag::WRITE };
    let ring = disk.queue(0).ring();
    let layout = ring.layout();
    let desc = |region, len, flags, next| Desc { addr: at(region), len, flags, next };
    let table = [
        desc(HEADER, 16, desc_flag::NEXT, 1),
        desc(DATA, DATA_LEN as u32, desc_flag::NEXT | to_device, 2),
        desc(STATUS, 1, desc_flag::WRITE, 0),
    ];
    for (index, desc) in table.into_iter().enumerate() {
        layout.write_desc(&memory, at(TABLE), index as u16, desc);
    }
    layout.write_desc(&memory, layout.desc, 0, desc(TABLE, 48, desc_flag::INDIRECT, 0));
    ring.add_head(0);
    ring.publish_quietly();
    at(DATA)
}

/// What is truncated: the region, and to how many bytes.
const CASES: [(&str, usize, u64); 9] = [
    ("all of the rings", RINGS, 0),
    ("the available and the used ring", RINGS, 4096),
    ("the used ring", RINGS, 8192),
    ("the header", HEADER, 0),
    ("all data", DATA, 0),
    ("data behind its first page", DATA, 4096),
    ("the last page of data", DATA, DATA_LEN as u64 - 4096),
    ("the indirect table", TABLE, 0),
    ("the status", STATUS, 0),
];

const FILE: &str = "driver=file,node-name=d0,filename=DIR/disk.img";

#[test]
fn memory_that_is_truncated_costs_the_connection_alone_whatever_lay_there() {
    let null = "driver=null-co,node-name=d0,read-zeroes=on";
    for blockdev in [FILE, null] {
        let mut daemon = two_disks(blockdev);
        let mut closed = 0;
        beside_load(&mut daemon, |daemon| {
            for (what, region, len) in CASES {
                for writes in [false, true] {
                    // A disk that keeps nothing does not look at what is written to it.
                    if writes && region == DATA && blockdev == null {
                        continue;
                    }
                    println!("{blockdev}: {what}, writes: {writes}");
                    let mut disk = open(daemon, 0);
                    // The worker sleeps, so that it first looks when it is kicked.
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    prepare(&mut disk, writes);
                    file_of(&disk, region).set_len(len).unwrap();
                    disk.queue(0).ring().kick().unwrap();
                    closed += 1;
                    daemon.wait_log(CLOSED, closed);
                    drop(disk);
                    // The next front end finds its disk.
                    let mut disk = open(daemon, 0);
                    disk.write(8, &pattern(4096, 3)).unwrap();
                    disk.read(8, &mut [0; 4096]).unwrap();
                }
            }
        });
        let log = daemon.end();
        assert_eq!(log.matches(CLOSED).count(), closed, "{log}");
        assert!(!log.contains("stopped: "), "the guest is blamed:\n{log}");
    }
}

#[test]
fn memory_that_is_truncated_under_a_request_in_flight_costs_the_connection_alone() {
    let slow = "driver=null-co,node-name=d0,read-zeroes=on,latency-ns=300000000";
    let mut daemon = two_disks(slow);
    beside_load(&mut daemon, |daemon| {
        let mut in_time = 0;
        // What has been read by then is not looked at again.
        let cases = CASES.iter().filter(|(_, region, _)| matches!(*region, RINGS | STATUS));
        for &(what, region, len) in cases.cycle().take(8) {
            println!("{what}");
            let mut disk = open(daemon, 0);
            prepare(&mut disk, true);
            disk.queue(0).ring().kick().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            // The test itself touches nothing that may be gone.
            let memory = disk.memory().clone();
            let layout = disk.queue(0).ring().layout();
            let ended = layout.used_idx(&memory) == 1;
            file_of(&disk, region).set_len(len).unwrap();
            // On a machine that is too slow the request has ended before.
            in_time += usize::from(!ended);
            // It waits until the request has ended; or the connection ends first.
            let _ = disk.connection().stop_queue(0);
        }
        daemon.wait_log(CLOSED, in_time);
    });
    daemon.assert_serves(0);
}

#[test]
fn a_request_whose_memory_was_lost_is_done_when_the_memory_is_back() {
    let raw = "driver=raw,node-name=d0,file.driver=file,file.filename=DIR/disk.img";
    let mut daemon = two_disks(raw);
    daemon.open(&Options::default()).write(0, &pattern(DATA_LEN, 5)).unwrap();
    for (turn, region) in [DATA, STATUS].into_iter().enumerate() {
        let mut disk = open(&daemon, protocol::INFLIGHT_SHMFD);
        assert!(disk.inflight().is_some());
        std::thread::sleep(std::time::Duration::from_millis(5));
        let data = prepare(&mut disk, false);
        let file = file_of(&disk, region);
        file.set_len(0).unwrap();
        disk.queue(0).ring().kick().unwrap();
        daemon.wait_log(CLOSED, turn + 1);
        file.set_len(1 << 20).unwrap();
        let memory = disk.memory().clone();
        let layout = disk.queue(0).ring().layout();
        assert_eq!(layout.used_idx(&memory), 0, "it was handed back");
        disk.reconnect().unwrap();
        disk.queue(0).ring().wait(LIMIT).unwrap();
        assert_eq!(layout.used_entry(&memory, 0), (0, DATA_LEN as u32 + 1));
        let mut read = vec![0; DATA_LEN];
        memory.read(data, &mut read);
        let mut ended = [0xee];
        memory.read(memory.regions()[STATUS].guest_addr(), &mut ended);
        assert_eq!(ended, [status::OK]);
        assert!(read == pattern(DATA_LEN, 5));
    }
}

/// What tells this program that it is to be a front end, and of which socket.
const CHILD: &str = "VUBLK_TEST_FRONT_END";

/// A front end of its own process under load on four queues: when its memory is truncated it dies of
/// that, as QEMU does.
#[test]
fn memory_that_is_truncated_at_any_time_under_load_costs_the_connection_alone() {
    if let Ok(socket) = std::env::var(CHILD) {
        front_end_under_load(socket.as_ref());
    }
    let seed = super::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let raw = "driver=raw,node-name=d0,file.driver=file,file.filename=DIR/disk.img";
    let mut daemon = two_disks(raw);
    beside_load(&mut daemon, |daemon| {
        for _ in 0..40 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", NAME, "--nocapture"])
                .env(CHILD, daemon.socket(0))
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.map_while(Result::ok).any(|line| line == "loading"));
            let files = memory_files(child.id());
            assert_eq!(files.len(), 5);
            std::thread::sleep(std::time::Duration::from_micros(random.u64(0..20_000)));
            let pages = random.u64(0..8);
            files[random.usize(..files.len())].set_len(pages * 4096).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10));
            // It may have had nothing of what was truncated in use.
            child.kill().unwrap();
            child.wait().unwrap();
        }
        daemon.assert_serves(0);
    });
    let log = daemon.end();
    assert!(log.contains(CLOSED), "{log}");
}

const NAME: &str = "vhost_user::lost_memory::memory_that_is_truncated_at_any_time_under_load_costs_the_connection_alone";

/// The files of a process's memory regions.
fn memory_files(process: u32) -> Vec<File> {
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().filter_map(|entry| {
        let path = entry.unwrap().path();
        let named = std::fs::read_link(&path).ok()?;
        let is_memory = named.to_string_lossy().contains("vublk-testkit");
        is_memory.then(|| File::options().write(true).open(path).unwrap())
    });
    open.collect()
}

fn front_end_under_load(socket: &std::path::Path) -> ! {
    let mut disk = Disk::open(
        socket,
        &Options {
            num_queues: 4,
            layout: MemoryLayout::adjacent(5, 1 << 20),
            protocol: protocol::DEFAULT | protocol::INFLIGHT_SHMFD,
            ..Options::default()
        },
    )
    .unwrap();
    let queues = std::mem::take(&mut disk.queues);
    println!("loading");
    for (number, mut queue) in queues.into_iter().enumerate() {
        std::thread::spawn(move || {
            let placements = [Placement::Packed, Placement::Spread];
            for round in 0u64.. {
                let shape = Shape {
                    indirect: round % 2 == 0,
                    placement: placements[number % 2],
                    ..Shape::default()
                };
                for i in 0..8 {
                    let sector = (number as u64 * 8 + i) * 8;
                    let data = pattern(4096, round as u8);
                    let request = match round % 2 {
                        0 => Request::Out { sector, data },
                        _ => Request::In { sector, len: 4096 },
                    };
                    let _ = queue.submit(&request, &shape);
                }
                let _ = queue.drain();
            }
        });
    }
    std::thread::sleep(LIMIT);
    std::process::exit(0)
}
