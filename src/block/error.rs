//! The block layer's rich error, for opening, changing and closing graphs: one line that says where,
//! what was found and what was wanted.

use crate::io::Errno;
use std::fmt;

/// One line, without the program's name and without a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    text: String,
    errno: Option<Errno>,
    hint: Option<String>,
    locked: Option<LockedFile>,
}

/// The file whose lock was refused, for those who look for the holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockedFile {
    pub device: u64,
    pub inode: u64,
    /// Our own descriptor that wanted the lock; it may be closed by now.
    pub fd: std::os::fd::RawFd,
}

impl Error {
    pub fn new(text: impl Into<String>) -> Error {
        Error { text: text.into(), errno: None, hint: None, locked: None }
    }

    /// `what: the errno's text`, as in `Could not open 'a': No such file or directory`.
    pub fn os(what: impl fmt::Display, errno: impl Into<Errno>) -> Error {
        let errno = errno.into();
        Error { text: format!("{what}: {errno}"), errno: Some(errno), hint: None, locked: None }
    }

    /// The same error with the errno that tells programs of what kind it is.
    pub fn with_errno(self, errno: Errno) -> Error {
        Error { errno: Some(errno), ..self }
    }

    /// The same error, seen from further out: `at: text`.
    pub fn at(self, at: impl fmt::Display) -> Error {
        Error { text: format!("{at}: {}", self.text), ..self }
    }

    /// The same error with a line of advice, which tools print on a line of its own below it.
    pub fn with_hint(self, hint: impl Into<String>) -> Error {
        Error { hint: Some(hint.into()), ..self }
    }

    /// The same error of a lock that was refused.
    pub fn with_locked_file(self, file: LockedFile) -> Error {
        Error { locked: Some(file), ..self }
    }

    pub fn locked_file(&self) -> Option<&LockedFile> {
        self.locked.as_ref()
    }

    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    pub fn errno(&self) -> Option<Errno> {
        self.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}
