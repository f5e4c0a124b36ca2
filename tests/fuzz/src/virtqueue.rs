//! A hostile guest against the real queue, on a simulated worker over a simulated disk.
//!
//! The law: no panic; no byte outside the guest's memory; a queue that is told to stop does, after
//! a bounded number of turns. A guest that keeps to the rules (`honest`) also gets every request
//! back once, with a status of the specification, and its queue never breaks.

mod requests;
mod results;

use super::dirty_log::Bitmap;
use super::disk::{self, Under, Wanted};
use super::events::{Events, take_word};
use super::guest::{GuestMemory, Place};
use super::inflight::Kept;
use super::input::Input;
use super::scribbler::Scribbler;
use super::worker::worker;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;
use vublk::export::core::ExportMetrics;
use vublk::export::core::failure::{FailureOptions, ReadErrors, WriteErrors};
use vublk::export::core::metrics::Serves;
use vublk::export::vhost_user_blk::queue::{AtStop, Queue, QueueLog, QueueStart, Stopped};
use vublk::export::vhost_user_blk::ring::{Addresses, Ring, SplitRing, Tracking};
use vublk::io::sim::Disorder;
use vublk::io::{Io, IoResult, Polled, Source, SourceId, current, sleep};

/// What ring addresses are given in is so far above guest addresses.
const USER: u64 = 0x7f00_0000_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Chains that a queue may take in one turn (`SHARE` in the queue).
const SHARE: usize = 256;
/// Regions that one descriptor may continue over; a power of two.
const MANY: usize = 128;
/// Turns, of a simulated millisecond each, after which a queue counts as stuck.
const PATIENCE: u32 = 20_000;

/// What an input says where it wants a flush of 2^16 segments. A mutation does not come upon it: such
/// a flush takes longer than a hundred other inputs, and a test has one.
const LONG_FLUSH: &[u8] = b"long flush";

/// What a run has shown.
#[derive(Default)]
pub struct Shown {
    /// Flushes of 2^16 segments that came back as they must.
    pub long_flushes: u32,
}

/// Runs one guest.
pub fn run(data: &[u8]) {
    show(data);
}

/// As [`run`], and tells what that has shown.
pub fn show(data: &[u8]) -> Shown {
    run_beside(data, None)
}

/// As [`run`], while another processor of the guest scribbles over the rings, from a seed. Such a
/// run is not repeatable; the law is the same, but the guest is never honest.
pub fn run_scribbled(data: &[u8], seed: u64) {
    run_beside(data, Some(seed));
}

fn run_beside(data: &[u8], scribble: Option<u64>) -> Shown {
    let data = data.to_vec();
    let queue = Rc::new(Shared::default());
    let theirs = queue.clone();
    let worker = worker(0);
    let shown = worker.drive(Disorder::wild(data.len() as u64), move |local| {
        let events = Events::silent();
        // The last bit of the input says whether the queue is kicked or looked at.
        let kicked = data.last().is_some_and(|byte| byte & 1 != 0);
        let fd = kicked.then(|| events.kick.as_raw_fd());
        let me = local.attach(Box::new(Watched(theirs.clone())), fd);
        async move {
            let mut shown = Shown::default();
            let words = Words { me, kicked, events };
            Guest::live(Input::new(&data), &theirs, words, scribble, &mut shown).await;
            theirs.over.set(true);
            current().wake_source(me);
            shown
        }
    });
    while Rc::strong_count(&queue) > 1 {
        worker.call(|_| ());
    }
    shown
}

thread_local! {
    /// The thread's, which counts all that its runs do.
    static METRICS: ExportMetrics = ExportMetrics::new("fuzz", (Serves::default(), 0), true, 1, true);
}

/// The way to the queue.
struct Words {
    me: SourceId,
    /// Whether the queue is notified of kicks.
    kicked: bool,
    events: Rc<Events>,
}

/// The queue, which its worker polls and the guest's future pauses and stops.
#[derive(Default)]
struct Shared {
    queue: RefCell<Option<Queue>>,
    /// Polls since the queue was told to stop.
    last_polls: Cell<u32>,
    stopping: Cell<bool>,
    /// The run is.
    over: Cell<bool>,
}

/// Passes everything on, and looks what a turn did.
struct Watched(Rc<Shared>);

