//! The hot loop: one virtqueue on one worker.
//!
//! A turn takes what the guest made available, maps each read and write through the graph, starts it
//! on the leaf it ends at, and leaves everything else to tasks. Results are written to the used ring
//! as they come and published once a batch, with at most one notification.
//!
//! Nothing here allocates once warm, takes a lock, or writes to memory that other workers write to.

mod ends;
mod failing;
mod parked;
mod slot;
mod slow;
mod take;

pub use failing::{AtStop, Stopped};

use super::calls::CallPolicy;
use super::dirty_log::DirtyLog;
use super::memory::Memory;
use super::memory_loss::LossWatch;
use super::ring::{Broken, Ring, SplitRing, Tracking};
use crate::export::core::Disk;
use crate::export::core::held::Held;
use crate::export::core::metrics::Recorder;
use crate::export::core::watch::Watch;
use crate::io::epoch::Announcer;
use crate::io::{Io, IoResult, Polled, Source, SourceId};
use parked::Parked;
use slot::Slot;
use slow::Finished;
use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

/// Chains taken from one queue in a turn, so that the other queues of the worker have theirs.
const SHARE: u16 = 256;

/// Segments that an idle slot may keep room for.
const KEEP_SEGMENTS: usize = 256;

/// Segments that all slots of a queue together have room for. Beyond that, requests that end leave no room but
/// for a few.
const KEEP_IN_ALL: usize = 1 << 16;

/// Segments that a slot keeps room for in any case.
const KEEP_ALWAYS: usize = 16;

/// Segments in flight, all requests of a queue together, beyond which no more are taken: their lists
/// are our memory, and how many there are is the guest's to say. The last chain may go beyond.
const HELD_SEGMENTS: usize = 1 << 15;

/// A queue at work. Owned by its worker.
pub struct Queue<R: Ring = SplitRing> {
    /// For the log.
    index: usize,
    disk: Arc<Disk>,
    serial: Arc<str>,
    memory: Arc<Memory>,
    loss: LossWatch,
    watch: Watch,
    ring: R,
    /// `None`: the front end does not want requests in flight to be tracked.
    inflight: Option<R::Tracker>,
    /// While a migration wants to know what we write.
    log: Option<Arc<DirtyLog>>,
    announcer: Rc<Announcer>,
    /// By head: a chain in flight is known by its first descriptor.
    slots: Vec<Slot>,
    in_flight: usize,
    /// Segments of the requests in flight.
    segments_in_flight: usize,
    /// Segments that slots have room for.
    room: usize,
    /// Requests that the storage has failed and that are tried again; they are not in flight.
    held: Held,
    /// Slow requests that wait for memory; they are in flight.
    parked: Parked,
    /// What tasks of the slow path have finished.
    finished: Rc<RefCell<Vec<Finished>>>,
    call: Option<Arc<File>>,
    calls: CallPolicy,
    err: Option<Arc<File>>,
    broken: bool,
    /// Nothing is taken while this is not zero.
    paused: u32,
    /// Who wants to know when nothing is in flight any more.
    drained: Vec<Box<dyn FnOnce() + Send>>,
    /// Declared, and so dropped, after all that holds the memory.
    stop: Option<(mpsc::Sender<Stopped<R::Index>>, AtStop)>,
    counts: Counts,
    /// `None`: nobody watches.
    recorder: Option<Recorder>,
}

#[derive(Default)]
struct Counts {
    requests: u64,
    slow: u64,
    flushes: u64,
}

/// What a queue writes is marked in a log, and in which of the guest's addresses its used ring.
#[derive(Clone, Default)]
pub struct QueueLog {
    pub log: Option<Arc<DirtyLog>>,
    pub used: Option<u64>,
}

/// What a queue is started with.
pub struct QueueStart<R: Ring = SplitRing> {
    /// The queue's number.
    pub index: usize,
    pub recorder: Option<Recorder>,
    pub disk: Arc<Disk>,
    /// What GET_ID reads.
    pub serial: String,
    pub memory: Arc<Memory>,
    pub ring: R,
    pub inflight: Option<R::Tracker>,
    pub log: QueueLog,
    pub size: u16,
    /// Heads of requests that another queue held on this ring, where that is not tracked.
    pub held: Vec<u16>,
    pub call: Option<Arc<File>>,
    pub err: Option<Arc<File>>,
    /// Nothing is taken until as many resumes have come.
    pub paused: u32,
}

