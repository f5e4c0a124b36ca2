//! A worker's turn: the loop that its thread runs.
//!
//! Reap completions, let every active source take what has arrived and start it, run the tasks that
//! were woken, let the sources publish their results, enter the ring once. When there is nothing to
//! do it spins as long as [`Spin`] says, then asks all sources for kicks and sleeps in the ring. Idle
//! costs nothing.

mod sources;

use super::ring::{BATCH, Completion, Pin, Ring, Wait};
use super::slots::Owner;
use super::spin::Spin;
use super::worker::{self, Io, Message, NEVER, Shared};
use super::{Errno, Polled, Source, SourceId, tag};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often an idle worker polls sources that give no kicks.
const LOOK_NS: u64 = 200_000;

/// The number of busy turns in a row after which timers are checked anyway.
const TICK_TURNS: u32 = 256;

/// A worker as seen from its own thread: what a message from outside may use.
pub struct Local {
    io: Rc<Io>,
    sources: Vec<Option<Entry>>,
    free: Vec<u32>,
    /// Sources that are polled each turn and need no kicks.
    active: Vec<u32>,
    completions: Vec<Completion>,
    /// A number for each poll of a kick descriptor, so that a late completion of an old one is
    /// known.
    watches: u32,
    /// Turns with work since the last without.
    busy_turns: u32,
    spin: Spin,
    longest_sleep: Option<Duration>,
}

struct Entry {
    source: Box<dyn Source>,
    /// `None` without a kick descriptor.
    watch: Option<Watch>,
    active: bool,
    idle_turns: u32,
    /// What the ring keeps open for it.
    pins: Vec<Pin>,
}

/// How a source's kick descriptor is polled.
#[derive(Clone, Copy)]
struct Watch {
    /// The poll's.
    number: u32,
    fd: RawFd,
    /// It is polled when the source has been armed, for one event; otherwise all the time.
    once: bool,
    /// The poll is under way.
    pending: bool,
}

impl Local {
    pub(super) fn new(ring: Box<dyn Ring>, shared: Arc<Shared>) -> Local {
        let io = Rc::new(Io::new(ring, shared));
        worker::replace_current(Some(io.clone()));
        let local = Local {
            io,
            sources: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            completions: Vec::with_capacity(BATCH),
            watches: 0,
            busy_turns: 0,
            spin: Spin::default(),
            longest_sleep: None,
        };
        local.watch_mail();
        local
    }

    pub(super) fn sleep_at_most(&mut self, time: Duration) {
        self.longest_sleep = Some(time);
    }

    pub fn io(&self) -> &Rc<Io> {
        &self.io
    }

    /// One turn. True if anything was done.
    fn turn(&mut self) -> bool {
        let mut busy = self.read_mail();
        busy |= self.dispatch();
        let io = self.io.clone();
        let mut at = 0;
        while at < self.active.len() {
            let index = self.active[at];
            let Some(Some(entry)) = self.sources.get_mut(index as usize) else {
                self.active.swap_remove(at);
                continue;
            };
            match entry.source.poll(&io, SourceId(index)) {
                Polled::Busy => {
                    busy = true;
                    entry.idle_turns = 0;
                }
                Polled::Idle => entry.idle_turns += 1,
                Polled::Ended => {
                    entry.source.publish();
                    self.unwatch(index);
                    if let Some(entry) = self.sources[index as usize].take() {
                        self.unpin(entry.pins);
                    }
                    self.free.push(index);
                    self.active.swap_remove(at);
                    busy = true;
                    continue;
                }
            }
            at += 1;
        }
        busy |= self.deliver();
        if !io.run_queue.is_empty() {
            io.run_queue.run();
            busy = true;
        }
        busy |= self.wake_ready();
        for &index in &self.active {
            if let Some(Some(entry)) = self.sources.get_mut(index as usize) {
                entry.source.publish();
            }
        }
        let mut ring = io.ring.borrow_mut();
        if ring.must_enter() {
            ring.enter(Wait::No);
            busy = true;
        }
        drop(ring);
        if busy && self.active.len() > 1 {
            self.retire_lazy();
        }
        busy
    }

    /// Passes completions of devices on to their sources.
    fn deliver(&mut self) -> bool {
        let io = self.io.clone();
        let mut any = false;
        while let Some((token, result)) = io.next_delivered() {
            any = true;
            if let Some(Some(entry)) = self.sources.get_mut(token.source.0 as usize) {
                entry.source.complete(&io, token.tag, result);
                self.activate(token.source.0);
            }
        }
        any
    }

    /// Calls the sources' ticks that are due. True if one of them is to be polled.
    fn tick(&mut self) -> bool {
        let wanted = self.io.tick.get();
        if wanted == NEVER {
            return false;
        }
        let now = self.io.now();
        if now < wanted {
            return false;
        }
        self.io.tick.set(NEVER);
        let io = self.io.clone();
        io.stop_late(now);
        for (index, entry) in self.sources.iter_mut().enumerate() {
            if let Some(entry) = entry
                && entry.source.tick(&io, now)
            {
                io.wake_source(SourceId(index as u32));
            }
        }
        self.wake_ready()
    }

    fn wake_ready(&mut self) -> bool {
        let mut any = false;
        self.take_devices();
        loop {
            let Some(id) = self.io.ready.borrow_mut().pop() else { return any };
            any = true;
            self.activate(id.0);
        }
    }

