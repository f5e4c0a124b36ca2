//! A large array of words whose memory is allocated on use and can be freed in parts beside readers.

use super::errno::Errno;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::AtomicU64;

/// Bytes that are given back at least.
pub const PAGE: usize = 4096;

/// Words that begin as zeroes. Unmapped when dropped.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<AtomicU64>,
    /// Words.
    len: usize,
}

// SAFETY: all access is to atomics, in a mapping that lives as long as this.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Room for `len` words.
    ///
    /// # Errors
    /// The kernel's, ENOMEM most likely.
    pub fn new(len: usize) -> Result<Pages, Errno> {
        let bytes = len.max(1).checked_mul(8).ok_or(Errno::ENOMEM)?;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let start = unsafe {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
            libc::mmap(null_mut(), bytes, prot, flags | libc::MAP_ANONYMOUS, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(Errno(
                std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM),
            ));
        }
        // SAFETY: the mapping made above. Huge pages would take room for what is not used; that they
        // are not to be had does no harm.
        unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        let start = NonNull::new(start.cast()).ok_or(Errno::ENOMEM)?;
        Ok(Pages { start, len })
    }

    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has that many words, which are zeroes or were stored, and lives as long
        // as this; atomics may be changed by anybody.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// Gives back the pages that lie wholly in a range of words, which are zeroes then. Whoever reads
    /// them meanwhile finds what was there or zeroes.
    pub fn give_back(&self, words: Range<usize>) {
        let (first, end) = ((words.start * 8).next_multiple_of(PAGE), words.end.min(self.len) * 8);
        let end =
            if words.end >= self.len { end.next_multiple_of(PAGE) } else { end / PAGE * PAGE };
        if first < end {
            // SAFETY: whole pages of the mapping, which stays; their words become zeroes, as if stored.
            unsafe {
                let at = self.start.as_ptr().cast::<u8>().add(first);
                libc::madvise(at.cast(), end - first, libc::MADV_DONTNEED);
            }
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, which nobody borrows any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len.max(1) * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_are_zeroes_until_stored_and_when_given_back() {
        let pages = Pages::new(3 * PAGE / 8 + 5).unwrap();
        let all = pages.words();
        assert!(all.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        all.iter().for_each(|word| word.store(7, Ordering::Relaxed));
        // One whole page is in it.
        pages.give_back(1..2 * PAGE / 8 + 1);
        let zeroes = all.iter().position(|word| word.load(Ordering::Relaxed) == 0);
        assert_eq!(zeroes, Some(PAGE / 8));
        assert_eq!(all.iter().filter(|word| word.load(Ordering::Relaxed) == 0).count(), PAGE / 8);
        pages.give_back(0..all.len());
        assert!(all.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }
}
