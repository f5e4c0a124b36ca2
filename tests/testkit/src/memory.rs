//! "Guest" memory: memfd regions that both sides map, and an allocator inside them.
//!
//! Guards that no access leaves a region: every pointer handed out was translated here. The server
//! reads and writes the same bytes at the same time; what orders the two sides is the ring's business.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Where the regions are: guest-physical start and size in bytes of each, in ascending order.
#[derive(Debug, Clone)]
pub struct MemoryLayout(pub Vec<(u64, usize)>);

impl MemoryLayout {
    /// One region at guest address 0.
    pub fn single(size: usize) -> Self {
        MemoryLayout(vec![(0, size)])
    }

    /// `count` regions whose guest addresses touch while their host addresses do not: a buffer may be across a
    /// border.
    pub fn adjacent(count: usize, size: usize) -> Self {
        MemoryLayout((0..count).map(|i| ((i * size) as u64, size)).collect())
    }

    /// `count` regions with holes as large as themselves between them.
    pub fn gapped(count: usize, size: usize) -> Self {
        MemoryLayout((0..count).map(|i| ((2 * i * size) as u64, size)).collect())
    }
}

/// One memfd, mapped shared.
pub struct Region {
    guest_addr: u64,
    size: usize,
    host: NonNull<u8>,
    file: File,
}

impl Region {
    fn new(guest_addr: u64, size: usize) -> Result<Region> {
        // SAFETY: the name is a C string; the call has no other precondition.
        let fd = unsafe { libc::memfd_create(c"vublk-testkit".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os("memfd_create"));
        }
        // SAFETY: `fd` was just opened and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size as u64).map_err(Error::io("memfd size"))?;
        // SAFETY: a fresh shared mapping at an address the kernel chooses replaces nothing.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(Error::last_os("mmap of a memory region"));
        }
        let host = NonNull::new(host.cast()).expect("the kernel maps nothing at 0");
        Ok(Region { guest_addr, size, host, file })
    }

    /// Guest-physical address of the first byte.
    pub fn guest_addr(&self) -> u64 {
        self.guest_addr
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Address of the first byte in this process: the "user address" of the vhost-user messages.
    pub fn host_addr(&self) -> u64 {
        self.host.as_ptr() as u64
    }

    /// The memfd.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn contains(&self, addr: u64) -> bool {
        addr >= self.guest_addr && addr - self.guest_addr < self.size as u64
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: maps exactly what `new` mapped; handles to it hold the `Memory` alive.
        unsafe { libc::munmap(self.host.as_ptr().cast(), self.size) };
    }
}

// SAFETY: the mapping belongs to the region for its whole life and is only reached through raw
// copies and atomics.
unsafe impl Send for Region {}
// SAFETY: as above; concurrent access is what shared memory is for.
unsafe impl Sync for Region {}

/// All regions, and which bytes of them are in use.
pub struct Memory {
    regions: Vec<Region>,
    /// Free ranges, by guest address; a range never crosses a region's border.
    free: Mutex<BTreeMap<u64, u64>>,
    /// Allocations come from the first this many regions, unless a region is named.
    usable: AtomicUsize,
}

