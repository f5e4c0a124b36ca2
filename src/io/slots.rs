//! Operations in flight on a worker: their slots, completions and owners.
//!
//! The rules it guards: a read or write is whole or it fails. What a short or interrupted one left is asked for
//! again, and what is past the end of a file reads as zeroes. On a socket a part is a success. And an operation keeps
//! its slot and its memory until its completion, also when it has been cancelled.

use super::op::{Op, Segments, Started, Token};
use super::ring::{BATCH, Completion, Wait};
use super::timer::Deadline;
use super::turn_share::moved;
use super::worker::Io;
use super::{Errno, IoResult, iovec, tag};
use std::future::Future;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

pub(super) struct Ops {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

struct Slot {
    fd: RawFd,
    op: Op,
    /// Bytes transferred so far.
    done: u64,
    /// The list of what a short transfer left.
    tail: Option<Box<[libc::iovec]>>,
    owner: Owner,
    deadline: Deadline,
    /// What it comes to if it is cancelled, once it has been asked to end.
    stop: Option<Errno>,
    /// Tells operations apart that have the slot one after another: a request to cancel one may come late.
    generation: u32,
}

pub(super) enum Owner {
    Nobody,
    Source(Token),
    Future(Option<Waker>),
    Finished(IoResult<u32>),
}

impl Io {
    /// Starts an operation; `token`'s source is notified of its end.
    ///
    /// # Safety
    /// The segments that the operation names stay mapped, and their list in place, until then.
    pub unsafe fn start(&self, fd: RawFd, op: Op, token: Token) -> Started {
        // SAFETY: the caller's promise.
        unsafe { self.start_until(fd, op, token, Deadline::NEVER) }
    }

    /// As [`Io::start`]. An operation that waits for somebody else (on a socket) is cancelled soon after the
    /// deadline, and fails with ETIMEDOUT.
    ///
    /// # Safety
    /// As for [`Io::start`].
    pub unsafe fn start_until(
        &self,
        fd: RawFd,
        op: Op,
        token: Token,
        deadline: Deadline,
    ) -> Started {
        // SAFETY: the caller's promise.
        unsafe { self.begin(fd, op, Owner::Source(token), deadline) };
        Started::Pending
    }

    /// Cancels the operations in flight of a token that wait for somebody else. Each completes all the same:
    /// with ECANCELED, unless its end was on the way. Until then its memory stays in use.
    pub fn cancel(&self, token: Token) {
        self.stop(
            Errno(libc::ECANCELED),
            |_, slot| matches!(slot.owner, Owner::Source(other) if other == token),
        );
    }

    /// Cancels the operations in flight of a token that wait for somebody else, and waits until the kernel has
    /// let go of their memory. Their source hears of their ends later, as of any.
    pub fn cancel_and_wait(&self, token: Token) {
        let is_its = |slot: &Slot| matches!(slot.owner, Owner::Source(other) if other == token);
        self.cancel(token);
        let ops = self.ops.borrow();
        let slots = (0..).zip(&ops.slots).filter(|(_, slot)| is_its(slot) && slot.op.waits());
        let wanted: Vec<u64> = slots.map(|(index, slot)| slot.user_data(index)).collect();
        drop(ops);
        let has_ended = |stash: &[Completion], user_data: u64| {
            stash.iter().any(|completion| completion.user_data == user_data)
        };
        loop {
            let mut stash = self.stash.borrow_mut();
            if wanted.iter().all(|&user_data| has_ended(&stash, user_data)) {
                return;
            }
            let mut ring = self.ring.borrow_mut();
            ring.enter(Wait::Forever);
            ring.reap(&mut stash);
        }
    }

    /// Cancels the operations whose deadline has come, and asks to be called when the next one does.
    pub(super) fn stop_late(&self, now: u64) {
        self.stop(Errno(libc::ETIMEDOUT), |_, slot| slot.deadline.0 <= now);
        let ops = self.ops.borrow();
        let waiting = ops.slots.iter().filter(|slot| slot.can_stop());
        if let Some(next) = waiting.map(|slot| slot.deadline).min() {
            self.tick_by(next.0);
        }
    }

    /// Cancels what is chosen, and not being cancelled yet.
    fn stop(&self, why: Errno, is_chosen: impl Fn(u32, &Slot) -> bool) {
        let mut ops = self.ops.borrow_mut();
        for (index, slot) in (0..).zip(&mut ops.slots) {
            if slot.can_stop() && is_chosen(index, slot) {
                slot.stop = Some(why);
                let cancel = Op::Cancel(slot.user_data(index));
                // SAFETY: names no memory.
                unsafe { self.ring.borrow_mut().push(tag::pack(tag::NONE, 0, 0), -1, cancel) };
            }
        }
    }

