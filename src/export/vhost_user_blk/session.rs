//! One connection of a front end: the state that its messages build up, and the rings that run by it.
//!
//! A bad message ends the connection, never the daemon. Whatever ends it, the rings are stopped as
//! GET_VRING_BASE stops them: popping ends, I/O in flight ends, its completions are published, and
//! only then may the next session begin.

mod messages;

use super::config::{F_LOG_ALL, F_PROTOCOL_FEATURES};
use super::dirty_log::DirtyLog;
use super::inflight;
use super::memory::{Memory, Region};
use super::memory_loss::LossWatch;
use super::queue::{AtStop, Queue, QueueLog, QueueStart, Stopped};
use super::request::Disk;
use super::ring::{Addresses, MAX_SIZE, SplitRing};
use crate::block::Fence;
use crate::export::core::cut_off::CutOff;
use crate::export::core::watch::{Watch, linger};
use crate::io::{Errno, SourceId, Worker};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use vhost::vhost_user::{Error, Result};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// How long a ring may take to stop before the log says that it is still waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether a ring that is to stop is to be given up.
const STOP_LOOK: Duration = Duration::from_millis(100);

/// The state of one connection.
pub struct Session {
    name: String,
    disk: Arc<Disk>,
    workers: Vec<Arc<Worker>>,
    /// The worker of the first queue; the others follow in turn.
    first_worker: usize,
    /// What the front end has acknowledged; `None` until it says.
    features: Option<u64>,
    /// Rings that start meanwhile take nothing either.
    paused: u32,
    memory: Arc<Memory>,
    /// Up to the last one that the front end has spoken of.
    rings: Vec<RingState>,
    /// Where requests in flight are tracked, if the front end wants it.
    inflight: Option<Arc<inflight::Region>>,
    /// The front end's dirty log; in use while [`F_LOG_ALL`] is acknowledged.
    log: Option<Arc<DirtyLog>>,
    /// The front end has acknowledged that it may be told things unasked.
    has_channel: bool,
    /// How its queues end the connection.
    cut_off: Option<Arc<CutOff>>,
    /// A request of one of its queues does not end.
    hung: Arc<AtomicBool>,
    /// Nothing begins any more.
    ended: bool,
    /// The guest has gone from here ([`crate::export::core::hand_over`]).
    moved: bool,
}

/// What the front end has said of a ring.
struct RingState {
    size: u16,
    at: Option<Addresses>,
    /// The guest address that its used ring is to be logged at.
    log_used: Option<u64>,
    base: u16,
    kick: Kick,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    enabled: bool,
    running: Option<(usize, SourceId)>,
    /// Heads of requests that are held while the ring goes over to other memory, where nothing else
    /// tells of them.
    held: Vec<u16>,
}

enum Kick {
    /// None was set yet: the ring is not started.
    Unset,
    /// The ring is to be polled.
    Poll,
    Fd(File),
}

impl RingState {
    fn new() -> RingState {
        RingState {
            size: 0,
            at: None,
            log_used: None,
            base: 0,
            kick: Kick::Unset,
            call: None,
            err: None,
            enabled: false,
            running: None,
            held: Vec::new(),
        }
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::ReqHandlerError(io::Error::other(why.into())))
}

/// Makes sure that no write to a descriptor of the front end's waits: one that is full would hold
/// up a worker, and with it the disks of others.
fn for_words(file: File) -> Result<Arc<File>> {
    let fd = file.as_raw_fd();
    // SAFETY: names no memory, and the descriptor is open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return refuse(format!("a descriptor that cannot be written to: {}", Errno::last()));
    }
    Ok(Arc::new(file))
}

impl Session {
    pub fn new(
        name: String,
        disk: Arc<Disk>,
        workers: Vec<Arc<Worker>>,
        first_worker: usize,
    ) -> Session {
        let session = Session {
            name,
            rings: Vec::new(),
            disk,
            workers,
            first_worker,
            features: None,
            paused: 0,
            memory: Arc::default(),
            inflight: None,
            log: None,
            has_channel: false,
            cut_off: None,
            hung: Arc::default(),
            ended: false,
            moved: false,
        };
        session.apply_write_cache();
        session
    }

    /// Lets the queues end the connection.
    pub fn set_cut_off(&mut self, cut_off: CutOff) {
        self.cut_off = Some(Arc::new(cut_off));
    }

    /// Queues that the disk offers.
    fn num_queues(&self) -> usize {
        self.disk.options.num_queues.into()
    }

    /// A ring that the front end speaks of. One that it never does takes no memory.
    fn ring(&mut self, index: u32) -> Result<&mut RingState> {
        let (index, count) = (index as usize, self.num_queues());
        if index >= count {
            return refuse(format!("queue {index} of {count}"));
        }
        if index >= self.rings.len() {
            self.rings.resize_with(index + 1, RingState::new);
        }
        Ok(&mut self.rings[index])
    }