    fn read_mail(&mut self) -> bool {
        if !self.io.shared.mail.load(Ordering::Relaxed) {
            return false;
        }
        self.io.shared.mail.store(false, Ordering::SeqCst);
        let messages = std::mem::take(&mut *self.io.shared.inbox.lock());
        for message in messages {
            match message {
                Message::Run(work) => work(self),
                Message::Task(flow, task) => self.io.run_queue.push(flow, task),
            }
        }
        self.wake_ready();
        true
    }

    fn dispatch(&mut self) -> bool {
        let io = self.io.clone();
        let mut completions = std::mem::take(&mut self.completions);
        completions.append(&mut io.stash.borrow_mut());
        io.ring.borrow_mut().reap(&mut completions);
        let any = !completions.is_empty();
        for completion in completions.drain(..) {
            let (kind, extra, number) = tag::unpack(completion.user_data);
            match kind {
                tag::OP => {
                    if let Some((Owner::Source(token), result)) =
                        io.finish(number, completion.result)
                        && let Some(Some(entry)) = self.sources.get_mut(token.source.0 as usize)
                    {
                        entry.source.counted(&io, token.tag, result);
                        self.activate(token.source.0);
                    }
                }
                tag::KICK => self.kicked(number, extra, completion),
                tag::WAKE if !completion.more => self.watch_mail(),
                _ => {}
            }
        }
        self.completions = completions;
        any
    }

    fn kicked(&mut self, index: u32, number: u32, completion: Completion) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        let Some(watch) = &mut entry.watch else { return };
        if watch.number != number {
            return;
        }
        entry.source.kicked();
        let fd = watch.fd;
        if watch.once {
            watch.pending = false;
        } else if !completion.more {
            if completion.result < 0 {
                let errno = Errno(-completion.result);
                log::error!("{}: the kick descriptor of a queue: {errno}", self.io.shared.name);
                entry.watch = None;
            } else {
                self.poll_many(completion.user_data, fd);
            }
        }
        self.activate(index);
    }

    fn watch_mail(&self) {
        self.poll_many(tag::pack(tag::WAKE, 0, 0), self.io.shared.wake.as_raw_fd());
    }

    /// Whether a spinning worker would find something to do.
    fn has_work(&self) -> bool {
        let shared = &self.io.shared;
        if shared.mail.load(Ordering::Relaxed) {
            return true;
        }
        let mut ring = self.io.ring.borrow_mut();
        ring.must_enter()
            || ring.has_completions()
            || self.active.iter().any(|&index| {
                self.sources[index as usize].as_ref().is_some_and(|e| e.source.has_work())
            })
    }

    /// Spins while that is promising, from `began` on. True if there is something to do.
    fn spin(&mut self, began: u64) -> bool {
        let limit = self.spin.limit_ns;
        if limit == 0 || self.active.is_empty() && self.io.timers.next().is_none() {
            return self.has_work();
        }
        loop {
            for _ in 0..16 {
                if self.has_work() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = self.io.now();
            if now - began >= limit || self.io.timers.next().is_some_and(|at| at <= now) {
                return false;
            }
        }
    }

    fn sleep(&mut self) {
        let shared = self.io.shared.clone();
        shared.asleep.store(true, Ordering::SeqCst);
        if !shared.mail.load(Ordering::SeqCst) && self.io.run_queue.is_empty() {
            let mut ring = self.io.ring.borrow_mut();
            let tick = Some(self.io.tick.get()).filter(|&at| at != NEVER);
            let timer = self.io.timers.next().into_iter().chain(tick).min();
            let timer = timer.map(|at| at.saturating_sub(ring.now()));
            // A front end that gives no kick descriptor wants its queue to be polled.
            let look = (!self.active.is_empty()).then_some(LOOK_NS);
            let longest = self.longest_sleep.map(|time| time.as_nanos() as u64);
            let wait = match timer.into_iter().chain(look).chain(longest).min() {
                Some(ns) => Wait::For(Duration::from_nanos(ns)),
                None => Wait::Forever,
            };
            ring.enter(wait);
        }
        shared.asleep.store(false, Ordering::Relaxed);
    }

    fn may_stop(&self) -> bool {
        self.io.shared.stopping.load(Ordering::Relaxed)
            && self.io.tasks.get() == 0
            && self.sources.iter().flatten().all(|entry| entry.source.is_detachable())
            && !self.io.shared.mail.load(Ordering::SeqCst)
            && !self.io.leave_all()
    }

    /// One round of work and, if there is none, of waiting. False when the worker may end.
    pub(super) fn round(&mut self) -> bool {
        if self.io.timers.next().is_some() {
            let now = self.io.now();
            self.io.timers.wake_due(now);
        }
        if self.turn() || !self.io.stash.borrow().is_empty() {
            self.busy_turns = self.busy_turns.wrapping_add(1);
            if self.busy_turns.is_multiple_of(TICK_TURNS) {
                self.tick();
            }
            self.io.turn_time.set(NEVER);
            return true;
        }
        self.busy_turns = 0;
        if self.tick() {
            self.io.turn_time.set(NEVER);
            return true;
        }
        if self.may_stop() {
            return false;
        }
        let poll_max = self.io.shared.poll_max_ns;
        let began = if poll_max > 0 { self.io.turn_time() } else { 0 };
        if !self.spin(began) && self.arm_all() {
            self.sleep();
        }
        self.io.turn_time.set(NEVER);
        if poll_max > 0 {
            // The next turn begins now.
            self.spin.learn(self.io.turn_time() - began, poll_max);
        }
        true
    }
}
