//! Waiting for descriptors with epoll, for rings other than the kernel's.
//!
//! It covers polls, and sends and receives that cannot complete at once. No thread blocks in a call for any of them.

use super::errno::Errno;
use super::op::Op;
use super::ring::Completion;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Operations that wait for events of descriptors.
pub(super) struct Polls {
    epoll: Epoll,
    polls: Vec<Option<Poll>>,
}

/// One operation. It holds the file, as the kernel's ring does.
struct Poll {
    user_data: u64,
    file: OwnedFd,
    op: Op,
}

impl Poll {
    /// What the operation comes to now that there are such events. None if it waits on.
    fn go_on(&self, events: u32) -> Option<Completion> {
        let result = match self.op {
            Op::Poll { .. } => events as i32,
            // SAFETY: the code that started the operation keeps list and memory in place until the completion.
            op => unsafe { calls::transfer(self.file.as_raw_fd(), op) }?,
        };
        let more = matches!(self.op, Op::Poll { many: true, .. });
        Some(Completion { user_data: self.user_data, result, more })
    }
}

impl Polls {
    pub fn new() -> std::io::Result<Polls> {
        Ok(Polls { epoll: Epoll::new()?, polls: Vec::new() })
    }

    /// Begins a poll, a send or a receive. Gives the completion if there is one already.
    ///
    /// # Safety
    /// The memory that the operation names stays mapped, and the list in place, until its completion.
    pub unsafe fn start(&mut self, user_data: u64, fd: RawFd, op: Op) -> Option<Completion> {
        let events = match op {
            Op::Poll { events, .. } => events,
            _ => {
                // SAFETY: the caller's promise.
                if let Some(result) = unsafe { calls::transfer(fd, op) } {
                    return Some(Completion { user_data, result, more: false });
                }
                let read = matches!(op, Op::Receive { .. });
                (if read { libc::POLLIN } else { libc::POLLOUT }) as u32
            }
        };
        // SAFETY: the descriptor is only borrowed for the call; if it is not open the call fails.
        let file = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let free = self.polls.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.polls.len());
        let added = file.and_then(|file| {
            // Edge-triggered: a descriptor that nobody reads is reported once per write.
            let event = EpollEvent::new(
                EventSet::from_bits_truncate(events) | EventSet::EDGE_TRIGGERED,
                slot as u64,
            );
            self.epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event)?;
            Ok(file)
        });
        let poll = match added {
            Ok(file) => Some(Poll { user_data, file, op }),
            Err(error) => {
                return Some(Completion { user_data, result: -Errno::from(error).0, more: false });
            }
        };
        match self.polls.get_mut(slot) {
            Some(place) => *place = poll,
            None => self.polls.push(poll),
        }
        None
    }

    /// The completions of a request to cancel an operation, and of that if there is one.
    pub fn cancel(&mut self, user_data: u64, cancelled: u64) -> impl Iterator<Item = Completion> {
        let found = self.end(cancelled);
        let result = if found { 0 } else { -libc::ENOENT };
        let operation = (cancelled, -libc::ECANCELED);
        let both = found.then_some(operation).into_iter().chain([(user_data, result)]);
        both.map(|(user_data, result)| Completion { user_data, result, more: false })
    }

    /// Ends the operation that carries `user_data`. False if there is none.
    fn end(&mut self, user_data: u64) -> bool {
        let mut all = self.polls.iter_mut();
        let found = all.find(|poll| poll.as_ref().is_some_and(|poll| poll.user_data == user_data));
        let Some(poll) = found.and_then(Option::take) else { return false };
        forget(&self.epoll, &poll);
        true
    }

    /// Gives what has completed, without waiting.
    pub fn poll(&mut self, out: &mut impl Extend<Completion>) {
        let mut events = [EpollEvent::default(); 16];
        // Interrupted: as if nothing had come.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        out.extend(events[..count].iter().filter_map(|event| {
            let place = self.polls.get_mut(event.data() as usize)?;
            let poll = place.take()?;
            let completion = poll.go_on(event.events());
            if completion.is_some_and(|completion| !completion.more) {
                forget(&self.epoll, &poll);
            } else {
                *place = Some(poll);
            }
            completion
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

fn forget(epoll: &Epoll, poll: &Poll) {
    let _ = epoll.ctl(ControlOperation::Delete, poll.file.as_raw_fd(), EpollEvent::default());
}

/// A descriptor's operations as plain system calls, for the same rings.
pub(super) mod calls {
    use crate::io::message::message;
    use crate::io::{Durable, Errno, Op};
    use std::os::fd::RawFd;

    /// Sends or receives what can be without waiting: a count, or a negative errno. None: nothing can be.
    ///
    /// # Safety
    /// The list that the operation names is in place, and its memory mapped.
    pub unsafe fn transfer(fd: RawFd, op: Op) -> Option<i32> {
        loop {
            // SAFETY: the caller's promise.
            let result = unsafe {
                match op {
                    Op::Send { segments } => {
                        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
                        libc::sendmsg(fd, &message(segments.as_slice()), flags)
                    }
                    Op::Receive { segments } => {
                        let mut message = message(segments.as_slice());
                        libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT)
                    }
                    _ => return Some(-libc::EINVAL),
                }
            };
            match count(result) {
                Ok(count) => return Some(count as i32),
                Err(Errno(libc::EINTR)) => {}
                Err(Errno(libc::EAGAIN)) => return None,
                Err(errno) => return Some(-errno.0),
            }
        }
    }

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