impl<R: Ring> Queue<R> {
    /// A queue, on the thread that will serve it.
    pub fn new(start: QueueStart<R>) -> Queue<R> {
        let announcer = Rc::new(start.disk.node().announcer());
        let mut slots: Vec<_> =
            std::iter::repeat_with(Slot::default).take(start.size as usize).collect();
        let mut held = start.held;
        held.retain(|&head| head < start.size);
        held.iter().for_each(|&head| slots[head as usize].busy = true);
        start.disk.failures.hold(held.len());
        let mut queue = Queue {
            index: start.index,
            disk: start.disk,
            serial: start.serial.into(),
            memory: start.memory,
            loss: LossWatch::default(),
            watch: Watch::default(),
            ring: start.ring,
            inflight: start.inflight,
            log: None,
            announcer,
            slots,
            in_flight: 0,
            segments_in_flight: 0,
            room: 0,
            held: Held::carried(held),
            parked: Parked::new(start.size),
            finished: Rc::new(RefCell::new(Vec::with_capacity(start.size as usize))),
            call: start.call,
            calls: CallPolicy::default(),
            err: start.err,
            broken: false,
            paused: start.paused,
            drained: Vec::new(),
            stop: None,
            counts: Counts::default(),
            recorder: start.recorder,
        };
        queue.set_log(start.log);
        queue
    }

    /// What is written from now on is marked, or no more; what is in flight is marked when it ends.
    pub fn set_log(&mut self, QueueLog { log, used }: QueueLog) {
        self.ring.set_log(log.clone().zip(used));
        self.log = log;
    }

    /// Takes nothing more; once nothing is in flight, ends, and tells `stopped` what it leaves. The
    /// channel ends when the queue is gone.
    pub fn stop(&mut self, stopped: mpsc::Sender<Stopped<R::Index>>, held: AtStop) {
        self.stop = Some((stopped, held));
        if held == AtStop::Fail {
            self.fail_held();
        }
    }

    /// Whether the front end keeps memory for what is in flight.
    pub fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    pub fn serves(&self, disk: &Arc<Disk>) -> bool {
        Arc::ptr_eq(&self.disk, disk)
    }

    /// The receiver of the front end's withdrawal of memory.
    pub fn watch_loss(&mut self, loss: LossWatch) {
        self.loss = loss;
    }

    /// The receiver of reports about requests that do not end.
    pub fn watch_hangs(&mut self, watch: Watch) {
        self.watch = watch;
    }

    pub fn set_call(&mut self, call: Option<Arc<File>>) {
        self.call = call;
    }

    pub fn set_err(&mut self, err: Option<Arc<File>>) {
        self.err = err;
    }

    /// Takes nothing more until as many `resume`s have come; calls `drained` once nothing is in
    /// flight.
    pub fn pause(&mut self, drained: Box<dyn FnOnce() + Send>) {
        self.paused += 1;
        self.drained.push(drained);
    }

    pub fn resume(&mut self) {
        self.paused = self.paused.saturating_sub(1);
    }

