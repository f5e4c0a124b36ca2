//! The guest's memory: announced in every form, changed while rings run, and refused if invalid.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::VhostUserFrontend;
use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::message::{self, NEED_REPLY, VERSION};
use vublk_testkit::request::{Placement, Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{Connection, MemoryLayout, Options, Queue};

use super::daemon::LIMIT;
use super::{Daemon, pattern};

/// Writes and reads back through one queue until told to stop. Gives the number of rounds.
pub fn load(queue: &mut Queue, number: usize, stop: &AtomicBool) -> u64 {
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) || round == 0 {
        let salt = (round as u8).wrapping_mul(7) ^ number as u8;
        let sector = number as u64 * 512;
        for i in 0..16 {
            let request = Request::Out { sector: sector + 8 * i, data: pattern(4096, salt) };
            queue.add(&request, &Shape::indirect()).unwrap();
        }
        queue.publish().unwrap();
        assert!(queue.drain().unwrap().iter().all(|c| c.status == status::OK));
        for i in 0..16 {
            let request = Request::In { sector: sector + 8 * i, len: 4096 };
            queue.add(&request, &Shape::default()).unwrap();
        }
        queue.publish().unwrap();
        for done in queue.drain().unwrap() {
            assert!(done.status == status::OK && done.data == pattern(4096, salt), "round {round}");
        }
        round += 1;
    }
    round
}

/// Changes the memory's upper regions, by `change`, again and again under load.
fn under_load(
    messages: MemoryMessages,
    change: impl Fn(&mut Connection, &vublk_testkit::Memory, usize),
) {
    let export = super::daemon::export_of("d0", 0);
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
        layout: MemoryLayout::gapped(3, 4 << 20),
        regions: Some(1),
        memory_messages: messages,
        ..Options::default()
    });
    let memory = disk.memory().clone();
    let mut queues = std::mem::take(&mut disk.queues);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads: Vec<_> = queues
            .iter_mut()
            .enumerate()
            .map(|(number, queue)| {
                let stop = &stop;
                scope.spawn(move || load(queue, number, stop))
            })
            .collect();
        for turn in 0..60 {
            change(disk.connection(), &memory, turn);
            // The queues' buffers stay in the first region: the others come and go.
            memory.set_usable_regions(1);
        }
        stop.store(true, Ordering::Relaxed);
        for load in loads {
            assert!(load.join().unwrap() > 0);
        }
    });
    disk.queues = queues;
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn the_memory_table_may_change_while_rings_run() {
    under_load(MemoryMessages::Table, |connection, memory, turn| {
        connection.share_memory(memory, 1 + turn % 3, MemoryMessages::Table).unwrap();
    });
}

#[test]
fn regions_may_come_and_go_while_rings_run() {
    under_load(MemoryMessages::Slots, |connection, memory, turn| {
        let region = &memory.regions()[1 + turn % 2];
        connection.add_region(region).unwrap();
        connection.remove_region(region).unwrap();
    });
}

#[test]
fn a_region_that_was_added_later_holds_data_too() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options {
        layout: MemoryLayout::gapped(12, 1 << 20),
        regions: Some(2),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    });
    let memory = disk.memory().clone();
    for region in &memory.regions()[2..] {
        disk.connection().add_region(region).unwrap();
    }
    memory.set_usable_regions(12);
    disk.queue(0).shape = Shape {
        readable: vublk_testkit::Cut::Each(512),
        writable: vublk_testkit::Cut::Each(512),
        indirect: true,
        placement: Placement::Spread,
    };
    let data = pattern(16 << 10, 3);
    disk.write(0, &data).unwrap();
    let mut back = vec![0; data.len()];
    disk.read(0, &mut back).unwrap();
    assert!(back == data && daemon.image()[..data.len()] == data);
}

#[test]
fn five_hundred_regions_are_taken() {
    let daemon = Daemon::file("");
    let mut layout = vec![(0, 1 << 20)];
    layout.extend((1..500).map(|i| ((i + 1) << 20, 4096)));
    let mut disk = daemon.open(&Options {
        layout: MemoryLayout(layout),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    });
    assert!(disk.connection().vhost().get_max_mem_slots().unwrap() >= 500);
    for region in [1, 7, 250, 499] {
        let memory = disk.memory().clone();
        let data = memory.alloc_in(region, 4096, 4096).unwrap();
        data.write(&pattern(4096, region as u8));
        let small = memory.alloc(32, 16).unwrap();
        small.write(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xee]);
        let ring = disk.queue(0).ring();
        let piece = |addr, len, device_writes| vublk_testkit::Segment { addr, len, device_writes };
        let chain = [
            piece(small.addr(), 16, false),
            piece(data.addr(), 4096, false),
            piece(small.addr() + 16, 1, true),
        ];
        ring.add(&chain, false).unwrap();
        ring.publish().unwrap();
        ring.wait(LIMIT).unwrap();
        ring.pop().unwrap().unwrap();
        assert_eq!(small.to_vec()[16], status::OK);
        assert!(daemon.image()[..4096] == pattern(4096, region as u8));
    }
}

