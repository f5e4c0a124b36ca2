//! The contract between a worker and a source of requests.

use super::IoResult;
use super::worker::Io;
use std::any::Any;
use std::rc::Rc;

/// A source's number on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceId(pub(super) u32);

/// Something that brings requests to a worker: a virtqueue.
pub trait Source: Any {
    /// Takes what has arrived, up to a share that is fair to the other sources, and starts it.
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled;

    /// Whether `poll` would find something. Called while the worker spins.
    fn has_work(&self) -> bool;

    /// An operation started with this source's token is done.
    fn complete(&mut self, io: &Rc<Io>, tag: u32, result: IoResult);

    /// As `complete`, with what the operation counted: bytes of a send or receive, events of a poll; zero of
    /// all others. For sources that start such operations.
    fn counted(&mut self, io: &Rc<Io>, tag: u32, result: IoResult<u32>) {
        self.complete(io, tag, result.map(|_| ()));
    }

    /// The end of a turn: makes results visible, and notifies at most once.
    fn publish(&mut self);

    /// A kick has come.
    fn kicked(&mut self) {}

    /// Asks for kicks, because the worker is about to sleep. False if something has arrived
    /// meanwhile: kicks are not to be relied upon then.
    fn arm(&mut self) -> bool;

    /// Says that kicks are not needed for now.
    fn disarm(&mut self);

    /// The time that was asked for with [`Io::tick_by`], by this source or another, has come. What is
    /// still wanted later is to be asked for again. True if the source is to be polled now.
    fn tick(&mut self, _io: &Rc<Io>, _now: u64) -> bool {
        false
    }

    /// Whether the worker may end while the source is attached: nothing is in flight, and only the worker's own
    /// tasks submit requests.
    fn is_detachable(&self) -> bool {
        false
    }

    /// Whether `poll` finds nothing until a message or a completion arrives. The worker does not poll an idle source
    /// that has no kicks.
    fn is_idle(&self) -> bool {
        false
    }
}

/// What [`Source::poll`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    Idle,
    /// It took something.
    Busy,
    /// It has come to its end, with nothing in flight: the worker drops it.
    Ended,
}
