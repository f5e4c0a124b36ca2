//! A guest's memory with guard bytes and guard pages around it.
//!
//! The end of each region's last page holds bytes that nobody may change, and pages that nobody may touch are next to
//! the mappings where there is room.

use std::cell::RefCell;
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::rc::Rc;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vublk::export::vhost_user_blk::memory::{Memory, Region};

const PAGE: u64 = 4096;
const CANARY: u8 = 0xc5;
const CANARIES: [u8; PAGE as usize] = [CANARY; PAGE as usize];

/// A file in memory of this many bytes, which may be sealed.
pub fn memory_file(len: u64) -> File {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string with its end; the result is checked.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).expect("room in memory");
    file
}

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub guest: u64,
    /// In the front end's addresses.
    pub user: u64,
    /// Bytes; the rest of the last page is the canary's.
    pub len: u64,
}

/// See the module's text.
pub struct GuestMemory {
    pub memory: Arc<Memory>,
    pub places: Vec<Place>,
    guards: Vec<*mut c_void>,
}

thread_local! {
    /// Memories that earlier runs of this thread have mapped, the newest last.
    static MAPPED: RefCell<Vec<Rc<GuestMemory>>> = const { RefCell::new(Vec::new()) };
}

/// Memories that a thread keeps mapped for later runs: about as many as there are ways to lay them out.
const KEPT: usize = 256;

impl GuestMemory {
    /// Memory of zeroes at these places. Mapping it is most of a short run's time, so that memory
    /// which an earlier run has returned is used again.
    pub fn at(places: Vec<Place>) -> Rc<GuestMemory> {
        MAPPED.with_borrow_mut(|mapped| {
            let is_free = |kept: &Rc<GuestMemory>| Rc::strong_count(kept) == 1;
            let found = mapped.iter().position(|kept| is_free(kept) && kept.places == places);
            let memory = match found {
                Some(n) => {
                    let memory = mapped.remove(n);
                    memory.clear();
                    memory
                }
                None => Rc::new(GuestMemory::new(places)),
            };
            if mapped.len() == KEPT {
                mapped.remove(0);
            }
            mapped.push(memory.clone());
            memory
        })
    }

    fn clear(&self) {
        for place in &self.places {
            let host = self.memory.host(place.guest, place.len).expect("it is mapped");
            // SAFETY: this many bytes are mapped there, and nobody else uses them.
            unsafe { host.write_bytes(0, place.len as usize) };
        }
    }

    fn new(places: Vec<Place>) -> GuestMemory {
        let mut guards = Vec::new();
        let mut regions = Vec::new();
        for place in &places {
            let file = memory_file(place.len.next_multiple_of(PAGE));
            let described = VhostUserMemoryRegion::new(place.guest, place.len, place.user, 0);
            let region = Region::map(&described, file).expect("a region that can be mapped");
            let region = Arc::new(region);
            let alone = Memory::new(vec![region.clone()]).expect("one region");
            let host = alone.host(place.guest, place.len).expect("it is mapped");
            let end = host.wrapping_add(place.len.next_multiple_of(PAGE) as usize);
            guards.extend([host.wrapping_sub(PAGE as usize), end].into_iter().filter_map(guard));
            let slack = slack(place);
            // SAFETY: the rest of the last page is mapped with it, and the file is as long.
            unsafe { host.add(slack.start).write_bytes(CANARY, slack.len()) };
            regions.push(region);
        }
        let memory = Arc::new(Memory::new(regions).expect("regions that do not overlap"));
        GuestMemory { memory, places, guards }
    }

    /// Writes what of `bytes` fits; nothing where no memory is.
    pub fn put(&self, addr: u64, bytes: &[u8]) {
        if let Some(host) = self.memory.host(addr, bytes.len() as u64) {
            // SAFETY: this many bytes are mapped there; the device only reads them meanwhile as memory that may
            // change.
            unsafe { host.copy_from(bytes.as_ptr(), bytes.len()) };
        }
    }

    pub fn get<const N: usize>(&self, addr: u64) -> [u8; N] {
        let host = self.memory.host(addr, N as u64).expect("an address that was checked");
        // SAFETY: this many bytes are mapped there.
        unsafe { host.cast::<[u8; N]>().read_unaligned() }
    }

    /// Panics if a byte beside the guest's memory has changed.
    pub fn check(&self) {
        for place in &self.places {
            let host = self.memory.host(place.guest, place.len).expect("it is mapped");
            let slack = slack(place);
            // SAFETY: as in `new`; the queue has ended, so that nobody writes there now.
            let found = unsafe { std::slice::from_raw_parts(host.add(slack.start), slack.len()) };
            assert!(*found == CANARIES[..found.len()], "a byte behind {place:x?} was written");
        }
    }
}

fn slack(place: &Place) -> std::ops::Range<usize> {
    place.len as usize..place.len.next_multiple_of(PAGE) as usize
}

/// A page that must not be touched, unless something is there already.
fn guard(at: *mut u8) -> Option<*mut c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: replaces nothing.
    let page = unsafe { libc::mmap(at.cast(), PAGE as usize, libc::PROT_NONE, flags, -1, 0) };
    (page != libc::MAP_FAILED).then_some(page)
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        for &page in &self.guards {
            // SAFETY: mapped by `guard`, and used by nobody.
            unsafe { libc::munmap(page, PAGE as usize) };
        }
    }
}
