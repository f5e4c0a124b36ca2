//! Rings that break the rules (virtio 1.2, section 2.7).
//!
//! The queue stops with one line in the log and a signal on the error descriptor; the other queues, the other disks
//! and the daemon continue.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::ring::{Desc, DriverRing, RingLayout};
use vublk_testkit::spec::desc_flag::{INDIRECT, NEXT, WRITE};
use vublk_testkit::{Disk, Memory, MemoryLayout, Options};

use super::daemon::LIMIT;
use super::{Daemon, pattern, seed};

/// Entries of the rings here.
const ENTRIES: u16 = 16;
/// Bytes of the one region, which begins at guest address 0.
const MEMORY: u64 = 1 << 20;
/// Guest addresses that no table of a ring uses.
const HEADER: u64 = MEMORY / 2;
const DATA: u64 = HEADER + 4096;
const STATUS: u64 = DATA + 4096;
const TABLE: u64 = STATUS + 4096;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// A read of one sector in descriptors 0, 1, 2, right in every way.
fn good() -> Vec<Desc> {
    vec![desc(HEADER, 16, NEXT, 1), desc(DATA, 512, NEXT | WRITE, 2), desc(STATUS, 1, WRITE, 0)]
}

/// Writes a table of descriptors.
fn put(memory: &Memory, layout: &RingLayout, table: u64, list: &[Desc]) {
    for (index, desc) in list.iter().enumerate() {
        layout.write_desc(memory, table, index as u16, *desc);
    }
}

/// What a case writes before the ring is kicked: the ring's own table, the indirect one, the heads
/// made available, and how far the index goes.
struct Case {
    name: &'static str,
    /// In the log.
    says: &'static str,
    ring: Vec<Desc>,
    table: Vec<Desc>,
    heads: Vec<u16>,
    index: u16,
}

fn case(name: &'static str, says: &'static str, ring: Vec<Desc>) -> Case {
    Case { name, says, ring, table: vec![], heads: vec![0], index: 1 }
}

fn indirect(name: &'static str, says: &'static str, len: u32, table: Vec<Desc>) -> Case {
    let ring = vec![desc(TABLE, len, INDIRECT, 0)];
    Case { table, ..case(name, says, ring) }
}

/// A good read with one descriptor changed.
fn with(index: usize, changed: Desc) -> Vec<Desc> {
    let mut list = good();
    list[index] = changed;
    list
}

