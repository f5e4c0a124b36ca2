//! System calls without a wrapper in the standard library.
//!
//! They are locks of open file descriptions, holes, preallocation, and ioctls of block devices and file systems.
//!
//! All unsafe code of this driver is here, behind safe functions. A call made here may block.

use crate::io::{Errno, IoResult};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// `_IO(0x12, n)`, which linux/fs.h gives to block devices.
const BLKROGET: libc::Ioctl = libc::_IO(0x12, 94);
const BLKDISCARD: libc::Ioctl = libc::_IO(0x12, 119);
const BLKZEROOUT: libc::Ioctl = libc::_IO(0x12, 127);

const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

const FS_NOCOW_FL: libc::c_int = 0x0080_0000;
const FS_XFLAG_EXTSIZE: u32 = 0x0000_0800;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

const FS_IOC_FSGETXATTR: libc::Ioctl = libc::_IOR::<FsXattr>(b'X' as u32, 31);
const FS_IOC_FSSETXATTR: libc::Ioctl = libc::_IOW::<FsXattr>(b'X' as u32, 32);

/// What the kernel says of direct I/O on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// It does not say (an older kernel, or a file system that has not been taught to).
    Unknown,
    /// There is none on this file.
    Unsupported,
    /// In bytes.
    Aligned { memory: u32, offset: u32 },
}

/// statx with STATX_DIOALIGN.
pub fn direct_io(file: &File) -> DirectIo {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, and the kernel writes at most one whole structure.
    let answer = unsafe {
        let flags = libc::AT_EMPTY_PATH;
        let path = c"".as_ptr();
        if libc::statx(file.as_raw_fd(), path, flags, libc::STATX_DIOALIGN, answer.as_mut_ptr())
            != 0
        {
            return DirectIo::Unknown;
        }
        // All zeroes is a valid value too.
        answer.assume_init()
    };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        DirectIo::Unknown
    } else if answer.stx_dio_offset_align == 0 {
        DirectIo::Unsupported
    } else {
        let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
        DirectIo::Aligned { memory, offset }
    }
}

fn done(result: libc::c_int) -> IoResult {
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// The answer of a block device's ioctl that writes one `int`.
fn ask(file: &File, request: libc::Ioctl) -> IoResult<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: the requests that this is called with write one int.
    done(unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) })?;
    u32::try_from(value).map_err(|_| Errno::EINVAL)
}

/// A block device's logical block size, in bytes.
pub fn logical_block_size(file: &File) -> IoResult<u32> {
    ask(file, libc::BLKSSZGET)
}

/// A block device's physical block size, in bytes.
pub fn physical_block_size(file: &File) -> IoResult<u32> {
    ask(file, libc::BLKPBSZGET)
}

/// Whether a block device refuses writes.
pub fn is_read_only_device(file: &File) -> IoResult<bool> {
    Ok(ask(file, BLKROGET)? != 0)
}

/// A request of a block device that takes a range.
fn range(file: &File, request: libc::Ioctl, at: u64, len: u64) -> IoResult {
    let range = [at, len];
    // SAFETY: the requests that this is called with read two 64-bit numbers.
    done(unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) })
}

/// Tells a block device that a range is no longer needed.
pub fn discard(file: &File, at: u64, len: u64) -> IoResult {
    range(file, BLKDISCARD, at, len)
}

/// Makes a range of a block device read as zeroes.
pub fn zero_out(file: &File, at: u64, len: u64) -> IoResult {
    range(file, BLKZEROOUT, at, len)
}

/// Asks btrfs not to copy this file's blocks on write. Only for empty files.
pub fn set_no_cow(file: &File) -> IoResult {
    let mut flags: libc::c_int = 0;
    // SAFETY: despite the `long` in its number, the request writes one int (linux/fs.h).
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &mut flags) })?;
    flags |= FS_NOCOW_FL;
    // SAFETY: the request reads one int.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &flags) })
}

/// Asks XFS to allocate `bytes` at a time.
pub fn set_extent_size(file: &File, bytes: u32) -> IoResult {
    let mut attributes = FsXattr {
        xflags: 0,
        extent_size: 0,
        extents: 0,
        project: 0,
        cow_extent_size: 0,
        padding: [0; 8],
    };
    // SAFETY: the request writes one such structure.
    done(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &mut attributes) })?;
    attributes.xflags |= FS_XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    // SAFETY: the request reads one such structure.
    done(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSSETXATTR, &attributes) })
}

