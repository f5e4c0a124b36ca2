//! The controller's own thread: resets, aborts, asynchronous events, and removal.
//!
//! Asynchronous events are in section 5.2. The thread checks periodically whether the device is still there.

#![forbid(unsafe_code)]

use super::admin::Data;
use super::link::State;
use super::{DEAD, Inner, STARTING, lock};
use crate::Error;
use crate::spec::identify::{NamespaceIdentity, cns};
use crate::spec::registers::{self, FATAL, READY};
use crate::spec::{AdminOpcode, Command, Health, log_page};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Events that are looked at, at a time.
const EVENTS: usize = 16;
/// Resets in a row, none of which has made the controller work, after which it is given up.
const RESETS: u32 = 3;
/// How often a device that seems to be gone is looked at.
const ABSENT_LOOK: Duration = Duration::from_millis(20);
/// After how long without one, resets are no longer in a row.
const ROW: Duration = Duration::from_secs(60);

pub fn spawn(inner: &Arc<Inner>) -> Result<JoinHandle<()>, Error> {
    let failed = |error: std::io::Error| Error::os("starting its thread", &error);
    let epoll = Epoll::new().map_err(failed)?;
    let mut events = Vec::new();
    let admin = inner.events.first().map(EventFd::try_clone);
    let request = inner.function.request_event().map(EventFd::try_clone);
    for event in [Some(inner.wake.try_clone()), admin, request].into_iter().flatten() {
        let event = event.map_err(failed)?;
        let interest = EpollEvent::new(EventSet::IN, events.len() as u64);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).map_err(failed)?;
        events.push(event);
    }
    let (weak, check_interval) = (Arc::downgrade(inner), inner.options.check_interval);
    let builder = std::thread::Builder::new().name("nvme-watch".into());
    let thread = Thread { weak, epoll, events, check_interval, watch: Watch::default() };
    builder.spawn(move || thread.run()).map_err(failed)
}

struct Thread {
    weak: Weak<Inner>,
    epoll: Epoll,
    /// To be woken, the admin queue's, the host's wish to have the device back.
    events: Vec<EventFd>,
    check_interval: Duration,
    watch: Watch,
}

/// The thread's state of the controller. Users of a controller without a thread keep this themselves.
#[derive(Default)]
pub struct Watch {
    /// Resets in a row, and when the last was.
    row: u32,
    last: Option<Instant>,
    /// Since when the device has seemed to be gone.
    absent: Option<Instant>,
    /// The controller is being reset, and not all pairs have stopped yet.
    is_halting: bool,
}

impl Thread {
    fn run(mut self) {
        loop {
            let mut woken = [EpollEvent::default(); 3];
            let wait = if self.watch.absent.is_some() { ABSENT_LOOK } else { self.check_interval };
            let timeout = wait.as_millis().try_into().unwrap_or(i32::MAX);
            let count = self.epoll.wait(timeout, &mut woken).unwrap_or(0);
            let Some(inner) = self.weak.upgrade() else { return };
            for event in &woken[..count] {
                let number = event.data() as usize;
                if let Some(event) = self.events.get(number) {
                    let _ = event.read();
                }
                if number == 2 && !inner.wanted_back.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "{}: the host wants the device back: close the disks on it to let it go",
                        inner.name
                    );
                }
            }
            if inner.is_dead() {
                return;
            }
            self.watch.work(&inner);
            self.wait_for_pairs(&inner);
        }
    }

    /// The threads of all pairs must have seen a reset before the queues are there again.
    fn wait_for_pairs(&mut self, inner: &Inner) {
        let began = Instant::now();
        let mut complained = false;
        while self.watch.is_halting {
            if !complained && began.elapsed() > Duration::from_secs(10) {
                complained = true;
                log::warn!("{}: waiting for a queue's thread that does not stop", inner.name);
            }
            std::thread::sleep(Duration::from_micros(200));
            self.watch.work(inner);
        }
    }
}

impl Watch {
    /// Does all pending work, without waiting for queue pairs.
    pub(super) fn work(&mut self, inner: &Inner) {
        if self.is_halting {
            return self.finish_reset(inner);
        }
        let status = inner.registers.read(registers::CSTS);
        if status == registers::GONE || !inner.is_there() {
            let since = *self.absent.get_or_insert_with(Instant::now);
            if since.elapsed() >= inner.options.absence {
                inner.declare_dead("the device is gone");
            }
            return;
        }
        self.absent = None;
        let wants = std::mem::take(&mut *lock(&inner.wants));
        if wants.reset || status & FATAL != 0 || status & READY == 0 {
            let why = match (status & FATAL != 0, status & READY != 0) {
                (true, _) => "it reports a fatal error",
                (_, false) => "it was reset by somebody else",
                _ => "asked for",
            };
            return self.reset(inner, why);
        }
        for (queue, command) in wants.aborts {
            inner.abort(queue, command);
        }
        inner.poll_events();
        if wants.health {
            inner.sample_health();
        }
    }

    fn reset(&mut self, inner: &Inner, why: &str) {
        let now = Instant::now();
        if self.last.is_none_or(|last| now - last > ROW) {
            self.row = 0;
        }
        (self.row, self.last) = (self.row + 1, Some(now));
        if self.row > RESETS {
            return inner.declare_dead("it keeps failing, whatever is done");
        }
        log::warn!("{}: resetting the controller: {why}", inner.name);
        match inner.halt() {
            Ok(()) => {
                self.is_halting = true;
                self.finish_reset(inner);
            }
            Err(error) => self.reset_failed(inner, error),
        }
    }

