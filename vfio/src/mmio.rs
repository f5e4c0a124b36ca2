//! A device's registers, mapped into this process.

use crate::Error;
use crate::function::Registers;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

/// A mapping of registers. Unmapped when dropped.
pub struct Mmio {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: registers are accessed by volatile loads and stores alone, from any thread.
unsafe impl Send for Mmio {}
// SAFETY: as above.
unsafe impl Sync for Mmio {}

impl Mmio {
    /// Maps `len` bytes of registers at `offset` of a device's descriptor.
    pub fn map(device: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Mmio, Error> {
        let failed = |error: &std::io::Error| Error::os("mapping its registers", error);
        let at = libc::off64_t::try_from(offset)
            .map_err(|_| failed(&std::io::Error::from_raw_os_error(libc::EOVERFLOW)))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choosing touches no memory of ours.
        let base = unsafe {
            let fd = device.as_raw_fd();
            libc::mmap64(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, at)
        };
        if base == libc::MAP_FAILED {
            return Err(failed(&std::io::Error::last_os_error()));
        }
        let base = NonNull::new(base.cast::<u8>());
        base.map(|base| Mmio { base, len })
            .ok_or_else(|| Error::new("mapping its registers: at address zero"))
    }

    fn at(&self, offset: usize) -> Option<*mut u32> {
        let fits = offset.is_multiple_of(4) && offset.checked_add(4)? <= self.len;
        fits.then(|| self.base.as_ptr().wrapping_add(offset).cast())
    }
}

impl Registers for Mmio {
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn read(&self, offset: usize) -> u32 {
        let Some(at) = self.at(offset) else { return u32::MAX };
        // SAFETY: inside the mapping and aligned. A device that is gone reads as all ones.
        let value = unsafe { at.read_volatile() };
        fence(Ordering::Acquire);
        u32::from_le(value)
    }

    #[inline]
    fn write(&self, offset: usize, value: u32) {
        let Some(at) = self.at(offset) else { return };
        // Memory is written before the device is notified. On x86 that costs nothing.
        fence(Ordering::Release);
        // SAFETY: inside the mapping and aligned.
        unsafe { at.write_volatile(value.to_le()) };
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and nothing else knows the address.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
