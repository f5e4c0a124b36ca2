//! Fairness between queues on one worker: none waits longer than another's share of a turn.

use std::rc::Rc;
use std::sync::mpsc;

use vublk::export::vhost_user_blk::queue::Queue;
use vublk::io;
use vublk_testkit::ring::Desc;
use vublk_testkit::spec::desc_flag::{INDIRECT, NEXT, WRITE};

use super::LIMIT;
use super::lone_queue::Lone;

const MIB: u32 = 1 << 20;
const HEADER: u64 = 64 << 10;
const STATUS: u64 = HEADER + 16;
const TABLE: u64 = 128 << 10;
const DATA: u64 = 1 << 20;

/// A queue that tells at the end of each turn how many of its requests have ended.
struct Reporting {
    name: char,
    queue: Queue,
    lone: Lone,
    sender: mpsc::Sender<(char, u16)>,
}

impl io::Source for Reporting {
    fn poll(&mut self, io: &Rc<io::Io>, me: io::SourceId) -> io::Polled {
        self.queue.poll(io, me)
    }
    fn has_work(&self) -> bool {
        self.queue.has_work()
    }
    fn complete(&mut self, io: &Rc<io::Io>, tag: u32, result: io::IoResult) {
        self.queue.complete(io, tag, result);
    }
    fn publish(&mut self) {
        self.queue.publish();
        let _ = self.sender.send((self.name, self.lone.ring.used_idx(&self.lone.guest)));
    }
    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
    fn disarm(&mut self) {
        self.queue.disarm();
    }
    fn is_detachable(&self) -> bool {
        true
    }
}

/// A ring full of `count` reads into `segments` pieces of `len` bytes.
fn reads(count: u16, segments: u16, len: u32) -> Lone {
    let lone = Lone::new(16 << 20, 256);
    let Lone { guest, ring, .. } = &lone;
    guest.write(HEADER, &[0; 16]);
    let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
    ring.write_desc(guest, TABLE, 0, desc(HEADER, 16, NEXT, 1));
    for n in 1..=segments {
        ring.write_desc(guest, TABLE, n, desc(DATA, len, NEXT | WRITE, n + 1));
    }
    ring.write_desc(guest, TABLE, segments + 1, desc(STATUS, 1, WRITE, 0));
    for head in 0..count {
        let table = 16 * (u32::from(segments) + 2);
        ring.write_desc(guest, ring.desc, head, desc(TABLE, table, INDIRECT, 0));
        ring.set_avail_entry(guest, head, head);
    }
    ring.set_avail_idx(guest, count);
    lone
}

/// What two queues on one worker tell, `a` of which comes first, up to the end of both.
fn order(options: &str, a: Lone, b: Lone) -> Vec<(char, u16)> {
    let worker = io::Worker::start("worker", io::WorkerOptions::default()).unwrap();
    let disk = format!("driver=null-co,read-zeroes=on{options}");
    let node = worker.block_on(move || async move { crate::disks::open(&disk).await.node });
    let wanted = [&a, &b].map(|lone| lone.ring.avail_idx(&lone.guest));
    let (sender, order) = mpsc::channel();
    worker.send(move |local| {
        for (name, lone) in [('a', a), ('b', b)] {
            let queue = Queue::new(lone.start(node.clone()));
            local.attach(Box::new(Reporting { name, queue, lone, sender: sender.clone() }), None);
        }
    });
    let mut all = Vec::new();
    while !(all.contains(&('a', wanted[0])) && all.contains(&('b', wanted[1]))) {
        all.push(order.recv_timeout(LIMIT).unwrap());
    }
    all
}

#[test]
fn a_queue_full_of_long_chains_or_long_copies_lets_the_others_of_its_worker_go_on() {
    for (segments, len) in [(1022, 512), (1, MIB), (16, MIB / 16)] {
        let order = order("", reads(256, segments, len), reads(1, 1, 512));
        // Four chains, the first batch of a turn, are its whole share.
        assert_eq!(order[..2], [('a', 4), ('b', 1)], "{segments} segments of {len}");
        assert!(order.contains(&('a', 8)));
    }
    let order = order("", reads(256, 1, 4096), reads(1, 1, 512));
    assert_eq!(order[0], ('a', 256), "small requests are done in one turn");
}

#[test]
fn a_request_that_is_longer_than_a_turn_goes_in_pieces() {
    let order = order("", reads(64, 1, 14 * MIB), reads(64, 1, 512));
    let place = |end| order.iter().position(|&one| one == end).unwrap();
    assert!(place(('b', 64)) < place(('a', 64)));
    let turns = order.iter().filter(|(name, _)| *name == 'a').count();
    // With the piece that ends it a turn moves less than twice its share.
    assert!(turns >= 64 * 14 / 8, "{turns}");
}

#[test]
fn slow_requests_of_one_queue_do_not_delay_those_of_another() {
    // Each takes a task, and zeroes its memory in it.
    let order = order(",latency-ns=1", reads(256, 1, MIB), reads(1, 1, 512));
    let place = |end| order.iter().position(|&one| one == end).unwrap();
    let by_then = order[..place(('b', 1))].iter().filter(|(name, _)| *name == 'a');
    let ended = by_then.map(|&(_, ended)| ended).max().unwrap_or(0);
    assert!(ended <= 16, "{ended} had ended");
}
