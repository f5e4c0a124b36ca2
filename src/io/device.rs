//! Devices that a worker drives itself, without its ring: queues in memory that are polled for
//! completions, and an eventfd to sleep on.
//!
//! Such a device is a [`Source`] of each worker that uses it. It tells others' sources that their
//! operations have ended ([`Io::deliver`]), and is found again by who wants to start one
//! ([`Io::keep`], [`Io::kept`]). Its event is polled only while the worker sleeps, and once: an
//! interrupt that comes while the worker is awake costs it nothing.

use super::worker::Io;
use super::{IoResult, Source, Token};
use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::rc::Rc;

/// Ends that there is room for without growing.
const DELIVERED: usize = 1024;

pub(super) struct Devices {
    new: RefCell<Vec<(Box<dyn Source>, RawFd)>>,
    delivered: RefCell<VecDeque<(Token, IoResult)>>,
    kept: RefCell<Vec<(usize, Rc<dyn Any>)>>,
}

impl Default for Devices {
    fn default() -> Devices {
        Devices {
            new: RefCell::default(),
            delivered: RefCell::new(VecDeque::with_capacity(DELIVERED)),
            kept: RefCell::default(),
        }
    }
}

impl Io {
    /// Adds a source in this turn; it is polled until it has nothing, and then again when `event`
    /// becomes readable. The descriptor stays open as long as the source is attached.
    pub fn attach_device(&self, source: Box<dyn Source>, event: RawFd) {
        self.devices.new.borrow_mut().push((source, event));
    }

    pub(super) fn next_device(&self) -> Option<(Box<dyn Source>, RawFd)> {
        self.devices.new.borrow_mut().pop()
    }

    /// An operation that a device was given with this token has ended: its source is told in this turn,
    /// if it is told of from [`Source::poll`].
    #[inline]
    pub fn deliver(&self, token: Token, result: IoResult) {
        self.devices.delivered.borrow_mut().push_back((token, result));
    }

    pub(super) fn next_delivered(&self) -> Option<(Token, IoResult)> {
        self.devices.delivered.borrow_mut().pop_front()
    }

    /// Keeps something for as long as the worker lives or until it is let go. `key` is of the
    /// caller's choosing, and no two callers' are the same: an address of something that it owns.
    pub fn keep(&self, key: usize, value: Rc<dyn Any>) {
        self.let_go(key);
        self.devices.kept.borrow_mut().push((key, value));
    }

    /// What is kept under a key.
    #[inline]
    pub fn kept<T: 'static>(&self, key: usize) -> Option<Rc<T>> {
        let kept = self.devices.kept.borrow();
        let (_, value) = kept.iter().find(|(other, _)| *other == key)?;
        value.clone().downcast().ok()
    }

    /// Whether anything is.
    #[inline]
    pub fn keeps(&self, key: usize) -> bool {
        self.devices.kept.borrow().iter().any(|(other, _)| *other == key)
    }

    /// Keeps it no more.
    pub fn let_go(&self, key: usize) -> Option<Rc<dyn Any>> {
        let mut kept = self.devices.kept.borrow_mut();
        let at = kept.iter().position(|(other, _)| *other == key)?;
        Some(kept.swap_remove(at).1)
    }
}
