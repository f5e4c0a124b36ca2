//! A queue pair, with which one thread sends commands to a controller and receives completions.
//!
//! Nothing here locks, allocates or enters the kernel once it is warm. Commands are written as they
//! come, and told of with one doorbell when the caller says ([`QueuePair::ring`]); completions are taken
//! as many as there are, and given back with one doorbell.
//!
//! The rule it guards: the slot of a command, which is its identifier, its list page and its bounce
//! buffers, is free again only when its completion has come, or when the controller was seen not to be
//! ready, or can reach no memory any more ([`Link`]).

#![forbid(unsafe_code)]

mod bounce;
mod request;

pub use request::{Direction, Done, Request};

use crate::controller::Inner;
use crate::controller::link::{Link, State};
use crate::dma::HostRange;
use crate::function::Registers;
use crate::prp::{self, List};
use crate::queue::{CompletionQueue, SubmissionQueue};
use crate::sgl;
use crate::space::{Memory, Space, Table};
use crate::spec::{Command, Status};
use bounce::{Bounce, Chain};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// Completions taken at a time.
const BATCH: usize = 256;
/// How often a command is given to the controller before its failure is reported, where the failure may pass or the
/// controller was reset meanwhile.
const ATTEMPTS: u8 = 4;
/// Looks at a command ([`QueuePair::tick`]) after which it is aborted, and after which the controller
/// is reset.
const ABORT_AGE: u8 = 4;
const RESET_AGE: u8 = 8;

/// What a queue pair has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub commands: u64,
    /// Commands whose data went through bounce buffers.
    pub bounced: u64,
    /// Commands with a scatter gather list, because pages could not tell where their data is.
    pub scattered: u64,
    pub submission_doorbells: u64,
    pub completion_doorbells: u64,
    pub retries: u64,
    /// Completions of commands that were not given.
    pub strays: u64,
}

/// One submission and one completion queue. It may go to another thread, but is used by one at a time.
pub struct QueuePair {
    inner: Arc<Inner>,
    registers: Arc<dyn Registers>,
    space: Arc<Space>,
    link: Arc<Link>,
    submissions: SubmissionQueue,
    completions: CompletionQueue,
    table: (u64, Arc<Table>),
    page: u64,
    /// The alignment of scatter gather lists, if the controller knows them.
    sgl_align: Option<u8>,
    /// By command identifier.
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// One page for each slot.
    lists: Memory,
    bounce: Bounce,
    /// What there was no room for, in the order in which it came.
    waiting: VecDeque<Request>,
    /// Commands that have failed and are to be given again at the next tick.
    again: Vec<u16>,
    counts: Counts,
}

#[derive(Clone, Copy)]
struct Slot {
    request: Request,
    chain: Chain,
    state: SlotState,
    age: u8,
    attempts: u8,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Free,
    /// The controller has it.
    Given,
    /// It has failed, and waits to be given again.
    Again,
}

impl QueuePair {
    pub(crate) fn new(inner: Arc<Inner>, link: Arc<Link>) -> Result<QueuePair, crate::Error> {
        let (registers, space) = (inner.registers().clone(), inner.space().clone());
        let page = inner.page();
        let entries = link.entries();
        let slots = entries as usize - 1;
        let lists = space.memory(slots * page, page)?;
        let bounce = Bounce::new(&space, page)?;
        let (submission_bell, completion_bell) = inner.doorbells(link.id());
        let slot = Slot {
            request: Request::without_data(Command::default(), 0),
            chain: Chain::NONE,
            state: SlotState::Free,
            age: 0,
            attempts: 0,
        };
        Ok(QueuePair {
            submissions: SubmissionQueue::new(link.submissions(), entries, submission_bell),
            completions: CompletionQueue::new(link.completions(), entries, completion_bell),
            table: space.table(),
            page: page as u64,
            sgl_align: inner.identity().sgl_align,
            slots: vec![slot; slots],
            free: (0..slots as u16).rev().collect(),
            lists,
            bounce,
            waiting: VecDeque::with_capacity(slots),
            again: Vec::with_capacity(slots),
            counts: Counts::default(),
            inner,
            registers,
            space,
            link,
        })
    }

    /// The controller's, from 1 on.
    pub fn id(&self) -> u16 {
        self.link.id()
    }

    /// Commands that the controller takes at a time.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Becomes readable when something completes, or when [`QueuePair::reap`] is wanted for another
    /// reason: to be waited for after [`QueuePair::arm`].
    pub fn event(&self) -> RawFd {
        self.link.event().as_raw_fd()
    }

    /// Requests taken and not told to be done.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.waiting.len()
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes a request. The controller is notified by the next [`QueuePair::ring`]. What there is no room for waits
    /// inside; `segments` of a request stay in place until it is reported as done.
    #[inline]
    pub fn submit(&mut self, request: Request) {
        if !self.waiting.is_empty() || !self.start(&request) {
            self.waiting.push_back(request);
        }
    }