impl Source for Watched {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        let mut queue = self.0.queue.borrow_mut();
        let Some(queue) = &mut *queue else {
            return if self.0.over.get() { Polled::Ended } else { Polled::Idle };
        };
        let before = queue.in_flight();
        let polled = queue.poll(io, me);
        let taken = queue.in_flight().saturating_sub(before);
        assert!(taken <= SHARE, "{taken} chains in one turn");
        if self.0.stopping.get() {
            self.0.last_polls.set(self.0.last_polls.get() + 1);
            assert!(self.0.last_polls.get() < 10 * PATIENCE, "a stopping queue is polled for ever");
        }
        if polled == Polled::Ended {
            assert_eq!(queue.in_flight(), 0, "ended with requests in flight");
        }
        polled
    }

    fn has_work(&self) -> bool {
        self.0.queue.borrow().as_ref().is_some_and(Queue::has_work)
    }

    fn complete(&mut self, io: &Rc<Io>, tag: u32, result: IoResult) {
        if let Some(queue) = &mut *self.0.queue.borrow_mut() {
            queue.complete(io, tag, result);
        }
    }

    fn tick(&mut self, io: &Rc<Io>, now: u64) -> bool {
        self.0.queue.borrow_mut().as_mut().is_some_and(|queue| queue.tick(io, now))
    }

    fn publish(&mut self) {
        if let Some(queue) = &mut *self.0.queue.borrow_mut() {
            queue.publish();
        }
    }

    fn is_idle(&self) -> bool {
        self.0.queue.borrow().as_ref().is_none_or(Queue::is_idle)
    }

    fn arm(&mut self) -> bool {
        self.0.queue.borrow_mut().as_mut().is_none_or(Queue::arm)
    }

    fn disarm(&mut self) {
        if let Some(queue) = &mut *self.0.queue.borrow_mut() {
            queue.disarm();
        }
    }
}

/// The driver's side.
struct Guest {
    memory: Rc<GuestMemory>,
    size: u16,
    /// Guest addresses.
    descriptors: u64,
    available: u64,
    used: u64,
    /// Has kept to the rules so far, and will.
    honest: bool,
    /// What it says in the available ring.
    index: u16,
    /// How far it has looked at the used ring.
    seen: u16,
    next_descriptor: u16,
    /// Next free byte, for what the honest guest puts into memory.
    free: u64,
    /// Where the status of each chain in flight will be, by head.
    flying: BTreeMap<u16, u64>,
    /// Heads, in the order in which they were made available.
    offered: Vec<u16>,
    /// Where the pages that the queue writes are marked.
    bitmap: Option<Bitmap>,
    /// Heads that were made available since it is used.
    logged: BTreeSet<u16>,
    /// A chain that nothing can be wrong with, on a disk without faults.
    must_succeed: Option<u16>,
    /// How many such chains have come back.
    long_flushes: u32,
    faulty: bool,
    shared: Rc<Shared>,
    words: Words,
}

/// Regions of the guest: few or many, side by side or with gaps, not always aligned.
fn places(input: &mut Input<'_>, honest: bool) -> Vec<Place> {
    let many = input.one_in(32);
    let count = if many { 130 } else { 1 + input.below(4) };
    let gap = if input.one_in(2) && !many { 0x10_0000 } else { 0 };
    let skew = u64::from(input.one_in(8) && !honest);
    let mut guest = input.pick(&[0, 0x1000, 0xffff_0000, 1 << 40]);
    // Few combinations, so that most runs find their memory mapped; and little of it, because each run clears it.
    let lens =
        if many { [0x200, 0xff0, 0x33, 0x200, 0x33] } else { [0x1800, 0xff0, 0x4e00, 0x200, 0x33] };
    let first = input.below(2);
    let mut places = Vec::new();
    for i in 0..count {
        let len = if i == 0 { 0xee00 } else { lens[(first + i) as usize % lens.len()] };
        places.push(Place { guest, user: USER + guest + skew, len });
        guest += len + gap;
    }
    places
}

/// The reaction to requests that fail.
fn failures(input: &mut Input<'_>) -> FailureOptions {
    use WriteErrors as Write;
    FailureOptions {
        werror: input.pick(&[Write::Report, Write::Stop, Write::Ignore, Write::Enospc]),
        rerror: input.pick(&[ReadErrors::Report, ReadErrors::Stop, ReadErrors::Ignore]),
        ..FailureOptions::default()
    }
}

