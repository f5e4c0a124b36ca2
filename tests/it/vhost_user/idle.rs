//! Unused disks, which take no processor time: connected, stopped, or broken by their guest.

use std::time::{Duration, Instant};

use vublk_testkit::message;
use vublk_testkit::{MemoryLayout, Options};

use super::{Daemon, LIMIT};

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
