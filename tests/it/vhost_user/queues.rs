//! Rings of every size, whole rounds of their indices, and many rings on few workers.

use std::time::Instant;
use vublk_testkit::request::{Range, Request, Shape};
use vublk_testkit::spec::{feature, status};
use vublk_testkit::{Cut, MemoryLayout, Options, Queue};

use super::{Daemon, LIMIT, SIZE, pattern};

#[test]
fn rings_of_every_size_serve_with_and_without_event_index() {
    let daemon = Daemon::file("");
    for size in (0..=10).map(|power| 1 << power) {
        for event_idx in [0, feature::EVENT_IDX] {
            let mut disk = daemon.open(&Options {
                queue_size: size,
                features: feature::QEMU & !feature::EVENT_IDX | event_idx,
                ..Options::default()
            });
            let queue = disk.queue(0);
            let data = pattern(2048, size as u8 ^ event_idx as u8);
            // A ring of two or fewer has no room for a direct chain of three.
            queue.shape = Shape::indirect();
            for turn in 0..3 {
                for i in 0..u64::from(size) {
                    let sector = 4 * (i + turn);
                    let request = Request::Out { sector, data: data.clone() };
                    queue.add(&request, &Shape::indirect()).unwrap();
                }
                queue.publish().unwrap();
                let done = queue.drain().unwrap();
                assert_eq!(done.len(), usize::from(size));
                assert!(done.iter().all(|c| c.status == status::OK));
            }
            let mut back = vec![0; 2048];
            queue.read(4, &mut back).unwrap();
            assert_eq!(back, data, "{size} entries");
        }
    }
}

#[test]
fn indices_wrap_after_65536_requests() {
    let daemon = Daemon::file("");
    for event_idx in [0, feature::EVENT_IDX] {
        let mut disk = daemon.open(&Options {
            queue_size: 512,
            features: feature::QEMU & !feature::EVENT_IDX | event_idx,
            ..Options::default()
        });
        let queue = disk.queue(0);
        let mut sent = 0u32;
        while sent < 66_000 {
            for _ in 0..512 {
                let request = Request::In { sector: u64::from(sent % 1000), len: 512 };
                queue.add(&request, &Shape::indirect()).unwrap();
                sent += 1;
            }
            queue.publish().unwrap();
            assert!(queue.drain().unwrap().iter().all(|c| c.status == status::OK));
        }
        let data = pattern(4096, 77);
        queue.write(16, &data).unwrap();
        let mut back = vec![0; 4096];
        queue.read(16, &mut back).unwrap();
        assert_eq!(back, data);
        assert_eq!(disk.stop().unwrap(), [(sent + 2) as u16]);
    }
}

#[test]
fn a_ring_may_begin_anywhere() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options { queue_size: 16, ..Options::default() });
    let data = pattern(512, 1);
    // Up to the wrap of the 16-bit index, by one request at a time.
    for _ in 0..40 {
        disk.write(0, &data).unwrap();
    }
    assert_eq!(disk.stop().unwrap(), [40]);
    disk.start_queue(0, 40).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    disk.write(1, &data).unwrap();
    assert_eq!(disk.stop().unwrap(), [41]);
}

/// Writes `count` blocks of 4 KiB of this queue's own, many at a time, and reads them back.
fn work(queue: &mut Queue, number: usize, blocks: std::ops::Range<u64>) {
    let salt = |block: u64| (block as u8).wrapping_mul(31) ^ number as u8;
    for block in blocks.clone() {
        let request = Request::Out { sector: block * 8, data: pattern(4096, salt(block)) };
        queue.add(&request, &Shape::indirect()).unwrap();
    }
    queue.publish().unwrap();
    assert!(queue.drain().unwrap().iter().all(|c| c.status == status::OK));
    let mut back = vec![0; 4096];
    for block in blocks {
        queue.read(block * 8, &mut back).unwrap();
        assert!(back == pattern(4096, salt(block)), "queue {number}, block {block}");
    }
}