    /// Goes on with a reset as soon as all pairs have stopped.
    fn finish_reset(&mut self, inner: &Inner) {
        if inner.links().iter().any(|link| link.state() == State::Halt) {
            return;
        }
        self.is_halting = false;
        match inner.go_on() {
            Ok(()) => log::warn!("{}: the controller works again", inner.name),
            Err(error) => self.reset_failed(inner, error),
        }
    }

    fn reset_failed(&self, inner: &Inner, error: Error) {
        if self.row == RESETS {
            return inner.declare_dead(&error.to_string());
        }
        // Somebody else may have reset it in the middle of this, or be at it still.
        log::warn!("{}: {error}", inner.name);
        inner.want_reset();
    }
}

impl Inner {
    /// Stops the controller, and tells queue pairs to stop: the first part of a reset.
    fn halt(&self) -> Result<(), Error> {
        self.life.store(STARTING, Ordering::Release);
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.links().iter().for_each(|link| link.notify(State::Halt));
        self.disable()
    }

    /// Starts the controller, whose queue pairs have stopped: the second part.
    fn go_on(&self) -> Result<(), Error> {
        lock(&self.wants).reset = false;
        lock(&self.wants).aborts.clear();
        self.restart()?;
        self.refresh();
        Ok(())
    }

    /// Marks the device as dead. Revokes its access to memory first, and then notifies all queue pairs and listeners.
    fn declare_dead(&self, why: &str) {
        log::error!("{}: {why}: every request fails from now on", self.name);
        let _ = self.function.set_bus_master(false);
        if let Err(error) = self.space.cut() {
            // The device could still write to memory that has another owner by then.
            log::error!("{}: taking its memory away: {error}", self.name);
            log::logger().flush();
            std::process::abort();
        }
        self.life.store(DEAD, Ordering::Release);
        self.links().iter().for_each(|link| link.notify(State::Dead));
        self.notify_listeners();
    }

    /// Asks the controller to end a command early (section 5.1). Its own completion tells whether it did.
    fn abort(&self, queue: u16, command: u16) {
        let abort = Command::admin(AdminOpcode::Abort)
            .with_dword(10, u32::from(queue) | u32::from(command) << 16);
        match self.admin(abort, Data::None) {
            Ok(reply) if reply.result & 1 != 0 => {
                log::info!("{}: queue {queue}: command {command} was not aborted", self.name);
            }
            Ok(_) => {}
            Err(failure) => log::warn!("{}: {}", self.name, failure.error("aborting a command")),
        }
    }

    /// Polls the admin queue, and handles its events.
    fn poll_events(&self) {
        for _ in 0..EVENTS {
            let events = {
                let mut admin = lock(&self.admin);
                admin.reap(self);
                admin.take_events()
            };
            if events.is_empty() {
                return;
            }
            events.into_iter().for_each(|event| self.handle_event(event));
            lock(&self.admin).ask_for_event(self);
        }
    }

    /// Handles one event. The controller reports no other of its kind until its log page is read.
    fn handle_event(&self, event: u32) {
        let (kind, information, page) = (event & 7, event >> 8 & 0xff, (event >> 16) as u8);
        let len = if page == log_page::CHANGED_NAMESPACES { 4096 } else { 512 };
        let read = self.log_page(page, len);
        match (kind, &read) {
            (2, _) if information == 0 => self.refresh(),
            (1, Ok(data)) => log::warn!("{}: health: {}", self.name, Health::parse(data)),
            (0, _) => log::warn!("{}: the controller reports error {information:#x}", self.name),
            _ => log::info!("{}: event {event:#x}", self.name),
        }
        if let Err(failure) = read {
            let what = format!("reading log page {page:#x}");
            log::warn!("{}: {}", self.name, failure.error(&what));
        }
    }

    /// Asks for the sizes of all open namespaces, and notifies the listener if one has changed.
    pub(super) fn refresh(&self) {
        let ids: Vec<u32> = lock(&self.namespaces).keys().copied().collect();
        let mut changed = false;
        for id in ids {
            let found = match self.identify(id, cns::NAMESPACE, 0, false) {
                Ok(data) => NamespaceIdentity::parse(&data),
                Err(failure) => {
                    let what = format!("asking for namespace {id}");
                    log::warn!("{}: {}", self.name, failure.error(&what));
                    continue;
                }
            };
            let open = lock(&self.namespaces);
            let Some(entry) = open.get(&id) else { continue };
            let before = entry.blocks.load(Ordering::Relaxed);
            let same = found.blocks == 0
                || (found.block_shift, found.metadata)
                    == (entry.identity.block_shift, entry.identity.metadata);
            // Another format: no block is where it was, so none is there.
            let blocks = if same { found.blocks } else { 0 };
            if blocks != before {
                changed = true;
                log::warn!(
                    "{}: namespace {id} had {before} blocks and has {blocks} now",
                    self.name
                );
                entry.blocks.store(blocks, Ordering::Release);
            }
        }
        if changed {
            self.notify_listeners();
        }
    }

    fn notify_listeners(&self) {
        let listeners: Vec<_> = lock(&self.listeners).iter().filter_map(Weak::upgrade).collect();
        listeners.iter().for_each(|listener| listener());
    }
}
