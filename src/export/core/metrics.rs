//! The counters of an export: requests, bytes, errors and latencies, by queue and operation.
//!
//! The rule held here: no write is shared. A queue's counters are written by the worker that runs it, with plain
//! loads and stores, and are on cache lines of their own; a reader may see one counter newer than another.
//!
//! A latency runs from when the worker finds a request to when it is about to show the guest its end.
//! Where nobody watches latencies the clock is not read at all, and they are 0 ([`ExportMetrics::new`]).
//! It is read once in a turn of the worker ([`Io::turn_time`]), for all requests that ended
//! before it and all that are taken after it.

use super::failure::Operation;
use crate::block::Node;
use crate::io::sync::Mutex;
use crate::io::{Budget, Io};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// The distinguished operations, by their place in [`QueueMetrics::operations`].
pub const OPERATIONS: [&str; 6] = ["read", "write", "flush", "discard", "write_zeroes", "other"];

/// Upper bounds of the latency buckets: 2^10 ns (about a microsecond), 2^11 ns and so on up to 2^34 ns
/// (17 s), and all above.
pub const BUCKETS: usize = 26;

/// The first bucket's upper bound is two to this, in nanoseconds.
const FIRST_BOUND: u32 = 10;

/// The upper bound of a bucket in nanoseconds, which belongs to it; none for the last.
pub fn bound(bucket: usize) -> Option<u64> {
    (bucket + 1 < BUCKETS).then(|| 1 << (FIRST_BOUND + bucket as u32))
}

fn bucket_of(ns: u64) -> usize {
    let above = ns.saturating_sub(1) >> FIRST_BOUND;
    ((u64::BITS - above.leading_zeros()) as usize).min(BUCKETS - 1)
}

/// What an export serves now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serves {
    pub node: String,
    /// The file that the disk is in; empty if it is in none, or in several.
    pub image: String,
}

impl Serves {
    pub fn of(node: &Node) -> Serves {
        let image = node.driver().filename().unwrap_or_default();
        Serves { node: node.name().to_owned(), image }
    }
}

/// An export as it can be watched. It holds nothing of the export alive.
pub struct ExportMetrics {
    pub name: String,
    pub serves: Mutex<Serves>,
    /// The path of its socket; empty if it was handed a descriptor.
    pub socket: String,
    pub writable: bool,
    /// Bytes.
    pub size: AtomicU64,
    /// A front end is connected.
    pub connected: AtomicBool,
    /// A flush has failed, and no operator has accepted what that has lost.
    pub flush_failed: Arc<AtomicBool>,
    /// Front ends that have connected so far.
    pub connections: AtomicU64,
    /// What requests hold of our memory.
    pub memory: Arc<Budget>,
    /// Latencies are measured.
    is_timed: bool,
    /// Made when a queue of the number is first started, and kept when it stops.
    queues: Box<[OnceLock<Arc<QueueMetrics>>]>,
}

impl ExportMetrics {
    /// Of an export of a disk of `size` bytes.
    pub fn new(
        name: &str,
        (serves, size): (Serves, u64),
        writable: bool,
        queues: u16,
        is_timed: bool,
    ) -> ExportMetrics {
        ExportMetrics {
            is_timed,
            name: name.to_owned(),
            serves: Mutex::new(serves),
            socket: String::new(),
            writable,
            size: AtomicU64::new(size),
            connected: AtomicBool::new(false),
            flush_failed: Arc::default(),
            connections: AtomicU64::new(0),
            memory: Budget::of_disk(),
            queues: std::iter::repeat_with(OnceLock::new).take(queues.into()).collect(),
        }
    }

    /// The same, reached through this socket.
    pub fn at(self, socket: Option<&Path>) -> ExportMetrics {
        let socket = socket.map(|path| path.display().to_string()).unwrap_or_default();
        ExportMetrics { socket, ..self }
    }

    /// The queues that were ever started, with their numbers.
    pub fn queues(&self) -> impl Iterator<Item = (usize, &QueueMetrics)> {
        let started = self.queues.iter().enumerate();
        started.filter_map(|(index, queue)| Some((index, &**queue.get()?)))
    }

