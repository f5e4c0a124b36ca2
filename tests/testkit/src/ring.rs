//! The driver side of a split virtqueue (virtio 2.7) in shared memory.
//!
//! [`DriverRing`] keeps a free list and lays chains out, direct or indirect; [`RingLayout`] gives raw
//! access to every field for tests that write what no driver would. Guards the order of the two
//! sides: entries before the index, the index before the look at the event field.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory};
use crate::request::Segment;
use crate::spec::{self, desc_flag, need_event};

/// A descriptor as it is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    /// The descriptor's 16 bytes.
    pub fn bytes(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[0..8].copy_from_slice(&self.addr.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..16].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

/// Where the three parts of a ring are, and raw access to them. Addresses are guest-physical.
#[derive(Debug, Clone, Copy)]
pub struct RingLayout {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

impl RingLayout {
    /// Bytes of a descriptor table, an available ring and a used ring of `size` entries.
    pub fn sizes(size: u16) -> [u64; 3] {
        let n = u64::from(size);
        [16 * n, 6 + 2 * n, 6 + 8 * n]
    }

    fn avail_entry(&self, index: u16) -> u64 {
        self.avail + 4 + 2 * u64::from(index % self.size)
    }

    fn used_event(&self) -> u64 {
        self.avail + 4 + 2 * u64::from(self.size)
    }

    fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }

    /// Writes descriptor `index` of the table at `table` (the ring's own or an indirect one).
    pub fn write_desc(&self, memory: &Memory, table: u64, index: u16, desc: Desc) {
        memory.write(table + spec::DESC_SIZE * u64::from(index), &desc.bytes());
    }

    /// Writes the available entry that index `index` falls on (modulo the size).
    pub fn set_avail_entry(&self, memory: &Memory, index: u16, head: u16) {
        memory.atomic_u16(self.avail_entry(index)).store(head.to_le(), Ordering::Relaxed);
    }

    /// Publishes the available index.
    pub fn set_avail_idx(&self, memory: &Memory, index: u16) {
        memory.atomic_u16(self.avail + 2).store(index.to_le(), Ordering::Release);
    }

    pub fn avail_idx(&self, memory: &Memory) -> u16 {
        u16::from_le(memory.atomic_u16(self.avail + 2).load(Ordering::Relaxed))
    }

    /// Writes the available ring's flags ([`spec::AVAIL_NO_INTERRUPT`]).
    pub fn set_avail_flags(&self, memory: &Memory, flags: u16) {
        memory.atomic_u16(self.avail).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Writes `used_event`: the device calls when it passes this used index.
    pub fn set_used_event(&self, memory: &Memory, index: u16) {
        memory.atomic_u16(self.used_event()).store(index.to_le(), Ordering::Relaxed);
    }

    /// Reads `avail_event`: the device wants a kick when the driver passes this available index.
    pub fn avail_event_value(&self, memory: &Memory) -> u16 {
        u16::from_le(memory.atomic_u16(self.avail_event()).load(Ordering::Relaxed))
    }

    pub fn used_flags(&self, memory: &Memory) -> u16 {
        u16::from_le(memory.atomic_u16(self.used).load(Ordering::Relaxed))
    }

    pub fn used_idx(&self, memory: &Memory) -> u16 {
        u16::from_le(memory.atomic_u16(self.used + 2).load(Ordering::Acquire))
    }

    /// The used entry that index `index` falls on: id and bytes written.
    pub fn used_entry(&self, memory: &Memory, index: u16) -> (u32, u32) {
        let mut raw = [0u8; 8];
        memory.read(self.used + 4 + 8 * u64::from(index % self.size), &mut raw);
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| raw[4 * i + b]));
        (word(0), word(1))
    }
}

/// What the driver remembers of a chain until it comes back.
struct Chain {
    descriptors: Vec<u16>,
    /// Freed with the chain.
    _indirect: Option<Buffer>,
}

/// A chain that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A ring, its eventfds, and the driver's private state.
pub struct DriverRing {
    memory: Arc<Memory>,
    layout: RingLayout,
    _tables: [Buffer; 3],
    event_idx: bool,
    kick: EventFd,
    call: EventFd,
    free: Vec<u16>,
    chains: Vec<Option<Chain>>,
    avail: u16,
    /// Available index at the last decision whether to kick.
    kicked: u16,
    used: u16,
}

impl DriverRing {
    /// Allocates a zeroed ring of `size` entries (a power of two) in `memory`.
    pub fn new(memory: &Arc<Memory>, size: u16, event_idx: bool) -> Result<DriverRing> {
        let [desc, avail, used] = RingLayout::sizes(size);
        let tables =
            [memory.alloc(desc, 4096)?, memory.alloc(avail, 4096)?, memory.alloc(used, 4096)?];
        for table in &tables {
            table.write(&vec![0; table.len() as usize]);
        }
        let eventfd =
            || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd for a queue"));
        Ok(DriverRing {
            memory: memory.clone(),
            layout: RingLayout {
                size,
                desc: tables[0].addr(),
                avail: tables[1].addr(),
                used: tables[2].addr(),
            },
            _tables: tables,
            event_idx,
            kick: eventfd()?,
            call: eventfd()?,
            free: (0..size).rev().collect(),
            chains: (0..size).map(|_| None).collect(),
            avail: 0,
            kicked: 0,
            used: 0,
        })
    }

    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub fn event_idx(&self) -> bool {
        self.event_idx
    }

