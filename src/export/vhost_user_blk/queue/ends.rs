//! The completion of requests: from the leaf to the used ring, and to the guest.

use super::super::request::{Kind, Status};
use super::super::ring::{Ring, Tracking};
use super::{KEEP_ALWAYS, KEEP_IN_ALL, KEEP_SEGMENTS, Queue};
use crate::export::core::failure::{Failure, Operation};
use crate::io::{Io, IoResult, iovec};
use std::io::Write;

impl<R: Ring> Queue<R> {
    /// The end of a transfer on the fast path.
    pub(super) fn transferred(&mut self, io: &Io, head: u16, result: IoResult) {
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

    /// Writes the status and hands the chain back.
    pub(super) fn finish(&mut self, head: u16, status: Status, written: u32) {
        let slot = &mut self.slots[head as usize];
        if let Some(at) = slot.status.take() {
            // SAFETY: the byte is in the guest's memory, which stays mapped as long as the request is in flight.
            unsafe { at.write_volatile(status as u8) };
            if let Some(log) = &self.log {
                slot.mark(log, &self.memory, at, written);
            }
        }
        slot.busy = false;
        if let Some(recorder) = &mut self.recorder {
            let operation = slot.kind.and_then(Kind::operation);
            recorder.ended(operation, status == Status::Ok, slot.taken_at, slot.len);
        }
        if std::mem::take(&mut slot.again) && status == Status::Ok {
            self.held.succeeded();
        }
        self.segments_in_flight -= slot.segments.len();
        let room = slot.segments.capacity();
        if room > KEEP_ALWAYS && (room > KEEP_SEGMENTS || self.room > KEEP_IN_ALL) {
            slot.segments = Vec::new();
            self.room -= room;
        }
        self.in_flight -= 1;
        self.ring.push(head, written + 1);
        if let Some(tracker) = &mut self.inflight {
            tracker.link(head);
        }
    }

    /// Touches what a request failed on, so that it shows if the memory is no longer there: the
    /// kernel meets that without a signal.
    #[cold]
    pub(super) fn probe(&self, head: u16) {
        for segment in &self.slots[head as usize].segments {
            // SAFETY: the segments are mapped guest memory.
            unsafe { iovec::probe(segment) };
        }
    }

    /// Makes what is done visible to the guest. Where its memory is lost nothing is: the requests
    /// stay in flight, and may be done again when a front end comes back with all of it.
    pub(super) fn show_used(&mut self) {
        if self.loss.is_lost(&self.memory) {
            self.broken = true;
            return;
        }
        // Where nothing is tracked, a front end that comes back repeats every request whose end it has not seen.
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

    /// Notifies the guest of published completions, if it wants that.
    pub(super) fn call(&mut self) {
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
}