    /// For the worker that a queue is started on. One at a time has it, for the queue before is gone.
    pub fn recorder(&self, queue: usize) -> Option<Recorder> {
        let to = self.queues.get(queue)?.get_or_init(Arc::default).clone();
        let is_timed = self.is_timed;
        Some(Recorder { to, is_timed, now: 0, at_once: Default::default(), any_at_once: false })
    }
}

/// What one queue has done since the export began.
#[derive(Default)]
#[repr(align(128))]
pub struct QueueMetrics {
    pub operations: [OperationMetrics; OPERATIONS.len()],
    /// Requests in flight.
    pub depth: AtomicU64,
    /// Requests that the storage has failed and that are held.
    pub held: AtomicU64,
    /// Requests in flight that wait for memory ([`Budget`]) before they begin.
    pub waiting: AtomicU64,
    /// Times that the worker has looked for requests, and how often there were some.
    pub polls: AtomicU64,
    pub batches: AtomicU64,
    /// Kicks that have come from the guest, and notifications that went to it.
    pub kicks: AtomicU64,
    pub notifications: AtomicU64,
}

/// What a queue has done of one operation. Requests are counted when they end, in their bucket.
#[derive(Default)]
pub struct OperationMetrics {
    /// Of the requests that worked.
    pub bytes: AtomicU64,
    /// Requests that ended with another status than OK.
    pub errors: AtomicU64,
    /// Times that the storage has failed a request, whatever became of it.
    pub storage_errors: AtomicU64,
    /// The sum of all latencies, in nanoseconds.
    pub latency_ns: AtomicU64,
    pub buckets: [AtomicU64; BUCKETS],
}

impl OperationMetrics {
    fn record(&self, ns: u64, requests: u64) {
        add(&self.latency_ns, ns.saturating_mul(requests));
        add(&self.buckets[bucket_of(ns)], requests);
    }
}

/// Adds to a counter that no other thread writes to.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// A running queue's pen.
pub struct Recorder {
    to: Arc<QueueMetrics>,
    is_timed: bool,
    /// The clock, as read last for this queue.
    now: u64,
    at_once: AtOnce,
    any_at_once: bool,
}

/// Requests that ended in the turn that took them, and their bytes, by operation: their latencies are
/// known when the clock is next read. Two arrays, which the compiler does not add to as one vector: that
/// costs more than two additions.
#[derive(Default)]
struct AtOnce {
    requests: [u64; OPERATIONS.len()],
    bytes: [u64; OPERATIONS.len()],
}

impl Recorder {
    #[inline]
    fn time(&self, io: &Io) -> u64 {
        if self.is_timed { io.turn_time() } else { 0 }
    }

    /// The worker looks for requests. To be called before anything of this turn is taken.
    #[inline]
    pub fn poll(&mut self, io: &Io) {
        add(&self.to.polls, 1);
        if self.any_at_once {
            self.settle(self.time(io));
        }
    }

    /// Requests are taken; they begin now. Gives the time.
    #[inline]
    pub fn begin(&mut self, io: &Io) {
        add(&self.to.batches, 1);
        self.now = self.time(io);
    }

    /// Requests of earlier turns end now.
    #[inline]
    pub fn end(&mut self, io: &Io) {
        let now = self.time(io);
        if self.any_at_once && now != self.now {
            self.settle(now);
        }
        self.now = now;
    }

    /// When a request began that is taken now. `before`: when it was taken first, if it is not new.
    #[inline]
    pub fn taken_at(&self, before: Option<u64>) -> u64 {
        before.filter(|&at| at != 0).unwrap_or(self.now)
    }