impl Memory {
    /// Makes the regions of `layout`, all zero and not yet populated.
    pub fn new(layout: &MemoryLayout) -> Result<Arc<Memory>> {
        let mut regions = Vec::new();
        for &(guest_addr, size) in &layout.0 {
            regions.push(Region::new(guest_addr, size)?);
        }
        let free = regions.iter().map(|r| (r.guest_addr, r.size())).collect();
        Ok(Arc::new(Memory {
            usable: AtomicUsize::new(regions.len()),
            regions,
            free: Mutex::new(free),
        }))
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Lets allocations come from the first `count` regions only: the rest are not announced yet.
    pub fn set_usable_regions(&self, count: usize) {
        self.usable.store(count, Ordering::Relaxed);
    }

    /// Index of the region that holds `addr`.
    pub fn region_of(&self, addr: u64) -> Option<usize> {
        self.regions.iter().position(|r| r.contains(addr))
    }

    /// Pointer to `len` bytes at guest address `addr`, if one region holds them all.
    pub fn host_ptr(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let region = &self.regions[self.region_of(addr)?];
        let offset = addr - region.guest_addr;
        (len <= region.size() - offset)
            // SAFETY: `offset` is inside the region's mapping.
            .then(|| unsafe { region.host.as_ptr().add(offset as usize) })
    }

    /// Address of `addr` in this process, as SET_VRING_ADDR wants it.
    pub fn user_addr(&self, addr: u64) -> Option<u64> {
        self.host_ptr(addr, 1).map(|p| p as u64)
    }

    /// Calls `copy` for each piece of the range that is in one region: pointer, offset in the range, bytes.
    fn pieces(&self, addr: u64, len: usize, mut copy: impl FnMut(*mut u8, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = addr + done as u64;
            let region = self
                .region_of(at)
                .unwrap_or_else(|| panic!("testkit: {at:#x} is in no memory region"));
            let region = &self.regions[region];
            let room = (region.guest_addr + region.size() - at) as usize;
            let step = room.min(len - done);
            let host = self.host_ptr(at, step as u64).expect("inside the region");
            copy(host, done, step);
            done += step;
        }
    }

    /// Copies bytes out of shared memory. Panics where no region is: the test is wrong.
    pub fn read(&self, addr: u64, out: &mut [u8]) {
        let len = out.len();
        // SAFETY: `pieces` yields ranges inside a mapping, and inside `out`.
        self.pieces(addr, len, |host, at, n| unsafe {
            std::ptr::copy_nonoverlapping(host, out[at..].as_mut_ptr(), n)
        });
    }

    /// Copies bytes into shared memory. Panics where no region is: the test is wrong.
    pub fn write(&self, addr: u64, data: &[u8]) {
        // SAFETY: `pieces` yields ranges inside a mapping, and inside `data`.
        self.pieces(addr, data.len(), |host, at, n| unsafe {
            std::ptr::copy_nonoverlapping(data[at..].as_ptr(), host, n)
        });
    }

    /// The two bytes at `addr`, which must be even, as an atomic: ring indices are read and written so.
    pub fn atomic_u16(&self, addr: u64) -> &AtomicU16 {
        assert_eq!(addr % 2, 0, "testkit: ring index at an odd address");
        let host = self
            .host_ptr(addr, 2)
            .unwrap_or_else(|| panic!("testkit: {addr:#x} is in no memory region"));
        // SAFETY: aligned (regions are page-aligned), mapped as long as `self`, and every other
        // user of these bytes treats them as atomic, too.
        unsafe { AtomicU16::from_ptr(host.cast()) }
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `len` bytes aligned to `align` (a power of two) from the first usable region with room.
    pub fn alloc(self: &Arc<Self>, len: u64, align: u64) -> Result<Buffer> {
        (0..self.usable.load(Ordering::Relaxed))
            .find_map(|r| self.alloc_in(r, len, align).ok())
            .ok_or(Error::NoMemory(len))
    }

    /// The same, from region number `region`.
    pub fn alloc_in(self: &Arc<Self>, region: usize, len: u64, align: u64) -> Result<Buffer> {
        let want = len.max(1);
        let r = &self.regions[region];
        let mut free = self.free();
        let found = free
            .range(r.guest_addr..r.guest_addr + r.size())
            .map(|(&start, &size)| (start, size, start.next_multiple_of(align)))
            .find(|&(start, size, at)| at - start + want <= size);
        let Some((start, size, at)) = found else {
            return Err(Error::NoMemory(len));
        };
        take(&mut free, start, size, at, want);
        Ok(self.buffer(at, len))
    }

    /// Takes `len` bytes across the border between two regions that touch, half on each side.
    pub fn alloc_straddling(self: &Arc<Self>, len: u64) -> Result<Buffer> {
        let usable = &self.regions[..self.usable.load(Ordering::Relaxed)];
        let half = len / 2;
        for pair in usable.windows(2) {
            let border = pair[1].guest_addr;
            if len < 2 || pair[0].guest_addr + pair[0].size() != border {
                continue;
            }
            let mut free = self.free();
            let holds = |at: u64, n: u64| {
                let (&start, &size) = free.range(..=at).next_back()?;
                (start + size >= at + n).then_some((start, size))
            };
            let low = holds(border - half, half);
            let high = holds(border, len - half);
            if let (Some((low, low_size)), Some((high, high_size))) = (low, high) {
                take(&mut free, low, low_size, border - half, half);
                take(&mut free, high, high_size, border, len - half);
                drop(free);
                return Ok(self.buffer(border - half, len));
            }
        }
        Err(Error::NoMemory(len))
    }

    fn buffer(self: &Arc<Self>, addr: u64, len: u64) -> Buffer {
        Buffer { memory: self.clone(), addr, len }
    }

    fn release(&self, addr: u64, len: u64) {
        let mut free = self.free();
        let mut at = addr;
        let end = addr + len.max(1);
        while at < end {
            let region = &self.regions[self.region_of(at).expect("was allocated in a region")];
            let stop = end.min(region.guest_addr + region.size());
            give_back(&mut free, region, at, stop - at);
            at = stop;
        }
    }
}

/// Cuts `[at, at + len)` out of the free range `[start, start + size)`.
fn take(free: &mut BTreeMap<u64, u64>, start: u64, size: u64, at: u64, len: u64) {
    free.remove(&start);
    if at > start {
        free.insert(start, at - start);
    }
    if at + len < start + size {
        free.insert(at + len, start + size - at - len);
    }
}

/// Returns a range of `region`, merged with its free neighbours in that region.
fn give_back(free: &mut BTreeMap<u64, u64>, region: &Region, mut at: u64, mut len: u64) {
    if let Some((&start, &size)) = free.range(region.guest_addr..at).next_back()
        && start + size == at
    {
        free.remove(&start);
        at = start;
        len += size;
    }
    if at + len < region.guest_addr + region.size()
        && let Some(size) = free.remove(&(at + len))
    {
        len += size;
    }
    free.insert(at, len);
}

/// A piece of shared memory, free again when dropped.
pub struct Buffer {
    memory: Arc<Memory>,
    addr: u64,
    len: u64,
}

impl Buffer {
    /// Guest-physical address.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Bytes asked for.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pointer to the first byte; the buffer must be in one region.
    pub fn host_ptr(&self) -> Option<*mut u8> {
        self.memory.host_ptr(self.addr, self.len)
    }

    /// Writes `data` to the start of the buffer.
    pub fn write(&self, data: &[u8]) {
        assert!(data.len() as u64 <= self.len, "testkit: buffer overrun");
        self.memory.write(self.addr, data);
    }

    /// The whole buffer's bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len as usize];
        self.memory.read(self.addr, &mut out);
        out
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.release(self.addr, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_buffers_merge_so_that_the_whole_region_can_be_had_again() {
        let memory = Memory::new(&MemoryLayout::single(1 << 16)).unwrap();
        let buffers: Vec<_> = (0..16).map(|_| memory.alloc(4096, 4096).unwrap()).collect();
        assert!(memory.alloc(1, 1).is_err(), "all is taken");
        let (even, odd): (Vec<_>, Vec<_>) =
            buffers.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
        drop(even);
        drop(odd);
        memory.alloc(1 << 16, 4096).unwrap();
    }

    #[test]
    fn a_straddling_buffer_lies_in_two_regions_and_reads_back() {
        let memory = Memory::new(&MemoryLayout::adjacent(2, 1 << 16)).unwrap();
        let buffer = memory.alloc_straddling(1000).unwrap();
        assert_eq!(memory.region_of(buffer.addr()), Some(0));
        assert_eq!(memory.region_of(buffer.addr() + 999), Some(1));
        assert!(buffer.host_ptr().is_none());
        let data: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        buffer.write(&data);
        assert_eq!(buffer.to_vec(), data);
        assert!(memory.alloc_straddling(2).is_err(), "the border is taken");
        drop(buffer);
        memory.alloc_in(0, 1 << 16, 1).unwrap();
        memory.alloc_in(1, 1 << 16, 1).unwrap();
    }

    #[test]
    fn regions_that_do_not_touch_have_no_straddling_buffer() {
        let memory = Memory::new(&MemoryLayout::gapped(2, 1 << 16)).unwrap();
        assert!(memory.alloc_straddling(64).is_err());
    }
}
