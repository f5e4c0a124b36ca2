//! The hot loop: one virtqueue on one worker.
//!
//! A turn takes what the guest made available, maps each read and write through the graph, starts it
//! on the leaf it ends at, and leaves everything else to tasks. Results are written to the used ring
//! as they come and published once a batch, with at most one notification.
//!
//! Nothing here allocates once warm, takes a lock, or writes to memory that other workers write to.

mod failing;

pub use failing::{AtStop, Stopped};

use super::calls::CallPolicy;
use super::dirty_log::DirtyLog;
use super::inflight::Tracker;
use super::memory::Memory;
use super::memory_loss::LossWatch;
use super::request::{Disk, Ended, HEADER_LEN, Header, Kind, Status, trim};
use super::ring::{Broken, SplitRing};
use crate::block::{Access, Target};
use crate::export::core::failure::{Failure, Operation};
use crate::export::core::held::Held;
use crate::export::core::metrics::Recorder;
use crate::export::core::watch::Watch;
use crate::io::epoch::{Announcer, Generation, Turn};
use crate::io::{
    Io, IoResult, IoVec, Polled, Segments, Source, SourceId, Started, Token, iovec, thread_cpu_ns,
};
use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

/// Chains taken from one queue in a turn, so that the other queues of the worker have theirs.
const SHARE: u16 = 256;

/// Chains that are taken together: their headers are fetched before the first of them is looked at,
/// what of them is done at once is published together, and what is not is submitted together.
/// Larger batches would keep the storage waiting for its first request.
const BATCH: u16 = 16;

/// Chains in the first batch of a turn. A guest that has just kicked goes to sleep next; the first
/// results are quick enough to keep it awake, and waking it costs more than many requests.
const FIRST_BATCH: u16 = 4;

/// Segments that an idle slot may keep room for.
const KEEP_SEGMENTS: usize = 256;

/// Segments in flight, all requests of a queue together, beyond which no more are taken: their lists
/// are our memory, and how many there are is the guest's to say. The last chain may go beyond.
const HELD_SEGMENTS: usize = 1 << 15;