fn cases() -> Vec<Case> {
    let outside = "not in the guest's memory";
    let table = "bad indirect table";
    vec![
        case("a loop of one", "looped or too long", vec![desc(HEADER, 16, NEXT, 0)]),
        case("a loop back", "looped or too long", with(2, desc(STATUS, 1, NEXT | WRITE, 1))),
        case(
            "next just past the table",
            "outside the table",
            with(0, desc(HEADER, 16, NEXT, ENTRIES)),
        ),
        case(
            "next far past the table",
            "outside the table",
            with(0, desc(HEADER, 16, NEXT, u16::MAX)),
        ),
        case("data past the memory", outside, with(1, desc(MEMORY, 512, NEXT | WRITE, 2))),
        case(
            "data ending past the memory",
            outside,
            with(1, desc(MEMORY - 511, 512, NEXT | WRITE, 2)),
        ),
        case("data as long as numbers go", outside, with(1, desc(DATA, u32::MAX, NEXT | WRITE, 2))),
        case(
            "data whose end overflows",
            outside,
            with(1, desc(u64::MAX - 100, 512, NEXT | WRITE, 2)),
        ),
        case("data at the last address", outside, with(1, desc(u64::MAX, 1, NEXT | WRITE, 2))),
        case("a header outside", outside, with(0, desc(1 << 40, 16, NEXT, 1))),
        case("a status outside", outside, with(2, desc(MEMORY, 1, WRITE, 0))),
        case("no room for a status", "too short", vec![desc(HEADER, 16, 0, 0)]),
        case(
            "a status of no bytes",
            "too short",
            vec![desc(HEADER, 16, NEXT, 1), desc(STATUS, 0, WRITE, 0)],
        ),
        case("a chain of no bytes", "too short", vec![desc(HEADER, 0, 0, 0)]),
        case(
            "half a header",
            "too short",
            vec![desc(HEADER, 15, NEXT, 1), desc(STATUS, 1, WRITE, 0)],
        ),
        case("no header", "too short", vec![desc(STATUS, 513, WRITE, 0)]),
        case(
            "a readable part after a writable one",
            "readable part after a writable one",
            vec![
                desc(DATA, 512, NEXT | WRITE, 1),
                desc(HEADER, 16, NEXT, 2),
                desc(STATUS, 1, WRITE, 0),
            ],
        ),
        case(
            "a readable part at the end",
            "readable part after a writable one",
            vec![
                desc(HEADER, 16, NEXT, 1),
                desc(STATUS, 1, NEXT | WRITE, 2),
                desc(DATA, 512, 0, 0),
            ],
        ),
        Case { heads: vec![ENTRIES], ..case("a head just outside", "outside the ring", good()) },
        Case { heads: vec![u16::MAX], ..case("a head far outside", "outside the ring", good()) },
        Case { index: ENTRIES + 1, ..case("an index too far ahead", "available index", good()) },
        Case { index: u16::MAX, ..case("an index that goes back", "available index", good()) },
        Case { index: 0x8000, ..case("an index half way round", "available index", good()) },
        indirect("a table of no bytes", table, 0, good()),
        indirect("a table of a byte too much", table, 49, good()),
        indirect("a table of less than a descriptor", table, 15, good()),
        indirect("a table of 1025 descriptors", table, 1025 * 16, good()),
        indirect("a table as long as numbers go", table, u32::MAX - 15, good()),
        indirect("next outside the indirect table", "outside the table", 32, good()),
        indirect(
            "a loop in the indirect table",
            "looped or too long",
            48,
            with(2, desc(STATUS, 1, NEXT | WRITE, 1)),
        ),
        indirect("a table in a table", table, 48, with(1, desc(TABLE, 48, INDIRECT, 0))),
        indirect("a table in a table first", table, 48, with(0, desc(TABLE, 48, INDIRECT, 0))),
        indirect(
            "data outside in a table",
            outside,
            48,
            with(1, desc(MEMORY, 512, NEXT | WRITE, 2)),
        ),
        case("a table after a descriptor", table, with(1, desc(TABLE, 48, INDIRECT, 0))),
        case("a table outside", table, vec![desc(MEMORY, 48, INDIRECT, 0)]),
        case("a table ending outside", table, vec![desc(MEMORY - 32, 48, INDIRECT, 0)]),
        case("a table whose end overflows", table, vec![desc(u64::MAX - 15, 48, INDIRECT, 0)]),
        Case {
            table: good(),
            ..case("a table that goes on", table, vec![desc(TABLE, 48, INDIRECT | NEXT, 1)])
        },
    ]
}

fn options() -> Options {
    Options {
        num_queues: 2,
        queue_size: ENTRIES,
        layout: MemoryLayout::single(MEMORY as usize),
        ..Options::default()
    }
}

fn two_disks() -> Daemon {
    let export = |number| {
        format!("{},writable=on,num-queues=2,iothread=io0", super::daemon::export_of("d0", number))
    };
    Daemon::start(&[
        "--object",
        "iothread,id=io0",
        "--blockdev",
        "driver=file,node-name=d0,filename=DIR/disk.img",
        "--export",
        &export(0),
        "--export",
        &export(1),
    ])
}

/// Sets an error descriptor for queue 0.
fn watch_errors(disk: &mut Disk) -> EventFd {
    let error = EventFd::new(EFD_NONBLOCK).unwrap();
    disk.connection().vhost().set_vring_err(0, &error).unwrap();
    // It has no answer of its own; this one comes after it.
    disk.connection().config().unwrap();
    error
}

/// Waits for the word that a queue has stopped.
fn is_signalled(fd: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, for the duration of the call.
    unsafe { libc::poll(&mut poll, 1, LIMIT.as_millis() as i32) == 1 }
}