/// Just enough of a session to send memory messages by hand.
fn connect(daemon: &Daemon) -> Connection {
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    let wanted = protocol::DEFAULT;
    connection.negotiate(vublk_testkit::spec::feature::QEMU, wanted).unwrap();
    connection
}

#[test]
fn regions_that_cannot_be_right_are_refused_and_cost_the_connection_alone() {
    let mut daemon = Daemon::file("");
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    // Guest address, bytes, user address, offset in the file.
    let table: [(&str, Vec<[u64; 4]>); 9] = [
        ("longer than its file", vec![[0, 2 << 20, 0x7000_0000, 0]]),
        ("beyond its file by its offset", vec![[0, 1 << 20, 0x7000_0000, 4096]]),
        ("of no bytes", vec![[0, 0, 0x7000_0000, 0]]),
        ("past the end of guest addresses", vec![[u64::MAX - 4095, 1 << 20, 0, 0]]),
        ("past the end of user addresses", vec![[0, 1 << 20, u64::MAX - 4095, 0]]),
        ("at an offset near the end of numbers", vec![[0, 4096, 0, u64::MAX - 4095]]),
        ("at an offset inside a page", vec![[0, 4096, 0x7000_0000, 100]]),
        ("twice", vec![[0, 1 << 20, 0x7000_0000, 0]; 2]),
        ("overlapping", vec![[0, 8192, 0x7000_0000, 0], [4096, 8192, 0x8000_0000, 0]]),
    ];
    for (what, regions) in table {
        let connection = connect(&daemon);
        let mut payload = (regions.len() as u64).to_le_bytes().to_vec();
        for word in regions.iter().flatten() {
            payload.extend_from_slice(&word.to_le_bytes());
        }
        let fds = vec![file.as_raw_fd(); regions.len()];
        // SET_MEM_TABLE.
        let stream = connection.stream();
        message::send(stream, 5, VERSION | NEED_REPLY, None, &payload, &fds).unwrap();
        let answer = message::receive(stream, LIMIT).unwrap();
        assert!(answer.is_none_or(|a| a.value() != Some(0)), "a region {what} was taken");
        assert_eq!(message::receive(stream, LIMIT).unwrap(), None, "{what}");
    }
    daemon.assert_serves(0);
}

#[test]
fn a_region_that_is_removed_must_be_there() {
    let mut daemon = Daemon::file("");
    let memory = vublk_testkit::Memory::new(&MemoryLayout::gapped(2, 1 << 20)).unwrap();
    let mut connection = connect(&daemon);
    connection.set_features().unwrap();
    connection.add_region(&memory.regions()[0]).unwrap();
    connection.remove_region(&memory.regions()[0]).unwrap();
    connection.add_region(&memory.regions()[0]).unwrap();
    connection.remove_region(&memory.regions()[1]).unwrap_err();
    daemon.assert_serves(0);
}

#[test]
fn a_region_that_is_added_again_is_the_one_that_counts() {
    let daemon = Daemon::file("");
    let options = Options {
        layout: MemoryLayout::gapped(2, 4 << 20),
        memory_messages: MemoryMessages::Slots,
        protocol: protocol::DEFAULT | protocol::CONFIGURE_MEM_SLOTS,
        ..Options::default()
    };
    let mut disk = daemon.open(&options);
    let memory = disk.memory().clone();
    for turn in 0..3u8 {
        for region in memory.regions() {
            disk.connection().add_region(region).unwrap();
        }
        let data = vec![turn + 1; 4096];
        disk.write(0, &data).unwrap();
        let mut back = vec![0; 4096];
        disk.read(0, &mut back).unwrap();
        assert_eq!(back, data);
    }
    // Each of them is there once.
    disk.stop().unwrap();
    for region in memory.regions() {
        disk.connection().remove_region(region).unwrap();
    }
    disk.connection().remove_region(&memory.regions()[0]).unwrap_err();
}
