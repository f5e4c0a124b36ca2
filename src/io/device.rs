//! Devices that a worker drives without its ring: queues in memory, polled for completions.
//!
//! An eventfd wakes the worker from sleep. Connections that drivers make are attached alike.
//!
//! Such a device is a [`Source`] of each worker that uses it. It tells others' sources that their
//! operations have ended ([`Io::deliver`]); drivers keep it in a [`PerWorker`](super::PerWorker). Its
//! event is polled only while the worker sleeps, and once: an interrupt that comes while the worker is
//! awake costs it nothing.

use super::worker::Io;
use super::{IoResult, Source, Token};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::RawFd;

/// Ends that there is room for without growing.
const DELIVERED: usize = 1024;

/// A source, and the event that it is polled after.
pub(super) type New = (Box<dyn Source>, Option<RawFd>);

pub(super) struct Devices {
    new: RefCell<Vec<New>>,
    delivered: RefCell<VecDeque<(Token, IoResult)>>,
}

impl Default for Devices {
    fn default() -> Devices {
        Devices {
            new: RefCell::default(),
            delivered: RefCell::new(VecDeque::with_capacity(DELIVERED)),
        }
    }
}

impl Io {
    /// Adds a source in this turn; it is polled until it has nothing, and then again when `event`
    /// becomes readable. The descriptor stays open as long as the source is attached. Without one it is
    /// polled after a completion of its own, and when it is woken, if it rests ([`Source::rests`]): so do
    /// connections, whose events are the ends of their operations.
    pub fn attach_device(&self, source: Box<dyn Source>, event: Option<RawFd>) {
        self.devices.new.borrow_mut().push((source, event));
    }

    pub(super) fn next_device(&self) -> Option<New> {
        self.devices.new.borrow_mut().pop()
    }

    /// An operation that a device was given with this token has ended. Its source is notified in this turn if this is
    /// called from [`Source::poll`].
    #[inline]
    pub fn deliver(&self, token: Token, result: IoResult) {
        self.devices.delivered.borrow_mut().push_back((token, result));
    }

    pub(super) fn next_delivered(&self) -> Option<(Token, IoResult)> {
        self.devices.delivered.borrow_mut().pop_front()
    }
}
