//! Requests that the storage fails: reported, ignored, or held for a retry.
//!
//! None of this is on the warm path.

use super::super::queues::InFlight;
use super::super::request::{Kind, Status};
use super::super::ring::Ring;
use super::slot::Slot;
use super::take::Chain;
use super::{KEEP_ALWAYS, Queue};
use crate::export::core::failure::{Action, Failure, Operation};
use crate::io::Io;

/// What becomes of held requests when their queue stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtStop {
    /// They are failed to the guest: nothing else would ever complete them.
    Fail,
    /// They stay as they are, for the next owner of the ring: marked where requests in flight are tracked, and named
    /// in [`Stopped`].
    Leave,
}

/// What a queue leaves behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stopped<I = u16> {
    /// Where the available ring is to be continued.
    pub base: I,
    /// The heads of requests that are held, in the order in which they failed.
    pub held: Vec<u16>,
}

impl<R: Ring> Queue<R> {
    /// Tries all held requests again now.
    pub fn retry_held(&mut self) {
        self.held.retry_now();
    }

    /// Fails all held requests to the guest.
    pub fn fail_held(&mut self) {
        for head in self.held.take_all() {
            self.disk.failures.let_go(1);
            self.slots[head as usize].again = true;
            // For the place of the status byte, wherever it is by now.
            match self.seize(head) {
                Ok(Chain { readable, .. }) => {
                    let slot = &mut self.slots[head as usize];
                    slot.data = (readable, slot.segments.len() as u32);
                    // A read may have written there before it failed, and may be another queue's.
                    if let Some(log) = &self.log {
                        let data = &slot.segments[readable as usize..];
                        log.mark_segments(&self.memory, data, u64::MAX);
                    }
                    self.finish(head, Status::IoError, 0);
                }
                Err(why) => self.fail(why),
            }
        }
    }

    /// The next of the held requests that is due.
    pub(super) fn next_held(&mut self) -> Option<u16> {
        let head = self.held.next_due()?;
        self.disk.failures.let_go(1);
        self.slots[head as usize].again = true;
        Some(head)
    }

    /// The storage has failed a request.
    #[cold]
    pub(super) fn failed(&mut self, io: &Io, head: u16, failure: Failure) {
        self.probe(head);
        if self.loss.is_lost(&self.memory) {
            // Not the storage's fault; nobody will see how it ended.
            return self.finish(head, Status::IoError, 0);
        }
        let read = failure.operation == Operation::Read;
        if let Some(recorder) = &self.recorder {
            recorder.failed(self.slots[head as usize].kind.and_then(Kind::operation));
        }
        match self.disk.failed(failure) {
            Action::Report => self.finish(head, Status::from(Err(failure.errno)), 0),
            Action::Ignore => {
                self.finish(head, Status::Ok, if read { failure.len as u32 } else { 0 })
            }
            Action::Stop => self.hold(io, head),
        }
    }

    /// Keeps a request that has failed; it is not in flight any more.
    fn hold(&mut self, io: &Io, head: u16) {
        let slot = &mut self.slots[head as usize];
        slot.status = None;
        self.segments_in_flight -= slot.segments.len();
        slot.segments.clear();
        self.room -= slot.segments.capacity();
        slot.segments.shrink_to(KEEP_ALWAYS);
        self.room += slot.segments.capacity();
        let again = std::mem::take(&mut slot.again);
        self.in_flight -= 1;
        self.disk.failures.hold(1);
        let (at, first) = self.held.hold(head, again, io.now());
        io.tick_by(at);
        if let Some(delay) = first {
            let seconds = delay / 1_000_000_000;
            let index = self.index;
            log::warn!(export = &*self.disk.name; "queue {index}: held, and tried again in {seconds} s");
        }
        if let Some((_, AtStop::Fail)) = self.stop {
            self.fail_held();
        }
    }

    /// Increments the ages of requests in flight, and reports the oldest if it is too old.
    #[cold]
    pub(super) fn age(&mut self) {
        // Those that wait for memory have not begun.
        self.parked.heads().for_each(|head| self.slots[head as usize].age = 0);
        for slot in self.slots.iter_mut().filter(|slot| slot.is_in_flight()) {
            slot.age = slot.age.saturating_add(1);
        }
        if let Some(oldest) = self.oldest().filter(|slot| self.watch.is_over(slot.age)) {
            let (index, seconds) = (self.index, self.watch.elapsed(oldest.age).as_secs());
            let line = format!(
                "queue {index}: {} has not ended for {seconds} s; {} requests are in flight",
                oldest.describe(),
                self.in_flight
            );
            self.watch.hangs(&self.disk.name, &line);
        }
    }

    fn oldest(&self) -> Option<&Slot> {
        let mut oldest: Option<&Slot> = None;
        for slot in self.slots.iter().filter(|slot| slot.is_in_flight()) {
            if oldest.is_none_or(|oldest| slot.age > oldest.age) {
                oldest = Some(slot);
            }
        }
        oldest
    }

    /// What it has in flight.
    pub fn in_flight_now(&self) -> InFlight {
        let describe = |slot: &Slot| (self.watch.elapsed(slot.age), slot.describe());
        InFlight { count: self.in_flight, oldest: self.oldest().map(describe) }
    }
}

impl Slot {
    fn is_in_flight(&self) -> bool {
        self.busy && self.status.is_some()
    }

    /// What the request is, for the log and for errors.
    fn describe(&self) -> String {
        let what = match self.kind {
            Some(Kind::In) => "read",
            Some(Kind::Out) => "write",
            Some(Kind::Flush) => "flush",
            Some(Kind::Discard) => "discard",
            Some(Kind::WriteZeroes) => "write zeroes",
            Some(Kind::GetId) | None => "request",
        };
        format!("{what} of {} bytes at {}", self.len, self.offset)
    }
}
