//! The holes of a file, as the file system reports them.
//!
//! The answer may be old when it is given, because others write too; and it may be wrong about data,
//! never about holes: calling a hole data costs time, calling data a hole loses it. So everything
//! unexpected is data.

use super::sys::{self, Seek};
use crate::io::{Errno, IoResult};
use std::fs::File;

/// What a range begins with, and for how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Data(u64),
    Hole(u64),
    /// The file system does not tell.
    Unknown,
}

/// Looks at the range of `len` bytes at `at`, which is in the file. Blocks.
pub fn query(file: &File, at: u64, len: u64) -> Found {
    interpret(at, len, |at, what| sys::seek(file, at, what))
}

fn interpret(at: u64, len: u64, seek: impl Fn(u64, Seek) -> IoResult<u64>) -> Found {
    match seek(at, Seek::Data) {
        // No data up to the end of the file.
        Err(Errno(libc::ENXIO)) => Found::Hole(len),
        Err(_) => Found::Unknown,
        Ok(data) if data > at => Found::Hole((data - at).min(len)),
        // Data before the place that was asked for: an answer to no question.
        Ok(data) if data < at => Found::Unknown,
        Ok(_) => match seek(at, Seek::Hole) {
            Ok(hole) if hole > at => Found::Data((hole - at).min(len)),
            // It was data a moment ago, or the file has become shorter.
            _ => Found::Data(len),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(data: IoResult<u64>, hole: IoResult<u64>) -> Found {
        interpret(1000, 100, |at, what| {
            assert_eq!(at, 1000);
            if what == Seek::Data { data } else { hole }
        })
    }

    #[test]
    fn an_answer_never_reaches_beyond_the_range() {
        assert_eq!(found(Ok(1000), Ok(1010)), Found::Data(10));
        assert_eq!(found(Ok(1000), Ok(5000)), Found::Data(100));
        assert_eq!(found(Ok(1010), Ok(0)), Found::Hole(10));
        assert_eq!(found(Ok(5000), Ok(0)), Found::Hole(100));
        assert_eq!(found(Err(Errno(libc::ENXIO)), Ok(0)), Found::Hole(100));
    }

    #[test]
    fn a_file_system_that_lies_or_a_file_that_changes_is_data() {
        assert_eq!(found(Ok(999), Ok(1010)), Found::Unknown);
        assert_eq!(found(Err(Errno::EINVAL), Ok(1010)), Found::Unknown);
        assert_eq!(found(Ok(1000), Ok(1000)), Found::Data(100));
        assert_eq!(found(Ok(1000), Ok(7)), Found::Data(100));
        assert_eq!(found(Ok(1000), Err(Errno(libc::ENXIO))), Found::Data(100));
    }
}
