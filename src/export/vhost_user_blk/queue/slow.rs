//! The slow road of a queue: requests that become tasks of the same worker.

use super::super::request::{self, Ended, HEADER_LEN, Kind};
use super::super::ring::Ring;
use super::Queue;
use crate::export::core::failure::Failure;
use crate::io::{Io, IoVec, SourceId};
use std::rc::Rc;
use std::sync::atomic::Ordering;

pub(super) struct Finished {
    pub(super) head: u16,
    pub(super) result: Result<Ended, Failure>,
}

impl<R: Ring> Queue<R> {
    pub(super) fn go_slow(
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
    pub(super) fn spawn(
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
        let serial = self.serial.clone();
        let durable = disk.write_through.load(Ordering::Relaxed);
        io.spawn(async move {
            let result = request::run(&disk, &serial, (kind, sector), out, into, durable).await;
            finished.borrow_mut().push(Finished { head, result });
            worker.wake_source(me);
        });
    }

    /// The end of a request on the slow road.
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
