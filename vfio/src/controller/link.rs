//! The state that a queue pair's thread and the controller's thread share: usability and rings.
//!
//! A controller is reset by one thread while others use their queue pairs. A doorbell that one of them rings too late
//! would make the controller read old commands of a new queue, so every pair first says that it has stopped
//! ([`State::Halted`]), is created again only then, and resumes on command.

#![forbid(unsafe_code)]

use crate::Error;
use crate::dma::HostRange;
use crate::space::{Memory, Space};
use crate::spec::command::{CQE, SQE};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use vmm_sys_util::eventfd::EventFd;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Running,
    /// The controller is about to be reset: touch nothing any more, and say so.
    Halt,
    /// The pair's thread has said so.
    Halted,
    /// The queues were made again: what the controller had is to be given again.
    Restart,
    /// The controller is gone, and reaches no memory any more.
    Dead,
}

pub struct Link {
    id: u16,
    entries: u32,
    state: AtomicU8,
    /// The queues are deleted: the controller does not write to the pair's memory any more.
    deleted: AtomicBool,
    /// Of the completion queue's interrupt vector; also written to when the state changes.
    event: EventFd,
    submissions: Memory,
    completions: Memory,
    /// Kept when the controller was not seen to release them.
    leaked: Mutex<bool>,
}

impl Link {
    pub fn new(
        id: u16,
        entries: u32,
        event: EventFd,
        space: &Arc<Space>,
        page: usize,
    ) -> Result<Link, Error> {
        Ok(Link {
            id,
            entries,
            state: AtomicU8::new(State::Running as u8),
            deleted: AtomicBool::new(false),
            event,
            submissions: space.memory(entries as usize * SQE, page)?,
            completions: space.memory(entries as usize * CQE, page)?,
            leaked: Mutex::new(false),
        })
    }

    pub fn id(&self) -> u16 {
        self.id
    }

    pub fn entries(&self) -> u32 {
        self.entries
    }

    pub fn event(&self) -> &EventFd {
        &self.event
    }

    pub fn submissions(&self) -> HostRange {
        self.submissions.host()
    }

    pub fn completions(&self) -> HostRange {
        self.completions.host()
    }

    /// Where the controller sees the submission and the completion queue.
    pub fn addresses(&self) -> (u64, u64) {
        (self.submissions.iova(), self.completions.iova())
    }

    #[inline]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Running,
            1 => State::Halt,
            2 => State::Halted,
            3 => State::Restart,
            _ => State::Dead,
        }
    }

    fn change(&self, from: State, to: State) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// For the pair's thread: it has stopped.
    pub fn halted(&self) {
        self.change(State::Halt, State::Halted);
    }

    /// For the pair's thread: it continues. False if the controller has changed its mind.
    pub fn running(&self) -> bool {
        self.change(State::Restart, State::Running)
    }

    /// For the controller. What is dead stays so.
    pub fn notify(&self, state: State) {
        let mut now = self.state.load(Ordering::Acquire);
        while now != State::Dead as u8 {
            let order = (Ordering::AcqRel, Ordering::Acquire);
            match self.state.compare_exchange(now, state as u8, order.0, order.1) {
                Ok(_) => break,
                Err(other) => now = other,
            }
        }
        // Full means that it is readable already.
        let _ = self.event.write(1);
    }

    pub fn set_deleted(&self) {
        self.deleted.store(true, Ordering::Release);
    }

    /// Whether the controller is known not to write to the pair's memory any more.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire) || self.state() == State::Dead
    }

    /// Never gives the rings' memory back.
    pub fn leak(&self) {
        *self.leaked.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = true;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if *self.leaked.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner) {
            self.submissions.leak();
            self.completions.leak();
        }
    }
}
