//! Memory that a device reads and writes: our own, and other people's.
//!
//! The device changes it whenever it likes, so no Rust reference to it is ever made: words are read and
//! written one at a time, and bytes move by raw copies.

use crate::Error;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Memory of this process that a device may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; the memory is only reached by raw copies.
unsafe impl Send for HostRange {}
// SAFETY: as above.
unsafe impl Sync for HostRange {}

impl HostRange {
    /// Memory of `len` bytes at `base`; `None` if that is the null address.
    ///
    /// # Safety
    /// It stays mapped, readable and writable, while any function has it mapped or a copy of the range is in use.
    /// Nobody holds Rust references to it meanwhile.
    pub unsafe fn new(base: *mut u8, len: usize) -> Option<HostRange> {
        Some(HostRange { base: NonNull::new(base)?, len })
    }

    pub fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes from `from` on, if it is inside.
    pub fn part(&self, from: usize, len: usize) -> Option<HostRange> {
        let inside = from.checked_add(len).is_some_and(|end| end <= self.len);
        let base = NonNull::new(self.base.as_ptr().wrapping_add(from))?;
        inside.then_some(HostRange { base, len })
    }

    /// Copies from `at` on to `into`. False, and nothing, where that is not inside.
    pub fn read(&self, at: usize, into: &mut [u8]) -> bool {
        let Some(part) = self.part(at, into.len()) else { return false };
        // SAFETY: the range is mapped, as `new` was promised, and the part is inside.
        unsafe { std::ptr::copy(part.base.as_ptr(), into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies `from` to `at`. False, and nothing, where that is not inside.
    pub fn write(&self, at: usize, from: &[u8]) -> bool {
        let Some(part) = self.part(at, from.len()) else { return false };
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy(from.as_ptr(), part.base.as_ptr(), from.len()) };
        true
    }

    /// Copies all of it to `at` of `to`. False, and nothing, where it does not fit.
    pub fn copy_to(&self, to: &HostRange, at: usize) -> bool {
        let Some(part) = to.part(at, self.len) else { return false };
        // SAFETY: both are mapped, as `new` was promised, and of this length.
        unsafe { std::ptr::copy(self.base.as_ptr(), part.base.as_ptr(), self.len) };
        true
    }

    fn word(&self, at: usize) -> Option<&AtomicU32> {
        let part = self.part(at, 4)?;
        let word = part.base.as_ptr().cast::<u32>();
        // SAFETY: mapped and aligned; the device and others reach it as plain memory, which is what
        // an atomic is for.
        word.is_aligned().then(|| unsafe { AtomicU32::from_ptr(word) })
    }

    /// The little-endian word at `at`, a multiple of four. What the device wrote before it is seen by
    /// later reads. Zero outside.
    #[inline]
    pub fn load(&self, at: usize) -> u32 {
        self.word(at).map_or(0, |word| u32::from_le(word.load(Ordering::Acquire)))
    }

    /// Writes a word; nothing happens outside. What was written before is seen first.
    #[inline]
    pub fn store(&self, at: usize, value: u32) {
        if let Some(word) = self.word(at) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Writes little-endian double words from `at` on, a multiple of eight; nothing happens if they do
    /// not fit. When others see them is for a later [`HostRange::store`] or register to say.
    #[inline]
    pub fn put(&self, at: usize, words: &[u64]) {
        let Some(part) = self.part(at, words.len() * 8) else { return };
        let base = part.base.as_ptr().cast::<u64>();
        if !base.is_aligned() {
            return;
        }
        for (n, word) in words.iter().enumerate() {
            // SAFETY: inside the part and aligned.
            unsafe { base.add(n).write_volatile(word.to_le()) };
        }
    }

    pub fn zero(&self) {
        // SAFETY: mapped, as `new` was promised.
        unsafe { std::ptr::write_bytes(self.base.as_ptr(), 0, self.len) };
    }
}

/// The memory of one request: a list of segments that others keep in place.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    base: *const libc::iovec,
    count: usize,
}

// SAFETY: an address and a count; its creator keeps the memory in place.
unsafe impl Send for Segments {}

impl Segments {
    /// No memory.
    pub const NONE: Segments = Segments { base: NonNull::dangling().as_ptr(), count: 0 };

    /// # Safety
    /// The list stays in place, and what it names mapped as [`HostRange::new`] asks, until the request
    /// that it is given to has been told to be done.
    pub unsafe fn new(list: &[libc::iovec]) -> Segments {
        Segments { base: list.as_ptr(), count: list.len() }
    }

    /// The segments that are not empty, in order.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = HostRange> + '_ {
        // SAFETY: the list is in place, as `new` was promised.
        let list = unsafe { std::slice::from_raw_parts(self.base, self.count) };
        list.iter().filter(|segment| segment.iov_len > 0).filter_map(|segment| {
            // SAFETY: mapped, as `new` was promised.
            unsafe { HostRange::new(segment.iov_base.cast(), segment.iov_len) }
        })
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.iter().map(|segment| segment.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Pages of our own: anonymous memory, zeroed, at a multiple of the page size. Given back when dropped, so its owner
/// takes it from the device first.
pub struct Pages(HostRange);

impl Pages {
    /// `len` bytes, rounded up to whole pages of `align` bytes (a power of two).
    pub fn new(len: usize, align: usize) -> Result<Pages, Error> {
        let failed = |errno| {
            let error = std::io::Error::from_raw_os_error(errno);
            Error::os(format_args!("{len} bytes of memory for the device"), &error)
        };
        let len = len.max(1).checked_next_multiple_of(align).ok_or_else(|| failed(libc::ENOMEM))?;
        let all = len.checked_add(align).ok_or_else(|| failed(libc::ENOMEM))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choosing touches no memory of ours. What is before and
        // behind the aligned part is given back.
        let base = unsafe {
            let base = libc::mmap(std::ptr::null_mut(), all, protection, flags, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(failed(libc::ENOMEM));
            }
            let base = base.cast::<u8>();
            let skip = base.align_offset(align);
            if skip > 0 {
                libc::munmap(base.cast(), skip);
            }
            let aligned = base.wrapping_add(skip);
            if all - skip > len {
                libc::munmap(aligned.wrapping_add(len).cast(), all - skip - len);
            }
            // Not copied to a child: the device would continue with one of the two only.
            libc::madvise(aligned.cast(), len, libc::MADV_DONTFORK);
            aligned
        };
        // SAFETY: mapped until `drop`; its owner hands out copies under that condition.
        let range = unsafe { HostRange::new(base, len) };
        range.map(Pages).ok_or_else(|| failed(libc::ENOMEM))
    }

    pub fn range(&self) -> HostRange {
        self.0
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { libc::munmap(self.0.base.as_ptr().cast(), self.0.len) };
    }
}
