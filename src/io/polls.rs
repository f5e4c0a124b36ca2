//! Waiting for descriptors with epoll, for rings that are not the kernel's.

use super::errno::Errno;
use super::op::Op;
use super::ring::Completion;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Polls that go on until they are ended, and such that end with their first completion.
pub(super) struct Polls {
    epoll: Epoll,
    polls: Vec<Option<Poll>>,
}

/// One poll. It holds the file, as the kernel's ring does.
struct Poll {
    user_data: u64,
    file: OwnedFd,
    once: bool,
}

impl Polls {
    pub fn new() -> std::io::Result<Polls> {
        Ok(Polls { epoll: Epoll::new()?, polls: Vec::new() })
    }

    /// Begins a poll of `op`'s kind.
    ///
    /// # Errors
    /// The completion that tells why it could not.
    pub fn start(&mut self, user_data: u64, fd: RawFd, op: Op) -> Result<(), Completion> {
        let once = matches!(op, Op::PollOnce);
        // SAFETY: the descriptor is only borrowed for the call; if it is not open the call fails.
        let file = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let free = self.polls.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.polls.len());
        let added = file.and_then(|file| {
            // Edge-triggered: a descriptor that nobody reads is told of once per write.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, slot as u64);
            self.epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event)?;
            Ok(file)
        });
        let poll = match added {
            Ok(file) => Some(Poll { user_data, file, once }),
            Err(error) => {
                return Err(Completion { user_data, result: -Errno::from(error).0, more: false });
            }
        };
        match self.polls.get_mut(slot) {
            Some(place) => *place = poll,
            None => self.polls.push(poll),
        }
        Ok(())
    }

    /// Ends the poll that carries `user_data`. False if there is none.
    pub fn end(&mut self, user_data: u64) -> bool {
        let mut all = self.polls.iter_mut();
        let found = all.find(|poll| poll.as_ref().is_some_and(|poll| poll.user_data == user_data));
        let Some(poll) = found.and_then(Option::take) else { return false };
        self.forget(&poll);
        true
    }

    fn forget(&self, poll: &Poll) {
        let event = EpollEvent::default();
        let _ = self.epoll.ctl(ControlOperation::Delete, poll.file.as_raw_fd(), event);
    }

    /// Gives what has become readable, without waiting.
    pub fn look(&mut self, out: &mut impl Extend<Completion>) {
        let mut events = [EpollEvent::default(); 16];
        // Interrupted: as if nothing had come.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        out.extend(events[..count].iter().filter_map(|event| {
            let place = self.polls.get_mut(event.data() as usize)?;
            let poll = place.take()?;
            let (user_data, more) = (poll.user_data, !poll.once);
            if more {
                *place = Some(poll);
            } else {
                self.forget(&poll);
            }
            Some(Completion { user_data, result: libc::POLLIN as i32, more })
        }));
    }

    /// Sleeps until something becomes readable, at most for `time`.
    pub fn sleep(&self, time: Option<Duration>) {
        let mut polled =
            libc::pollfd { fd: self.epoll.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // Times too long for the structure are as good as none.
        let time = time.and_then(|time| {
            let tv_sec = time.as_secs().try_into().ok()?;
            Some(libc::timespec { tv_sec, tv_nsec: time.subsec_nanos().into() })
        });
        let at: *const libc::timespec = time.as_ref().map_or(std::ptr::null(), |time| time);
        // SAFETY: one entry, and a time or none, that live through the call.
        unsafe { libc::ppoll(&mut polled, 1, at, std::ptr::null()) };
    }
}

/// A descriptor's operations as plain system calls, for the same rings.
pub(super) mod calls {
    use crate::io::{Durable, Errno};
    use std::os::fd::RawFd;

    fn count(result: isize) -> Result<u64, Errno> {
        if result < 0 { Err(Errno::last()) } else { Ok(result as u64) }
    }

    /// # Safety
    /// The memory that the list names is mapped.
    pub unsafe fn read(fd: RawFd, list: &[libc::iovec], offset: u64) -> Result<u64, Errno> {
        // SAFETY: the caller's promise.
        count(unsafe { libc::preadv(fd, list.as_ptr(), list.len() as i32, offset as i64) })
    }

    /// # Safety
    /// As for `read`.
    pub unsafe fn write(
        fd: RawFd,
        list: &[libc::iovec],
        offset: u64,
        durable: Durable,
    ) -> Result<u64, Errno> {
        let flags = if durable == Durable::Yes { libc::RWF_DSYNC } else { 0 };
        let (base, n) = (list.as_ptr(), list.len() as i32);
        // SAFETY: the caller's promise.
        count(unsafe { libc::pwritev2(fd, base, n, offset as i64, flags) })
    }

    pub fn sync(fd: RawFd) -> Result<u64, Errno> {
        // SAFETY: names no memory.
        count(unsafe { libc::fdatasync(fd) } as isize)
    }

    pub fn allocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> Result<u64, Errno> {
        // SAFETY: names no memory.
        count(unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) } as isize)
    }
}
