//! The dirty bitmap of a migrating front end, and the bits that may be set in it.

use super::guest::memory_file;
use super::input::Input;
use super::mapped::Mapped;
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserLog;
use vublk::export::vhost_user_blk::dirty_log::DirtyLog;

/// Bytes of the file: bits for more than the first 4 GiB.
const LEN: usize = 0x30000;
const PAGE: usize = 4096;

thread_local! {
    /// Files of zeroes that earlier runs of this thread have returned.
    static FREE: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

/// A file, and its bytes.
struct Kept {
    file: File,
    bytes: Mapped,
}

/// The front end's side of it.
pub struct Bitmap {
    /// Taken when this is dropped.
    kept: Option<Kept>,
    announced: VhostUserLog,
    pub log: Arc<DirtyLog>,
}

impl Kept {
    fn new() -> Kept {
        let file = memory_file(LEN as u64);
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: integers are all that the call takes.
        let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(sealed, 0, "{}", std::io::Error::last_os_error());
        let bytes = Mapped::of(&file, LEN);
        Kept { file, bytes }
    }
}

impl Bitmap {
    /// `None` if it is refused, which must be said on one line.
    pub fn new(input: &mut Input<'_>) -> Option<Bitmap> {
        let free = FREE.with_borrow_mut(Vec::pop);
        let kept = free.unwrap_or_else(Kept::new);
        let mut announced = VhostUserLog { mmap_size: 0x28000, mmap_offset: 0x1000 };
        if input.one_in(4) {
            announced.mmap_size = input.pick(&[0x1000, 1, 7, LEN as u64, 0, u64::MAX]);
            announced.mmap_offset =
                input.pick(&[0, 0x1000, (LEN - 0x1000) as u64, 3, LEN as u64, u64::MAX]);
        }
        match DirtyLog::map("fuzz", &announced, kept.file.try_clone().expect("a descriptor")) {
            Ok(log) => Some(Bitmap { kept: Some(kept), announced, log: Arc::new(log) }),
            Err(why) => {
                assert!(!why.is_empty() && !why.contains('\n'), "not one line: {why:?}");
                assert_ne!(
                    (announced.mmap_size, announced.mmap_offset),
                    (0x28000, 0x1000),
                    "{why}"
                );
                FREE.with_borrow_mut(|free| free.push(kept));
                None
            }
        }
    }

    /// Whether the page of a guest address is marked; that of one without a bit is.
    pub fn is_marked(&self, guest: u64) -> bool {
        let page = guest / PAGE as u64;
        let at = self.announced.mmap_offset + page / 8;
        if page / 8 >= self.announced.mmap_size || at >= LEN as u64 {
            return true;
        }
        let Some(kept) = &self.kept else { return true };
        let [byte] = kept.bytes.get(at as usize);
        byte & 1 << (page % 8) != 0
    }

    /// Nobody marks pages any more. Panics if anything beside the bitmap was written.
    pub fn end(mut self) {
        let Some(mut kept) = self.kept.take() else { return };
        let from = self.announced.mmap_offset as usize;
        let inside = from..from + self.announced.mmap_size as usize;
        for (n, page) in kept.bytes.alone().chunks_mut(PAGE).enumerate() {
            if *page == [0; PAGE] {
                continue;
            }
            let places = (n * PAGE..).zip(&*page).filter(|(_, byte)| **byte != 0);
            let beside = places.map(|(at, _)| at).find(|at| !inside.contains(at));
            assert!(beside.is_none(), "written beside the bitmap, at {beside:x?}");
            page.fill(0);
        }
        FREE.with_borrow_mut(|free| free.push(kept));
    }
}
