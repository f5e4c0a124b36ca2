//! The bitmap of a front end that migrates, and what may be found in it.

use super::guest::memory_file;
use super::input::Input;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserLog;
use vublk::export::vhost_user_blk::dirty_log::DirtyLog;

/// Bytes of the file: bits for more than the first 4 GiB.
const LEN: u64 = 0x30000;
const PAGE: u64 = 4096;

/// The front end's side of it.
pub struct Bitmap {
    file: File,
    told: VhostUserLog,
    pub log: Arc<DirtyLog>,
}

impl Bitmap {
    /// `None` if it is refused, which must be said on one line.
    pub fn new(input: &mut Input<'_>) -> Option<Bitmap> {
        let file = memory_file(LEN);
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: integers are all that the call takes.
        let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(sealed, 0, "{}", std::io::Error::last_os_error());
        let mut told = VhostUserLog { mmap_size: 0x28000, mmap_offset: 0x1000 };
        if input.one_in(4) {
            told.mmap_size = input.pick(&[0x1000, 1, 7, LEN, 0, u64::MAX]);
            told.mmap_offset = input.pick(&[0, 0x1000, LEN - 0x1000, 3, LEN, u64::MAX]);
        }
        match DirtyLog::map("fuzz", &told, file.try_clone().expect("a descriptor")) {
            Ok(log) => Some(Bitmap { file, told, log: Arc::new(log) }),
            Err(why) => {
                assert!(!why.is_empty() && !why.contains('\n'), "not one line: {why:?}");
                assert_ne!((told.mmap_size, told.mmap_offset), (0x28000, 0x1000), "{why}");
                None
            }
        }
    }

    /// Whether the page of a guest address is marked; that of one without a bit is.
    pub fn is_marked(&self, guest: u64) -> bool {
        let page = guest / PAGE;
        if page / 8 >= self.told.mmap_size {
            return true;
        }
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, self.told.mmap_offset + page / 8).expect("a byte of it");
        byte[0] & 1 << (page % 8) != 0
    }

    /// Panics if anything beside the bitmap was written.
    pub fn check(&self) {
        let (from, end) = (self.told.mmap_offset, self.told.mmap_offset + self.told.mmap_size);
        for beside in [0..from, end..LEN] {
            let mut bytes = vec![0; (beside.end - beside.start) as usize];
            self.file.read_exact_at(&mut bytes, beside.start).expect("a part of it");
            assert!(bytes == vec![0; bytes.len()], "written beside the bitmap, in {beside:x?}");
        }
    }
}
