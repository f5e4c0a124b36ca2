//! Guest memory: the regions that the front end shares, and the translation of its addresses.
//!
//! A region is mapped when it comes and unmapped when the last user of the table that holds it has gone, so a table
//! must be kept as long as I/O into it is in flight. Devices that reach it themselves release it before that.

use crate::block::{Admission, GuestRegion, Node};
use crate::io::SharedMapping;
use crate::io::iovec::iovec;
use std::fs::File;
use std::sync::{Arc, OnceLock};
use vhost::vhost_user::message::VhostUserMemoryRegion;

/// Regions at most; what QEMU's back ends take too.
pub const MAX_REGIONS: usize = 509;

/// One mapped region.
pub struct Region {
    /// First guest physical address.
    guest: u64,
    /// First address in the front end's own address space, in which ring addresses are given.
    user: u64,
    /// Bytes.
    len: u64,
    /// Its mappings for devices, which are removed before it is unmapped.
    admissions: OnceLock<Vec<Admission>>,
    mapping: SharedMapping,
}

impl Region {
    /// Maps a region of the front end's. Refuses what overflows, and what the file does not hold.
    pub fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Region, String> {
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } =
            *region;
        let describe =
            || format!("memory region of {memory_size:#x} bytes at {guest_phys_addr:#x}");
        if memory_size == 0
            || guest_phys_addr.checked_add(memory_size).is_none()
            || user_addr.checked_add(memory_size).is_none()
        {
            return Err(format!("{}: empty, or ends beyond the address space", describe()));
        }
        let len = usize::try_from(memory_size).map_err(|e| format!("{}: {e}", describe()))?;
        // What is no regular file, such as a device of persistent memory, has no length to be held
        // against.
        let found = file.metadata().map_err(|e| format!("{}: {e}", describe()))?;
        let end = mmap_offset.checked_add(memory_size);
        if found.is_file() && end.is_none_or(|end| end > found.len()) {
            let holds = found.len();
            return Err(format!("{}: its file ends at {holds:#x} bytes", describe()));
        }
        let mapping = SharedMapping::map(&file, mmap_offset, len)
            .map_err(|e| format!("{}: {e}", describe()))?;
        let admissions = OnceLock::new();
        Ok(Region {
            guest: guest_phys_addr,
            user: user_addr,
            len: memory_size,
            admissions,
            mapping,
        })
    }

    /// Lets the devices below a disk reach the memory, while it is mapped. Once.
    pub fn admit(&self, node: &Node) {
        self.admissions.get_or_init(|| {
            // SAFETY: mapped until `self` is dropped, and the admissions are dropped first.
            let region = unsafe { GuestRegion::new(self.mapping.as_ptr(), self.len as usize) };
            region.map(|region| node.admit(region)).unwrap_or_default()
        });
    }

    pub fn is(&self, region: &VhostUserMemoryRegion) -> bool {
        // Packed fields are copied out before they are compared.
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, .. } = *region;
        self.guest == guest_phys_addr && self.user == user_addr && self.len == memory_size
    }
}

/// All regions of a guest at one time, ordered by guest address.
#[derive(Clone, Default)]
pub struct Memory {
    spans: Vec<Span>,
    /// The same by host address.
    by_host: Vec<Span>,
    regions: Vec<Arc<Region>>,
}

/// What a look-up needs of a region.
#[derive(Clone, Copy)]
struct Span {
    guest: u64,
    end: u64,
    host: *mut u8,
}

// SAFETY: the pointers lead to shared mappings that `regions` keeps alive; they are only used for
// raw copies and system calls.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// A table with these regions. Refuses regions that overlap: an address would be ambiguous.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Memory, String> {
        if regions.len() > MAX_REGIONS {
            return Err(format!("{} memory regions, more than {MAX_REGIONS}", regions.len()));
        }
        regions.sort_by_key(|r| r.guest);
        for pair in regions.windows(2) {
            if pair[0].guest + pair[0].len > pair[1].guest {
                return Err(format!("memory regions overlap at {:#x}", pair[1].guest));
            }
        }
        let spans: Vec<Span> = regions
            .iter()
            .map(|r| Span { guest: r.guest, end: r.guest + r.len, host: r.mapping.as_ptr() })
            .collect();
        let mut by_host = spans.clone();
        by_host.sort_by_key(|s| s.host);
        Ok(Memory { spans, by_host, regions })
    }

    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether the front end has taken some of it away.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Where `len` bytes at a guest address are mapped, if they are in one region.
    pub fn host(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let span = self.span(guest)?;
        let inside = guest - span.guest;
        (len <= span.end - guest).then(|| span.host.wrapping_add(inside as usize))
    }

    /// The guest address of a byte that is mapped at a host address: the way back of [`Memory::host`]
    /// and [`Memory::append`].
    pub fn guest(&self, host: *const u8) -> Option<u64> {
        let host = host as u64;
        let after = self.by_host.partition_point(|s| s.host as u64 <= host);
        let span = self.by_host[..after].last()?;
        let inside = host - span.host as u64;
        (inside < span.end - span.guest).then(|| span.guest + inside)
    }

    /// Where `len` bytes at an address of the front end's are mapped, if they are in one region.
    pub fn host_of_user(&self, user: u64, len: u64) -> Option<*mut u8> {
        let region = self.regions.iter().find(|r| user >= r.user && user - r.user < r.len)?;
        let inside = user - region.user;
        (len <= region.len - inside).then(|| region.mapping.as_ptr().wrapping_add(inside as usize))
    }

    /// Appends the segments that `len` bytes at a guest address are mapped at: one, or several where the bytes
    /// continue from one region to the next. None of it if any byte is not mapped.
    pub fn append(&self, mut guest: u64, len: u32, list: &mut Vec<libc::iovec>) -> Option<()> {
        let mut left = len as u64;
        let before = list.len();
        while left > 0 {
            let Some(span) = self.span(guest) else {
                list.truncate(before);
                return None;
            };
            let n = left.min(span.end - guest);
            let host = span.host.wrapping_add((guest - span.guest) as usize);
            list.push(iovec(host, n as usize));
            guest += n;
            left -= n;
        }
        Some(())
    }

    #[inline]
    fn span(&self, guest: u64) -> Option<&Span> {
        // Few regions, and nearly all of the memory in the first or second.
        if self.spans.len() <= 8 {
            return self.spans.iter().find(|s| guest >= s.guest && guest < s.end);
        }
        let after = self.spans.partition_point(|s| s.guest <= guest);
        self.spans[..after].last().filter(|s| guest < s.end)
    }
}
