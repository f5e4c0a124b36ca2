//! Making files: length, preallocation, and hints to the file system.
//!
//! Another process that uses the file is noticed before anything in it is changed. When making fails
//! half-way the file is left empty.

use super::entry;
use super::lock::ImageLocks;
use super::options::Locking;
use super::sys;
use crate::block::create::Made;
use crate::block::{Error, Locks, Perm, Perms, Preallocation};
use crate::io::{Errno, IoResult};
use crate::options::{Size, bytes};
use serde::Deserialize;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;

/// What XFS is asked to allocate at a time, in bytes, if nothing else is said: fewer extents.
const EXTENT_SIZE: u64 = 1 << 20;
/// Bytes written at a time.
const CHUNK: usize = 1 << 20;

/// Options of a new file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub struct CreateOptions {
    /// Bytes.
    pub size: Size,
    #[serde(default)]
    pub preallocation: Preallocation,
    /// No copy-on-write, on btrfs; without effect elsewhere.
    #[serde(default)]
    pub nocow: bool,
    /// Bytes; zero for none. A hint: ignored by file systems that don't know it.
    pub extent_size_hint: Option<Size>,
}

/// Makes a regular file, or empties an existing one. Blocks.
pub fn create_file(filename: &str, options: &CreateOptions) -> Result<Made, Error> {
    let hint = options.extent_size_hint.map_or(EXTENT_SIZE, |size| size.0);
    let hint = u32::try_from(hint).map_err(|_| Error::new("Extent size hint is too large"))?;
    entry::FILE.growth.check(options.preallocation)?;
    let could_not = || format!("Could not create '{filename}'");
    // Emptied only after the locks were had.
    let mut open = OpenOptions::new();
    open.read(true).write(true).create(true).truncate(false).mode(0o644);
    let path = bytes::path_of(filename);
    let file = open.open(&path).map_err(|e| Error::os_at(could_not(), e, &path))?;
    let file = Arc::new(file);
    let _locks = exclusive(&file, filename)?;
    file.set_len(0).map_err(|e| Error::os(could_not(), e))?;
    if options.nocow
        && let Err(errno) = sys::set_no_cow(&file)
    {
        log::debug!("'{filename}': nocow: {errno}");
    }
    if hint > 0
        && let Err(errno) = sys::set_extent_size(&file, hint)
        && !errno.is_unsupported()
    {
        log::warn!("'{filename}': extent_size_hint={hint}: {errno}");
    }
    grow(&file, 0, options.size.0, options.preallocation)?;
    // A file that was emptied first has nothing but what was written here.
    let reads_zeroes = file.metadata().is_ok_and(|found| found.is_file());
    Ok(Made { reads_zeroes })
}

/// Makes an existing device ready to hold a new disk of at most its own size. Blocks.
pub fn create_device(filename: &str, options: &CreateOptions) -> Result<Made, Error> {
    let could_not = |e: Errno| Error::os(format!("Could not open '{filename}'"), e);
    let file = OpenOptions::new().read(true).write(true).open(bytes::path_of(filename));
    let file = Arc::new(file.map_err(|e| could_not(e.into()))?);
    let _locks = exclusive(&file, filename)?;
    let len = sys::seek(&file, 0, sys::Seek::End).map_err(could_not)?;
    if options.size.0 > len {
        return Err(Error::new("Cannot grow device files"));
    }
    // What was there before must not be taken for an image of some format.
    file.write_all_at(&[0; 512][..len.min(512) as usize], 0)
        .and_then(|()| file.sync_data())
        .map_err(|e| Error::os("Failed to clear the new image's first sector", e))?;
    // The rest of the device keeps what was there before.
    Ok(Made { reads_zeroes: false })
}

/// Makes a regular file longer, from `old` to `new` bytes; what is new reads as zeroes. On failure
/// the file has its old length again. Blocks.
pub fn grow(file: &File, old: u64, new: u64, preallocation: Preallocation) -> Result<(), Error> {
    entry::FILE.growth.check(preallocation)?;
    if new == old {
        return Ok(());
    }
    let result = match preallocation {
        Preallocation::Falloc => allocate(file, old, new)
            .map_err(|e| Error::os("Could not preallocate data for the new file", e))
            .and_then(|()| first_block(file, old, new)),
        Preallocation::Full => write_zeroes(file, old, new)
            .map_err(|e| Error::os("Could not write zeros for preallocation", e)),
        Preallocation::Off | Preallocation::Metadata => file
            .set_len(new)
            .map_err(|e| Error::os("Could not resize file", e))
            .and_then(|()| first_block(file, old, new)),
    };
    if result.is_err()
        && let Err(error) = file.set_len(old)
    {
        log::warn!("restoring the old length of a file: {error}");
    }
    result
}

/// Gives a new file its first block: the alignment of direct I/O can be probed there, while a hole
/// takes reads of any alignment on some file systems.
fn first_block(file: &File, old: u64, new: u64) -> Result<(), Error> {
    if old != 0 {
        return Ok(());
    }
    file.write_all_at(&[0; 4096][..new.min(4096) as usize], 0)
        .map_err(|e| Error::os("Could not resize file", e))
}

/// Allocates what is behind the end. Where the file system has no call for it (ramfs, NFS 3, ZFS), zeroes are written
/// instead, as posix_fallocate does.
fn allocate(file: &File, old: u64, new: u64) -> IoResult {
    match sys::allocate(file, 0, old, new - old) {
        Err(errno) if errno.is_unsupported() => Ok(write_zeroes(file, old, new)?),
        result => result,
    }
}

fn write_zeroes(file: &File, old: u64, new: u64) -> std::io::Result<()> {
    file.set_len(new)?;
    let zeroes = vec![0; CHUNK];
    let mut at = old;
    while at < new {
        let n = (new - at).min(CHUNK as u64);
        file.write_all_at(&zeroes[..n as usize], at)?;
        at += n;
    }
    file.sync_all()
}

/// The locks of a user that writes and resizes, and lets nobody else resize.
fn exclusive(file: &Arc<File>, filename: &str) -> Result<ImageLocks, Error> {
    let locks = ImageLocks::new(file.clone(), filename, Locking::Auto, false)?;
    let perms = Perms { held: Perm::WRITE | Perm::RESIZE, shared: Perm::all() - Perm::RESIZE };
    locks.prepare(Perms::NONE, perms)?;
    Ok(locks)
}