    /// Gives a request to the controller. False if there is no room.
    #[inline]
    fn start(&mut self, request: &Request) -> bool {
        if self.link.state() != State::Running {
            return false;
        }
        let Some(&id) = self.free.last() else { return false };
        let mut chain = Chain::NONE;
        let command = if request.len == 0 {
            request.command
        } else if let Some(command) = self.direct(id, request) {
            command
        } else if let Some((taken, command)) = self.copied(id, request) {
            chain = taken;
            command
        } else {
            return false;
        };
        self.free.pop();
        let request = Request { command: command.with_id(id), ..*request };
        self.submissions.push(&request.command);
        self.counts.commands += 1;
        self.slots[id as usize] =
            Slot { request, chain, state: SlotState::Given, age: 0, attempts: 1 };
        true
    }

    #[inline]
    fn list(&self, id: u16) -> List {
        let at = u64::from(id) * self.page;
        let memory = self.lists.host().part(at as usize, self.page as usize);
        let memory = memory.unwrap_or_else(|| unreachable!("a page for each slot"));
        List { memory, iova: self.lists.iova() + at }
    }

    /// The command with its data where it is, if the device reaches that.
    #[inline]
    fn direct(&mut self, id: u16, request: &Request) -> Option<Command> {
        if self.space.generation() != self.table.0 {
            self.table = self.space.table();
        }
        let list = self.list(id);
        let table = &self.table.1;
        let pieces = || {
            let find = |piece: HostRange| table.find(piece.address(), piece.len());
            request.segments.iter().map(move |piece| Some((find(piece)?, piece.len())))
        };
        if let Some((first, second)) = prp::build(pieces(), self.page, list) {
            return Some(request.command.with_data(first, second));
        }
        // Only here, because devices are quicker with pages.
        let align = u64::from(self.sgl_align?);
        let descriptor = sgl::build(pieces(), align, self.page, list)?;
        self.counts.scattered += 1;
        Some(request.command.with_sgl(descriptor))
    }

    /// The command with its data in bounce buffers; `None` while there are none.
    fn copied(&mut self, id: u16, request: &Request) -> Option<(Chain, Command)> {
        let len = request.len as usize;
        let chain = self.bounce.take(len)?;
        let Some(data) = prp::build(self.bounce.pieces(chain, len), self.page, self.list(id))
        else {
            // A request longer than the reported limits: not one of `Namespace`'s.
            self.bounce.give_back(chain);
            return None;
        };
        self.counts.bounced += 1;
        if request.direction == Direction::ToDevice {
            self.bounce.fill(chain, request.segments);
        }
        Some((chain, request.command.with_data(data.0, data.1)))
    }

    /// Tells the controller of what was submitted since the last time, with one doorbell.
    #[inline]
    pub fn ring(&mut self) {
        // Not after a halt was asked for: the doorbell may be another queue's by then.
        if self.submissions.must_ring() && self.link.state() == State::Running {
            self.submissions.ring(&*self.registers);
            self.counts.submission_doorbells += 1;
        }
    }

    /// Whether [`QueuePair::reap`] would find something.
    #[inline]
    pub fn has_work(&self) -> bool {
        match self.link.state() {
            State::Running => self.completions.has_entry(),
            // The controller is being reset: what is in the queue means nothing.
            State::Halted => false,
            State::Halt | State::Restart => true,
            State::Dead => self.in_flight() > 0,
        }
    }

    /// Takes what has completed, tells `done` of each, and starts what was waiting. Also where a reset of the
    /// controller, or its loss, is noted. Returns how many were reported.
    #[inline]
    pub fn reap(&mut self, mut done: impl FnMut(Done)) -> usize {
        let mut ended = 0;
        if self.link.state() != State::Running {
            ended = self.follow(&mut done);
            if self.link.state() != State::Running {
                return ended;
            }
        }
        let mut taken = 0;
        while taken < BATCH
            && let Some(entry) = self.completions.pop()
        {
            taken += 1;
            let slot = self.slots.get(usize::from(entry.id));
            if entry.queue != self.link.id()
                || slot.is_none_or(|slot| slot.state != SlotState::Given)
            {
                self.stray(entry);
                continue;
            }
            ended += usize::from(self.completed(entry.id, entry.status, &mut done));
        }
        if taken > 0 {
            self.completions.ring(&*self.registers);
            self.counts.completion_doorbells += 1;
            self.start_waiting();
        }
        ended
    }

    /// A command's completion. True if its request is over.
    #[inline]
    fn completed(&mut self, id: u16, status: Status, done: &mut impl FnMut(Done)) -> bool {
        let slot = &mut self.slots[usize::from(id)];
        if status.is_transient() && slot.attempts < ATTEMPTS {
            slot.state = SlotState::Again;
            self.again.push(id);
            return false;
        }
        let request = slot.request;
        if !slot.chain.is_none() {
            if request.direction == Direction::FromDevice && status.is_ok() {
                self.bounce.empty(slot.chain, request.segments);
            }
            self.bounce.give_back(slot.chain);
        }
        slot.state = SlotState::Free;
        self.free.push(id);
        done(Done { token: request.token, status });
        true
    }