    fn has(&self, bit: u32) -> bool {
        self.features.is_some_and(|features| features & 1 << bit != 0)
    }

    /// Whether writes must be durable before they complete: because the export says so, because the
    /// guest cannot flush, or because it has switched the write cache off. That choice outlives the
    /// connection: front ends do not repeat it when a stopped machine goes on or when they
    /// reconnect, and a guest that relies on it sends no flushes.
    fn apply_write_cache(&self) {
        let flushes = self.features.is_none() || self.has(VIRTIO_BLK_F_FLUSH);
        let off = !self.disk.write_cache.is_on();
        let through = self.disk.options.write_through || !flushes || off;
        self.disk.write_through.store(through, Ordering::SeqCst);
    }

    fn set_write_cache(&self, on: bool) {
        self.disk.write_cache.set(on, self.inflight.as_deref());
        self.apply_write_cache();
    }

    /// The front end takes the device. QEMU does so once for each device that it plugs in, all of them on
    /// one connection if they have one chardev, and says everything about the new device afterwards: so
    /// what was said of the one before it, whose rings have stopped, ends here.
    ///
    /// Cloud Hypervisor plays a recorded session again while rings run. Those go on.
    fn begin(&mut self) {
        if self.rings.iter().any(|ring| !matches!(ring.kick, Kick::Unset)) {
            return;
        }
        self.let_journal_go();
        self.features = None;
        self.memory = Arc::default();
        self.rings = Vec::new();
        self.inflight = None;
        self.log = None;
        self.apply_write_cache();
    }

    /// Back to what a guest finds that has said nothing. What it had under way is of no more use. The
    /// memory stays: front ends do not share it again.
    fn reset(&mut self) -> Result<()> {
        self.stop_rings(0..self.rings.len(), AtStop::Fail)?;
        self.features = None;
        self.rings = Vec::new();
        self.set_write_cache(true);
        Ok(())
    }

    /// Where a ring lies that is to run and does not: all that it needs has been said.
    fn is_due(&self, ring: &RingState) -> Option<Addresses> {
        let protocol = self.features.unwrap_or(0) & F_PROTOCOL_FEATURES != 0;
        // Without the protocol features a ring is enabled from the start.
        let enabled = ring.enabled || !protocol;
        let started = !matches!(ring.kick, Kick::Unset);
        ring.at.filter(|_| started && enabled && ring.running.is_none())
    }

    /// Whether a ring is kept back because the disk is not ours.
    pub fn waits_for_disk(&self) -> bool {
        !self.disk.hand_over.is_active() && self.rings.iter().any(|r| self.is_due(r).is_some())
    }

    /// Whether the guest has gone from here since this was last asked.
    pub fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// Starts a ring if all that it needs has been said, and the disk is ours.
    fn start_ring(&mut self, index: usize) -> Result<()> {
        let ring = &self.rings[index];
        let Some(at) = self.is_due(ring) else { return Ok(()) };
        // While I/O of an earlier connection may still land nothing begins; its end starts the ring.
        if self.ended || self.disk.lingering.any() || !self.disk.hand_over.is_active() {
            return Ok(());
        }
        if let Some(region) = &self.inflight {
            let attached =
                self.disk.journal.attach(&self.name, &self.disk.node(), region, &self.workers[0]);
            attached.or_else(|error| refuse(error.to_string()))?;
        }
        let size = if ring.size == 0 { MAX_SIZE } else { ring.size };
        let event_index = self.has(VIRTIO_RING_F_EVENT_IDX);
        let mut split = SplitRing::new(&self.memory, size, at, ring.base, event_index)
            .or_else(|why| refuse(format!("queue {index}: {why}")))?;
        let inflight = match &self.inflight {
            None => None,
            Some(region) => {
                let tracker = inflight::Tracker::recover(region, index, size, split.published())
                    .or_else(|why| refuse(format!("queue {index}: {why}")))?;
                // The base that the front end knows may be that of a daemon which died.
                let again = tracker.to_replay();
                split.go_on_behind(again);
                if again > 0 {
                    log::info!(
                        export = &*self.name;
                        "queue {index}: {again} requests are begun again"
                    );
                }
                Some(tracker)
            }
        };
        let start = QueueStart {
            export: self.name.clone(),
            index,
            recorder: self.disk.metrics.as_ref().and_then(|metrics| metrics.recorder(index)),
            disk: self.disk.clone(),
            memory: self.memory.clone(),
            ring: split,
            inflight,
            log: self.log_of(index),
            size,
            held: ring.held.clone(),
            call: ring.call.clone(),
            err: ring.err.clone(),
            paused: self.paused,
        };
        let kick = match &ring.kick {
            Kick::Fd(file) => Some(file.as_raw_fd()),
            _ => None,
        };
        let worker = (self.first_worker + index) % self.workers.len();
        let loss = LossWatch::new(self.cut_off.clone());
        let timeout = self.disk.options.failures.io_timeout;
        let watch = Watch::new(timeout, self.cut_off.clone(), self.hung.clone());
        // Every start scans the ring unprompted: a source is polled as it is attached.
        // Only who tracks requests has them begun again.
        let fence = self.inflight.as_ref().map(|_| self.disk.node().fence());
        let source = self.workers[worker].call(move |local| {
            let mut queue = Queue::new(start);
            queue.watch_loss(loss);
            queue.watch_hangs(watch);
            local.attach_pinned(Box::new(queue), kick, fence.as_ref().map_or(&[], Fence::files))
        });
        let source = source.or_else(|why| {
            refuse(format!("queue {index}: the kernel does not keep the image's locks: {why}"))
        })?;
        self.rings[index].running = Some((worker, source));
        self.rings[index].held.clear();
        self.disk.running.lock().push((worker, source));
        Ok(())
    }

