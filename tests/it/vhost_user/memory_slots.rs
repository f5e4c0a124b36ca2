//! Memory that is added and removed in as many regions as possible, under load.
//!
//! Requests cross region borders, and other disks are not delayed.

use std::sync::atomic::{AtomicBool, Ordering};

use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::status;
use vublk_testkit::{Disk, MemoryLayout, Options, Queue, Segment};

use super::daemon::{LIMIT, export_of};
use super::{Daemon, pattern};

/// Regions at most.
const MOST: usize = 509;
/// Bytes of all but the first.
const SMALL: usize = 4096;
/// Bytes of the first one, which holds rings and the load's buffers.
const FIRST: usize = 4 << 20;

/// One region, and then a page each, which follow it without a gap.
fn pages() -> MemoryLayout {
    let mut layout = vec![(0, FIRST)];
    layout.extend((0..MOST - 1).map(|i| ((FIRST + i * SMALL) as u64, SMALL)));
    MemoryLayout(layout)
}

/// Carries two megabytes out and back through one segment that crosses all small regions.
fn cross_all(queue: &mut Queue, daemon: &Daemon, salt: u8) {
    let ring = queue.ring();
    let memory = ring.memory().clone();
    let len = (MOST - 1) * SMALL;
    let data = pattern(len, salt);
    let [header, ended] = [16, 1].map(|len| memory.alloc_in(0, len, 16).unwrap());
    let sector = 4096u64;
    for writes in [true, false] {
        let mut bytes = [0; 16];
        bytes[0] = u8::from(writes);
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        header.write(&bytes);
        ended.write(&[0xee]);
        let before = if writes { data.clone() } else { vec![0; len] };
        memory.write(FIRST as u64, &before);
        let piece =
            |addr, len: usize, device_writes| Segment { addr, len: len as u32, device_writes };
        let chain = [
            piece(header.addr(), 16, false),
            piece(FIRST as u64, len, !writes),
            piece(ended.addr(), 1, true),
        ];
        ring.add(&chain, false).unwrap();
        ring.publish().unwrap();
        ring.wait(LIMIT).unwrap();
        ring.pop().unwrap().unwrap();
        assert_eq!(ended.to_vec(), [status::OK]);
    }
    let mut back = vec![0; len];
    memory.read(FIRST as u64, &mut back);
    assert!(back == data);
    assert!(daemon.image()[sector as usize * 512..][..len] == data);
}

#[test]
fn five_hundred_and_nine_regions_come_and_go_one_at_a_time_under_load() {
    let seed = super::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let export = export_of("d0", 0);
    let export = format!("{export},writable=on,num-queues=4,iothread.0=a,iothread.1=b");
    let mut daemon = Daemon::start(&[
        "--object",
        "iothread,id=a",
        "--object",
        "iothread,id=b",
        "--blockdev",
        "driver=file,node-name=d0,filename=DIR/disk.img",
        "--export",
        &export,
    ]);
    let mut disk = daemon.open(&Options {
        num_queues: 4,
        layout: pages(),
        regions: Some(1),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    });
    let memory = disk.memory().clone();
    let mut queues = std::mem::take(&mut disk.queues);
    let (crossing, loaded) = queues.split_last_mut().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads: Vec<_> = loaded
            .iter_mut()
            .enumerate()
            .map(|(number, queue)| {
                let stop = &stop;
                scope.spawn(move || super::memory::load(queue, number, stop))
            })
            .collect();
        let mut order: Vec<usize> = (1..MOST).collect();
        for turn in 0..2u8 {
            random.shuffle(&mut order);
            for &region in &order {
                disk.connection().add_region(&memory.regions()[region]).unwrap();
            }
            cross_all(crossing, &daemon, turn);
            random.shuffle(&mut order);
            for &region in &order {
                disk.connection().remove_region(&memory.regions()[region]).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        for load in loads {
            assert!(load.join().unwrap() > 0);
        }
    });
    // As many as there may be, and one more.
    for region in &memory.regions()[1..] {
        disk.connection().add_region(region).unwrap();
    }
    let one_more = vublk_testkit::Memory::new(&MemoryLayout(vec![(1 << 40, SMALL)])).unwrap();
    disk.connection().add_region(&one_more.regions()[0]).unwrap_err();
    drop(disk);
    daemon.assert_serves(0);
}

