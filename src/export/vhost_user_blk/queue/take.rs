//! Taking chains from the available ring: they are checked, mapped and started on the leaf.
//!
//! The rule held here: a request is fast in whole or slow in whole. A transfer that the graph cannot map at once
//! goes the slow path, and so does all that is no transfer.

use super::super::request::{HEADER_LEN, Header, Kind, Status, trim};
use super::super::ring::{Broken, Ring, Tracking};
use super::Queue;
use super::slot::Slot;
use crate::block::{Access, Target};
use crate::export::core::Disk;
use crate::io::epoch::Guard;
use crate::io::{Io, Segments, SourceId, Started, Token, iovec, thread_cpu_ns, turn_share};
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// Chains that are taken together: their headers are fetched before the first of them is looked at,
/// what of them is done at once is published together, and what is not is submitted together.
/// Larger batches would keep the storage waiting for its first request.
const BATCH: u16 = 16;

/// Memory segments of the chains that a queue takes in a turn. The last chain may go beyond.
const SEGMENTS: usize = 4096;

/// Chains in the first batch of a turn. A guest that has just kicked goes to sleep next; the first
/// results are quick enough to keep it awake, and waking it costs more than many requests.
const FIRST_BATCH: u16 = 4;

/// What a queue has left of its share of a turn.
struct Share {
    segments: usize,
    bytes: usize,
}

impl Share {
    fn new() -> Share {
        Share { segments: SEGMENTS, bytes: turn_share::BYTES as usize }
    }

    #[inline]
    fn is_left(&self) -> bool {
        self.segments > 0 && self.bytes > 0
    }

    #[inline]
    fn spend(&mut self, chain: &Chain) {
        self.segments = self.segments.saturating_sub(chain.segments);
        self.bytes = self.bytes.saturating_sub(chain.bytes);
    }
}

/// A chain that has been taken.
pub(super) struct Chain {
    /// How many of its segments the device reads; the others it writes.
    pub(super) readable: u32,
    segments: usize,
    /// Of all segments, without the status.
    bytes: usize,
}

impl<R: Ring> Queue<R> {
    /// Takes and starts up to `count` chains, as many as its share of the turn allows.
    ///
    /// In two steps, a batch at a time: the guest has just written the headers on another processor, and the second
    /// step finds them in flight instead of waiting for each.
    pub(super) fn take(&mut self, io: &Rc<Io>, me: SourceId, mut count: u16) -> Result<(), Broken> {
        // One announcement covers the batch. The record is counted apart from self, so that the
        // requests may change self meanwhile.
        let announcer = self.announcer.clone();
        let guard = announcer.enter();
        let mut batch = FIRST_BATCH;
        let mut share = Share::new();
        self.calls.taken(count as u32, thread_cpu_ns);
        self.watch.begin(io);
        if let Some(recorder) = &mut self.recorder {
            recorder.begin(io);
        }
        // Heads, and how many segments of each chain the device reads. Words of one size are cleared at once.
        let mut chains = [(0u32, 0u32); BATCH as usize];
        loop {
            let (mut taken, mut broken) = (0, None);
            for chain in &mut chains[..batch.min(count) as usize] {
                if !self.has_room() || !share.is_left() {
                    break;
                }
                match self.gather() {
                    Ok((head, taken)) => {
                        share.spend(&taken);
                        *chain = (head.into(), taken.readable);
                    }
                    Err(why) => {
                        broken = Some(why);
                        break;
                    }
                }
                taken += 1;
            }
            for &(head, readable) in &chains[..taken as usize] {
                self.start(io, me, &guard, head as u16, readable as usize);
            }
            count -= taken;
            match broken {
                Some(why) => return Err(why),
                None if count == 0 || !self.has_room() || !share.is_left() => return Ok(()),
                None => {
                    self.show_used();
                    if self.calls.is_early() {
                        self.call();
                    }
                    io.submit();
                }
            }
            batch = BATCH;
        }
    }

    /// Takes the next chain, which is known by its head.
    #[inline]
    fn gather(&mut self) -> Result<(u16, Chain), Broken> {
        let again = self.inflight.as_mut().and_then(Tracking::replay);
        let again = again.or_else(|| self.next_held());
        let head = match again {
            Some(head) => head,
            None => self.ring.pop()?,
        };
        if again.is_none() && self.slots[head as usize].busy {
            return Err(Broken::Busy(head));
        }
        let chain = self.seize(head)?;
        if let Some(tracker) = &mut self.inflight
            && again.is_none()
        {
            tracker.mark(head);
        }
        self.counts.requests += u64::from(!self.slots[head as usize].again);
        Ok((head, chain))
    }