#[test]
fn a_ring_that_breaks_a_rule_stops_alone_with_one_line_in_the_log() {
    let mut daemon = two_disks();
    let mut other = daemon.open_number(1, &options());
    for (number, case) in cases().into_iter().enumerate() {
        let mut disk = daemon.open(&options());
        let error = watch_errors(&mut disk);
        let memory = disk.memory().clone();
        let ring: &mut DriverRing = disk.queue(0).ring();
        let layout = ring.layout();
        put(&memory, &layout, layout.desc, &case.ring);
        put(&memory, &layout, TABLE, &case.table);
        for (at, &head) in case.heads.iter().enumerate() {
            layout.set_avail_entry(&memory, at as u16, head);
        }
        layout.set_avail_idx(&memory, case.index);
        ring.kick().unwrap();
        assert!(is_signalled(&error), "{}:\n{}", case.name, daemon.server.stderr());
        let log = daemon.wait_log("queue 0: stopped: ", number + 1);
        let said = log.lines().rfind(|line| line.contains("queue 0: stopped: ")).unwrap();
        assert!(said.contains(case.says), "{}: {said}", case.name);
        // It says no more, however often it is kicked; the other queue and the other disk work.
        for turn in 0..3u64 {
            disk.queue(0).ring().kick().unwrap();
            disk.queue(1).write(8 * turn, &pattern(512, number as u8)).unwrap();
            let mut back = vec![0; 512];
            other.read(8 * turn, &mut back).unwrap();
            assert_eq!(back, pattern(512, number as u8), "{}", case.name);
        }
        let log = daemon.server.stderr();
        assert_eq!(log.matches("stopped: ").count(), number + 1, "{}:\n{log}", case.name);
        assert_eq!(layout.used_idx(&memory), 0, "{}", case.name);
        // It can be stopped as any other.
        disk.stop().unwrap();
    }
    drop(other);
    daemon.assert_serves(0);
    daemon.assert_serves(1);
}