    /// What is to be marked of a ring's writes now.
    fn log_of(&self, index: usize) -> QueueLog {
        let log = self.log.clone().filter(|_| self.has(F_LOG_ALL));
        QueueLog { log, used: self.rings[index].log_used }
    }

    /// Has rings that run mark what is to be marked now, and nothing else. Returns once all of them
    /// do.
    fn apply_log(&self, indices: impl Iterator<Item = usize>) {
        for index in indices {
            let log = self.log_of(index);
            self.tell(index as u32, move |queue| queue.set_log(log));
        }
    }

    /// Whether the front end may be told things unasked.
    pub fn has_channel(&self) -> bool {
        self.has_channel
    }

    /// Whether the device serves a ring.
    pub fn is_running(&self) -> bool {
        self.rings.iter().any(|ring| ring.running.is_some())
    }

    /// Descriptors of the front end's that its rings have.
    pub fn descriptors(&self) -> usize {
        let of = |ring: &RingState| {
            let kick = matches!(ring.kick, Kick::Fd(_));
            [kick, ring.call.is_some(), ring.err.is_some()].map(usize::from).iter().sum::<usize>()
        };
        self.rings.iter().map(of).sum()
    }

    /// Rings that start from now on track their requests there.
    fn track_in(&mut self, region: inflight::Region) -> Result<()> {
        if let Some(index) = self.rings.iter().position(|ring| ring.running.is_some()) {
            return refuse(format!("inflight region: queue {index} is running"));
        }
        let (has, most) = (region.num_queues() as usize, self.num_queues());
        if has > most {
            return refuse(format!("inflight region for {has} queues: the disk has {most}"));
        }
        self.disk.write_cache.meet(&region);
        self.apply_write_cache();
        let region = Arc::new(region);
        self.disk.losses.meet(&self.name, &region);
        self.inflight = Some(region);
        Ok(())
    }

    /// Whether requests that are held when a ring stops may stay so: where they are tracked, whoever
    /// starts the ring again, here or in a daemon after this one, finds them there. Otherwise nothing
    /// would ever complete them.
    fn may_leave_held(&self) -> bool {
        // While pages are logged a stop may be the end of a migration: what is held here is not known
        // at the other end.
        self.inflight.is_some() && !self.has(F_LOG_ALL)
    }

    /// What becomes of held requests when a ring stops for good, as far as we know.
    fn at_stop(&self) -> AtStop {
        if self.may_leave_held() { AtStop::Leave } else { AtStop::Fail }
    }

