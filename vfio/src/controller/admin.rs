//! The admin queue, whose commands any thread may send and await.
//!
//! Waiting threads look for completions themselves, so that a lost interrupt makes nothing hang. An identifier, and
//! the page of data that goes with it, is used again only when its command has completed or the controller was not
//! ready since.

#![forbid(unsafe_code)]

use super::{Failure, Inner, lock};
use crate::Error;
use crate::queue::{CompletionQueue, SubmissionQueue};
use crate::space::{Memory, Space};
use crate::spec::{AdminOpcode, Command, Completion, Status, registers};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Entries of the admin queues.
pub const ENTRIES: u32 = 32;
/// Events taken before the controller must wait for the next look: one that reports events without end must not keep
/// a thread busy.
const EVENTS: usize = 16;

/// The data of an admin command; at most a page.
#[derive(Clone, Copy)]
pub enum Data {
    None,
    /// So many bytes from the controller.
    In(usize),
}

pub struct Admin {
    submissions: SubmissionQueue,
    completions: CompletionQueue,
    rings: Memory,
    data: Memory,
    page: usize,
    slots: [Slot; ENTRIES as usize - 1],
    events: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Given,
    /// Given, but nobody waits any more.
    Abandoned,
    /// An asynchronous event request.
    Event,
    Done(Completion),
}

impl Admin {
    pub fn new(space: &Arc<Space>, page: usize, stride: u32) -> Result<Admin, Error> {
        let rings = space.memory(2 * page, page)?;
        let part = |n| rings.host().part(n * page, page);
        let (Some(submissions), Some(completions)) = (part(0), part(1)) else {
            unreachable!("two pages")
        };
        let (tail, head) = registers::doorbells(0, stride);
        Ok(Admin {
            submissions: SubmissionQueue::new(submissions, ENTRIES, tail),
            completions: CompletionQueue::new(completions, ENTRIES, head),
            data: space.memory(ENTRIES as usize * page, page)?,
            rings,
            page,
            slots: [Slot::Free; ENTRIES as usize - 1],
            events: Vec::new(),
        })
    }

    /// Where the controller sees the submission and the completion queue.
    pub fn addresses(&self) -> (u64, u64) {
        (self.rings.iova(), self.rings.iova() + self.page as u64)
    }

    /// The controller is not ready: everything that it had is over.
    pub fn reset(&mut self) {
        self.rings.host().zero();
        self.submissions.reset();
        self.completions.reset();
        self.events.clear();
        for slot in &mut self.slots {
            *slot = match *slot {
                Slot::Given => Slot::Done(Completion {
                    result: 0,
                    head: 0,
                    queue: 0,
                    id: 0,
                    phase: false,
                    status: Status::QUEUE_DELETED,
                }),
                Slot::Done(completion) => Slot::Done(completion),
                Slot::Free | Slot::Abandoned | Slot::Event => Slot::Free,
            };
        }
    }

    fn give(&mut self, inner: &Inner, command: Command, data: Data, slot: Slot) -> Option<u16> {
        let id = self.slots.iter().position(|slot| *slot == Slot::Free)?;
        let at = id * self.page;
        let place = self.data.host().part(at, self.page)?;
        let iova = self.data.iova() + at as u64;
        let command = match data {
            Data::None => command,
            Data::In(_) => {
                place.zero();
                command.with_data(iova, 0)
            }
        };
        self.slots[id] = slot;
        self.submissions.push(&command.with_id(id as u16));
        self.submissions.ring(&**inner.registers());
        Some(id as u16)
    }

    /// Books what has completed.
    pub fn reap(&mut self, inner: &Inner) {
        let mut strays = 0;
        for _ in 0..ENTRIES {
            let Some(entry) = self.completions.pop() else { break };
            match self.slots.get_mut(usize::from(entry.id)) {
                Some(slot @ Slot::Given) => *slot = Slot::Done(entry),
                Some(slot @ Slot::Abandoned) => *slot = Slot::Free,
                Some(slot @ Slot::Event) => {
                    *slot = Slot::Free;
                    if entry.status.is_ok() && self.events.len() < EVENTS {
                        self.events.push(entry.result);
                    }
                }
                _ => strays += 1,
            }
        }
        self.completions.ring(&**inner.registers());
        if strays > 0 {
            log::error!(
                "{}: the controller completes admin commands that it was not given: resetting it",
                inner.name()
            );
            inner.want_reset();
        }
    }

    /// The events that have come; the request for the next one is to be given again.
    pub fn take_events(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.events)
    }

    /// Requests the next event, if no request is pending.
    pub fn ask_for_event(&mut self, inner: &Inner) {
        if !self.slots.contains(&Slot::Event) {
            let command = Command::admin(AdminOpcode::AsyncEvent);
            self.give(inner, command, Data::None, Slot::Event);
        }
    }
}

/// What an admin command answers.
pub struct Reply {
    /// Dword 0 of the completion.
    pub result: u32,
    /// What was asked for with [`Data::In`].
    pub data: Vec<u8>,
}

impl Inner {
    /// Gives an admin command and waits for its end.
    pub fn admin(&self, command: Command, data: Data) -> Result<Reply, Failure> {
        self.execute(command, data, false)
    }

    /// The same; `starting` for the thread that starts the controller, while all others have to wait.
    pub fn execute(&self, command: Command, data: Data, starting: bool) -> Result<Reply, Failure> {
        let deadline = Instant::now() + self.options().admin_timeout;
        let mut pause = Duration::from_micros(20);
        let mut given = None;
        loop {
            if self.is_dead() {
                return Err(Failure::Gone);
            }
            let mut admin = lock(self.admin_queue());
            if given.is_none() && (starting || self.is_running()) {
                given = admin.give(self, command, data, Slot::Given);
            }
            admin.reap(self);
            if let Some(id) = given
                && let Slot::Done(completion) = admin.slots[usize::from(id)]
            {
                admin.slots[usize::from(id)] = Slot::Free;
                if !completion.status.is_ok() {
                    return Err(Failure::Status(completion.status));
                }
                let mut bytes = Vec::new();
                if let Data::In(len) = data {
                    bytes.resize(len.min(admin.page), 0);
                    admin.data.host().read(usize::from(id) * admin.page, &mut bytes);
                }
                return Ok(Reply { result: completion.result, data: bytes });
            }
            // One that is not ready any more answers nothing that it was given.
            let is_lost = given.is_some() && !self.is_ready();
            if is_lost || Instant::now() >= deadline {
                if let Some(id) = given {
                    admin.slots[usize::from(id)] = Slot::Abandoned;
                    drop(admin);
                    self.want_reset();
                }
                return Err(Failure::Timeout);
            }
            drop(admin);
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }
}