#[test]
fn two_hundred_and_fifty_six_queues_on_three_workers_serve_one_disk() {
    vublk::io::descriptors::raise_limit();
    let export = super::daemon::export_of("d0", 0);
    let export =
        format!("{export},writable=on,num-queues=256,iothread.0=a,iothread.1=b,iothread.2=c");
    let daemon = Daemon::start(&[
        "--object",
        "iothread,id=a",
        "--object",
        "iothread,id=b",
        "--object",
        "iothread,id=c",
        "--blockdev",
        "driver=file,node-name=d0,filename=DIR/disk.img",
        "--export",
        &export,
    ]);
    let mut disk = daemon.open(&Options {
        num_queues: 256,
        queue_size: 64,
        layout: MemoryLayout::adjacent(4, 16 << 20),
        ..Options::default()
    });
    assert!(disk.has(feature::MQ));
    let each = SIZE / 4096 / 256;
    let mut queues = std::mem::take(&mut disk.queues);
    std::thread::scope(|scope| {
        for (lot, queues) in queues.chunks_mut(64).enumerate() {
            scope.spawn(move || {
                for (i, queue) in queues.iter_mut().enumerate() {
                    let number = lot * 64 + i;
                    work(queue, number, number as u64 * each..(number as u64 + 1) * each);
                }
            });
        }
    });
    disk.queues = queues;
    // What one queue has written, another one reads.
    let mut back = vec![0; 4096];
    for number in 0..256u64 {
        let block = (255 - number) * each;
        disk.queue(number as usize).read(block * 8, &mut back).unwrap();
        assert!(back == pattern(4096, (block as u8).wrapping_mul(31) ^ (255 - number) as u8));
    }
    let workers = daemon.server.threads().unwrap();
    let used = workers.iter().filter(|t| ["a", "b", "c"].contains(&&*t.name)).count();
    assert_eq!(used, 3, "{workers:?}");
    assert_eq!(disk.stop().unwrap().len(), 256);
}

#[test]
fn queues_that_are_offered_and_not_used_take_no_descriptors_and_no_threads() {
    let [one, many] = [1, 256].map(|offered| {
        let daemon = Daemon::null("size=1048576", &format!("num-queues={offered}"));
        let mut disk = daemon.open(&Options::default());
        disk.read(0, &mut [0; 4096]).unwrap();
        (daemon, disk)
    });
    let taken = |daemon: &Daemon| {
        // Threads for work that blocks, ours and the kernel's, come and go.
        let stays =
            |name: &str| !["offload", "compute", "io"].contains(&name) && !name.starts_with("iou-");
        let threads = daemon.server.threads().unwrap();
        let threads: Vec<_> = threads.into_iter().map(|t| t.name).filter(|n| stays(n)).collect();
        (daemon.server.open_files(), threads)
    };
    // What is taken for a while only may differ.
    let end = Instant::now() + LIMIT;
    while taken(&one.0) != taken(&many.0) && Instant::now() < end {}
    assert_eq!(taken(&one.0), taken(&many.0), "descriptors and threads");
}

#[test]
fn more_queues_than_a_message_can_name_are_refused() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["daemon", "--blockdev", "null-co,node-name=d0", "--export"])
        .arg("vhost-user-blk,id=e,node-name=d0,addr.type=unix,addr.path=never.sock,num-queues=257")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("num-queues must be at most 256"), "{said}");
}

