//! The dirty log of live migration: the pages of guest memory that we have written to.
//!
//! The front end sends these pages once more (vhost-user text, "Migration").
//!
//! The front end shares a bitmap: bit `n % 8` of byte `n / 8` stands for the page of guest addresses
//! from `n * 4096` on. It clears what it has read at any time, so bits are set by atomic or. The
//! rules held here and by the callers:
//!
//! * A page is marked after the bytes have landed in it: marked before, it could be read, cleared and
//!   sent without them.
//! * What a request wrote is marked before the used index moves past it; the used ring itself after
//!   each of its stores, and in whole when its logging begins.
//! * A read that has failed may have landed in part, and is marked like one that has not.
//! * Requests that are in flight when logging begins are marked when they end.
//! * Switching is acknowledged once every queue has passed it, and the end of a queue is reported after its last
//!   mark.
//!
//! Nothing outside the bitmap is ever written. Pages for which it has no bit cost one line of log.

use super::memory::Memory;
use crate::io::SharedMapping;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use vhost::vhost_user::message::VhostUserLog;

/// Bytes of a page of the log, whatever the guest's or the host's pages are.
pub const PAGE: u64 = 4096;

/// Bytes of the used ring before its entries: flags and index.
const USED_HEADER: u64 = 4;
/// Bytes of an entry of the used ring.
const USED_ENTRY: u64 = 8;

/// The bitmap, mapped.
pub struct DirtyLog {
    /// For the log of our own.
    name: String,
    mapping: SharedMapping,
    /// Bits that it has.
    pages: u64,
    /// It was too small for something.
    exceeded: AtomicBool,
}

impl DirtyLog {
    /// Maps the bitmap that the front end shares. Refuses what its file does not hold, and a file
    /// that could be shrunk: touching what is no longer there would end the process (SIGBUS).
    pub fn map(name: &str, announced: &VhostUserLog, file: File) -> Result<DirtyLog, String> {
        let VhostUserLog { mmap_size, mmap_offset } = *announced;
        let describe = || format!("dirty log of {mmap_size} bytes at {mmap_offset}");
        // SAFETY: the call takes nothing.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(format!("{}: its file is not sealed against shrinking", describe()));
        }
        let holds = file.metadata().map_err(|e| format!("{}: {e}", describe()))?.len();
        if mmap_size == 0 || mmap_offset.checked_add(mmap_size).is_none_or(|end| end > holds) {
            return Err(format!("{}: its file ends at {holds}", describe()));
        }
        let len = usize::try_from(mmap_size).map_err(|e| format!("{}: {e}", describe()))?;
        let mapping = SharedMapping::map(&file, mmap_offset, len)
            .map_err(|e| format!("{}: {e}", describe()))?;
        let pages = mmap_size.saturating_mul(8);
        Ok(DirtyLog { name: name.to_owned(), mapping, pages, exceeded: AtomicBool::new(false) })
    }

    /// Marks the pages that hold `len` bytes from a guest address on.
    pub fn mark(&self, guest: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = guest.saturating_add(len - 1) / PAGE;
        if last >= self.pages {
            self.exceed(guest, len);
        }
        let end = (last + 1).min(self.pages);
        let mut page = guest / PAGE;
        while page < end {
            let bit = page % 8;
            let count = (8 - bit).min(end - page);
            let bits = ((1u16 << count) - 1) as u8;
            // After the bytes that are marked; the used index comes after it by its own order.
            self.byte(page / 8).fetch_or(bits << bit, Ordering::Release);
            page += count;
        }
    }

    /// Marks the pages of up to `len` bytes in segments that were looked up in `memory`.
    pub fn mark_segments(&self, memory: &Memory, segments: &[libc::iovec], len: u64) {
        let mut left = len;
        for segment in segments {
            let n = left.min(segment.iov_len as u64);
            if n > 0
                && let Some(guest) = memory.guest(segment.iov_base.cast())
            {
                self.mark(guest, n);
            }
            left -= n;
        }
    }

    /// `index` is below the size.
    fn byte(&self, index: u64) -> &AtomicU8 {
        // SAFETY: the byte is in the mapping, which cannot lose pages and lives as long as self.
        unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(index as usize)) }
    }

    #[cold]
    fn exceed(&self, guest: u64, len: u64) {
        if !self.exceeded.swap(true, Ordering::Relaxed) {
            let holds = self.pages / 8;
            log::error!(
                export = &*self.name;
                "the dirty log's {holds} bytes end before {len} bytes at {guest:#x}, which \
                 were written: a guest that is migrated now is not the same"
            );
        }
    }
}

/// The log of one ring's used part.
pub struct UsedLog {
    log: Arc<DirtyLog>,
    /// The guest address that the used ring is logged at. The front end's word: it need not be in
    /// the guest's memory.
    at: u64,
    /// Entries.
    size: u16,
}

impl UsedLog {
    pub fn new(log: Arc<DirtyLog>, at: u64, size: u16) -> UsedLog {
        UsedLog { log, at, size }
    }

