//! The block layer's error for opening, changing and closing graphs.
//!
//! It is one line that says where the error is, what was found and what was wanted.

use crate::io::Errno;
use std::fmt;
use std::path::Path;

/// One line, without the program's name and without a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    text: String,
    errno: Option<Errno>,
    hint: Option<String>,
    advice: Option<String>,
    locked: Option<LockedFile>,
}

/// The file whose lock was refused, for finding the holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockedFile {
    pub device: u64,
    pub inode: u64,
    /// Our own descriptor that wanted the lock; it may be closed by now.
    pub fd: std::os::fd::RawFd,
}

impl Error {
    pub fn new(text: impl Into<String>) -> Error {
        Error { text: text.into(), errno: None, hint: None, advice: None, locked: None }
    }

    /// `what: the errno's text`, as in `Could not open 'a': No such file or directory`.
    pub fn os(what: impl fmt::Display, errno: impl Into<Errno>) -> Error {
        let errno = errno.into();
        Error { errno: Some(errno), ..Error::new(format!("{what}: {errno}")) }
    }

    /// The same of a path, with advice where a folder of it is missing.
    pub fn os_at(what: impl fmt::Display, errno: impl Into<Errno>, path: &Path) -> Error {
        Error::os(what, errno).with_missing_folder(path)
    }

    /// The same error of a path, with advice where a folder of it is missing.
    pub fn with_missing_folder(self, path: &Path) -> Error {
        let is_missing = self.errno == Some(Errno(libc::ENOENT));
        let missing = if is_missing { missing_folder(path) } else { None };
        let advice = missing.map(|folder| format!("There is no folder '{}'.", folder.display()));
        self.with_advice(advice)
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

    /// The same error with a line of our own, which QEMU does not print: what may have been meant, or what there is.
    pub fn with_advice(self, advice: Option<String>) -> Error {
        Error { advice: self.advice.or(advice), ..self }
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

    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }

    pub fn errno(&self) -> Option<Errno> {
        self.errno
    }
}

/// The outermost folder of a path that is not there.
fn missing_folder(path: &Path) -> Option<&Path> {
    let folders = path.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
    folders.take_while(|folder| !folder.exists()).last()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let advice = |path: &str| {
            let path = dir.path().join(path);
            Error::os_at("x", Errno(libc::ENOENT), &path).advice().map(str::to_owned)
        };
        let missing = dir.path().join("a");
        let reported = Some(format!("There is no folder '{}'.", missing.display()));
        assert_eq!((advice("a/b/c"), advice("a/b")), (reported.clone(), reported));
        assert_eq!(advice("a"), None);
        let denied = Error::os_at("x", Errno(libc::EACCES), &dir.path().join("a/b"));
        assert_eq!(denied.advice(), None);
    }
}
