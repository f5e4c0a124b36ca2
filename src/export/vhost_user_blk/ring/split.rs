//! The device's side of a split virtqueue (virtio 1.2, section 2.7), over cached host pointers.
//!
//! Everything in the ring is the guest's to write at any time. Each field is read once, checked, and only the copy is
//! used; an index that cannot be right stops the queue. Used elements are written as they come, but the used index
//! moves, and the guest is notified, once per batch.

use super::super::dirty_log::{DirtyLog, UsedLog};
use super::super::inflight::Tracker;
use super::super::memory::Memory;
use super::{Addresses, Broken, MAX_SIZE, Ring};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Half a descriptor, as it is in the guest's memory: at any address.
#[repr(C, packed)]
struct Word(u64);

/// A descriptor in the guest's memory (section 2.7.5): its address, then length, flags and next.
type InMemory = [Word; 2];

/// A copy of one.
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Copies a descriptor out of the guest's memory. Each field is loaded once: the guest may be writing
    /// to it.
    ///
    /// # Safety
    /// All of it is mapped.
    #[inline]
    unsafe fn read(at: *const InMemory) -> Descriptor {
        let words = at.cast::<Word>();
        // SAFETY: the caller's promise; a word may be at any address.
        let (addr, rest) = unsafe { (words.read_volatile().0, words.add(1).read_volatile().0) };
        Descriptor { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// A split ring in use.
pub struct SplitRing {
    size: u16,
    event_index: bool,
    descriptors: *const InMemory,
    available: *mut u16,
    used: *mut u16,
    /// The next entry of the available ring to take.
    next_available: u16,
    /// The next entry of the used ring to fill; the guest sees `published`.
    next_used: u16,
    published: u16,
    /// Up to here the guest was notified, or asked whether it wants to be.
    called: u16,
    /// While a migration wants to know of our stores.
    log: Option<UsedLog>,
    /// Keeps the mappings alive that the pointers lead to.
    _memory: Arc<Memory>,
}

// SAFETY: the pointers lead into mappings that any thread may use and that `_memory` keeps.
unsafe impl Send for SplitRing {}

impl SplitRing {
    fn atomic(&self, base: *mut u16, index: usize) -> &AtomicU16 {
        // SAFETY: `new` checked that both rings are in mapped memory at even host addresses, `index` is inside the
        // ring at every call, and the mapping lives as long as self.
        unsafe { AtomicU16::from_ptr(base.add(index)) }
    }

    fn available_index(&self) -> &AtomicU16 {
        self.atomic(self.available, 1)
    }

    fn used_index(&self) -> &AtomicU16 {
        self.atomic(self.used, 1)
    }
}

impl Ring for SplitRing {
    type Index = u16;
    type Tracker = Tracker;

    fn new(
        memory: &Arc<Memory>,
        size: u16,
        at: Addresses,
        base: u16,
        event_index: bool,
    ) -> Result<SplitRing, String> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(format!("a ring of {size} entries (a power of two up to 1024 is wanted)"));
        }
        let part = |what: &str, user: u64, len: u64, align: u64| {
            let host = memory.host_of_user(user, len).ok_or_else(|| match memory.regions() {
                [] => "the guest's memory is not shared: it needs share=on (Cloud Hypervisor: shared=on)".into(),
                _ => format!("{what} ring at {user:#x} is not in the guest's memory"),
            })?;
            // Where a region begins in the front end's space is its own affair, so that ours may be
            // misaligned although its is not. Both must be right.
            if (user | host as u64) & (align - 1) != 0 {
                return Err(format!("{what} ring at {user:#x} is not aligned to {align}"));
            }
            Ok(host)
        };
        let entries = size as u64;
        let descriptors = part("descriptor", at.descriptors, entries * 16, 16)?;
        let available = part("available", at.available, 4 + entries * 2 + 2, 2)?;
        let used = part("used", at.used, 4 + entries * 8 + 2, 4)?;
        let mut ring = SplitRing {
            size,
            event_index,
            descriptors: descriptors.cast_const().cast(),
            available: available.cast(),
            used: used.cast(),
            next_available: base,
            next_used: 0,
            published: 0,
            called: 0,
            log: None,
            _memory: memory.clone(),
        };
        ring.next_used = ring.used_index().load(Ordering::Acquire);
        ring.published = ring.next_used;
        ring.called = ring.next_used;
        Ok(ring)
    }

    fn next_available(&self) -> u16 {
        self.next_available
    }

    fn published(&self) -> u16 {
        self.published
    }

    fn set_log(&mut self, log: Option<(Arc<DirtyLog>, u64)>) {
        self.log = log.map(|(log, at)| UsedLog::new(log, at, self.size));
        if let Some(log) = &self.log {
            log.all();
        }
    }

    fn go_on_behind(&mut self, in_flight: u16) {
        self.next_available = self.published.wrapping_add(in_flight);
    }

    fn has_work(&self) -> bool {
        self.available_index().load(Ordering::Relaxed) != self.next_available
    }

    fn available(&self) -> Result<u16, Broken> {
        let index = self.available_index().load(Ordering::Acquire);
        let count = index.wrapping_sub(self.next_available);
        if count > self.size {
            return Err(Broken::AvailableIndex { next: self.next_available, index });
        }
        Ok(count)
    }

    fn pop(&mut self) -> Result<u16, Broken> {
        let entry = 2 + (self.next_available & (self.size - 1)) as usize;
        let head = self.atomic(self.available, entry).load(Ordering::Relaxed);
        if head >= self.size {
            return Err(Broken::Head(head));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    fn gather(
        &self,
        memory: &Memory,
        head: u16,
        list: &mut Vec<libc::iovec>,
    ) -> Result<usize, Broken> {
        list.clear();
        // SAFETY: `new` checked the table's place; head was checked against its length.
        let first = unsafe { Descriptor::read(self.descriptors.add(head as usize)) };
        let (table, count, mut entry) = if first.flags & DESC_INDIRECT != 0 {
            let broken = Broken::Indirect { head, addr: first.addr, len: first.len };
            let count = first.len / 16;
            if first.flags & DESC_NEXT != 0
                || !first.len.is_multiple_of(16)
                || count == 0
                || count > MAX_SIZE as u32
            {
                return Err(broken);
            }
            let table = memory.host(first.addr, first.len as u64).ok_or(broken)?;
            // SAFETY: the whole table is mapped; the guest may have put it at any address.
            let entry = unsafe { Descriptor::read(table.cast_const().cast()) };
            (table.cast_const().cast::<InMemory>(), count as u16, entry)
        } else {
            (self.descriptors, self.size, first)
        };
        let mut readable = 0;
        let mut left = count;
        let mut writing = false;
        loop {
            if left == 0 {
                return Err(Broken::TooLong { head });
            }
            left -= 1;
            let Descriptor { addr, len, flags, next } = entry;
            if flags & DESC_INDIRECT != 0 {
                // A table inside a table, or after direct descriptors.
                return Err(Broken::Indirect { head, addr, len });
            }
            let writes = flags & DESC_WRITE != 0;
            if writing && !writes {
                return Err(Broken::Order { head });
            }
            writing = writes;
            memory.append(addr, len, list).ok_or(Broken::Address { head, addr, len })?;
            if !writes {
                readable = list.len();
            }
            if flags & DESC_NEXT == 0 {
                return Ok(readable);
            }
            if next >= count {
                return Err(Broken::Next { head, next });
            }
            // SAFETY: next is inside the table, which is mapped.
            entry = unsafe { Descriptor::read(table.add(next as usize)) };
        }
    }

    fn push(&mut self, head: u16, written: u32) {
        let entry = (self.next_used & (self.size - 1)) as usize;
        // SAFETY: `new` checked the used ring's place; an element is 8 bytes, after 4 of header,
        // and the address is a multiple of 4.
        unsafe {
            let element = self.used.add(2).cast::<u32>().add(entry * 2);
            element.write_volatile(head as u32);
            element.add(1).write_volatile(written);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    fn publish(&mut self) {
        if self.published != self.next_used {
            self.used_index().store(self.next_used, Ordering::Release);
            if let Some(log) = &self.log {
                log.published(self.published, self.next_used);
            }
            self.published = self.next_used;
        }
    }

    fn must_call(&mut self) -> bool {
        let (old, new) = (self.called, self.published);
        if old == new {
            return false;
        }
        self.called = new;
        // The index must be visible before we look whether the guest wants to know (section
        // 2.7.7.2): it looks in the other order.
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.atomic(self.available, 2 + self.size as usize).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.atomic(self.available, 0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    fn want_kick(&mut self) -> bool {
        // Section 2.7.10.
        if self.event_index {
            // After the used elements of 8 bytes, which follow 4 bytes of header.
            self.atomic(self.used, 2 + 4 * self.size as usize)
                .store(self.next_available, Ordering::Relaxed);
        } else {
            self.atomic(self.used, 0).store(0, Ordering::Relaxed);
        }
        if let Some(log) = &self.log {
            if self.event_index { log.event() } else { log.flags() }
        }
        fence(Ordering::SeqCst);
        !self.has_work()
    }

    fn no_kick(&mut self) {
        // With the event index the old event, left behind, says it.
        if !self.event_index {
            self.atomic(self.used, 0).store(USED_NO_NOTIFY, Ordering::Relaxed);
            if let Some(log) = &self.log {
                log.flags();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::memory::Region;
    use super::*;
    use std::os::fd::{FromRawFd, OwnedFd};
    use vhost::vhost_user::message::VhostUserMemoryRegion;

    const LEN: u64 = 1 << 20;

    /// Memory of one region, which the front end says it has mapped at `user`.
    fn memory(user: u64) -> Arc<Memory> {
        // SAFETY: the name is a C string, and the descriptor is nobody else's.
        let file = unsafe {
            let fd = libc::memfd_create(c"ring".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            std::fs::File::from(OwnedFd::from_raw_fd(fd))
        };
        file.set_len(LEN).unwrap();
        let region = VhostUserMemoryRegion {
            guest_phys_addr: 0,
            memory_size: LEN,
            user_addr: user,
            mmap_offset: 0,
        };
        Arc::new(Memory::new(vec![Arc::new(Region::map(&region, file).unwrap())]).unwrap())
    }

    #[test]
    fn a_ring_that_is_aligned_for_the_front_end_only_is_refused() {
        let at = |base: u64| Addresses {
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
        };
        let even = SplitRing::new(&memory(0x10000), 128, at(0x11000), 0, true);
        assert!(even.is_ok());
        // The front end's addresses are aligned, but where its region begins is not.
        for odd in [1, 2, 4, 8] {
            let ring = SplitRing::new(&memory(0x10000 + odd), 128, at(0x11000), 0, true);
            assert!(ring.err().unwrap().contains("not aligned"), "{odd}");
        }
    }
}