    /// A request has ended. `works`: without an error. `bytes`: of the disk, that it was about.
    #[inline]
    pub fn ended(&mut self, operation: Option<Operation>, works: bool, taken_at: u64, bytes: u32) {
        let operation = place(operation);
        let mut bytes = u64::from(bytes);
        if !works {
            add(&self.to.operations[operation].errors, 1);
            bytes = 0;
        }
        if taken_at == self.now {
            self.at_once.requests[operation] += 1;
            self.at_once.bytes[operation] += bytes;
            self.any_at_once = true;
        } else {
            let to = &self.to.operations[operation];
            add(&to.bytes, bytes);
            to.record(self.now.saturating_sub(taken_at), 1);
        }
    }

    /// Books what has ended at once, now that the clock shows `now`.
    pub fn settle(&mut self, now: u64) {
        let now = if self.is_timed { now } else { 0 };
        self.any_at_once = false;
        let began = std::mem::replace(&mut self.now, now);
        let AtOnce { requests, bytes } = std::mem::take(&mut self.at_once);
        for (to, (requests, bytes)) in
            self.to.operations.iter().zip(requests.into_iter().zip(bytes))
        {
            if requests > 0 {
                add(&to.bytes, bytes);
                to.record(now.saturating_sub(began), requests);
            }
        }
    }

    /// The storage has failed a request.
    #[cold]
    pub fn failed(&self, operation: Option<Operation>) {
        add(&self.to.operations[place(operation)].storage_errors, 1);
    }

    /// How things stand at the end of a turn.
    #[inline]
    pub fn show(&self, depth: usize, held: usize, waiting: usize) {
        self.to.depth.store(depth as u64, Ordering::Relaxed);
        self.to.held.store(held as u64, Ordering::Relaxed);
        self.to.waiting.store(waiting as u64, Ordering::Relaxed);
    }

    pub fn kicked(&self) {
        add(&self.to.kicks, 1);
    }

    pub fn notified(&self) {
        add(&self.to.notifications, 1);
    }
}

#[inline]
fn place(operation: Option<Operation>) -> usize {
    match operation {
        Some(Operation::Read) => 0,
        Some(Operation::Write) => 1,
        Some(Operation::Flush) => 2,
        Some(Operation::Discard) => 3,
        Some(Operation::WriteZeroes) => 4,
        None => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_belongs_to_the_bucket_whose_bounds_hold_it() {
        for ns in [0, 1, 1023, 1024, 1025, 2048, 2049, 1 << 33, (1 << 34) - 1, 1 << 34] {
            let bucket = bucket_of(ns);
            assert!(bound(bucket).is_some_and(|bound| ns <= bound), "{ns}");
            assert!(bucket == 0 || bound(bucket - 1).is_some_and(|bound| ns > bound), "{ns}");
        }
        for ns in [(1 << 34) + 1, u64::MAX] {
            assert_eq!((bucket_of(ns), bound(BUCKETS - 1)), (BUCKETS - 1, None));
        }
    }

    #[test]
    fn requests_that_end_in_their_turn_are_booked_when_the_clock_is_read_next() {
        let export = ExportMetrics::new("e", (Serves::default(), 0), true, 1, true);
        let mut recorder = export.recorder(0).unwrap();
        let counts = || {
            let (_, queue) = export.queues().next().unwrap();
            let read = &queue.operations[0];
            let all = read.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum();
            (all, read.bytes.load(Ordering::Relaxed), read.latency_ns.load(Ordering::Relaxed))
        };
        recorder.now = 5_000;
        let at = recorder.taken_at(None);
        recorder.ended(Some(Operation::Read), true, at, 512);
        recorder.ended(Some(Operation::Read), true, at, 512);
        assert_eq!(counts(), (0u64, 0, 0));
        recorder.settle(8_000);
        assert_eq!(counts(), (2, 1024, 6_000));
        // One of the turn before.
        recorder.ended(Some(Operation::Read), true, at, 4096);
        assert_eq!(counts(), (3, 5120, 9_000));
        // One that fails moves no bytes.
        recorder.ended(Some(Operation::Read), false, at, 4096);
        assert_eq!(counts(), (4, 5120, 12_000));
        // One that was held was taken long ago; one that another daemon took is new here.
        assert_eq!((recorder.taken_at(Some(1)), recorder.taken_at(Some(0))), (1, 8_000));
    }
}