impl Guest {
    async fn live(
        mut input: Input<'_>,
        shared: &Rc<Shared>,
        words: Words,
        scribble: Option<u64>,
        shown: &mut Shown,
    ) {
        let flags = input.u8();
        let honest = flags & 3 == 0 && scribble.is_none();
        let event_index = flags & 4 != 0;
        let wanted = Wanted {
            graph: [Under::Fast, Under::Slow, Under::Aligned, Under::Null]
                [usize::from(flags >> 3 & 3)],
            faulty: flags & 32 != 0,
            writable: flags & 64 == 0 || honest,
            write_through: flags & 128 != 0,
            logical_block_size: input.pick(&[512, 512, 4096]),
            num_queues: 1,
            failures: failures(&mut input),
        };
        let device = disk::open(wanted).await;
        let memory = GuestMemory::at(places(&mut input, honest));
        let base = memory.places[0];

        let size = 1u16 << input.pick(&[4u16, 0, 1, 2, 3, 5, 7, 4, 4, 0, 1, 2, 3, 5, 7, 10]);
        let start = if input.one_in(4) { input.u16() } else { 0 };
        let entries = u64::from(size);
        let descriptors = base.guest;
        let available = descriptors + entries * 16;
        let used = (available + 6 + entries * 2).next_multiple_of(4);
        let mut at = Addresses {
            descriptors: descriptors + USER,
            available: available + USER,
            used: used + USER,
        };
        if !honest && input.one_in(16) {
            let anywhere = |input: &mut Input<'_>| base.user.wrapping_add(input.edgy());
            at = Addresses {
                descriptors: anywhere(&mut input),
                available: anywhere(&mut input),
                used: anywhere(&mut input),
            };
        }
        if base.user != USER + base.guest {
            // Right in the front end's addresses, but not aligned in ours.
            for part in [&mut at.descriptors, &mut at.available, &mut at.used] {
                *part += 16;
            }
        }
        // Not from the start: the guest's two indexes begin where an earlier session left them.
        memory.put(available + 2, &start.to_le_bytes());
        memory.put(used + 2, &start.to_le_bytes());
        let mut guest = Guest {
            free: used + 6 + entries * 8,
            memory,
            size,
            descriptors,
            available,
            used,
            honest,
            index: start,
            seen: start,
            next_descriptor: 0,
            flying: BTreeMap::new(),
            offered: Vec::new(),
            bitmap: None,
            logged: BTreeSet::new(),
            must_succeed: None,
            long_flushes: 0,
            faulty: wanted.faulty,
            shared: shared.clone(),
            words,
        };
        let mut kept =
            if input.one_in(4) { Some(guest.have_a_past(&mut input).await) } else { None };
        // Where the front end says that the ring continues; with a past, it may be wrong.
        let base = if kept.is_some() { input.u16() } else { start };
        let ring = SplitRing::new(&guest.memory.memory, size, at, base, event_index);
        let Ok(mut ring) = ring else { return };
        let inflight = match &mut kept {
            None => None,
            Some(kept) => {
                let Some(tracker) = kept.take_up(ring.published()) else { return };
                ring.go_on_behind(tracker.to_replay());
                Some(tracker)
            }
        };
        *guest.shared.queue.borrow_mut() = Some(Queue::new(QueueStart {
            index: 0,
            recorder: METRICS.with(|metrics| metrics.recorder(0)),
            disk: device.disk.clone(),
            serial: "fuzz".to_owned(),
            memory: guest.memory.memory.clone(),
            ring,
            inflight,
            log: Default::default(),
            size,
            call: Some(guest.words.events.call.clone()),
            err: Some(guest.words.events.error.clone()),
            held: Vec::new(),
            paused: 0,
        }));
        current().wake_source(guest.words.me);
        if let Some(kept) = &kept
            && !honest
            && at.used == USER + used
        {
            guest.see_what_is_begun_again(kept).await;
        }
        let ring_and_headers = u64::from(guest.size) * 18 + 0x800;
        let scribbler = scribble
            .map(|seed| Scribbler::start(&guest.memory, guest.descriptors, ring_and_headers, seed));
        guest.act(&mut input).await;
        guest.end().await;
        drop(scribbler);
        shown.long_flushes = guest.long_flushes;
        guest.memory.check();
        if let Some(kept) = &kept {
            let used_index = honest.then(|| u16::from_le_bytes(guest.memory.get(guest.used + 2)));
            kept.check_end(guest.is_broken(), used_index);
        }
        guest.shared.queue.borrow_mut().take();
        if let Some(bitmap) = guest.bitmap {
            bitmap.end();
        }
    }

