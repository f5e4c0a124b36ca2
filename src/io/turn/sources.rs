//! The sources of a worker: active ones, which are polled, and idle ones, which wait for a kick.

use super::{Entry, Local, Watch};
use crate::io::op::Op;
use crate::io::ring::Pin;
use crate::io::{Source, SourceId, tag};
use std::any::Any;
use std::fs::File;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Turns without work after which one source among busy ones goes back to kicks.
const LAZY_TURNS: u32 = 256;

impl Local {
    /// Adds a source, polls it at once, and from then on whenever `kick` becomes readable. Without
    /// a kick descriptor it is polled all the time.
    pub fn attach(&mut self, source: Box<dyn Source>, kick: Option<RawFd>) -> SourceId {
        let id = self.insert(source);
        self.watch(id, kick);
        id
    }

    /// As [`Local::attach`]. `files` stay open while the source is attached, and beyond the process's
    /// end while the kernel works for this worker ([`Ring::pin`](crate::io::ring::Ring::pin)).
    ///
    /// # Errors
    /// The kernel refuses to keep a file open; nothing is attached.
    pub fn attach_pinned(
        &mut self,
        source: Box<dyn Source>,
        kick: Option<RawFd>,
        files: &[Arc<File>],
    ) -> std::io::Result<SourceId> {
        let pins = self.pin_all(files)?;
        let id = self.attach(source, kick);
        self.set_pins(id, pins);
        Ok(id)
    }

    /// Other files stay open from now on for a source, as those of [`Local::attach_pinned`], which end for it.
    ///
    /// # Errors
    /// The kernel refuses to keep a file open; nothing has changed.
    pub fn pin(&mut self, id: SourceId, files: &[Arc<File>]) -> std::io::Result<()> {
        let pins = self.pin_all(files)?;
        self.set_pins(id, pins);
        Ok(())
    }

    fn pin_all(&self, files: &[Arc<File>]) -> std::io::Result<Vec<Pin>> {
        let mut pins = Vec::new();
        for file in files {
            let pin = self.io.ring.borrow_mut().pin(file);
            match pin {
                Ok(pin) => pins.push(pin),
                Err(error) => {
                    self.unpin(pins);
                    return Err(error);
                }
            }
        }
        Ok(pins)
    }

    fn set_pins(&mut self, id: SourceId, pins: Vec<Pin>) {
        let old = match self.sources.get_mut(id.0 as usize) {
            Some(Some(entry)) => std::mem::replace(&mut entry.pins, pins),
            _ => pins,
        };
        self.unpin(old);
    }

    pub(super) fn unpin(&self, pins: Vec<Pin>) {
        pins.into_iter().for_each(|pin| self.io.ring.borrow_mut().unpin(pin));
    }

    fn insert(&mut self, source: Box<dyn Source>) -> SourceId {
        let entry = Entry { source, watch: None, active: false, idle_turns: 0, pins: Vec::new() };
        let index = match self.free.pop() {
            Some(index) => {
                self.sources[index as usize] = Some(entry);
                index
            }
            None => {
                self.sources.push(Some(entry));
                self.sources.len() as u32 - 1
            }
        };
        SourceId(index)
    }

    /// Takes in what tasks have attached ([`Io::attach_device`](crate::io::Io::attach_device)).
    pub(super) fn take_devices(&mut self) {
        while let Some((source, event)) = self.io.next_device() {
            let id = self.insert(source);
            self.watches = (self.watches + 1) & 0xff_ffff;
            let number = self.watches;
            let watch = event.map(|fd| Watch { number, fd, once: true, pending: false });
            if let Some(Some(entry)) = self.sources.get_mut(id.0 as usize) {
                entry.watch = watch;
            }
            self.activate(id.0);
        }
    }

    /// Gives a source another kick descriptor, or none. The ring holds the file, so the descriptor
    /// may be closed as soon as another one has taken its place.
    pub fn watch(&mut self, id: SourceId, kick: Option<RawFd>) {
        self.unwatch(id.0);
        self.watches = (self.watches + 1) & 0xff_ffff;
        let number = self.watches;
        if let Some(Some(entry)) = self.sources.get_mut(id.0 as usize) {
            entry.watch = kick.map(|fd| Watch { number, fd, once: false, pending: true });
            if let Some(fd) = kick {
                self.poll_many(tag::pack(tag::KICK, number, id.0), fd);
            }
        }
        self.activate(id.0);
    }

    /// The source, for messages that know its type.
    pub fn source<T: Source>(&mut self, id: SourceId) -> Option<&mut T> {
        let entry = self.sources.get_mut(id.0 as usize)?.as_mut()?;
        self.io.wake_source(id);
        (&mut *entry.source as &mut dyn Any).downcast_mut()
    }

    pub(super) fn unwatch(&mut self, index: u32) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        if let Some(Watch { number, pending: true, .. }) = entry.watch.take() {
            let user_data = tag::pack(tag::NONE, 0, 0);
            let op = Op::Cancel(tag::pack(tag::KICK, number, index));
            // SAFETY: names no memory.
            unsafe { self.io.ring.borrow_mut().push(user_data, -1, op) };
        }
    }

    pub(super) fn poll_many(&self, user_data: u64, fd: RawFd) {
        // SAFETY: names no memory.
        unsafe { self.io.ring.borrow_mut().push(user_data, fd, Op::POLL_MANY) };
    }

    /// A source has been armed: its kick is waited for, if that is not so all the time.
    pub(super) fn await_kick(&mut self, index: u32) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        if let Some(watch) = &mut entry.watch
            && watch.once
            && !std::mem::replace(&mut watch.pending, true)
        {
            let user_data = tag::pack(tag::KICK, watch.number, index);
            // SAFETY: names no memory.
            unsafe { self.io.ring.borrow_mut().push(user_data, watch.fd, Op::POLL_ONCE) };
        }
    }

    pub(super) fn activate(&mut self, index: u32) {
        let Some(Some(entry)) = self.sources.get_mut(index as usize) else { return };
        entry.idle_turns = 0;
        if !entry.active {
            entry.active = true;
            entry.source.disarm();
            self.active.push(index);
        }
    }

    /// Sends sources that have had nothing for long, while others kept the worker busy, back to
    /// kicks.
    pub(super) fn retire_lazy(&mut self) {
        let mut at = 0;
        while at < self.active.len() {
            match self.sources[self.active[at] as usize].as_mut() {
                Some(entry)
                    if entry.idle_turns > LAZY_TURNS
                        && (entry.watch.is_some() || entry.source.is_idle()) =>
                {
                    if entry.source.arm() {
                        entry.active = false;
                        let index = self.active.swap_remove(at);
                        self.await_kick(index);
                        continue;
                    }
                    entry.source.disarm();
                    entry.idle_turns = 0;
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Asks all sources for kicks. False if one of them has something now.
    pub(super) fn arm_all(&mut self) -> bool {
        let mut at = 0;
        while at < self.active.len() {
            let index = self.active[at];
            let Some(entry) = self.sources[index as usize].as_mut() else {
                self.active.swap_remove(at);
                continue;
            };
            if entry.watch.is_none() && !entry.source.is_idle() {
                at += 1;
                continue;
            }
            if !entry.source.arm() {
                entry.source.disarm();
                return false;
            }
            entry.active = false;
            self.active.swap_remove(at);
            self.await_kick(index);
        }
        true
    }
}
