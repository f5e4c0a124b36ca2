//! Opening a file or device: the type check, read-only or not, and O_DIRECT or not.
//!
//! A node that may write opens the file read-write at once, whether or not it has writers yet, so
//! that the descriptor never changes under the fast path. With `auto-read-only` it is opened
//! read-only where it cannot be had otherwise, and then stays so.

use super::entry::{FILE, HOST_DEVICE};
use super::options::FileOptions;
use super::sys;
use crate::block::{DriverEntry, Error, NodeOptions};
use crate::io::Errno;
use crate::options::bytes;
use std::fs::{File, FileType, Metadata, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

/// What is behind the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Regular,
    BlockDevice,
    CharacterDevice,
}

/// Which of the two drivers opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    File,
    HostDevice,
}

impl Flavour {
    pub fn entry(self) -> &'static DriverEntry {
        match self {
            Flavour::File => &FILE,
            Flavour::HostDevice => &HOST_DEVICE,
        }
    }

    /// The kind of a file of this type, if this driver takes it.
    fn kind(self, found: FileType) -> Option<Kind> {
        match self {
            Flavour::File => found.is_file().then_some(Kind::Regular),
            Flavour::HostDevice if found.is_block_device() => Some(Kind::BlockDevice),
            Flavour::HostDevice if found.is_char_device() => Some(Kind::CharacterDevice),
            Flavour::HostDevice => None,
        }
    }

    fn wrong_kind(self, filename: &str) -> Error {
        let wanted = match self {
            Flavour::File => "a regular file",
            Flavour::HostDevice => "either a character or block device",
        };
        Error::new(format!("'{}' driver requires '{filename}' to be {wanted}", self.entry().name))
    }
}

/// A file, open.
pub struct Opened {
    pub file: File,
    pub kind: Kind,
    pub metadata: Metadata,
    /// It could be had for reading only, or was wanted so.
    pub read_only: bool,
    /// In bytes.
    pub len: u64,
}

/// Opens the file. Blocks.
pub fn open(
    flavour: Flavour,
    options: &FileOptions,
    node: &NodeOptions,
    auto_read_only: bool,
) -> Result<Opened, Error> {
    options.check(node)?;
    let filename = &options.filename;
    if filename.is_empty() {
        let driver = flavour.entry().name;
        return Err(Error::new(format!("The '{driver}' block driver requires a file name")));
    }
    // Opening a FIFO would wait for its other end.
    if std::fs::metadata(bytes::path_of(filename)).is_ok_and(|m| m.file_type().is_fifo()) {
        return Err(flavour.wrong_kind(filename));
    }
    let (file, read_only) = match open_as(filename, node.direct, node.read_only) {
        Ok(file) => (file, node.read_only),
        Err(errno) if auto_read_only && !node.read_only && may_be_readable(errno) => {
            let file = open_as(filename, node.direct, true).map_err(|e| refused(filename, e))?;
            (file, true)
        }
        Err(Errno(libc::EINVAL)) if node.direct && open_as(filename, false, true).is_ok() => {
            return Err(no_direct_io(filename));
        }
        Err(errno) => return Err(refused(filename, errno)),
    };
    let metadata = file.metadata().map_err(|e| refused(filename, e))?;
    let kind = flavour.kind(metadata.file_type()).ok_or_else(|| flavour.wrong_kind(filename))?;
    let mut opened = Opened { len: 0, file, kind, metadata, read_only };
    if kind == Kind::BlockDevice && !read_only && sys::is_read_only_device(&opened.file) == Ok(true)
    {
        if !auto_read_only {
            return Err(Error::os("The device is not writable", Errno(libc::EACCES)));
        }
        opened.file = open_as(filename, node.direct, true).map_err(|e| refused(filename, e))?;
        opened.read_only = true;
    }
    opened.len = length(&opened.file, kind)
        .map_err(|e| Error::os(format!("Could not tell the size of '{filename}'"), e))?;
    Ok(opened)
}

/// Bytes that the file or device has now.
pub fn length(file: &File, kind: Kind) -> Result<u64, Errno> {
    match kind {
        Kind::Regular => Ok(file.metadata()?.len()),
        _ => sys::seek(file, 0, sys::Seek::End),
    }
}

pub fn no_direct_io(filename: &str) -> Error {
    Error::new(format!("Could not open '{filename}': filesystem does not support O_DIRECT"))
}

fn open_as(filename: &str, direct: bool, read_only: bool) -> Result<File, Errno> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    // The standard library adds O_CLOEXEC.
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).custom_flags(flags | libc::O_NOCTTY);
    options.open(bytes::path_of(filename)).map_err(Errno::from)
}

fn may_be_readable(errno: Errno) -> bool {
    matches!(errno.0, libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY)
}

fn refused(filename: &str, errno: impl Into<Errno>) -> Error {
    Error::os_at(format!("Could not open '{filename}'"), errno, &bytes::path_of(filename))
}
