//! The front end's side of the dirty log of live migration.
//!
//! It is a sealed memfd with one bit for each page of 4 KiB of guest addresses.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Error, Result};
use crate::request::Segment;

/// Bytes of guest addresses that a bit stands for.
pub const PAGE: u64 = 4096;

/// The pages that hold any of `len` bytes from `addr` on.
pub fn pages(addr: u64, len: u64) -> impl Iterator<Item = u64> {
    let end = if len == 0 { addr / PAGE } else { (addr + len - 1) / PAGE + 1 };
    addr / PAGE..end
}

/// The pages that the device may write of a chain.
pub fn written(chain: &[Segment]) -> BTreeSet<u64> {
    let parts = chain.iter().filter(|segment| segment.device_writes);
    parts.flat_map(|segment| pages(segment.addr, u64::from(segment.len))).collect()
}

/// A log, mapped shared.
pub struct DirtyLog {
    file: File,
    bytes: usize,
    at: NonNull<u8>,
}

impl DirtyLog {
    /// A log of this many bytes, nothing marked, in a file that cannot be shrunk or grown.
    pub fn new(bytes: u64) -> Result<DirtyLog> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string; the call has no other precondition.
        let fd = unsafe { libc::memfd_create(c"vublk-testkit-log".as_ptr(), flags) };
        if fd < 0 {
            return Err(Error::last_os("memfd_create"));
        }
        // SAFETY: `fd` was just opened and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes).map_err(Error::io("size of the log"))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: an integer is all that the call takes.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(Error::last_os("F_ADD_SEALS"));
        }
        let (bytes, access) = (bytes as usize, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a fresh shared mapping at an address the kernel chooses replaces nothing.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(Error::last_os("mmap of the log"));
        }
        let at = NonNull::new(at.cast()).expect("the kernel maps nothing at 0");
        Ok(DirtyLog { file, bytes, at })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes as u64
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn byte(&self, index: usize) -> &AtomicU8 {
        assert!(index < self.bytes, "testkit: the log ends before page {}", index * 8);
        // SAFETY: inside the mapping, which lives as long as self; both sides treat it as atomic.
        unsafe { AtomicU8::from_ptr(self.at.as_ptr().add(index)) }
    }

    pub fn is_marked(&self, page: u64) -> bool {
        self.byte(page as usize / 8).load(Ordering::Acquire) >> (page % 8) & 1 == 1
    }

    /// The pages that are marked, which they are no more afterwards: a front end's look at the log.
    pub fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for index in 0..self.bytes {
            let bits = self.byte(index).swap(0, Ordering::AcqRel);
            let marked = (0..8).filter(|bit| bits >> bit & 1 == 1);
            pages.extend(marked.map(|bit| index as u64 * 8 + bit));
        }
        pages
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // SAFETY: maps exactly what `new` mapped.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

// SAFETY: the mapping belongs to the log for its whole life and is only reached through atomics.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}