    /// Starts an operation; gives its slot.
    ///
    /// # Safety
    /// As for [`Io::start`].
    unsafe fn begin(&self, fd: RawFd, op: Op, owner: Owner, deadline: Deadline) -> u32 {
        let (index, user_data) = self.ops.borrow_mut().insert(fd, op, owner, deadline);
        if deadline != Deadline::NEVER {
            self.tick_by(deadline.0);
        }
        // SAFETY: the caller's promise.
        unsafe { self.ring.borrow_mut().push(user_data, fd, op) };
        index
    }

    /// Books a completion of slot `index`. Its owner and result, once the operation is over.
    pub(super) fn finish(&self, index: u32, result: i32) -> Option<(Owner, IoResult<u32>)> {
        let mut ops = self.ops.borrow_mut();
        let slot = &mut ops.slots[index as usize];
        let result = match slot.outcome(result) {
            Outcome::Over(result) => result,
            Outcome::Continue(op) => {
                let (fd, user_data) = (slot.fd, slot.user_data(index));
                drop(ops);
                // SAFETY: what the starter promised lasts until the completion, and the list of the remaining
                // segments is in the slot until then.
                unsafe { self.ring.borrow_mut().push(user_data, fd, op) };
                return None;
            }
        };
        match &mut slot.owner {
            Owner::Future(waker) => {
                let waker = waker.take();
                slot.owner = Owner::Finished(result);
                drop(ops);
                if let Some(waker) = waker {
                    waker.wake();
                }
                None
            }
            owner => {
                let owner = std::mem::replace(owner, Owner::Nobody);
                ops.remove(index);
                Some((owner, result))
            }
        }
    }

    /// Runs an operation for a task, with a deadline as [`Io::start_until`].
    ///
    /// # Safety
    /// The segments that the operation names stay mapped, and their list in place, until the future is done or
    /// dropped; if it is forgotten, forever.
    pub(super) unsafe fn run(self: &Rc<Io>, fd: RawFd, op: Op, deadline: Deadline) -> Operation {
        if let Op::Read { segments, .. } | Op::Write { segments, .. } = op {
            moved(segments.len());
        }
        // SAFETY: the caller's promise.
        let slot = unsafe { self.begin(fd, op, Owner::Future(None), deadline) };
        Operation { io: self.clone(), slot: Some(slot) }
    }
}

impl Ops {
    /// Room for this many operations before it has to grow.
    pub(super) fn with_capacity(operations: usize) -> Ops {
        let (slots, free) = (Vec::with_capacity(operations), Vec::with_capacity(operations));
        Ops { slots, free }
    }

    /// Gives the slot, and the user data of its operation.
    fn insert(&mut self, fd: RawFd, op: Op, owner: Owner, deadline: Deadline) -> (u32, u64) {
        let mut new =
            Slot { fd, op, done: 0, tail: None, owner, deadline, stop: None, generation: 0 };
        let index = match self.free.pop() {
            Some(index) => {
                let slot = &mut self.slots[index as usize];
                new.generation = slot.generation.wrapping_add(1);
                *slot = new;
                index
            }
            None => {
                self.slots.push(new);
                self.slots.len() as u32 - 1
            }
        };
        (index, self.slots[index as usize].user_data(index))
    }

    fn remove(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.tail = None;
        slot.owner = Owner::Nobody;
        slot.deadline = Deadline::NEVER;
        self.free.push(index);
    }
}

const INTERRUPTED: i32 = -libc::EINTR;
const AGAIN: i32 = -libc::EAGAIN;
const CANCELLED: i32 = -libc::ECANCELED;

enum Outcome {
    Over(IoResult<u32>),
    Continue(Op),
}

impl Slot {
    fn user_data(&self, index: u32) -> u64 {
        tag::pack(tag::OP, self.generation, index)
    }

    /// Whether it is in flight, waits for somebody else, and has not been asked to end.
    fn can_stop(&self) -> bool {
        matches!(self.owner, Owner::Source(_) | Owner::Future(_))
            && self.op.waits()
            && self.stop.is_none()
    }

