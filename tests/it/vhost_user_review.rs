//! Rings and messages at the edges of what the vhost-user-blk export counts, keeps and promises.

use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::vhost_user::Daemon;
use crate::vhost_user::lone_queue::Lone;
use vublk::export::vhost_user_blk::queue::{AtStop, Queue, Stopped};
use vublk::io;
use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::message;
use vublk_testkit::ring::Desc;
use vublk_testkit::spec;
use vublk_testkit::spec::desc_flag::{INDIRECT, NEXT, WRITE};
use vublk_testkit::{Connection, Disk, MemoryLayout, Options};

/// No step of a test takes this long unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

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

/// How often each thread of the daemon was given a processor.
fn turns_on_a_processor(daemon: &Daemon) -> Vec<(String, u64)> {
    let tasks = format!("/proc/{}/task", daemon.server.pid());
    let mut turns: Vec<_> = std::fs::read_dir(tasks)
        .unwrap()
        .map(|task| {
            let task = task.unwrap().path();
            let name = std::fs::read_to_string(task.join("comm")).unwrap();
            let stat = std::fs::read_to_string(task.join("schedstat")).unwrap();
            let turns = stat.split_whitespace().nth(2).unwrap().parse().unwrap();
            (format!("{} {}", task.display(), name.trim()), turns)
        })
        .collect();
    turns.sort();
    turns
}

#[test]
fn a_hundred_connected_disks_that_are_idle_use_no_processor() {
    let exports: Vec<String> = (0..100)
        .map(|n| {
            format!(
                "type=vhost-user-blk,id=e{n},node-name=d0,addr.type=unix,addr.path=DIR/e{n}.sock,\
                 num-queues=2"
            )
        })
        .collect();
    let mut arguments = vec!["--blockdev", "driver=null-co,node-name=d0,read-zeroes=on"];
    exports.iter().for_each(|export| arguments.extend(["--export", export]));
    let daemon = Daemon::start(&arguments);
    let options = Options {
        num_queues: 2,
        queue_size: 16,
        layout: MemoryLayout::single(1 << 20),
        ..Options::default()
    };
    let mut disks: Vec<_> = (0..100).map(|n| daemon.open_number(n, &options)).collect();
    for (n, disk) in disks.iter_mut().enumerate() {
        for _ in 0..20 {
            disk.read(0, &mut [0; 512]).unwrap();
        }
        // Some are stopped, some broken by their guest.
        match n % 4 {
            0 => drop(disk.connection().stop_queue(0).unwrap()),
            1 => disk.connection().enable_queue(0, false).unwrap(),
            2 => {
                let memory = disk.memory().clone();
                let ring = disk.queue(0).ring();
                ring.layout().set_avail_idx(&memory, ring.next_avail().wrapping_add(1000));
                ring.kick().unwrap();
            }
            _ => {}
        }
    }
    assert_falls_idle(&daemon);
}

/// What is at work settles; then nobody runs. A thread of the pool may end meanwhile.
fn assert_falls_idle(daemon: &Daemon) {
    let end = Instant::now() + LIMIT;
    loop {
        let before = turns_on_a_processor(daemon);
        std::thread::sleep(Duration::from_secs(2));
        let after = turns_on_a_processor(daemon);
        if before == after {
            return;
        }
        let differ: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).collect();
        assert!(Instant::now() < end, "not idle: {differ:?}");
    }
}

#[test]
fn a_polled_queue_that_was_broken_is_looked_at_no_more() {
    let mut daemon = Daemon::null("", "");
    let mut disk = daemon.open(&Options::default());
    // SET_VRING_KICK without a descriptor: the ring is to be polled.
    let flags = message::VERSION | message::NEED_REPLY;
    let stream = disk.connection().stream();
    message::send(stream, 12, flags, None, &0x100u64.to_le_bytes(), &[]).unwrap();
    assert_eq!(message::receive(stream, LIMIT).unwrap().unwrap().value(), Some(0));
    disk.read(0, &mut [0; 512]).unwrap();
    let memory = disk.memory().clone();
    let ring = disk.queue(0).ring();
    ring.layout().set_avail_idx(&memory, ring.next_avail().wrapping_add(1000));
    daemon.wait_log("out of range", 1);
    assert_falls_idle(&daemon);
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
    // the lists that the kernel takes, and twice that on the slow road.
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

/// A queue that tells, when it ends, what its stopper has heard by then.
struct Watched {
    queue: Queue,
    stopper: mpsc::Receiver<Stopped>,
    told: mpsc::Sender<[Result<Stopped, mpsc::TryRecvError>; 2]>,
}

impl io::Source for Watched {
    fn poll(&mut self, io: &Rc<io::Io>, me: io::SourceId) -> io::Polled {
        let polled = self.queue.poll(io, me);
        if polled == io::Polled::Ended {
            let _ = self.told.send([self.stopper.try_recv(), self.stopper.try_recv()]);
        }
        polled
    }
    fn has_work(&self) -> bool {
        self.queue.has_work()
    }
    fn complete(&mut self, io: &Rc<io::Io>, tag: u32, result: io::IoResult) {
        self.queue.complete(io, tag, result);
    }
    fn publish(&mut self) {
        self.queue.publish();
    }
    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
    fn disarm(&mut self) {
        self.queue.disarm();
    }
}

#[test]
fn who_stops_a_queue_can_wait_until_it_has_let_go_of_the_memory() {
    // Else its worker may be the last to hold the guest's memory, and unmap it: that takes long, and
    // the other disks of the worker would wait.
    let worker = io::Worker::start("worker", io::WorkerOptions::default()).unwrap();
    let opened = worker.block_on(|| async { crate::disks::open("driver=null-co").await.node });
    let lone = Lone::new(1 << 20, 16);
    let (start, memory) = (lone.start(opened), lone.memory);
    let (told, hears) = mpsc::channel();
    worker.send(move |local| {
        let (sender, stopper) = mpsc::channel();
        let mut queue = Queue::new(start);
        queue.stop(sender, AtStop::Fail);
        local.attach(Box::new(Watched { queue, stopper, told }), None);
    });
    let empty = Err(mpsc::TryRecvError::Empty);
    assert_eq!(
        hears.recv_timeout(LIMIT).unwrap(),
        [Ok(Stopped::default()), empty],
        "it still holds the memory"
    );
    // The end of the channel is the end of the queue.
    assert!(hears.recv_timeout(LIMIT).is_err());
    assert_eq!(Arc::strong_count(&memory), 1);
}