/// Two disks on one worker: requests of the first take a second.
fn slow_and_quick() -> Daemon {
    let export = |node, number| format!("{},writable=on,iothread=a", export_of(node, number));
    Daemon::start(&[
        "--object",
        "iothread,id=a",
        "--blockdev",
        "driver=null-co,node-name=d0,read-zeroes=on,latency-ns=1000000000",
        "--blockdev",
        "driver=file,node-name=d1,filename=DIR/disk.img",
        "--export",
        &export("d0", 0),
        "--export",
        &export("d1", 1),
    ])
}

fn three_regions(daemon: &Daemon) -> Disk {
    daemon.open(&Options {
        layout: MemoryLayout::gapped(3, 1 << 20),
        regions: Some(2),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    })
}

#[test]
fn while_a_change_waits_for_requests_in_flight_another_disk_of_the_worker_is_served() {
    let daemon = slow_and_quick();
    let mut quick = daemon.open_number(1, &Options::default());
    for messages in [MemoryMessages::Slots, MemoryMessages::Table] {
        let mut slow = three_regions(&daemon);
        let memory = slow.memory().clone();
        slow.queue(0).submit(&Request::In { sector: 0, len: 512 }, &Shape::default()).unwrap();
        // Taken: an answer of the same worker's tells that the turn has passed.
        quick.read(0, &mut [0; 512]).unwrap();
        let mut served = 0;
        std::thread::scope(|scope| {
            let connection = slow.connection();
            let change = scope.spawn(|| match messages {
                MemoryMessages::Slots => connection.add_region(&memory.regions()[2]).unwrap(),
                MemoryMessages::Table => connection.share_memory(&memory, 3, messages).unwrap(),
            });
            while !change.is_finished() {
                quick.write(8, &pattern(4096, served as u8)).unwrap();
                served += 1;
            }
        });
        // One may have waited for the whole change.
        assert!(served > 2, "{messages:?}: {served} requests");
        assert_eq!(slow.queue(0).drain().unwrap().len(), 1);
    }
}

#[test]
fn memory_stays_mapped_until_the_requests_into_it_have_ended() {
    let daemon = slow_and_quick();
    let mapped = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.server.pid())).unwrap();
        maps.matches("vublk-testkit").count()
    };
    let mut quick = daemon.open_number(1, &Options::default());
    let mut disk = three_regions(&daemon);
    let memory = disk.memory().clone();
    assert_eq!(mapped(), 1 + 2);
    let buffer = memory.alloc_in(1, 4096, 4096).unwrap();
    let small = memory.alloc_in(0, 32, 16).unwrap();
    small.write(&[0; 17]);
    let piece = |addr, len, device_writes| Segment { addr, len, device_writes };
    let chain = [
        piece(small.addr(), 16, false),
        piece(buffer.addr(), 4096, true),
        piece(small.addr() + 16, 1, true),
    ];
    let ring = disk.queue(0).ring();
    ring.add(&chain, false).unwrap();
    ring.publish().unwrap();
    quick.read(0, &mut [0; 512]).unwrap();
    std::thread::scope(|scope| {
        let used = disk.queue(0).ring().layout();
        let connection = disk.connection();
        let removal = scope.spawn(|| connection.remove_region(&memory.regions()[1]).unwrap());
        while !removal.is_finished() {
            let mapped = mapped();
            // The request may have ended between the two looks, but not before the first.
            assert!(mapped == 1 + 2 || used.used_idx(&memory) == 1);
        }
    });
    assert_eq!((mapped(), disk.queue(0).ring().layout().used_idx(&memory)), (1 + 1, 1));
}
