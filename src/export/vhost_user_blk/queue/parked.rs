//! Requests on the slow path that wait for memory ([`Budget`](crate::io::Budget)).
//!
//! A parked request has nothing but its slot, which it has in any case; its task is made when there is memory for it.
//! The queue continues taking requests meanwhile: those on the fast path need none. Slow ones keep their order among
//! themselves. For its whole list a queue has one place among those that wait for the disk's memory, so the disk's
//! queues come in turns.

use super::super::config::MAX_DISCARD_SECTORS;
use super::super::request::Kind;
use super::super::ring::Ring;
use super::Queue;
use super::slot::Slot;
use crate::block::SECTOR;
use crate::export::core::Disk;
use crate::io::{Io, Permit, SourceId};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// The parked requests of one queue.
pub(super) struct Parked {
    /// By their heads, in the order in which they came.
    heads: VecDeque<u16>,
    /// A task asks for the memory of the first of them.
    is_asking: bool,
    /// What it has been given.
    given: Rc<RefCell<Option<Permit>>>,
}

impl Parked {
    /// Room for all requests of a ring of `size` entries.
    pub(super) fn new(size: u16) -> Parked {
        let heads = VecDeque::with_capacity(size.into());
        Parked { heads, is_asking: false, given: Rc::default() }
    }

    pub(super) fn count(&self) -> usize {
        self.heads.len()
    }

    pub(super) fn heads(&self) -> impl Iterator<Item = u16> + '_ {
        self.heads.iter().copied()
    }
}

impl Slot {
    /// What the request may take of our memory, in bytes.
    fn memory(&self, disk: &Disk) -> u64 {
        let node = disk.node();
        let needs = node.working_memory();
        let data = &self.segments[self.data.0 as usize..self.data.1 as usize];
        match self.kind {
            Some(Kind::In) => needs.to_transfer(self.offset, data, false),
            Some(Kind::Out) => needs.to_transfer(self.offset, data, true),
            // How long it is the guest's memory says, which is read once, when the request begins.
            Some(Kind::WriteZeroes) => needs.to_zero(u64::from(MAX_DISCARD_SECTORS) * SECTOR),
            _ => needs.to_ask(),
        }
    }
}

impl<R: Ring> Queue<R> {
    /// Starts a request on the slow path, once there is memory for it.
    pub(super) fn go_slow(&mut self, io: &Rc<Io>, me: SourceId, head: u16) {
        self.parked.heads.push_back(head);
        if self.parked.heads.len() == 1 {
            self.unpark(io, me);
        }
    }

    /// Starts those parked requests that there is memory for, and asks for that of the next.
    #[inline]
    pub(super) fn unpark(&mut self, io: &Rc<Io>, me: SourceId) {
        if !self.parked.heads.is_empty() {
            self.unpark_some(io, me);
        }
    }

    #[cold]
    fn unpark_some(&mut self, io: &Rc<Io>, me: SourceId) {
        let mut given = self.parked.given.take();
        if self.parked.is_asking && given.is_none() {
            return;
        }
        self.parked.is_asking = false;
        while let Some(&head) = self.parked.heads.front() {
            let bytes = self.slots[head as usize].memory(&self.disk);
            let budget = &self.disk.memory;
            let Some(permit) = given.take().or_else(|| budget.try_take(bytes)) else {
                return self.ask(io, me, bytes);
            };
            self.parked.heads.pop_front();
            self.spawn(io, me, head, permit);
        }
    }

    /// Waits for memory, and has the queue polled when there is some.
    fn ask(&mut self, io: &Rc<Io>, me: SourceId, bytes: u64) {
        self.parked.is_asking = true;
        let (budget, given) = (self.disk.memory.clone(), self.parked.given.clone());
        let worker = io.clone();
        io.spawn_for(me, async move {
            let permit = budget.take(bytes).await;
            *given.borrow_mut() = Some(permit);
            worker.wake_source(me);
        });
    }
}
