//! The data path's error: a bare errno value, small and `Copy`.
//!
//! Rich errors (where, what was found, what was wanted) belong to opening and to tools; on the data
//! path an error is made millions of times or never, and must cost nothing.

use std::fmt;

/// A positive `errno` value as the kernel gives it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    pub const EIO: Errno = Errno(libc::EIO);
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    pub const ENOTSUP: Errno = Errno(libc::EOPNOTSUPP);
    pub const EPERM: Errno = Errno(libc::EPERM);
    pub const EROFS: Errno = Errno(libc::EROFS);
    pub const ENOMEM: Errno = Errno(libc::ENOMEM);

    /// The calling thread's last error.
    pub fn last() -> Errno {
        Errno::from(std::io::Error::last_os_error())
    }

    /// Whether the operation is one that this file or driver cannot do, so that the caller may take
    /// another way.
    pub fn is_unsupported(self) -> bool {
        matches!(self.0, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    }
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> std::io::Error {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

/// The C library's text alone (`No space left on device`), as QEMU's messages end.
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        // The standard library appends " (os error N)".
        f.write_str(text.rsplit_once(" (os error").map_or(&*text, |(head, _)| head))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}

/// The result of a data path operation.
pub type IoResult<T = ()> = Result<T, Errno>;