    /// Requests taken and not handed back.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn may_take(&self) -> bool {
        !self.broken && self.paused == 0 && self.stop.is_none() && self.has_room()
    }

    /// Whether another request's segments may be held; if not, the end of one makes room.
    fn has_room(&self) -> bool {
        self.segments_in_flight < HELD_SEGMENTS
    }

    /// How many chains are to be taken again now: those of a daemon that has died, which belong to the
    /// ring's past, so that a queue that is asked to stop takes them still; and those held ones that
    /// are due.
    fn to_replay(&self) -> u16 {
        if self.broken || self.paused != 0 || !self.has_room() {
            return 0;
        }
        let died = self.inflight.as_ref().map_or(0, Tracking::to_replay);
        died + if self.stop.is_none() { self.held.due() } else { 0 }
    }

    /// The guest broke the rules: this queue takes no more, what is in flight completes.
    fn fail(&mut self, why: Broken) {
        self.broken = true;
        // What is no longer there was not written by the guest.
        if self.loss.is_lost(&self.memory) {
            return;
        }
        log::warn!(export = &*self.disk.name; "queue {}: stopped: {why}", self.index);
        if let Some(err) = &self.err {
            let _ = (&**err).write(&1u64.to_ne_bytes());
        }
    }

    /// What was waiting for the queue to be empty.
    fn when_empty(&mut self) -> bool {
        if self.in_flight > 0 || self.to_replay() > 0 {
            return false;
        }
        for drained in self.drained.drain(..) {
            drained();
        }
        self.stop.is_some()
    }

    fn add_up(&mut self) {
        let Counts { requests, slow, flushes } = std::mem::take(&mut self.counts);
        let counters = &self.disk.counters;
        counters.requests.fetch_add(requests, Ordering::Relaxed);
        counters.slow.fetch_add(slow, Ordering::Relaxed);
        counters.flushes.fetch_add(flushes, Ordering::Relaxed);
    }
}

impl<R: Ring> Source for Queue<R> {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        let mut polled = Polled::Idle;
        if let Some(recorder) = &mut self.recorder {
            recorder.poll(io);
        }
        while let Some(done) = self.next_finished() {
            self.slow_ended(io, done);
            polled = Polled::Busy;
        }
        self.unpark(io, me);
        let again = self.to_replay();
        if again > 0 {
            polled = Polled::Busy;
            if let Err(why) = self.take(io, me, again.min(SHARE)) {
                self.fail(why);
            }
        } else if self.may_take() {
            match self.ring.available() {
                Ok(0) => {}
                Ok(count) => {
                    polled = Polled::Busy;
                    if let Err(why) = self.take(io, me, count.min(SHARE)) {
                        self.fail(why);
                    }
                }
                Err(why) => self.fail(why),
            }
        }
        if (self.stop.is_some() || !self.drained.is_empty()) && self.when_empty() {
            self.publish();
            self.add_up();
            if let Some(recorder) = &mut self.recorder {
                recorder.settle(io.now());
            }
            let held = self.held.take_all();
            self.disk.failures.let_go(held.len());
            if let Some((stopped, _)) = &self.stop {
                // The caller may have given up waiting. The sender stays: its end tells that the queue has released
                // the memory.
                let _ = stopped.send(Stopped { base: self.ring.next_available(), held });
            }
            return Polled::Ended;
        }
        polled
    }

    fn has_work(&self) -> bool {
        self.ring.has_work() && self.may_take() || self.to_replay() > 0
    }

    fn complete(&mut self, io: &Rc<Io>, tag: u32, result: IoResult) {
        let head = tag as u16;
        if let Some(generation) = self.slots[head as usize].generation.take() {
            self.announcer.end(generation);
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.end(io);
        }
        self.transferred(io, head, result);
    }

    fn kicked(&mut self) {
        if let Some(recorder) = &self.recorder {
            recorder.kicked();
        }
    }

    fn tick(&mut self, io: &Rc<Io>, now: u64) -> bool {
        if let Some(at) = self.held.tick(now) {
            io.tick_by(at);
        }
        if self.watch.is_due(io, now, self.in_flight > 0) {
            self.age();
        }
        self.held.due() > 0
    }

    fn publish(&mut self) {
        self.announcer.settle();
        self.show_used();
        self.call();
        if let Some(recorder) = &self.recorder {
            recorder.show(self.in_flight, self.held.count(), self.parked.count());
        }
    }

    fn arm(&mut self) -> bool {
        // A queue that takes nothing wants no kicks either; a wake-up polls it.
        self.to_replay() == 0 && (!self.may_take() || self.ring.want_kick())
    }

    fn disarm(&mut self) {
        self.ring.no_kick();
    }

    fn is_idle(&self) -> bool {
        !self.may_take() && self.to_replay() == 0
    }
}