/// A queue at work. Owned by its worker.
pub struct Queue {
    /// For the log: the export's name and the queue's number.
    export: String,
    index: usize,
    disk: Arc<Disk>,
    memory: Arc<Memory>,
    loss: LossWatch,
    watch: Watch,
    ring: SplitRing,
    /// `None`: the front end does not want requests in flight to be tracked.
    inflight: Option<Tracker>,
    /// While a migration wants to know what we write.
    log: Option<Arc<DirtyLog>>,
    announcer: Rc<Announcer>,
    /// By head: a chain in flight is known by its first descriptor.
    slots: Vec<Slot>,
    in_flight: usize,
    /// Segments of the requests in flight.
    held: usize,
    /// Requests that the storage has failed and that are tried again; they are not in flight.
    on_hold: Held,
    /// What tasks of the slow road have finished.
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
    stop: Option<(mpsc::Sender<Stopped>, AtStop)>,
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

#[derive(Default)]
struct Slot {
    busy: bool,
    /// The road that the request took: how its end must be booked.
    fast: bool,
    /// It was held before.
    again: bool,
    /// Looks of the watch since it was taken.
    age: u8,
    /// For the recorder: when it was taken.
    taken_at: u64,
    kind: Option<Kind>,
    /// The chain's memory; for transfers, `data` of it is the data.
    segments: Vec<libc::iovec>,
    data: (u32, u32),
    /// Bytes of data.
    len: u32,
    offset: u64,
    status: Option<std::ptr::NonNull<u8>>,
    generation: Generation,
}

impl Slot {
    /// Marks what the request has written to the guest's memory. How much of a failed read has
    /// landed is not known.
    #[cold]
    fn mark(&self, log: &DirtyLog, memory: &Memory, status: std::ptr::NonNull<u8>, written: u32) {
        let data = || &self.segments[self.data.0 as usize..self.data.1 as usize];
        match self.kind {
            Some(Kind::In) => log.mark_segments(memory, data(), u64::MAX),
            Some(Kind::GetId) => log.mark_segments(memory, data(), written as u64),
            _ => {}
        }
        log.mark_segments(memory, &[iovec::iovec(status.as_ptr(), 1)], 1);
    }
}

struct Finished {
    head: u16,
    result: Result<Ended, Failure>,
}

/// What a queue writes is marked in a log, and in which of the guest's addresses its used ring.
#[derive(Clone, Default)]
pub struct QueueLog {
    pub log: Option<Arc<DirtyLog>>,
    pub used: Option<u64>,
}

/// What a queue is started with.
pub struct QueueStart {
    /// For the log: the export's name and the queue's number.
    pub export: String,
    pub index: usize,
    pub recorder: Option<Recorder>,
    pub disk: Arc<Disk>,
    pub memory: Arc<Memory>,
    pub ring: SplitRing,
    pub inflight: Option<Tracker>,
    pub log: QueueLog,
    pub size: u16,
    /// Heads of requests that another queue held on this ring, where that is not tracked.
    pub held: Vec<u16>,
    pub call: Option<Arc<File>>,
    pub err: Option<Arc<File>>,
    /// Nothing is taken until as many resumes have come.
    pub paused: u32,
}

// SAFETY: the ring's pointers lead into mappings that any thread may use; a queue is built on a
// control thread and from then on stays on its worker.
unsafe impl Send for QueueStart {}

impl Queue {
    /// A queue, on the thread that will serve it.
    pub fn new(start: QueueStart) -> Queue {
        let announcer = Rc::new(Announcer::default());
        start.disk.node().add_member(announcer.member());
        let mut slots: Vec<_> =
            std::iter::repeat_with(Slot::default).take(start.size as usize).collect();
        let mut held = start.held;
        held.retain(|&head| head < start.size);
        held.iter().for_each(|&head| slots[head as usize].busy = true);
        start.disk.failures.hold(held.len());
        let mut queue = Queue {
            export: start.export,
            index: start.index,
            disk: start.disk,
            memory: start.memory,
            loss: LossWatch::default(),
            watch: Watch::default(),
            ring: start.ring,
            inflight: start.inflight,
            log: None,
            announcer,
            slots,
            in_flight: 0,
            held: 0,
            on_hold: Held::carried(held),
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
    pub fn stop(&mut self, stopped: mpsc::Sender<Stopped>, held: AtStop) {
        self.stop = Some((stopped, held));
        if held == AtStop::Fail {
            self.fail_held();
        }
    }

    pub fn serves(&self, disk: &Arc<Disk>) -> bool {
        Arc::ptr_eq(&self.disk, disk)
    }

    /// Who is told when the front end takes its memory away.
    pub fn watch_loss(&mut self, loss: LossWatch) {
        self.loss = loss;
    }

    /// Who is told when a request does not end.
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
        self.held < HELD_SEGMENTS
    }

    /// How many chains are to be taken again now: those of a daemon that has died, which belong to the
    /// ring's past, so that a queue that is asked to stop takes them still; and those held ones that
    /// are due.
    fn to_replay(&self) -> u16 {
        if self.broken || self.paused != 0 || !self.has_room() {
            return 0;
        }
        let died = self.inflight.as_ref().map_or(0, Tracker::to_replay);
        died + if self.stop.is_none() { self.on_hold.due() } else { 0 }
    }

    /// The guest broke the rules: this queue takes no more, what is in flight completes.
    fn fail(&mut self, why: Broken) {
        self.broken = true;
        // What is no longer there was not written by the guest.
        if self.loss.is_lost(&self.memory) {
            return;
        }
        log::warn!(export = &*self.export; "queue {}: stopped: {why}", self.index);
        if let Some(err) = &self.err {
            let _ = (&**err).write(&1u64.to_ne_bytes());
        }
    }

    /// Takes and starts up to `count` chains.
    ///
    /// In two steps, a batch at a time: the guest has just written the headers on another
    /// processor, and the second step finds them on their way instead of waiting for each.
    fn take(&mut self, io: &Rc<Io>, me: SourceId, mut count: u16) -> Result<(), Broken> {
        // One announcement covers the batch. The record is counted apart from self, so that the
        // requests may change self meanwhile.
        let announcer = self.announcer.clone();
        let turn = announcer.enter();
        let mut batch = FIRST_BATCH;
        self.calls.taken(count as u32, thread_cpu_ns);
        self.watch.begin(io);
        if let Some(recorder) = &mut self.recorder {
            recorder.begin(io);
        }
        loop {
            let mut chains = [(0u16, 0u32); BATCH as usize];
            let (mut taken, mut broken) = (0, None);
            for chain in &mut chains[..batch.min(count) as usize] {
                if !self.has_room() {
                    break;
                }
                match self.gather() {
                    Ok(gathered) => *chain = gathered,
                    Err(why) => {
                        broken = Some(why);
                        break;
                    }
                }
                taken += 1;
            }
            for &(head, readable) in &chains[..taken as usize] {
                self.start(io, me, &turn, head, readable as usize);
            }
            count -= taken;
            match broken {
                Some(why) => return Err(why),
                None if count == 0 || !self.has_room() => return Ok(()),
                None => {
                    self.show_used();
                    if self.calls.is_early() {
                        self.call();
                    }
                    io.submit();
                }
            }
            batch = BATCH;
        }
    }

    /// Makes what is done visible to the guest. Where its memory is lost nothing is: the requests
    /// stay in flight, and may be done again when a front end comes back with all of it.
    fn show_used(&mut self) {
        if self.loss.is_lost(&self.memory) {
            self.broken = true;
            return;
        }
        // Who comes back where nothing is tracked does again all that it has not seen done.
        if self.watch.is_hung() && self.inflight.is_none() {
            return;
        }
        self.ring.publish();
        if let Some(tracker) = &mut self.inflight
            && !self.loss.is_lost(&self.memory)
        {
            tracker.settle(self.ring.published());
        }
    }

    /// Touches what a request failed on, so that it shows if the memory is no longer there: the
    /// kernel meets that without a signal.
    #[cold]
    fn probe(&self, head: u16) {
        for segment in &self.slots[head as usize].segments {
            // SAFETY: the segments are mapped guest memory.
            unsafe { iovec::probe(segment) };
        }
    }

    /// Tells the guest of what it can see, if it wants to be told.
    fn call(&mut self) {
        if self.ring.must_call()
            && let Some(call) = &self.call
        {
            // An eventfd: full means that the guest has a notification waiting already.
            let _ = (&**call).write(&1u64.to_ne_bytes());
            if let Some(recorder) = &self.recorder {
                recorder.notified();
            }
        }
    }

    /// Takes the next chain: its head, and how many of its segments the device reads.
    fn gather(&mut self) -> Result<(u16, u32), Broken> {
        let again = self.inflight.as_mut().and_then(Tracker::replay);
        let again = again.or_else(|| self.next_held());
        let head = match again {
            Some(head) => head,
            None => self.ring.pop()?,
        };
        if again.is_none() && self.slots[head as usize].busy {
            return Err(Broken::Busy(head));
        }
        let readable = self.seize(head)?;
        if let Some(tracker) = &mut self.inflight
            && again.is_none()
        {
            tracker.mark(head);
        }
        self.counts.requests += u64::from(!self.slots[head as usize].again);
        Ok((head, readable))
    }

    /// Looks a chain's memory up. It is in flight from here on.
    fn seize(&mut self, head: u16) -> Result<u32, Broken> {
        let slot = &mut self.slots[head as usize];
        let readable = self.ring.gather(&self.memory, head, &mut slot.segments)?;
        let (out, into) = slot.segments.split_at_mut(readable);
        if out.iter().map(|s| s.iov_len).sum::<usize>() < HEADER_LEN {
            return Err(Broken::Layout { head });
        }
        // The status is the last byte that the device may write (section 5.2.6.2).
        let Some(last) = into.iter_mut().rev().find(|s| s.iov_len > 0) else {
            return Err(Broken::Layout { head });
        };
        last.iov_len -= 1;
        let status = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        slot.status = std::ptr::NonNull::new(status);
        prefetch(out[0].iov_base.cast());
        slot.busy = true;
        slot.age = 0;
        if let Some(recorder) = &self.recorder {
            slot.taken_at = recorder.taken_at(slot.again.then_some(slot.taken_at));
        }
        self.in_flight += 1;
        self.held += slot.segments.len();
        // At most 1024 descriptors, each in at most 509 regions.
        Ok(readable as u32)
    }

    /// Starts what the chain's header asks for.
    #[inline]
    fn start(&mut self, io: &Rc<Io>, me: SourceId, turn: &Turn<'_>, head: u16, readable: usize) {
        let slot = &mut self.slots[head as usize];
        let header = Header::parse(Header::read(&slot.segments[..readable]));
        slot.kind = header.kind();
        let Some(kind) = slot.kind else {
            return self.finish(head, Status::Unsupported, 0);
        };
        let access = match kind {
            Kind::In => Access::Read,
            Kind::Out if self.disk.write_through.load(Ordering::Relaxed) => Access::DurableWrite,
            Kind::Out => Access::Write,
            _ => return self.go_slow(io, me, head, kind, header.sector, readable),
        };
        self.transfer(io, me, turn, head, kind, access, header.sector, readable);
    }

    /// A read or write: on the fast road if the graph allows it.
    #[expect(clippy::too_many_arguments, reason = "the parts of one request, at hand in registers")]
    #[inline]
    fn transfer(
        &mut self,
        io: &Rc<Io>,
        me: SourceId,
        turn: &Turn<'_>,
        head: u16,
        kind: Kind,
        access: Access,
        sector: u64,
        readable: usize,
    ) {
        let slot = &mut self.slots[head as usize];
        let (from, segments) = match access {
            Access::Read => (readable, &mut slot.segments[readable..]),
            _ => (0, &mut slot.segments[..readable]),
        };
        let all: usize = segments.iter().map(|s| s.iov_len).sum();
        let skip = if access == Access::Read { 0 } else { HEADER_LEN };
        let len = all - skip;
        let range = trim(segments, skip, len);
        slot.data = ((from + range.start) as u32, (from + range.end) as u32);
        let allowed = access == Access::Read || self.disk.options.writable;
        let offset = match self.disk.transfer_range(sector, len as u64) {
            Some(offset) if allowed && len <= u32::MAX as usize => offset,
            _ => return self.finish(head, Status::IoError, 0),
        };
        slot.len = len as u32;
        slot.offset = offset;
        if len == 0 {
            return self.finish(head, Status::Ok, 0);
        }
        let token = Token { source: me, tag: head as u32 };
        match start_fast(&self.disk, turn, io, slot, access, token) {
            Some(Started::Pending) => {
                slot.fast = true;
                slot.generation = turn.begin();
            }
            Some(Started::Done(result)) => self.transferred(io, head, result),
            None => {
                let writes = access != Access::Read;
                let data = slot.data;
                let list = &slot.segments[data.0 as usize..data.1 as usize];
                // SAFETY: the queue keeps `memory` mapped while the request is in flight.
                let list = unsafe { IoVec::from_raw(list) };
                let (out, into) = if writes {
                    (list, IoVec::from_mut(&mut []))
                } else {
                    (IoVec::from_mut(&mut []), list)
                };
                self.spawn(io, me, head, kind, sector, out, into);
            }
        }
    }

    fn go_slow(
        &mut self,
        io: &Rc<Io>,
        me: SourceId,
        head: u16,
        kind: Kind,
        sector: u64,
        readable: usize,
    ) {
        let slot = &mut self.slots[head as usize];
        slot.data = (readable as u32, slot.segments.len() as u32);
        (slot.offset, slot.len) = (0, 0);
        let (out, into) = slot.segments.split_at(readable);
        // SAFETY: the queue keeps `memory` mapped while the request is in flight.
        let (out, into) = unsafe { (IoVec::from_raw(out), IoVec::from_raw(into)) };
        let out = out.slice(HEADER_LEN as u64, out.len() - HEADER_LEN as u64);
        self.counts.flushes += u64::from(kind == Kind::Flush);
        self.spawn(io, me, head, kind, sector, out, into);
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one request")]
    fn spawn(
        &mut self,
        io: &Rc<Io>,
        me: SourceId,
        head: u16,
        kind: Kind,
        sector: u64,
        out: IoVec<'static>,
        into: IoVec<'static>,
    ) {
        self.counts.slow += 1;
        let (disk, finished, worker) = (self.disk.clone(), self.finished.clone(), io.clone());
        let durable = disk.write_through.load(Ordering::Relaxed);
        io.spawn(async move {
            let result = disk.run(kind, sector, out, into, durable).await;
            finished.borrow_mut().push(Finished { head, result });
            worker.wake_source(me);
        });
    }

    /// The end of a transfer on the fast road.
    fn transferred(&mut self, io: &Io, head: u16, result: IoResult) {
        let slot = &self.slots[head as usize];
        let read = slot.kind == Some(Kind::In);
        match result {
            Ok(()) => self.finish(head, Status::Ok, if read { slot.len } else { 0 }),
            Err(errno) => {
                let operation = if read { Operation::Read } else { Operation::Write };
                let (offset, len) = (slot.offset, slot.len as u64);
                self.failed(io, head, Failure { operation, offset, len, errno });
            }
        }
    }

    /// The end of a request on the slow road.
    fn slow_ended(&mut self, io: &Io, Finished { head, result }: Finished) {
        if let Some(recorder) = &mut self.recorder {
            recorder.end(io);
        }
        match result {
            Ok(Ended { status, written, bytes }) => {
                self.slots[head as usize].len = bytes;
                self.finish(head, status, written);
            }
            Err(failure) => self.failed(io, head, failure),
        }
    }

    /// Writes the status and hands the chain back.
    fn finish(&mut self, head: u16, status: Status, written: u32) {
        let slot = &mut self.slots[head as usize];
        if let Some(at) = slot.status.take() {
            // SAFETY: the byte lies in the guest's memory, which stays mapped as long as the
            // request is in flight.
            unsafe { at.write_volatile(status as u8) };
            if let Some(log) = &self.log {
                slot.mark(log, &self.memory, at, written);
            }
        }
        slot.busy = false;
        slot.fast = false;
        if let Some(recorder) = &mut self.recorder {
            recorder.ended(slot.kind, status, slot.taken_at, slot.len);
        }
        if std::mem::take(&mut slot.again) && status == Status::Ok {
            self.on_hold.succeeded();
        }
        self.held -= slot.segments.len();
        if slot.segments.capacity() > KEEP_SEGMENTS {
            slot.segments = Vec::new();
        }
        self.in_flight -= 1;
        self.ring.push(head, written + 1);
        if let Some(tracker) = &mut self.inflight {
            tracker.link(head);
        }
    }

    fn next_finished(&self) -> Option<Finished> {
        self.finished.borrow_mut().pop()
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

/// Starts a transfer where the graph says that its bytes live, if it can say so.
#[inline]
fn start_fast(
    disk: &Disk,
    turn: &Turn<'_>,
    io: &Io,
    slot: &Slot,
    access: Access,
    token: Token,
) -> Option<Started> {
    let node = disk.root.fast(turn.in_flight());
    let mapping = node.map(turn.in_flight(), slot.offset, slot.len as u64, access);
    if mapping.len < slot.len as u64 {
        return None;
    }
    let segments = &slot.segments[slot.data.0 as usize..slot.data.1 as usize];
    match mapping.target {
        Target::Data { leaf, offset } => {
            let traits = node.traits();
            if traits.buffer_align > 1 && !iovec::is_aligned(segments, traits.buffer_align)
                || segments.len() > traits.max_segments as usize
            {
                return None;
            }
            let op = access.op(offset, Segments::new(segments, slot.len.into()));
            // SAFETY: the slot and the guest's memory stay in place until the request is finished.
            Some(unsafe { leaf.start(io, op, token) })
        }
        Target::Zero if access == Access::Read => {
            // SAFETY: the guest's memory is mapped.
            unsafe { iovec::zero(segments) };
            Some(Started::Done(Ok(())))
        }
        _ => None,
    }
}

/// Asks the processor for a cache line that is soon to be read.
#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

impl Source for Queue {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        let mut polled = Polled::Idle;
        if let Some(recorder) = &mut self.recorder {
            recorder.poll(io);
        }
        while let Some(done) = self.next_finished() {
            self.slow_ended(io, done);
            polled = Polled::Busy;
        }
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
            let held = self.on_hold.take_all();
            self.disk.failures.let_go(held.len());
            if let Some((stopped, _)) = &self.stop {
                // Whoever asked may have given up waiting. The sender stays: its end tells that the
                // queue has let go of the memory.
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
        let slot = &self.slots[head as usize];
        if slot.fast {
            self.announcer.end(slot.generation);
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
        if let Some(at) = self.on_hold.tick(now) {
            io.tick_by(at);
        }
        if self.watch.is_due(io, now, self.in_flight > 0) {
            self.age();
        }
        self.on_hold.due() > 0
    }

    fn publish(&mut self) {
        self.announcer.settle();
        self.show_used();
        self.call();
        if let Some(recorder) = &self.recorder {
            recorder.show(self.in_flight, self.on_hold.count());
        }
    }

    fn arm(&mut self) -> bool {
        // A queue that takes nothing wants no kicks either; whoever wakes it up polls it.
        self.to_replay() == 0 && (!self.may_take() || self.ring.want_kick())
    }

    fn disarm(&mut self) {
        self.ring.no_kick();
    }

    fn rests(&self) -> bool {
        !self.may_take() && self.to_replay() == 0
    }
}
