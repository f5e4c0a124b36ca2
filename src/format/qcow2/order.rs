//! The order in which things reach the disk, stated once, and what enforces it in memory.
//!
//! A host crash may keep any subset of what was written since the last flush, torn at 512 bytes; a
//! killed process loses only what was not handed to the kernel. Whatever is left, no structure may
//! be corrupt (clusters may leak), and each sector of the disk holds what was last flushed or
//! something written since.
//!
//! * **Reserve**: clusters are taken out of the refcounts many at a time, and the refcounts are
//!   *durable* before the first of them is used ([`super::alloc`]). What a crash leaves of a
//!   reservation is leaked. What was reserved past the end of the file reads as zeroes, durably.
//! * **Allocate**: the guest's data, and every byte that was copied or zeroed around it, is written;
//!   if the cluster does not already read, durably, as the disk did there (zeroes in fresh
//!   clusters), it is made *durable*; then the L2 entry is written; then the entry is shown to
//!   readers, and only then the guest is answered. Where there is memory that outlives the process, the
//!   entry is kept there, shown and answered first, and the rest follows ([`super::journal`]).
//! * **Compressed**: the references to every host cluster that the stream touches are durable, and so
//!   is the stream, before the L2 entry ([`super::packed`]).
//! * **Tables**: a new L2 table or refcount block is durable before the entry that names it. A table
//!   that moves is copied, made durable, named by one write of a sector, durable, and freed.
//! * **Free**: the entry that dropped the reference is durable before the refcount is lowered, and
//!   nothing that may still have I/O under way is reused or discarded ([`super::freed`]).
//! * **Lazy refcounts**, if asked for: the dirty bit is durable before the first reservation, and
//!   reservations then need not be, unless the file becomes longer for them: a repair cannot make up for
//!   a table past the end of the file. An image's own lazy bit alone does not make them so: reserving
//!   many at once costs next to nothing, and leaves nothing to repair.
//! * **Snapshots**: while references are counted anew, the dirty bit says that they may be wrong.
//!   *Made*: the refcounts of all that the disk refers to are raised and durable, then the COPIED
//!   flags are cleared, and these, the copy of the L1 table and the new snapshot table are durable
//!   before one write of the header names the table. *Deleted*: one write of the header names the
//!   table without it, durably, then refcounts are lowered, then flags are set where one reference is
//!   left. *Applied*: refcounts raised, durable; a new L1 table, durable; one write of the header names
//!   it, with the disk's size; then the references of the old one are given back. (Version 2 has no
//!   dirty bit: after a crash meanwhile flags and refcounts do not agree, as if by QEMU, until a
//!   repair; no data depends on it.)
//! * **Resizing**: what the disk's new length relies on is durable before the header that tells it
//!   ([`super::resize`]).
//! * **External data file**: it is flushed before the L2 entry that names what was copied to it.
//!
//! In memory: who changes the mapping of guest clusters holds their range ([`Ranges`]), so that
//! allocations, zeroes and discards of one cluster take turns, and bits of subclusters are merged.
//! Whoever looked up a host cluster on the slow road is counted ([`Visits`]) until his I/O is done;
//! who did on the fast road has announced it ([`crate::io::epoch`]).

use crate::io::sync::Mutex;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

/// Ranges that are being changed; the numbers are guest clusters.
#[derive(Default)]
pub struct Ranges {
    list: Mutex<RangeList>,
}

#[derive(Default)]
struct RangeList {
    next_id: u64,
    /// Oldest first.
    held: Vec<HeldRange>,
}

struct HeldRange {
    id: u64,
    range: Range<u64>,
    waiting: Vec<Waker>,
}

/// The right to change a range's mapping, until it is dropped.
pub struct RangeGuard<'a> {
    ranges: &'a Ranges,
    id: u64,
}

impl Ranges {
    /// Waits for all that overlap and came before. Nobody may wait for a second range while he has
    /// one.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let id = {
            let mut list = self.list.lock();
            let id = list.next_id;
            list.next_id += 1;
            list.held.push(HeldRange { id, range: range.clone(), waiting: Vec::new() });
            id
        };
        let guard = RangeGuard { ranges: self, id };
        poll_fn(|cx| {
            let mut list = self.list.lock();
            let older = list.held.iter_mut().find(|held| {
                held.id < id && held.range.start < range.end && range.start < held.range.end
            });
            match older {
                Some(older) => {
                    older.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
                None => Poll::Ready(()),
            }
        })
        .await;
        guard
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut list = self.ranges.list.lock();
        let Some(at) = list.held.iter().position(|held| held.id == self.id) else { return };
        let held = list.held.remove(at);
        drop(list);
        held.waiting.into_iter().for_each(Waker::wake);
    }
}

