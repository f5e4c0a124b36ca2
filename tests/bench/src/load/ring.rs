//! A driver's ring for load, whose chains are laid out once.
//!
//! A request costs a sector number, an available entry and a share of one index update.
//!
//! Guards that the load is never what is measured: no allocation, no translation and no lock per
//! request. Slot `i` owns a header, a status byte, a data buffer and its descriptors for good.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use vublk_testkit::memory::Buffer;
use vublk_testkit::ring::{Desc, DriverRing};
use vublk_testkit::spec::{self, desc_flag, need_event, request_type};
use vublk_testkit::{Error, Result};

/// What the slots do.
#[derive(Debug, Clone, Copy)]
pub struct Chains {
    /// Requests in flight.
    pub depth: u16,
    /// Bytes of data per request.
    pub block: u32,
    pub write: bool,
    /// One descriptor that points to a table, or three in the ring.
    pub indirect: bool,
}

/// Bytes per slot for header (at 0) and status (at 32): a cache line, as Linux has them.
const META: u64 = 64;
/// Bytes per indirect table of three descriptors.
const TABLE: u64 = 64;
/// Descriptors of a request: header, data, status.
const LINKS: u16 = 3;

impl Chains {
    /// Ring entries needed: a power of two, and no less than a small guest has.
    pub fn ring_size(&self) -> u16 {
        let links = if self.indirect { 1 } else { LINKS };
        (self.depth * links).next_power_of_two().max(128)
    }

    /// Bytes of shared memory needed for one ring, generously.
    pub fn memory(&self) -> usize {
        let per_slot = self.block as usize + 4096 + (META + TABLE) as usize;
        (per_slot * usize::from(self.depth)).next_multiple_of(1 << 20) + (2 << 20)
    }
}

struct Slot {
    head: u16,
    sector: *mut u64,
    status: *const u8,
}

/// See the module. Not for two threads at once.
pub struct HotRing<'a> {
    ring: &'a DriverRing,
    event_idx: bool,
    mask: u16,
    avail_flags: &'a AtomicU16,
    avail_idx: &'a AtomicU16,
    avail_entries: *const AtomicU16,
    used_event: &'a AtomicU16,
    used_flags: &'a AtomicU16,
    used_idx: &'a AtomicU16,
    used_entries: *const u64,
    avail_event: &'a AtomicU16,
    slots: Vec<Slot>,
    slot_of_head: Vec<u16>,
    avail: u16,
    kicked: u16,
    used: u16,
    _meta: Buffer,
    _tables: Buffer,
    _data: Buffer,
}

// SAFETY: the pointers lead into shared memory that the ring keeps mapped, and one thread at a time
// has the ring.
unsafe impl Send for HotRing<'_> {}

