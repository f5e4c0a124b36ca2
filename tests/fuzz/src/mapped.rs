//! A file mapped into memory, for contents that another side may change at any time.
//!
//! A system call for each access would be most of a run.

use std::fs::File;
use std::os::fd::AsRawFd;

/// See the module's text.
pub struct Mapped {
    bytes: *mut u8,
    len: usize,
}

impl Mapped {
    /// The first `len` bytes of a file that cannot shrink.
    pub fn of(file: &File, len: usize) -> Mapped {
        let (prot, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: replaces nothing.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Mapped { bytes: at.cast(), len }
    }

    /// Writes what of `bytes` is in the file.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        for (at, &byte) in (at..self.len).zip(bytes) {
            // SAFETY: the byte is mapped.
            unsafe { self.bytes.add(at).write_volatile(byte) };
        }
    }

    /// Zeroes stand for what is beyond the file.
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut into = [0; N];
        for (at, byte) in (at..self.len).zip(&mut into) {
            // SAFETY: the byte is mapped.
            *byte = unsafe { self.bytes.add(at).read_volatile() };
        }
        into
    }

    /// The bytes, while nobody else uses the file.
    pub fn alone(&mut self) -> &mut [u8] {
        // SAFETY: they are mapped, and the caller knows of nobody else who writes to them.
        unsafe { std::slice::from_raw_parts_mut(self.bytes, self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, and lent to nobody.
        unsafe { libc::munmap(self.bytes.cast(), self.len) };
    }
}