/// A mutex that may be held across an await: whoever has the turn takes what it guards out, and puts
/// it back.
pub struct Lock<T> {
    state: Mutex<LockState<T>>,
}

struct LockState<T> {
    /// None while somebody has it.
    value: Option<T>,
    waiting: Vec<Waker>,
}

/// What a [`Lock`] guards, until it is dropped.
pub struct LockGuard<'a, T> {
    lock: &'a Lock<T>,
    /// Some, until it is dropped.
    value: Option<T>,
}

impl<T> Lock<T> {
    pub fn new(value: T) -> Lock<T> {
        Lock { state: Mutex::new(LockState { value: Some(value), waiting: Vec::new() }) }
    }

    /// The lock, if nobody has it.
    pub fn try_lock(&self) -> Option<LockGuard<'_, T>> {
        let value = self.state.lock().value.take()?;
        Some(LockGuard { lock: self, value: Some(value) })
    }

    pub async fn lock(&self) -> LockGuard<'_, T> {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            match state.value.take() {
                Some(value) => Poll::Ready(LockGuard { lock: self, value: Some(value) }),
                None => {
                    state.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl<T> std::ops::Deref for LockGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is put back when the guard is dropped")
    }
}

impl<T> std::ops::DerefMut for LockGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("it is put back when the guard is dropped")
    }
}

impl<T> Drop for LockGuard<'_, T> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock();
        state.value = self.value.take();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        // All of them: one that is gone must not keep the others from their turn.
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Who is on the slow road with host clusters in hand.
#[derive(Default)]
pub struct Visits {
    state: Mutex<VisitList>,
}

#[derive(Default)]
struct VisitList {
    now: u64,
    /// How many visits began at which time, oldest first.
    begun: VecDeque<(u64, u32)>,
    waiting: Vec<Waker>,
}

/// A visit, until it is dropped.
pub struct Visit<'a> {
    visits: &'a Visits,
    began: u64,
}

impl Visits {
    pub fn enter(&self) -> Visit<'_> {
        let mut list = self.state.lock();
        let now = list.now;
        match list.begun.back_mut() {
            Some((at, count)) if *at == now => *count += 1,
            _ => list.begun.push_back((now, 1)),
        }
        Visit { visits: self, began: now }
    }

    /// A moment: [`Visits::passed`] tells when all visits that had begun before it have ended.
    pub fn moment(&self) -> u64 {
        let mut list = self.state.lock();
        list.now += 1;
        list.now
    }

    pub fn passed(&self, moment: u64) -> bool {
        self.state.lock().passed(moment)
    }

    /// Waits until all visits that have begun by now have ended.
    pub async fn older(&self) {
        let moment = self.moment();
        poll_fn(|cx| {
            let mut list = self.state.lock();
            if list.passed(moment) {
                return Poll::Ready(());
            }
            list.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl VisitList {
    fn passed(&self, moment: u64) -> bool {
        self.begun.front().is_none_or(|&(began, _)| began >= moment)
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut list = self.visits.state.lock();
        if let Some(entry) = list.begun.iter_mut().find(|(at, _)| *at == self.began) {
            entry.1 -= 1;
        }
        if list.begun.front().is_none_or(|&(_, count)| count > 0) {
            return;
        }
        while list.begun.front().is_some_and(|&(_, count)| count == 0) {
            list.begun.pop_front();
        }
        let waiting = std::mem::take(&mut list.waiting);
        drop(list);
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn overlapping_ranges_take_turns_in_the_order_in_which_they_came() {
        let ranges = Ranges::default();
        let first = poll(pin!(ranges.lock(0..4))).unwrap();
        let apart = poll(pin!(ranges.lock(4..5))).unwrap();
        let mut second = pin!(ranges.lock(3..5));
        assert!(poll(second.as_mut()).is_none());
        let mut third = pin!(ranges.lock(2..4));
        assert!(poll(third.as_mut()).is_none());
        drop((first, apart));
        assert!(poll(third.as_mut()).is_none(), "the second came before");
        let second = poll(second).unwrap();
        drop(second);
        assert!(poll(third).is_some());
    }

    #[test]
    fn a_moment_has_passed_when_older_visits_have_ended() {
        let visits = Visits::default();
        assert!(visits.passed(visits.moment()));
        let old = visits.enter();
        let moment = visits.moment();
        let young = visits.enter();
        assert!(!visits.passed(moment));
        drop(old);
        assert!(visits.passed(moment));
        drop(young);
    }
}