    /// The eventfd that wakes the device.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd by which the device wakes the driver.
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// Free descriptors in the ring's own table.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Available index of the next chain to be added.
    pub fn next_avail(&self) -> u16 {
        self.avail
    }

    /// Used index up to which chains were taken back.
    pub fn next_used(&self) -> u16 {
        self.used
    }

    /// Chains that were added and have not come back.
    pub fn in_flight(&self) -> usize {
        self.chains.iter().flatten().count()
    }

    /// Lays out one chain and enters it into the available ring, unpublished. Returns its head.
    pub fn add(&mut self, segments: &[Segment], indirect: bool) -> Result<u16> {
        let want = if indirect { 1 } else { segments.len() };
        if want > self.free.len() || segments.is_empty() {
            return Err(Error::RingFull(want, self.free.len()));
        }
        let descriptors = self.free.split_off(self.free.len() - want);
        let head = descriptors[0];
        let table = if indirect {
            let numbers: Vec<u16> = (0..segments.len() as u16).collect();
            let table = match self.memory.alloc(spec::DESC_SIZE * segments.len() as u64, 16) {
                Ok(table) => table,
                Err(e) => {
                    self.free.extend(descriptors);
                    return Err(e);
                }
            };
            self.write_chain(table.addr(), &numbers, segments);
            let pointer = Desc {
                addr: table.addr(),
                len: table.len() as u32,
                flags: desc_flag::INDIRECT,
                next: 0,
            };
            self.layout.write_desc(&self.memory, self.layout.desc, head, pointer);
            Some(table)
        } else {
            self.write_chain(self.layout.desc, &descriptors, segments);
            None
        };
        self.chains[usize::from(head)] = Some(Chain { descriptors, _indirect: table });
        self.add_head(head);
        Ok(head)
    }

    /// Enters `head` into the available ring, unpublished, whatever it points to.
    pub fn add_head(&mut self, head: u16) {
        self.layout.set_avail_entry(&self.memory, self.avail, head);
        self.avail = self.avail.wrapping_add(1);
    }

    fn write_chain(&self, table: u64, numbers: &[u16], segments: &[Segment]) {
        for (i, segment) in segments.iter().enumerate() {
            let next = numbers.get(i + 1).copied();
            let mut flags = if next.is_some() { desc_flag::NEXT } else { 0 };
            if segment.device_writes {
                flags |= desc_flag::WRITE;
            }
            let desc =
                Desc { addr: segment.addr, len: segment.len, flags, next: next.unwrap_or(0) };
            self.layout.write_desc(&self.memory, table, numbers[i], desc);
        }
    }

    /// Publishes what was added, and kicks if the device asked for it. True if it was kicked.
    pub fn publish(&mut self) -> Result<bool> {
        self.publish_quietly();
        fence(Ordering::SeqCst);
        let due = if self.event_idx {
            let event = self.layout.avail_event_value(&self.memory);
            need_event(event, self.avail, self.kicked)
        } else {
            self.avail != self.kicked
                && self.layout.used_flags(&self.memory) & spec::USED_NO_NOTIFY == 0
        };
        self.kicked = self.avail;
        if due {
            self.kick()?;
        }
        Ok(due)
    }

    /// Publishes what was added without a kick.
    pub fn publish_quietly(&mut self) {
        self.layout.set_avail_idx(&self.memory, self.avail);
    }

    /// Kicks, asked or not.
    pub fn kick(&self) -> Result<()> {
        self.kick.write(1).map_err(Error::io("kick"))
    }

    /// Takes the next finished chain back, if there is one.
    pub fn pop(&mut self) -> Result<Option<Used>> {
        let idx = self.layout.used_idx(&self.memory);
        if idx == self.used {
            return Ok(None);
        }
        let ahead = idx.wrapping_sub(self.used);
        if ahead > self.layout.size {
            return Err(Error::BadUsed(format!("index {idx} is {ahead} ahead of {}", self.used)));
        }
        let (id, len) = self.layout.used_entry(&self.memory, self.used);
        let chain = u16::try_from(id)
            .ok()
            .and_then(|id| self.chains.get_mut(usize::from(id))?.take())
            .ok_or_else(|| Error::BadUsed(format!("id {id} is not in flight")))?;
        self.free.extend(chain.descriptors.iter().rev());
        self.used = self.used.wrapping_add(1);
        Ok(Some(Used { head: id as u16, len }))
    }

    /// Waits until the device has finished something, by call (not by looking again and again).
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            if self.event_idx {
                self.layout.set_used_event(&self.memory, self.used);
            }
            // The device must see the wish before we look at the index for the last time.
            fence(Ordering::SeqCst);
            if self.layout.used_idx(&self.memory) != self.used {
                return Ok(());
            }
            if !self.wait_call(end.saturating_duration_since(Instant::now()))? {
                return Err(Error::Timeout("completion by call".into(), limit));
            }
        }
    }

    /// Waits for a call and consumes it. False when none came in time.
    pub fn wait_call(&self, limit: Duration) -> Result<bool> {
        let mut poll = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = limit.as_millis().clamp(0, 3_600_000) as i32;
        // SAFETY: one valid pollfd, for the duration of the call.
        let n = unsafe { libc::poll(&mut poll, 1, millis) };
        if n > 0 {
            // Another reader of the shared eventfd cannot exist; an empty read is only a late wake.
            let _ = self.call.read();
        }
        Ok(n > 0)
    }

    /// Where a device takes this ring up again after its connection was lost: at the used index,
    /// as QEMU restores it.
    pub fn resume_base(&self) -> u16 {
        self.layout.used_idx(&self.memory)
    }
}
