//! The memory that a guest can make the daemon hold: it is bounded, and further requests wait.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vublk::block::{OpenPolicy, Traits};
use vublk::io::budget::Limits;
use vublk::options::keyval;
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk, SimOptions};
use vublk::service::Service;
use vublk_testkit::memory::MemoryLayout;
use vublk_testkit::ring::Desc;
use vublk_testkit::spec::desc_flag::{INDIRECT, NEXT, WRITE};
use vublk_testkit::{Disk, Options};

use super::{Daemon, LIMIT, export_of, pattern};
use crate::disks::{REGISTRY, unique};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 8 * MIB;
const ENTRIES: u16 = 1024;
/// Guest addresses that no table of a ring uses.
const HEADER: u64 = MEMORY / 2;
const STATUS: u64 = HEADER + 16;
const TABLE: u64 = HEADER + 4096;
/// Not aligned.
const DATA: u64 = HEADER + 8192 + 1;

fn options() -> Options {
    Options {
        num_queues: 2,
        queue_size: ENTRIES,
        layout: MemoryLayout::single(MEMORY as usize),
        limit: LIMIT,
        ..Options::default()
    }
}

/// Fills a queue with reads of the same MiB of the disk, from sector 8 on, into the same memory.
fn flood(disk: &mut Disk, queue: usize) {
    let memory = disk.memory().clone();
    let mut header = [0; 16];
    header[8] = 8;
    memory.write(HEADER, &header);
    memory.write(STATUS, &[0xff]);
    let layout = disk.queue(queue).ring().layout();
    let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
    let table = [
        desc(HEADER, 16, NEXT, 1),
        desc(DATA, MIB as u32, NEXT | WRITE, 2),
        desc(STATUS, 1, WRITE, 0),
    ];
    for (index, desc) in table.into_iter().enumerate() {
        layout.write_desc(&memory, TABLE, index as u16, desc);
    }
    for head in 0..ENTRIES {
        layout.write_desc(&memory, layout.desc, head, desc(TABLE, 48, INDIRECT, 0));
        layout.set_avail_entry(&memory, head, head);
    }
    layout.set_avail_idx(&memory, ENTRIES);
    disk.queue(queue).ring().kick().unwrap();
}

/// How many requests of a queue have come back.
fn done(disk: &mut Disk, queue: usize) -> u16 {
    let memory = disk.memory().clone();
    disk.queue(queue).ring().layout().used_idx(&memory)
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + 3 * LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn parse(text: &str) -> vublk::options::Map {
    keyval::parse(text, None).unwrap().options
}

#[test]
fn a_stalled_disk_holds_its_share_of_memory_and_others_go_on() {
    let align = Traits { request_align: 512, buffer_align: 4096, ..SimOptions::new(0).traits };
    let bytes = pattern(4 << 20, 7);
    let stalled = SimDisk::holding(
        SimOptions { traits: align, ..SimOptions::new(bytes.len() as u64) },
        &bytes,
    );
    let other = SimDisk::new(SimOptions::new(4 << 20));
    let dir = tempfile::tempdir().unwrap();
    let service = Service::start(&REGISTRY, OpenPolicy::default()).unwrap();
    let iothread = parse("qom-type=iothread,id=io0");
    service.wait(async move |service| service.object_add(iothread).await).unwrap();
    let observed = service.observe();
    let paths = [(&stalled, 0), (&other, 1)].map(|(disk, number)| {
        let name = unique();
        disk.publish(&name);
        let node = parse(&format!("driver=sim,disk={name},node-name=d{number}"));
        let path = dir.path().join(format!("e{number}.sock"));
        let export = format!(
            "type=vhost-user-blk,id=e{number},node-name=d{number},addr.type=unix,addr.path={},\
             iothread=io0,num-queues=2",
            path.display()
        );
        let export = parse(&export);
        let begun = service.wait(async move |service| {
            service.blockdev_add(node).await?;
            service.export_add(export).await
        });
        begun.unwrap();
        path
    });
    stalled.inject(Fault::new(Kinds::READ, Effect::Hang));
    let mut disk = Disk::open(&paths[0], &options()).unwrap();
    let mut second = Disk::open(&paths[1], &options()).unwrap();
    flood(&mut disk, 0);
    flood(&mut disk, 1);

    let export = observed.exports().into_iter().find(|export| export.name == "e0").unwrap();
    let sum = |of: fn(&vublk::export::core::metrics::QueueMetrics) -> u64| {
        export.queues().map(|(_, queue)| of(queue)).sum::<u64>()
    };
    let in_flight = || sum(|queue| queue.depth.load(Ordering::Relaxed));
    let waiting = || sum(|queue| queue.waiting.load(Ordering::Relaxed));
    wait_until("all are taken", || in_flight() == 2 * u64::from(ENTRIES));
    assert!((32..=64).contains(&(in_flight() - waiting())), "{} wait", waiting());
    assert!(export.memory.held() <= Limits::DISK.most);

    // The other disk of the same worker works, on both paths.
    flood(&mut second, 0);
    wait_until("the other disk", || done(&mut second, 0) == ENTRIES);
    second.queue(1).flush().unwrap();
    assert_eq!((done(&mut disk, 0), done(&mut disk, 1)), (0, 0));

    stalled.heal();
    wait_until("all end", || (0..2).all(|queue| done(&mut disk, queue) == ENTRIES));
    let memory = disk.memory();
    let (mut data, mut status) = (vec![0; MIB as usize], [1]);
    memory.read(DATA, &mut data);
    memory.read(STATUS, &mut status);
    assert_eq!(status, [0]);
    assert!(data == bytes[4096..][..MIB as usize]);
    wait_until("nothing is held", || export.memory.held() == 0 && waiting() == 0);
    second.queue(1).flush().unwrap();
}

#[test]
fn thousands_of_requests_that_are_copied_take_a_bounded_part_of_memory() {
    let export = |number| format!("{},num-queues=2", export_of(&format!("d{number}"), number));
    let mut daemon = Daemon::start(&[
        "--blockdev",
        "driver=blkdebug,align=4096,node-name=d0,image.driver=null-co,image.read-zeroes=on,\
         image.latency-ns=50000000,image.size=4194304",
        "--export",
        &export(0),
        "--blockdev",
        "driver=file,node-name=d1,filename=DIR/disk.img",
        "--export",
        &export(1),
    ]);
    let mut other = daemon.open_number(1, &options());
    let mut disk = daemon.open(&options());
    let before = daemon.server.resident().unwrap().anonymous;
    flood(&mut disk, 0);
    flood(&mut disk, 1);
    let mut most = 0;
    wait_until("all end", || {
        other.read(0, &mut [0; 4096]).unwrap();
        most = most.max(daemon.server.resident().unwrap().anonymous);
        (0..2).all(|queue| done(&mut disk, queue) == ENTRIES)
    });
    let taken = most.saturating_sub(before);
    assert!(taken < 128 * MIB, "{taken} bytes");
    drop(disk);
    daemon.assert_serves(0);
}