    fn mark(&self, offset: u64, len: u64) {
        self.log.mark(self.at.saturating_add(offset), len);
    }

    /// All of it was or may have been written.
    pub fn all(&self) {
        self.mark(0, USED_HEADER + self.size as u64 * USED_ENTRY + 2);
    }

    /// The entries from one index up to another were written, and the index.
    pub fn published(&self, from: u16, to: u16) {
        let size = self.size as u64;
        let first = from as u64 % size;
        let count = (to.wrapping_sub(from) as u64).min(size);
        let straight = count.min(size - first);
        self.mark(USED_HEADER + first * USED_ENTRY, straight * USED_ENTRY);
        self.mark(USED_HEADER, (count - straight) * USED_ENTRY);
        self.flags();
    }

    /// The flags or the index were written.
    pub fn flags(&self) {
        self.mark(0, USED_HEADER);
    }

    /// The event index behind the entries was written.
    pub fn event(&self) {
        self.mark(USED_HEADER + self.size as u64 * USED_ENTRY, 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;

    /// A sealed file of `holds` bytes, and a log in it.
    fn log(holds: u64, size: u64, offset: u64) -> (File, Result<DirtyLog, String>) {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string, and the descriptor is nobody else's.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"log".as_ptr(), flags)) };
        file.set_len(holds).unwrap();
        // SAFETY: an integer is all that the call takes.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        let log =
            DirtyLog::map("test", &VhostUserLog::new(size, offset), file.try_clone().unwrap());
        (file, log)
    }

    fn marked(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let is_set = |page: &u64| bytes[*page as usize / 8] >> (page % 8) & 1 == 1;
        (0..bytes.len() as u64 * 8).filter(is_set).collect()
    }

    #[test]
    fn exactly_the_pages_that_were_touched_are_marked() {
        for (guest, len, pages) in [
            (0, 1, 0..1),
            (4095, 1, 0..1),
            (4095, 2, 0..2),
            (4096, 4096, 1..2),
            (7 * 4096, 8192, 7..9),
            (3 * 4096 + 5, 20 * 4096, 3..24),
            (9 * 4096, 0, 0..0),
        ] {
            let (file, log) = log(4096, 4096, 0);
            log.unwrap().mark(guest, len);
            assert_eq!(marked(&file), pages.collect::<Vec<_>>(), "{len} bytes at {guest}");
        }
    }

    #[test]
    fn what_is_marked_stays_marked() {
        let (file, log) = log(4096, 4096, 0);
        let log = log.unwrap();
        for page in [5, 3, 5, 4, 60, 61] {
            log.mark(page * PAGE, 1);
        }
        assert_eq!(marked(&file), [3, 4, 5, 60, 61]);
    }

    #[test]
    fn nothing_is_written_outside_a_log_that_is_too_small() {
        // Two bytes of log, at an offset.
        let (file, log) = log(8192, 2, 4096);
        let log = log.unwrap();
        log.mark(14 * PAGE, 10 * PAGE);
        log.mark(16 * PAGE, 1);
        log.mark(u64::MAX - 1, 2);
        log.mark(u64::MAX, u64::MAX);
        let at = 4096 * 8;
        assert_eq!(marked(&file), [at + 14, at + 15]);
        assert!(log.exceeded.load(Ordering::Relaxed));
    }

    #[test]
    fn a_log_that_its_file_does_not_hold_is_refused() {
        for (holds, size, offset) in
            [(4096, 4097, 0), (4096, 1, 4096), (8192, 8192, 1), (4096, u64::MAX, 1), (4096, 0, 0)]
        {
            let error = log(holds, size, offset).1.err().unwrap();
            assert!(error.contains("its file ends at"), "{error}");
        }
    }

    #[test]
    fn a_log_that_could_be_shrunk_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let error = DirtyLog::map("test", &VhostUserLog::new(4096, 0), file).err().unwrap();
        assert!(error.contains("not sealed against shrinking"), "{error}");
    }

    #[test]
    fn a_batch_that_goes_round_the_end_of_the_used_ring_marks_both_ends() {
        // 1024 entries: three pages, the first beginning at page 8.
        let pages_of = |from: u16, to: u16| {
            let (file, log) = log(4096, 4096, 0);
            UsedLog::new(Arc::new(log.unwrap()), 8 * PAGE, 1024).published(from, to);
            marked(&file)
        };
        assert_eq!(pages_of(0, 1), [8]);
        assert_eq!(pages_of(600, 601), [8, 9]);
        // Entry 511 crosses the border between the pages, because of the header.
        assert_eq!(pages_of(511, 512), [8, 9]);
        assert_eq!(pages_of(1023, 1024), [8, 9, 10]);
        assert_eq!(pages_of(1020, 1030), [8, 9, 10]);
        assert_eq!(pages_of(65535, 0), [8, 9, 10]);
        assert_eq!(pages_of(700, 1724), [8, 9, 10]);
    }
}