impl<'a> HotRing<'a> {
    /// Takes over a ring that is fresh or has nothing in flight.
    pub fn new(ring: &'a DriverRing, chains: &Chains) -> Result<HotRing<'a>> {
        let memory = ring.memory();
        let layout = ring.layout();
        let depth = u64::from(chains.depth);
        let block = u64::from(chains.block).next_multiple_of(4096);
        let meta = memory.alloc(META * depth, 4096)?;
        let tables = memory.alloc(TABLE * depth, 4096)?;
        let data = memory.alloc(block * depth, 4096)?;
        // Faulted in now: the first touch of a page is not the server's work.
        data.write(&vec![0x5a; data.len() as usize]);
        let host = |addr, len| {
            memory
                .host_ptr(addr, len)
                .ok_or_else(|| Error::Peer(format!("{addr:#x} is in no region")))
        };
        let mut hot = HotRing {
            ring,
            event_idx: ring.event_idx(),
            mask: layout.size - 1,
            avail_flags: memory.atomic_u16(layout.avail),
            avail_idx: memory.atomic_u16(layout.avail + 2),
            avail_entries: host(layout.avail + 4, 2 * u64::from(layout.size))?.cast(),
            used_event: memory.atomic_u16(layout.avail + 4 + 2 * u64::from(layout.size)),
            used_flags: memory.atomic_u16(layout.used),
            used_idx: memory.atomic_u16(layout.used + 2),
            used_entries: host(layout.used + 4, 8 * u64::from(layout.size))?.cast(),
            avail_event: memory.atomic_u16(layout.used + 4 + 8 * u64::from(layout.size)),
            slots: Vec::new(),
            slot_of_head: vec![u16::MAX; usize::from(layout.size)],
            avail: layout.avail_idx(memory),
            kicked: layout.avail_idx(memory),
            used: layout.used_idx(memory),
            _meta: meta,
            _tables: tables,
            _data: data,
        };
        for i in 0..chains.depth {
            let meta = hot._meta.addr() + META * u64::from(i);
            let kind = if chains.write { request_type::OUT } else { request_type::IN };
            memory.write(meta, &kind.to_le_bytes());
            let at = hot._data.addr() + block * u64::from(i);
            let head = hot.lay_out(i, chains, meta, at);
            hot.slot_of_head[usize::from(head)] = i;
            hot.slots.push(Slot {
                head,
                sector: host(meta + 8, 8)?.cast(),
                status: host(meta + 32, 1)?,
            });
        }
        Ok(hot)
    }

    /// Writes the chain of slot `i`; returns its head.
    fn lay_out(&self, i: u16, chains: &Chains, meta: u64, data: u64) -> u16 {
        let (memory, layout) = (self.ring.memory(), self.ring.layout());
        let data_flag = if chains.write { 0 } else { desc_flag::WRITE };
        let parts = [
            (meta, spec::HEADER_SIZE as u32, desc_flag::NEXT),
            (data, chains.block, desc_flag::NEXT | data_flag),
            (meta + 32, 1, desc_flag::WRITE),
        ];
        let (table, first) = if chains.indirect {
            (self._tables.addr() + TABLE * u64::from(i), 0)
        } else {
            (layout.desc, LINKS * i)
        };
        for (link, (addr, len, flags)) in (first..).zip(parts) {
            let next = if flags & desc_flag::NEXT != 0 { link + 1 } else { 0 };
            let desc = Desc { addr, len, flags, next };
            layout.write_desc(memory, table, link, desc);
        }
        if !chains.indirect {
            return first;
        }
        let pointer = Desc {
            addr: table,
            len: (spec::DESC_SIZE * u64::from(LINKS)) as u32,
            flags: desc_flag::INDIRECT,
            next: 0,
        };
        layout.write_desc(memory, layout.desc, i, pointer);
        i
    }

    /// Enters slot `slot` for `sector`, unpublished. The slot must not be in flight.
    #[inline]
    pub fn post(&mut self, slot: u16, sector: u64) {
        let s = &self.slots[usize::from(slot)];
        // SAFETY: `sector` points to 8 aligned bytes of shared memory; the device reads them after
        // the index is published.
        unsafe { s.sector.write_volatile(sector.to_le()) };
        // SAFETY: masked, so inside the ring's entries.
        let entry = unsafe { &*self.avail_entries.add(usize::from(self.avail & self.mask)) };
        entry.store(s.head.to_le(), Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Publishes what was posted, and kicks if the device wants it.
    #[inline]
    pub fn publish(&mut self) -> Result<()> {
        self.avail_idx.store(self.avail.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        let due = if self.event_idx {
            let event = u16::from_le(self.avail_event.load(Ordering::Relaxed));
            need_event(event, self.avail, self.kicked)
        } else {
            u16::from_le(self.used_flags.load(Ordering::Relaxed)) & spec::USED_NO_NOTIFY == 0
        };
        self.kicked = self.avail;
        if due {
            self.ring.kick()?;
        }
        Ok(())
    }

    /// Calls `finished(self, slot)` for everything the device has finished; it may post again.
    /// Returns how many there were.
    #[inline]
    pub fn reap(&mut self, mut finished: impl FnMut(&mut Self, u16)) -> Result<u32> {
        let idx = u16::from_le(self.used_idx.load(Ordering::Acquire));
        let mut count = 0;
        while self.used != idx {
            let at = usize::from(self.used & self.mask);
            // SAFETY: masked, so inside the ring's entries; the index was acquired after them. The
            // entries start 4 bytes after a page, hence unaligned as 8-byte words.
            let entry = unsafe { self.used_entries.add(at).read_unaligned() };
            let id = u64::from_le(entry) as u32;
            let slot = self.slot_of_head.get(id as usize).copied();
            let Some((slot, s)) = slot.and_then(|i| Some((i, self.slots.get(usize::from(i))?)))
            else {
                return Err(Error::BadUsed(format!("id {id} is not a slot's")));
            };
            // SAFETY: points to the slot's status byte.
            let status = unsafe { s.status.read_volatile() };
            if status != 0 {
                return Err(Error::Status(status));
            }
            self.used = self.used.wrapping_add(1);
            finished(self, slot);
            count += 1;
        }
        Ok(count)
    }

    /// Tells the device not to call: the load looks for itself.
    #[inline]
    pub fn refuse_calls(&self) {
        if self.event_idx {
            // Half the range away: not reached before the next refusal.
            let far = self.used.wrapping_add(0x8000);
            self.used_event.store(far.to_le(), Ordering::Relaxed);
        } else if self.avail_flags.load(Ordering::Relaxed) == 0 {
            let flag = spec::AVAIL_NO_INTERRUPT;
            self.avail_flags.store(flag.to_le(), Ordering::Relaxed);
        }
    }

    /// Sleeps until the device calls, as a guest does. False when nothing came within `limit`.
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        if self.event_idx {
            self.used_event.store(self.used.to_le(), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        if u16::from_le(self.used_idx.load(Ordering::Acquire)) != self.used {
            return Ok(true);
        }
        debug_assert!(self.ring.call_fd().as_raw_fd() >= 0);
        self.ring.wait_call(limit)
    }

    pub fn in_flight(&self) -> u16 {
        self.avail.wrapping_sub(self.used)
    }
}

/// A device that finishes whatever was posted, newest first. `next` is its place in the ring,
/// `heads` a buffer of its own.
pub fn echo(ring: &DriverRing, next: &mut u16, heads: &mut Vec<u16>) {
    let (memory, layout) = (ring.memory(), ring.layout());
    let idx = layout.avail_idx(memory);
    let mut used = layout.used_idx(memory);
    while *next != idx {
        let at = layout.avail + 4 + 2 * u64::from(*next % layout.size);
        heads.push(memory.atomic_u16(at).load(Ordering::Relaxed));
        *next = next.wrapping_add(1);
    }
    while let Some(head) = heads.pop() {
        let at = layout.used + 4 + 8 * u64::from(used % layout.size);
        memory.write(at, &u64::from(head).to_le_bytes());
        used = used.wrapping_add(1);
    }
    memory.atomic_u16(layout.used + 2).store(used, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vublk_testkit::{Memory, MemoryLayout};

    #[test]
    fn every_slot_comes_back_once_per_round_over_many_turns_of_the_ring() {
        for indirect in [false, true] {
            let chains = Chains { depth: 40, block: 4096, write: false, indirect };
            let memory = Memory::new(&MemoryLayout::single(chains.memory())).unwrap();
            let ring = DriverRing::new(&memory, chains.ring_size(), true).unwrap();
            let mut hot = HotRing::new(&ring, &chains).unwrap();
            let (mut next, mut heads) = (0, Vec::new());
            (0..40).for_each(|slot| hot.post(slot, 0));
            for round in 1..3000u64 {
                hot.publish().unwrap();
                echo(&ring, &mut next, &mut heads);
                let mut seen = [0; 40];
                let done = hot.reap(|hot, slot| {
                    seen[usize::from(slot)] += 1;
                    hot.post(slot, round);
                });
                assert_eq!(done.unwrap(), 40);
                assert!(seen.iter().all(|&n| n == 1));
            }
            assert_eq!(hot.in_flight(), 40);
        }
    }
}
