//! Errors of the control plane: one line that says where, what was found, and what to do about it.

use std::fmt;

/// Why a controller could not be opened or used.
#[derive(Debug)]
pub struct Error {
    text: String,
    errno: i32,
}

impl Error {
    /// An error without an errno of its own (EIO).
    pub fn new(text: impl Into<String>) -> Error {
        Error { text: text.into(), errno: libc::EIO }
    }

    /// The same with a positive errno value, for callers that can only report a number.
    pub fn with_errno(self, errno: i32) -> Error {
        Error { errno, ..self }
    }

    /// A failed call: `what` was being done.
    pub fn os(what: impl fmt::Display, error: &std::io::Error) -> Error {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        let full = error.to_string();
        let text = full.rsplit_once(" (os error").map_or(&*full, |(head, _)| head);
        Error { text: format!("{what}: {text}"), errno }
    }

    /// The error with a place in front: which device.
    pub fn at(self, place: impl fmt::Display) -> Error {
        Error { text: format!("{place}: {}", self.text), errno: self.errno }
    }

    /// A positive errno value.
    pub fn errno(&self) -> i32 {
        self.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}
