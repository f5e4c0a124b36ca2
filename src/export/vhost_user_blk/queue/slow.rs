//! The slow path of a queue: requests that run as tasks of the same worker.
//!
//! A request becomes a task once there is memory for it ([`super::parked`]).

use super::super::request::{self, Ended, HEADER_LEN, Kind};
use super::super::ring::Ring;
use super::Queue;
use super::slot::Slot;
use crate::block::SECTOR;
use crate::export::core::failure::Failure;
use crate::io::{Io, IoVec, Lent, Permit, SourceId};
use std::rc::Rc;
use std::sync::atomic::Ordering;

pub(super) struct Finished {
    pub(super) head: u16,
    pub(super) result: Result<Ended, Failure>,
}

impl Slot {
    /// What the device reads and writes, without header and status.
    ///
    /// # Safety
    /// The guest's memory stays mapped until the lists are dropped and all operations on them have completed.
    unsafe fn lists(&self) -> (IoVec<'static>, IoVec<'static>) {
        let (from, to) = (self.data.0 as usize, self.data.1 as usize);
        let list = |segments| {
            // SAFETY: the caller's promise.
            unsafe { IoVec::from_raw(segments) }
        };
        match self.kind {
            Some(Kind::In) => (IoVec::empty(), list(&self.segments[from..to])),
            Some(Kind::Out) => (list(&self.segments[from..to]), IoVec::empty()),
            _ => {
                let (out, header) = (list(&self.segments[..from]), HEADER_LEN as u64);
                (out.slice(header, out.len() - header), list(&self.segments[from..to]))
            }
        }
    }
}

impl<R: Ring> Queue<R> {
    /// Begins a request that has the memory that it may need.
    pub(super) fn spawn(&mut self, io: &Rc<Io>, me: SourceId, head: u16, permit: Permit) {
        let slot = &self.slots[head as usize];
        let Some(kind) = slot.kind else { return };
        self.counts.slow += 1;
        self.counts.flushes += u64::from(kind == Kind::Flush);
        // SAFETY: the queue keeps `memory` mapped while the request is in flight, and the request does not end
        // before the operations that `lent` counts.
        let (out, into) = unsafe { slot.lists() };
        let sector = slot.offset / SECTOR;
        let (disk, finished, worker) = (self.disk.clone(), self.finished.clone(), io.clone());
        let serial = self.serial.clone();
        let durable = disk.write_through.load(Ordering::Relaxed);
        io.spawn_for(me, async move {
            let lent = Lent::default();
            let (out, into) = (out.lent_by(&lent), into.lent_by(&lent));
            let result = request::run(&disk, &serial, (kind, sector), out, into, durable).await;
            lent.check();
            drop(permit);
            finished.borrow_mut().push(Finished { head, result });
            worker.wake_source(me);
        });
    }

    /// The end of a request on the slow path.
    pub(super) fn slow_ended(&mut self, io: &Io, Finished { head, result }: Finished) {
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

    pub(super) fn next_finished(&self) -> Option<Finished> {
        self.finished.borrow_mut().pop()
    }
}