    /// A completion of a command that the controller does not have: nothing that it says can be relied
    /// on until it has been reset.
    #[cold]
    fn stray(&mut self, entry: crate::spec::Completion) {
        self.counts.strays += 1;
        if self.counts.strays == 1 {
            log::error!(
                "{}: queue {} completes command {} of queue {}, which it was not given: resetting \
                 the controller",
                self.inner.name(),
                self.link.id(),
                entry.id,
                entry.queue
            );
        }
        self.inner.want_reset();
    }

    #[inline]
    fn start_waiting(&mut self) {
        while let Some(request) = self.waiting.front().copied()
            && self.start(&request)
        {
            self.waiting.pop_front();
        }
    }

    /// Follows the controller through a reset, or to its end.
    #[cold]
    fn follow(&mut self, done: &mut impl FnMut(Done)) -> usize {
        match self.link.state() {
            State::Running | State::Halted => 0,
            State::Halt => {
                self.link.halted();
                0
            }
            State::Restart => {
                self.submissions.reset();
                self.completions.reset();
                self.again.clear();
                if !self.link.running() {
                    return 0;
                }
                let mut ended = 0;
                for id in 0..self.slots.len() as u16 {
                    if self.slots[usize::from(id)].state != SlotState::Free {
                        ended += usize::from(!self.give_again(id, done));
                    }
                }
                self.start_waiting();
                self.ring();
                ended
            }
            State::Dead => {
                let mut ended = 0;
                for id in 0..self.slots.len() as u16 {
                    if self.slots[usize::from(id)].state != SlotState::Free {
                        self.slots[usize::from(id)].attempts = ATTEMPTS;
                        ended += usize::from(self.completed(id, Status::GONE, done));
                    }
                }
                self.again.clear();
                while let Some(request) = self.waiting.pop_front() {
                    done(Done { token: request.token, status: Status::GONE });
                    ended += 1;
                }
                ended
            }
        }
    }

    /// Gives a command once more, unless that was done often enough: then its request is over, and the
    /// answer is false.
    fn give_again(&mut self, id: u16, done: &mut impl FnMut(Done)) -> bool {
        let slot = &mut self.slots[usize::from(id)];
        if slot.attempts >= ATTEMPTS {
            return !self.completed(id, Status::GONE, done);
        }
        slot.attempts += 1;
        slot.age = 0;
        slot.state = SlotState::Given;
        let command = slot.request.command;
        self.submissions.push(&command);
        self.counts.retries += 1;
        true
    }

    /// To be called every [`QueuePair::tick_interval`] or a little more while something is in flight:
    /// gives again what has failed and may succeed now, has commands aborted that take too long, and
    /// the controller reset when that does not help.
    pub fn tick(&mut self, mut done: impl FnMut(Done)) {
        if self.link.state() != State::Running {
            return;
        }
        let again = std::mem::take(&mut self.again);
        for &id in &again {
            self.give_again(id, &mut done);
        }
        self.again = again;
        self.again.clear();
        let mut oldest = 0;
        for (id, slot) in self.slots.iter_mut().enumerate() {
            if slot.state != SlotState::Given {
                continue;
            }
            slot.age = slot.age.saturating_add(1);
            oldest = oldest.max(slot.age);
            if slot.age == ABORT_AGE {
                log::warn!(
                    "{}: queue {}: command {id} (opcode {:#04x}, block {}) takes longer than {} s: \
                     aborting it",
                    self.inner.name(),
                    self.link.id(),
                    slot.request.command.opcode(),
                    slot.request.command.lba(),
                    self.inner.io_timeout().as_secs_f32()
                );
                self.inner.want_abort(self.link.id(), id as u16);
            }
        }
        if oldest >= RESET_AGE {
            log::error!(
                "{}: queue {}: a command does not end although it was aborted: resetting the controller",
                self.inner.name(),
                self.link.id()
            );
            self.inner.want_reset();
        }
        self.start_waiting();
        self.ring();
    }

    /// How often to call [`QueuePair::tick`].
    pub fn tick_interval(&self) -> std::time::Duration {
        self.inner.io_timeout() / u32::from(ABORT_AGE)
    }

    /// Arms [`QueuePair::event`] for later completions. False if there are some already.
    pub fn arm(&mut self) -> bool {
        // Earlier completions are already reported. Nobody reads it while completions are polled for.
        let _ = self.link.event().read();
        !self.has_work()
    }

    /// What makes [`QueuePair::event`] readable, for other threads.
    pub fn waker(&self) -> PairWaker {
        PairWaker(self.link.clone())
    }
}

/// Wakes the thread that waits for a queue pair's event.
#[derive(Clone)]
pub struct PairWaker(Arc<Link>);

impl PairWaker {
    pub fn wake(&self) {
        // Full means that it is readable already.
        let _ = self.0.event().write(1);
    }
}

impl Drop for QueuePair {
    /// Deletes the queues, which ends what is in flight. Blocks.
    fn drop(&mut self) {
        self.inner.delete_pair(&self.link);
        if !self.link.is_deleted() {
            // The controller may still write to the lists' and buffers' memory, so it is not given
            // back to the system.
            self.lists.leak();
            self.bounce.leak();
        }
    }
}