#[test]
fn a_ring_that_was_stopped_works_again_for_the_next_front_end_and_after_a_restart() {
    let mut daemon = two_disks();
    let mut disk = daemon.open(&options());
    let error = watch_errors(&mut disk);
    let ring = disk.queue(0).ring();
    let (layout, memory) = (ring.layout(), ring.memory().clone());
    ring.add_head(999);
    ring.publish().unwrap();
    assert!(is_signalled(&error), "{}", daemon.server.stderr());
    assert_eq!(disk.connection().stop_queue(0).unwrap(), 0, "the bad head was not taken");
    put(&memory, &layout, layout.desc, &good());
    memory.write(HEADER, &[0; 16]);
    layout.set_avail_entry(&memory, 0, 0);
    disk.start_queue(0, 0).unwrap();
    disk.queue(0).ring().wait(LIMIT).unwrap();
    assert_eq!(layout.used_entry(&memory, 0), (0, 513));
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn what_was_in_flight_when_a_ring_broke_is_completed() {
    let daemon = Daemon::null("latency-ns=50000000", "num-queues=2");
    let mut disk = daemon.open(&options());
    let error = watch_errors(&mut disk);
    let request = Request::In { sector: 0, len: 512 };
    for _ in 0..4 {
        disk.queue(0).add(&request, &Shape::indirect()).unwrap();
    }
    let ring = disk.queue(0).ring();
    ring.add_head(ENTRIES);
    ring.publish().unwrap();
    assert!(is_signalled(&error), "{}", daemon.server.stderr());
    assert_eq!(disk.queue(0).drain().unwrap().len(), 4);
    assert_eq!(disk.connection().stop_queue(0).unwrap(), 4);
}

#[test]
fn a_head_that_is_in_flight_cannot_be_made_available_again() {
    let mut daemon = Daemon::null("latency-ns=50000000", "num-queues=2");
    let mut disk = daemon.open(&options());
    let error = watch_errors(&mut disk);
    let ring = disk.queue(0).ring();
    let (layout, memory) = (ring.layout(), ring.memory().clone());
    put(&memory, &layout, layout.desc, &good());
    ring.add_head(0);
    ring.add_head(0);
    ring.publish().unwrap();
    assert!(is_signalled(&error), "{}", daemon.server.stderr());
    ring.wait(LIMIT).unwrap();
    disk.connection().stop_queue(0).unwrap();
    assert_eq!(layout.used_idx(&memory), 1, "the first one was answered, once");
    let log = daemon.wait_log("in flight already", 1);
    assert_eq!(log.matches("stopped: ").count(), 1, "{log}");
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn memory_that_was_taken_away_stops_the_queue_that_uses_it() {
    let mut daemon = two_disks();
    let mut disk = daemon.open(&Options {
        layout: MemoryLayout(vec![(0, MEMORY as usize), (MEMORY, 1 << 20)]),
        memory_messages: vublk_testkit::frontend::MemoryMessages::Slots,
        ..options()
    });
    let error = watch_errors(&mut disk);
    let memory = disk.memory().clone();
    disk.connection().remove_region(&memory.regions()[1]).unwrap();
    let ring = disk.queue(0).ring();
    let layout = ring.layout();
    put(&memory, &layout, layout.desc, &with(1, desc(MEMORY, 512, NEXT | WRITE, 2)));
    ring.add_head(0);
    ring.publish().unwrap();
    assert!(is_signalled(&error), "{}", daemon.server.stderr());
    disk.queue(1).read(0, &mut [0; 512]).unwrap();
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn a_request_in_more_pieces_than_sixteen_bits_count_is_served_or_refused() {
    // Descriptors that lie in up to 100 regions each: with the header, 65536 pieces.
    const REGIONS: u64 = 100;
    const BASE: u64 = 1 << 20;
    let mut regions = vec![(0, BASE as usize)];
    regions.extend((0..REGIONS).map(|i| (BASE + (i << 12), 4096)));
    let mut daemon = Daemon::null("size=4294967296", "");
    let mut disk = daemon.open(&Options {
        queue_size: ENTRIES,
        layout: MemoryLayout(regions),
        memory_messages: vublk_testkit::frontend::MemoryMessages::Slots,
        ..Options::default()
    });
    let memory = disk.memory().clone();
    let ring = disk.queue(0).ring();
    let layout = ring.layout();
    for (request, kind) in [(0u32, WRITE), (1, 0)] {
        let mut table = vec![desc(HEADER, 16, NEXT, 1)];
        table.extend((1..=655).map(|i| desc(BASE, 100 * 4096, NEXT | kind, i + 1)));
        table.push(desc(BASE, 35 * 4096, NEXT | kind, 657));
        table.push(desc(STATUS, 1, WRITE, 0));
        put(&memory, &layout, TABLE, &table);
        memory.write(HEADER, &[&request.to_le_bytes()[..], &[0; 12]].concat());
        memory.write(STATUS, &[0xee]);
        let pointer = desc(TABLE, table.len() as u32 * 16, INDIRECT, 0);
        put(&memory, &layout, layout.desc, &[pointer]);
        let before = layout.used_idx(&memory);
        ring.add_head(0);
        ring.publish().unwrap();
        let end = Instant::now() + LIMIT;
        while layout.used_idx(&memory) == before {
            assert!(Instant::now() < end, "no answer:\n{}", daemon.server.stderr());
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut status = [0xee];
        memory.read(STATUS, &mut status);
        assert_ne!(status, [0xee]);
    }
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn random_rings_do_not_end_the_daemon() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = two_disks();
    let mut other = daemon.open_number(1, &options());
    for _ in 0..150 {
        let mut disk = daemon.open(&options());
        let memory = disk.memory().clone();
        for number in 0..2 {
            let ring = disk.queue(number).ring();
            let layout = ring.layout();
            for table in [layout.desc, TABLE] {
                for index in 0..ENTRIES {
                    layout.write_desc(&memory, table, index, random_desc(&mut random));
                }
            }
            for index in 0..ENTRIES {
                layout.set_avail_entry(&memory, index, random.u16(0..ENTRIES));
            }
            for at in (HEADER..HEADER + 4096).step_by(16) {
                let kind = [0, 1, 4, 8, 11, 13, 77][random.usize(0..7)];
                memory.write(at, &[kind, 0, 0, 0, 0, 0, 0, 0, random.u8(..), 0, 0, 0, 0, 0, 0, 0]);
            }
            layout.set_avail_idx(&memory, random.u16(0..=ENTRIES));
            ring.kick().unwrap();
        }
        if random.bool() {
            disk.stop().unwrap();
        }
        other.read(0, &mut [0; 512]).unwrap();
    }
    drop(other);
    daemon.assert_serves(0);
    daemon.assert_serves(1);
}

/// A descriptor that is mostly right.
fn random_desc(random: &mut fastrand::Rng) -> Desc {
    let addr = match random.u8(0..20) {
        0 => random.u64(..),
        1 => TABLE,
        _ => HEADER + random.u64(0..500) * 16,
    };
    let len = match random.u8(0..20) {
        0 => random.u32(..),
        1 => 0,
        2 | 3 => 1,
        4..=9 => 16,
        _ => 512 * random.u32(0..4),
    };
    let flags = match random.u8(0..12) {
        0 => random.u16(..),
        1 => INDIRECT,
        2..=5 => WRITE,
        6..=8 => NEXT | WRITE,
        9 => 0,
        _ => NEXT,
    };
    desc(addr, len, flags, random.u16(0..ENTRIES + 1))
}