    /// Has made requests available to a daemon that died over them: what is kept of them, and what
    /// it had shown in the used ring.
    async fn have_a_past(&mut self, input: &mut Input<'_>) -> Kept {
        for _ in 0..input.below(9) {
            if self.table_is_full() {
                break;
            }
            self.request(input).await;
        }
        self.notify();
        let mut kept = Kept::new(input, self.size, self.honest);
        let handed_back = kept.live_and_die(input, &self.offered, self.seen);
        for (n, head) in (0..).zip(&handed_back.heads) {
            let entry = u64::from(self.seen.wrapping_add(n) & (self.size - 1));
            let element = [u32::from(*head), 1].map(u32::to_le_bytes).concat();
            self.memory.put(self.used + 4 + entry * 8, &element);
            self.memory.put(self.flying[head], &[0]);
        }
        let index = self.seen.wrapping_add(handed_back.shown);
        self.memory.put(self.used + 2, &index.to_le_bytes());
        if !self.honest {
            kept.scramble(input);
        }
        kept
    }

    /// Makes nothing available beyond what the queue begins again, and looks what comes back: each
    /// of those at most once.
    async fn see_what_is_begun_again(&mut self, kept: &Kept) {
        let used_index = || u16::from_le_bytes(self.memory.get(self.used + 2));
        let (from, mut again) = (kept.used_index, kept.again.clone());
        self.index = from.wrapping_add(again.len() as u16);
        self.notify();
        current().wake_source(self.words.me);
        // Longer than all that is begun again takes, unless that is held.
        sleep(Duration::from_millis(2)).await;
        let count = used_index().wrapping_sub(from);
        assert!(usize::from(count) <= again.len(), "{count} came back of {}", again.len());
        for n in 0..count {
            let entry = u64::from(from.wrapping_add(n) & (self.size - 1));
            let id = u32::from_le_bytes(self.memory.get(self.used + 4 + entry * 8));
            let place = again.iter().position(|head| u32::from(*head) == id);
            again.remove(place.unwrap_or_else(|| panic!("{id} came back and was not to")));
        }
    }

    async fn act(&mut self, input: &mut Input<'_>) {
        let mut paused = 0;
        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            match input.u8() % 18 {
                16 | 17 => self.migrate(input),
                0..=5 => self.request(input).await,
                6 | 7 => self.wait().await,
                8 if paused < 3 => {
                    paused += 1;
                    self.with_queue(|queue| queue.pause(Box::new(|| {})));
                }
                9 if paused > 0 => {
                    paused -= 1;
                    self.with_queue(Queue::resume);
                }
                // Words that the guest may say at any time: whether and when it wants to be told.
                10 => self.memory.put(self.available, &input.u16().to_le_bytes()),
                11 => {
                    let event = self.available + 4 + 2 * u64::from(self.size);
                    self.memory.put(event, &input.u16().to_le_bytes());
                }
                _ if self.honest => self.notify(),
                12 => self.descriptor(input),
                13 => {
                    let entry = u64::from(input.u16() % self.size);
                    let head = input.below(u64::from(self.size) * 2) as u16;
                    self.memory.put(self.available + 4 + entry * 2, &head.to_le_bytes());
                }
                14 => {
                    let by = if input.one_in(8) { input.u16() } else { input.below(9) as u16 };
                    self.index = self.index.wrapping_add(by);
                    self.notify();
                }
                _ => {
                    let (addr, len) = (self.address(input), usize::from(input.u8()) % 64);
                    self.memory.put(addr, input.bytes(len));
                }
            }
        }
        for _ in 0..paused {
            self.with_queue(Queue::resume);
        }
    }

    /// Has what the queue writes marked from now on, or no longer.
    fn migrate(&mut self, input: &mut Input<'_>) {
        self.logged.clear();
        self.with_queue(|queue| queue.set_log(QueueLog::default()));
        if let Some(last) = self.bitmap.take() {
            last.end();
        }
        if input.one_in(3) {
            return;
        }
        let Some(bitmap) = Bitmap::new(input) else { return };
        let used = if self.honest || input.one_in(2) { self.used } else { self.address(input) };
        let log = QueueLog { log: Some(bitmap.log.clone()), used: Some(used) };
        self.with_queue(|queue| queue.set_log(log));
        self.bitmap = Some(bitmap);
    }

    fn with_queue(&self, work: impl FnOnce(&mut Queue)) {
        if let Some(queue) = &mut *self.shared.queue.borrow_mut() {
            work(queue);
        }
        current().wake_source(self.words.me);
    }
}

fn encode(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