    /// What a completion with `result` means for the operation as a whole.
    fn outcome(&mut self, result: i32) -> Outcome {
        let (offset, segments, write) = match self.op {
            Op::Read { offset, segments } => (offset, segments, None),
            Op::Write { offset, segments, durable } => (offset, segments, Some(durable)),
            op => {
                return match (result, self.stop) {
                    (count @ 0.., _) => {
                        Outcome::Over(Ok(if op.waits() { count as u32 } else { 0 }))
                    }
                    (INTERRUPTED | AGAIN | CANCELLED, Some(why)) => Outcome::Over(Err(why)),
                    (INTERRUPTED | AGAIN, None) => Outcome::Continue(op),
                    (errno, _) => Outcome::Over(Err(Errno(-errno))),
                };
            }
        };
        if matches!(result, INTERRUPTED | AGAIN) {
            return Outcome::Continue(self.rest());
        }
        if result < 0 {
            // The tail of a direct read that ends in the middle of the file's last sector cannot
            // be asked for again: it is not aligned.
            if -result == libc::EINVAL && self.done > 0 && write.is_none() && self.is_at_end(offset)
            {
                self.zero_rest(segments);
                return Outcome::Over(Ok(0));
            }
            return Outcome::Over(Err(Errno(-result)));
        }
        self.done += result as u64;
        if self.done >= segments.len() {
            return Outcome::Over(Ok(0));
        }
        match (result, write) {
            (0, None) => {
                self.zero_rest(segments);
                Outcome::Over(Ok(0))
            }
            // A write that moves nothing and reports nothing would be asked for forever.
            (0, Some(_)) => Outcome::Over(Err(Errno::ENOSPC)),
            _ => Outcome::Continue(self.rest()),
        }
    }

    /// The operation on what is not transferred yet.
    fn rest(&mut self) -> Op {
        let mut op = self.op;
        if self.done > 0
            && let Op::Read { offset, segments } | Op::Write { offset, segments, .. } = &mut op
        {
            let left = self.left(*segments);
            let tail = self.tail.insert(left);
            *offset += self.done;
            *segments = Segments::new(tail, segments.len() - self.done);
        }
        op
    }

    fn left(&self, segments: Segments) -> Box<[libc::iovec]> {
        let mut skip = self.done as usize;
        // SAFETY: the operation is in flight, so the list is in place.
        let list = unsafe { segments.as_slice() };
        let mut left = Vec::with_capacity(list.len());
        for segment in list {
            let n = skip.min(segment.iov_len);
            skip -= n;
            if n < segment.iov_len {
                let base = segment.iov_base.cast::<u8>().wrapping_add(n);
                left.push(iovec::iovec(base, segment.iov_len - n));
            }
        }
        left.into_boxed_slice()
    }

    fn zero_rest(&self, segments: Segments) {
        let left = self.left(segments);
        // SAFETY: the starter keeps the memory mapped until the completion is reported.
        unsafe { iovec::zero(&left) };
    }

    /// Whether the file ends where the transfer stopped. Asked only after a short direct read.
    fn is_at_end(&self, offset: u64) -> bool {
        // SAFETY: fstat writes the whole structure or fails.
        let (result, stat) = unsafe {
            let mut stat = std::mem::zeroed::<libc::stat64>();
            (libc::fstat64(self.fd, &mut stat), stat)
        };
        result == 0 && stat.st_size as u64 <= offset + self.done
    }
}

/// An operation in flight for a task. Dropping it cancels what waits for somebody else, and waits until the kernel
/// has released the memory.
pub(super) struct Operation {
    io: Rc<Io>,
    slot: Option<u32>,
}

impl Future for Operation {
    type Output = IoResult<u32>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoResult<u32>> {
        let slot = self.slot.expect("polled after it was done");
        let mut ops = self.io.ops.borrow_mut();
        match &mut ops.slots[slot as usize].owner {
            Owner::Finished(result) => {
                let result = *result;
                ops.remove(slot);
                drop(ops);
                self.slot = None;
                Poll::Ready(result)
            }
            owner => {
                *owner = Owner::Future(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let user_data = self.io.ops.borrow().slots[slot as usize].user_data(slot);
        self.io.stop(Errno(libc::ECANCELED), |index, _| index == slot);
        let finished =
            || matches!(self.io.ops.borrow().slots[slot as usize].owner, Owner::Finished(_));
        // Another operation that was dropped may have reaped this one's completion.
        let mut completions = self.io.stash.take();
        loop {
            for completion in completions {
                if completion.user_data == user_data {
                    self.io.finish(slot, completion.result);
                } else {
                    self.io.stash.borrow_mut().push(completion);
                }
            }
            if finished() {
                break;
            }
            completions = Vec::with_capacity(BATCH);
            let mut ring = self.io.ring.borrow_mut();
            ring.enter(Wait::Forever);
            ring.reap(&mut completions);
        }
        self.io.ops.borrow_mut().remove(slot);
    }
}