    /// Stops rings, all at once, and waits until nothing of them is in flight.
    ///
    /// # Errors
    /// Something in flight does not end. Those rings are left to themselves, and the connection is
    /// closed.
    fn stop_rings(&mut self, indices: impl Iterator<Item = usize>, held: AtStop) -> Result<()> {
        let mut stopping = Vec::new();
        for index in indices {
            let Some((worker, source)) = self.rings[index].running.take() else { continue };
            self.disk.running.lock().retain(|running| *running != (worker, source));
            let (sender, receiver) = mpsc::channel();
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.stop(sender, held);
                }
            });
            stopping.push((index, receiver));
        }
        let mut result = Ok(());
        for (index, receiver) in stopping {
            let Some(stopped) = self.wait_stopped(index, &receiver) else {
                linger(&self.disk, receiver);
                if let Some(cut_off) = &self.cut_off {
                    cut_off.cut("I/O in flight does not end");
                }
                result = refuse(format!("queue {index}: I/O in flight does not end"));
                continue;
            };
            self.rings[index].base = stopped.base;
            // Where requests are tracked they are found there.
            if self.inflight.is_none() {
                self.rings[index].held = stopped.held;
            }
            // Until the queue is gone: the last to hold a guest's memory unmaps it, which takes long
            // and must not be the worker, whose other disks would wait.
            while receiver.recv().is_ok() {}
        }
        result
    }

    /// What a ring leaves that was told to stop; none if its I/O is given up on.
    fn wait_stopped(&self, index: usize, receiver: &mpsc::Receiver<Stopped>) -> Option<Stopped> {
        let timeout = self.disk.options.failures.io_timeout;
        // The queue's own watch tells a little later than the deadline, so that this is for those
        // who cannot tell: a worker that hangs itself.
        let most = if timeout.is_zero() { Duration::MAX } else { 2 * timeout };
        let began = Instant::now();
        let mut told = STOP_PATIENCE;
        loop {
            match receiver.recv_timeout(STOP_LOOK) {
                Ok(stopped) => return Some(stopped),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let waited = began.elapsed();
                    if self.hung.load(Ordering::SeqCst) || waited > most {
                        return None;
                    }
                    if waited >= told {
                        told += STOP_PATIENCE;
                        log::warn!(
                            export = &*self.name;
                            "queue {index}: I/O in flight has not ended for {} s",
                            waited.as_secs()
                        );
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Some(Stopped { base: self.rings[index].base, held: Vec::new() });
                }
            }
        }
    }

    /// Starts the rings that have waited, for I/O of an earlier connection or for the disk.
    pub fn start_waiting(&mut self) -> Result<()> {
        (0..self.rings.len()).try_for_each(|index| self.start_ring(index))
    }

    /// Stops every ring. The end of each session.
    pub fn stop_all(&mut self) {
        self.ended = true;
        // Whatever does not end, the session does.
        let _ = self.stop_rings(0..self.rings.len(), self.at_stop());
        self.let_journal_go();
    }

    /// The memory that holds the image's journal goes. If I/O may still land, the next session sees to it.
    fn let_journal_go(&self) {
        if !self.disk.lingering.any() {
            self.disk.journal.detach(&self.name, &self.workers[0]);
        }
    }

    /// Takes no more requests, and returns once none is in flight.
    pub fn pause(&mut self) {
        self.paused += 1;
        let (sender, receiver) = mpsc::channel();
        for (worker, source) in self.rings.iter().filter_map(|ring| ring.running) {
            let sender = sender.clone();
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.pause(Box::new(move || {
                        let _ = sender.send(());
                    }));
                }
            });
        }
        drop(sender);
        // Ends when every queue has sent its word and dropped its sender.
        while receiver.recv().is_ok() {}
    }

    /// Undoes one `pause`.
    pub fn resume(&mut self) {
        self.paused = self.paused.saturating_sub(1);
        for (worker, source) in self.rings.iter().filter_map(|ring| ring.running) {
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.resume();
                }
            });
        }
    }

    /// Goes over to another table of memory: rings that run are stopped, and started again with
    /// their addresses looked up anew.
    fn change_memory(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        let memory = Memory::new(regions).or_else(refuse)?;
        let running = self.running();
        self.stop_rings(running.iter().copied(), AtStop::Leave)?;
        self.memory = Arc::new(memory);
        self.start_on_node(running)
    }

    /// Goes over to the node that the disk is on now: rings that run are stopped and started again, so
    /// that they keep its image's locks.
    ///
    /// # Errors
    /// Those locks cannot be kept, or something in flight does not end. The rings stand.
    pub fn change_node(&mut self) -> Result<()> {
        let running = self.running();
        self.stop_rings(running.iter().copied(), AtStop::Leave)?;
        self.start_on_node(running)
    }

    fn running(&self) -> Vec<usize> {
        (0..self.rings.len()).filter(|&i| self.rings[i].running.is_some()).collect()
    }

    /// Starts rings that were stopped, whose memory devices below the node may reach.
    fn start_on_node(&mut self, rings: Vec<usize>) -> Result<()> {
        let node = self.disk.node();
        self.memory.regions().iter().for_each(|region| region.admit(&node));
        rings.into_iter().try_for_each(|index| self.start_ring(index))
    }

    /// Runs `work` on a ring's queue, if it is running.
    fn tell(&self, index: u32, work: impl FnOnce(&mut Queue) + Send + 'static) {
        if let Some((worker, source)) = self.rings[index as usize].running {
            self.workers[worker].call(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    work(queue);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::{FromRawFd, IntoRawFd};

    #[test]
    fn a_full_descriptor_of_the_front_end_s_does_not_hold_up_who_writes_to_it() {
        let full = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        // SAFETY: the descriptor is taken from its only owner.
        let file = unsafe { File::from_raw_fd(full.into_raw_fd()) };
        let call = for_words(file).unwrap();
        let error = (&*call).write(&1u64.to_ne_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