#[test]
fn many_disks_share_one_worker() {
    let mut arguments = vec!["--object".to_owned(), "iothread,id=io0".to_owned()];
    let dir = tempfile::tempdir().unwrap();
    for number in 0..8 {
        super::daemon::new_image(&dir.path().join(format!("{number}.img")), 1 << 20);
        arguments.push("--blockdev".into());
        arguments.push(format!("driver=file,node-name=d{number},filename=DIR/{number}.img"));
        arguments.push("--export".into());
        let export = super::daemon::export_of(&format!("d{number}"), number);
        arguments.push(format!("{export},writable=on,num-queues=2,iothread=io0"));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::start_in(dir, &[env!("CARGO_BIN_EXE_vublk"), "daemon"], &arguments);
    let options = Options { num_queues: 2, ..Options::default() };
    let mut disks: Vec<_> = (0..8).map(|number| daemon.open_number(number, &options)).collect();
    std::thread::scope(|scope| {
        for (number, disk) in disks.iter_mut().enumerate() {
            scope.spawn(move || {
                work(disk.queue(0), number, 0..64);
                work(disk.queue(1), number + 100, 64..128);
            });
        }
    });
    for number in 0..8 {
        let image = std::fs::read(daemon.path(&format!("{number}.img"))).unwrap();
        assert!(image[..4096] == pattern(4096, number as u8), "disk {number}");
    }
}

#[test]
fn a_queue_without_kick_descriptor_is_polled() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    assert_eq!(disk.stop().unwrap(), [0]);
    let ring = disk.queue(0).ring();
    let (layout, memory) = (ring.layout(), ring.memory().clone());
    let call = ring.call_fd().try_clone().unwrap();
    let user = |addr| memory.user_addr(addr).unwrap();
    let stream = disk.connection().stream().try_clone().unwrap();
    use vublk_testkit::message as m;
    use vublk_testkit::message::{NEED_REPLY, VERSION, receive, send};
    let words = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
    let mut address = words(0, 0);
    for at in [user(layout.desc), user(layout.used), user(layout.avail), 0] {
        address.extend_from_slice(&at.to_le_bytes());
    }
    use std::os::fd::AsRawFd;
    let none = (1u64 << 8).to_le_bytes();
    // SET_VRING_NUM, BASE, ADDR, CALL, KICK with the bit that says "no descriptor", ENABLE.
    for (request, payload, fds) in [
        (8, words(0, u32::from(layout.size)), vec![]),
        (10, words(0, 0), vec![]),
        (9, address, vec![]),
        (13, 0u64.to_le_bytes().to_vec(), vec![call.as_raw_fd()]),
        (12, none.to_vec(), vec![]),
        (18, words(0, 1), vec![]),
    ] {
        send(&stream, request, VERSION | NEED_REPLY, None, &payload, &fds).unwrap();
        let answer: m::Answer = receive(&stream, super::daemon::LIMIT).unwrap().unwrap();
        assert_eq!((answer.request, answer.value()), (request, Some(0)));
    }
    let queue = disk.queue(0);
    let request = Request::In { sector: 0, len: 512 };
    queue.add(&request, &Shape { writable: Cut::Joined, ..Shape::default() }).unwrap();
    let ring = queue.ring();
    ring.publish_quietly();
    assert_eq!(queue.wait().unwrap().status, status::OK);
}

#[test]
fn requests_that_write_the_same_place_at_once_leave_one_of_them_there() {
    let daemon = Daemon::file("num-queues=2");
    let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
    for turn in 0..50u8 {
        for number in 0..2 {
            let data = vec![turn * 2 + number; 4096];
            let queue = disk.queue(usize::from(number));
            queue.submit(&Request::Out { sector: 0, data }, &Shape::default()).unwrap();
            let zero = vec![Range { sector: 8, sectors: 8, flags: 0 }];
            queue.submit(&Request::WriteZeroes(zero), &Shape::default()).unwrap();
        }
        for number in 0..2 {
            let done = disk.queue(number).drain().unwrap();
            assert!(done.iter().all(|c| c.status == status::OK));
        }
        let mut back = vec![0; 8192];
        disk.read(0, &mut back).unwrap();
        for block in back[..4096].chunks(512) {
            assert!(block[0] / 2 == turn && block.iter().all(|&byte| byte == block[0]));
        }
        assert_eq!(back[4096..], [0; 4096]);
    }
}