    /// Looks a chain's memory up. It is in flight from here on.
    pub(super) fn seize(&mut self, head: u16) -> Result<Chain, Broken> {
        let slot = &mut self.slots[head as usize];
        let room = slot.segments.capacity();
        let gathered = self.ring.gather(&self.memory, head, &mut slot.segments);
        // Room is only ever added here, and hardly ever.
        if slot.segments.capacity() > room {
            self.room += slot.segments.capacity() - room;
        }
        let readable = gathered?;
        let (out, into) = slot.segments.split_at_mut(readable);
        slot.readable = out.iter().map(|s| s.iov_len).sum();
        if slot.readable < HEADER_LEN {
            return Err(Broken::Layout { head });
        }
        // The status is the last byte that the device may write (section 5.2.6.2).
        let Some(last) = into.iter_mut().rev().find(|s| s.iov_len > 0) else {
            return Err(Broken::Layout { head });
        };
        last.iov_len -= 1;
        let status = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        slot.status = std::ptr::NonNull::new(status);
        slot.writable = into.iter().map(|s| s.iov_len).sum();
        prefetch(out[0].iov_base.cast());
        slot.busy = true;
        slot.age = 0;
        if let Some(recorder) = &self.recorder {
            slot.taken_at = recorder.taken_at(slot.again.then_some(slot.taken_at));
        }
        self.in_flight += 1;
        self.segments_in_flight += slot.segments.len();
        Ok(Chain {
            // At most 1024 descriptors, each in at most 509 regions.
            readable: readable as u32,
            segments: slot.segments.len(),
            bytes: slot.readable + slot.writable,
        })
    }

    /// Starts what the chain's header asks for.
    #[inline]
    fn start(&mut self, io: &Rc<Io>, me: SourceId, guard: &Guard<'_>, head: u16, readable: usize) {
        let slot = &mut self.slots[head as usize];
        let header = Header::parse(Header::read(&slot.segments[..readable]));
        slot.kind = header.kind();
        let Some(kind) = slot.kind else {
            return self.finish(head, Status::Unsupported, 0);
        };
        let access = match kind {
            Kind::In => Access::Read,
            Kind::Out if self.disk.write_through.load(Ordering::Relaxed) => Access::DurableWrite,
            Kind::Out => Access::Write,
            _ => {
                slot.data = (readable as u32, slot.segments.len() as u32);
                (slot.offset, slot.len) = (0, 0);
                return self.go_slow(io, me, head);
            }
        };
        self.transfer(io, me, guard, head, access, header.sector, readable);
    }

    /// A read or write: on the fast path if the graph allows it.
    #[expect(clippy::too_many_arguments, reason = "the parts of one request, at hand in registers")]
    #[inline]
    fn transfer(
        &mut self,
        io: &Rc<Io>,
        me: SourceId,
        guard: &Guard<'_>,
        head: u16,
        access: Access,
        sector: u64,
        readable: usize,
    ) {
        let slot = &mut self.slots[head as usize];
        let (from, segments) = match access {
            Access::Read => (readable, &mut slot.segments[readable..]),
            _ => (0, &mut slot.segments[..readable]),
        };
        let (skip, len) = match access {
            Access::Read => (0, slot.writable),
            _ => (HEADER_LEN, slot.readable - HEADER_LEN),
        };
        let range = trim(segments, skip, len);
        slot.data = ((from + range.start) as u32, (from + range.end) as u32);
        let allowed = access == Access::Read || self.disk.options.writable;
        let offset = match self.disk.transfer_range(sector, len as u64) {
            Some(offset) if allowed && len <= u32::MAX as usize => offset,
            _ => return self.finish(head, Status::IoError, 0),
        };
        slot.len = len as u32;
        slot.offset = offset;
        if len == 0 {
            return self.finish(head, Status::Ok, 0);
        }
        // Longer ones go in pieces, with turns of the others in between.
        if len as u64 > turn_share::BYTES {
            return self.go_slow(io, me, head);
        }
        let token = Token { source: me, tag: head as u32 };
        match start_fast(&self.disk, guard, io, slot, access, token) {
            Some(Started::Pending) => {
                slot.generation = Some(guard.begin());
            }
            Some(Started::Done(result)) => self.transferred(io, head, result),
            None => self.go_slow(io, me, head),
        }
    }
}

/// Starts a transfer where the graph says that its bytes live, if it can say so.
#[inline]
fn start_fast(
    disk: &Disk,
    guard: &Guard<'_>,
    io: &Io,
    slot: &Slot,
    access: Access,
    token: Token,
) -> Option<Started> {
    let node = disk.root.fast(guard.in_flight());
    let mapping = node.map(guard.in_flight(), slot.offset, slot.len as u64, access);
    if mapping.len < slot.len as u64 {
        return None;
    }
    let segments = &slot.segments[slot.data.0 as usize..slot.data.1 as usize];
    match mapping.target {
        Target::Data { leaf, offset } => {
            if !node.takes_memory(segments) {
                return None;
            }
            let op = access.op(offset, Segments::new(segments, slot.len.into()));
            // SAFETY: the slot and the guest's memory stay in place until the request is finished.
            Some(unsafe { leaf.start(io, op, token) })
        }
        Target::Zero if access == Access::Read => {
            // SAFETY: the guest's memory is mapped.
            unsafe { iovec::zero(segments) };
            Some(Started::Done(Ok(())))
        }
        _ => None,
    }
}

/// Asks the processor for a cache line that is soon to be read.
#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