/// Whether the file's bytes are kept in memory, so that a transfer is a copy and never waits for a
/// device.
pub fn is_in_memory(file: &File) -> bool {
    let mut found = MaybeUninit::<libc::statfs64>::uninit();
    // SAFETY: the call fills the structure whenever it succeeds, and it is read only then.
    let magic = unsafe {
        if libc::fstatfs64(file.as_raw_fd(), found.as_mut_ptr()) != 0 {
            return false;
        }
        found.assume_init().f_type
    };
    magic == libc::TMPFS_MAGIC || magic == RAMFS_MAGIC
}

/// What [`transfer`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Read,
    /// Only what is in memory: nothing, where the storage or the file system cannot tell.
    ReadCached,
    Write,
}

/// preadv2 or pwritev, once. The count of bytes moved; a failure is a count of zero.
///
/// # Safety
/// The segments must be mapped, for a read writable.
pub unsafe fn transfer(
    fd: libc::c_int,
    offset: u64,
    segments: &[libc::iovec],
    direction: Direction,
) -> usize {
    let (Ok(offset), Ok(count)) = (signed(offset), libc::c_int::try_from(segments.len())) else {
        return 0;
    };
    // SAFETY: the caller's promise, and the list is as long as is said.
    let moved = unsafe {
        match (segments, direction) {
            ([one], Direction::Read) => libc::pread64(fd, one.iov_base, one.iov_len, offset),
            ([one], Direction::Write) => libc::pwrite64(fd, one.iov_base, one.iov_len, offset),
            (many, Direction::Read) => libc::preadv64(fd, many.as_ptr(), count, offset),
            (many, Direction::ReadCached) => {
                libc::preadv64v2(fd, many.as_ptr(), count, offset, libc::RWF_NOWAIT)
            }
            (many, Direction::Write) => libc::pwritev64(fd, many.as_ptr(), count, offset),
        }
    };
    usize::try_from(moved).unwrap_or(0)
}

/// fallocate with `mode`.
pub fn allocate(file: &File, mode: i32, at: u64, len: u64) -> IoResult {
    let (at, len) = (signed(at)?, signed(len)?);
    // SAFETY: names no memory.
    done(unsafe { libc::fallocate64(file.as_raw_fd(), mode, at, len) })
}

/// What lseek is asked to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    Data,
    Hole,
    End,
}

/// The next place of this kind from `at` on. It moves the descriptor's own offset, which nothing
/// here uses: all transfers say where.
pub fn seek(file: &File, at: u64, what: Seek) -> IoResult<u64> {
    let (at, whence) = match what {
        Seek::Data => (signed(at)?, libc::SEEK_DATA),
        Seek::Hole => (signed(at)?, libc::SEEK_HOLE),
        Seek::End => (0, libc::SEEK_END),
    };
    // SAFETY: names no memory.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), at, whence) };
    u64::try_from(found).map_err(|_| Errno::last())
}

/// Drops from the host's page cache what is on the storage. Advice: it cannot fail.
pub fn drop_cache(file: &File) {
    // SAFETY: names no memory.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

fn signed(value: u64) -> IoResult<i64> {
    i64::try_from(value).map_err(|_| Errno(libc::EFBIG))
}

fn byte(kind: libc::c_int, at: u64) -> libc::flock64 {
    // SAFETY: all zeroes is a valid value of this structure of integers; OFD locks want l_pid 0.
    let mut lock = unsafe { MaybeUninit::<libc::flock64>::zeroed().assume_init() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at as libc::off64_t;
    lock.l_len = 1;
    lock
}

/// Takes a shared lock on one byte, for this open file description.
pub fn lock_byte(file: &File, at: u64) -> IoResult {
    let lock = byte(libc::F_RDLCK, at);
    // SAFETY: the kernel reads one such structure.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) })
}

/// Gives up the lock on one byte.
pub fn unlock_byte(file: &File, at: u64) -> IoResult {
    let lock = byte(libc::F_UNLCK, at);
    // SAFETY: the kernel reads one such structure.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) })
}

/// Whether another open file description has a lock of any kind on one byte.
pub fn is_byte_locked(file: &File, at: u64) -> IoResult<bool> {
    let mut lock = byte(libc::F_WRLCK, at);
    // SAFETY: the kernel reads and writes one such structure.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) })?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
