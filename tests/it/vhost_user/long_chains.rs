//! Chains of as many descriptors, over as many regions of memory, as a guest can make.

use std::time::{Duration, Instant};

use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::ring::Desc;
use vublk_testkit::spec;
use vublk_testkit::spec::desc_flag::{INDIRECT, NEXT, WRITE};
use vublk_testkit::{Disk, MemoryLayout, Options};

use super::{Daemon, LIMIT};

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// Makes head 0 available, which points to an indirect table at `table`, and waits until it is used.
fn run_table(daemon: &Daemon, disk: &mut Disk, table: u64, list: &[Desc]) {
    let memory = disk.memory().clone();
    let ring = disk.queue(0).ring();
    let layout = ring.layout();
    for (index, desc) in list.iter().enumerate() {
        layout.write_desc(&memory, table, index as u16, *desc);
    }
    let pointer = desc(table, list.len() as u32 * 16, INDIRECT, 0);
    layout.write_desc(&memory, layout.desc, 0, pointer);
    let before = layout.used_idx(&memory);
    ring.add_head(0);
    ring.publish().unwrap();
    let end = Instant::now() + LIMIT;
    while layout.used_idx(&memory) == before {
        assert!(Instant::now() < end, "no answer:\n{}", daemon.server.stderr());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_header_in_two_pieces_before_65535_of_data_is_understood() {
    // Descriptors that lie in up to 100 regions each: 65537 pieces that the device reads.
    const REGIONS: u64 = 100;
    const BASE: u64 = 1 << 20;
    const HEADER: u64 = BASE / 2;
    const STATUS: u64 = HEADER + 4096;
    const TABLE: u64 = STATUS + 4096;
    let mut regions = vec![(0, BASE as usize)];
    regions.extend((0..REGIONS).map(|i| (BASE + (i << 12), 4096)));
    let mut daemon = Daemon::null("size=4294967296", "");
    let mut disk = daemon.open(&Options {
        queue_size: 16,
        layout: MemoryLayout(regions),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    });
    let memory = disk.memory().clone();
    let mut list = vec![desc(HEADER, 8, NEXT, 1), desc(HEADER + 8, 8, NEXT, 2)];
    list.extend((0..655).map(|i| desc(BASE, 100 * 4096, NEXT, i + 3)));
    list.push(desc(BASE, 35 * 4096, NEXT, 658));
    list.push(desc(STATUS, 1, WRITE, 0));
    memory.write(HEADER, &[&1u32.to_le_bytes()[..], &[0; 12]].concat());
    memory.write(STATUS, &[spec::status::UNTOUCHED]);
    run_table(&daemon, &mut disk, TABLE, &list);
    let mut status = [0];
    memory.read(STATUS, &mut status);
    assert_eq!(status, [spec::status::OK]);
    drop(disk);
    daemon.assert_serves(0);
}

/// The most memory that the daemon has had, guests' included, in bytes.
fn most_resident(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_guest_with_as_many_pieces_in_flight_as_there_can_be_does_not_fill_our_memory() {
    // 16 queues of 1024 requests of 1024 pieces: more than 16 million pieces, of 16 bytes each in
    // the lists that the kernel takes, and twice that on the slow path.
    const QUEUES: usize = 16;
    const SIZE: u16 = 1024;
    let daemon = Daemon::null("size=1073741824,latency-ns=20000000", "num-queues=16");
    let mut disk =
        daemon.open(&Options { num_queues: QUEUES, queue_size: SIZE, ..Options::default() });
    let memory = disk.memory().clone();
    let buffer = memory.alloc(64 << 10, 4096).unwrap();
    let (header, data, status, table) =
        (buffer.addr(), buffer.addr() + 4096, buffer.addr() + 8192, buffer.addr() + 12288);
    memory.write(header, &[0; 16]);
    let mut list = vec![desc(header, 16, NEXT, 1)];
    list.extend((2..SIZE).map(|next| desc(data, 512, NEXT | WRITE, next)));
    list.push(desc(status, 1, WRITE, 0));
    let before = most_resident(&daemon);
    for queue in &mut disk.queues {
        let ring = queue.ring();
        let layout = ring.layout();
        for (index, desc) in (0..).zip(&list) {
            layout.write_desc(&memory, table, index, *desc);
        }
        for head in 0..SIZE {
            let pointer = desc(table, list.len() as u32 * 16, INDIRECT, 0);
            layout.write_desc(&memory, layout.desc, head, pointer);
            ring.add_head(head);
        }
        ring.publish().unwrap();
    }
    let end = Instant::now() + LIMIT;
    for queue in &mut disk.queues {
        let layout = queue.ring().layout();
        while layout.used_idx(&memory) != SIZE {
            assert!(Instant::now() < end, "no answer:\n{}", daemon.server.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let grown = most_resident(&daemon) - before;
    assert!(grown < 160 << 20, "{} MiB", grown >> 20);
}
