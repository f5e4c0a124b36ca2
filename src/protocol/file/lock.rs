//! Locks on the image file, compatible with QEMU's.
//!
//! Processes tell each other by them what they do with the image, so that neither opens what the other writes.
//!
//! For permission number `i`, a shared lock on byte 100 + i says that this process holds it, and one on byte 200 + i
//! that it does not let others hold it. Holding needs 200 + i free of others' locks, not sharing needs 100 + i free.
//! Own locks are taken before the others' are looked at, so that of two simultaneous processes at least one fails.
//!
//! The locks belong to the open file description (F_OFD_SETLK): other descriptors of this process
//! do not lose them.

use super::options::Locking;
use super::sys;
use crate::block::{Error, LockedFile, Locks, Perm, Perms};
use crate::io::Errno;
use crate::io::sync::Mutex;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

const HELD: u64 = 100;
const NOT_SHARED: u64 = 200;

/// The locks of one open file.
pub struct ImageLocks {
    file: Arc<File>,
    filename: String,
    /// `false`: `locking=off`, or the kernel has no such locks.
    enabled: bool,
    /// The node shares all permissions.
    force_share: bool,
    taken: Mutex<Bytes>,
}

/// The locked bytes: one for each permission that is held, and one for each that is not shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bytes {
    held: Perm,
    not_shared: Perm,
}

impl Bytes {
    fn union(self, other: Bytes) -> Bytes {
        Bytes { held: self.held | other.held, not_shared: self.not_shared | other.not_shared }
    }

    fn minus(self, other: Bytes) -> Bytes {
        Bytes { held: self.held - other.held, not_shared: self.not_shared - other.not_shared }
    }

    fn offsets(self) -> impl Iterator<Item = u64> {
        offsets(HELD, self.held).chain(offsets(NOT_SHARED, self.not_shared))
    }
}

fn offsets(base: u64, perms: Perm) -> impl Iterator<Item = u64> {
    (0..8).filter(move |bit| perms.bits() & (1 << bit) != 0).map(move |bit| base + bit)
}

impl ImageLocks {
    /// No byte is locked yet.
    pub fn new(
        file: Arc<File>,
        filename: &str,
        locking: Locking,
        force_share: bool,
    ) -> Result<ImageLocks, Error> {
        let available = sys::is_byte_locked(&file, HELD) != Err(Errno::EINVAL);
        if locking == Locking::On && !available {
            return Err(Error::new(format!(
                "'{filename}': locking=on, but the kernel has no locks of open file descriptions"
            )));
        }
        Ok(ImageLocks {
            file,
            filename: filename.to_owned(),
            enabled: locking != Locking::Off && available,
            force_share,
            taken: Mutex::default(),
        })
    }

    /// Whether no other file description can have the locks of such permissions while this one has
    /// them.
    pub fn exclude(&self, perms: Perms) -> bool {
        let bytes = self.bytes(perms);
        self.enabled && bytes.held.intersects(bytes.not_shared)
    }

    fn bytes(&self, perms: Perms) -> Bytes {
        let shared = if self.force_share { Perm::all() } else { perms.shared };
        Bytes { held: perms.held, not_shared: Perm::all() - shared }
    }

    /// Locks the bytes of `wanted` that are not locked yet.
    fn take(&self, taken: &mut Bytes, wanted: Bytes) -> Result<(), Error> {
        for offset in wanted.minus(*taken).offsets() {
            // Only an exclusive lock, which no such process takes, or a file system without locks can fail here.
            sys::lock_byte(&self.file, offset)
                .map_err(|_| Error::new(format!("Failed to lock byte {offset}")))?;
        }
        *taken = taken.union(wanted);
        Ok(())
    }

    /// Unlocks all but `kept`.
    fn keep(&self, taken: &mut Bytes, kept: Bytes) {
        for offset in Bytes::minus(*taken, kept).offsets() {
            if let Err(errno) = sys::unlock_byte(&self.file, offset) {
                log::warn!("'{}': unlocking byte {offset}: {errno}", self.filename);
            }
        }
        *taken = kept;
    }

    /// Whether other processes hold or refuse permissions in conflict with `wanted`.
    fn check(&self, wanted: Bytes) -> Result<(), Error> {
        self.check_free(wanted.held, NOT_SHARED, "")?;
        self.check_free(wanted.not_shared, HELD, "shared ")
    }

    fn check_free(&self, perms: Perm, opposite: u64, shared: &str) -> Result<(), Error> {
        for perm in perms.iter() {
            let offset = opposite + u64::from(perm.bits().trailing_zeros());
            let locked = sys::is_byte_locked(&self.file, offset)
                .map_err(|e| Error::os(format!("Failed to look at lock byte {offset}"), e))?;
            if locked {
                let name = perm.names().next().unwrap_or("unknown");
                let text = format!("Failed to get {shared}\"{name}\" lock");
                let hint = format!("Is another process using the image [{}]?", self.filename);
                let error = Error::new(text).with_errno(Errno(libc::EAGAIN)).with_hint(hint);
                return Err(match self.file.metadata() {
                    Ok(found) => error.with_locked_file(LockedFile {
                        device: found.dev(),
                        inode: found.ino(),
                        fd: self.file.as_raw_fd(),
                    }),
                    Err(_) => error,
                });
            }
        }
        Ok(())
    }
}

impl Locks for ImageLocks {
    fn prepare(&self, old: Perms, new: Perms) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        let mut taken = self.taken.lock();
        let (old, new) = (self.bytes(old), self.bytes(new));
        let result = self.take(&mut taken, new).and_then(|()| self.check(new.minus(old)));
        if result.is_err() {
            // A byte that could not be locked may be among those that are unlocked here, which
            // does no harm.
            *taken = taken.union(new);
            self.keep(&mut taken, old);
        }
        result
    }

    fn commit(&self, _old: Perms, new: Perms) {
        if self.enabled {
            self.keep(&mut self.taken.lock(), self.bytes(new));
        }
    }

    fn rollback(&self, old: Perms, _new: Perms) {
        if self.enabled {
            self.keep(&mut self.taken.lock(), self.bytes(old));
        }
    }

    fn take_over(&self, from: &dyn Locks, held: Perms) -> Result<(), Error> {
        if from.file() != Locks::file(self) {
            let text = format!("'{}' is another file than the one that is open", self.filename);
            return Err(Error::new(text));
        }
        match self.enabled {
            true => self.take(&mut self.taken.lock(), self.bytes(held)),
            false => Ok(()),
        }
    }

    fn file(&self) -> Option<(u64, u64)> {
        self.file.metadata().ok().map(|found| (found.dev(), found.ino()))
    }
}

impl Drop for ImageLocks {
    /// A copy of the descriptor in a child process, or in an operation that has not ended, must not
    /// keep the image locked.
    fn drop(&mut self) {
        self.keep(&mut self.taken.lock(), Bytes::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locks(path: &std::path::Path) -> ImageLocks {
        let file = File::options().read(true).write(true).open(path).unwrap();
        ImageLocks::new(Arc::new(file), "a.img", Locking::Auto, false).unwrap()
    }

    fn writer() -> Perms {
        Perms::format(Perms { held: Perm::WRITE, shared: Perm::all() })
    }

    fn reader() -> Perms {
        Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() - Perm::WRITE }
    }

    #[test]
    fn two_writers_of_one_file_exclude_each_other_and_readers_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (locks(file.path()), locks(file.path()));
        a.prepare(Perms::NONE, writer()).unwrap();
        a.commit(Perms::NONE, writer());
        let error = b.prepare(Perms::NONE, writer()).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        assert_eq!(error.hint(), Some("Is another process using the image [a.img]?"));
        let error = b.prepare(Perms::NONE, reader()).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
        a.commit(writer(), reader());
        b.prepare(Perms::NONE, reader()).unwrap();
    }

    #[test]
    fn a_refused_or_rolled_back_change_leaves_the_locks_as_they_were() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (locks(file.path()), locks(file.path()));
        a.prepare(Perms::NONE, reader()).unwrap();
        a.commit(Perms::NONE, reader());
        b.prepare(Perms::NONE, reader()).unwrap();
        b.commit(Perms::NONE, reader());
        b.prepare(reader(), writer()).unwrap_err();
        assert_eq!(*b.taken.lock(), b.bytes(reader()));
        drop(b);
        let before = *a.taken.lock();
        a.prepare(reader(), writer()).unwrap();
        a.rollback(reader(), writer());
        assert_eq!(*a.taken.lock(), before);
        let watcher = File::open(file.path()).unwrap();
        let locked: Vec<u64> =
            (100..208).filter(|&at| sys::is_byte_locked(&watcher, at).unwrap()).collect();
        assert_eq!(locked, [100, 201]);
        drop(a);
        assert!((100..208).all(|at| !sys::is_byte_locked(&watcher, at).unwrap()));
    }

    #[test]
    fn force_share_locks_what_is_held_and_refuses_nothing_to_others() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let a = locks(file.path());
        a.prepare(Perms::NONE, writer()).unwrap();
        let opened = Arc::new(File::open(file.path()).unwrap());
        let b = ImageLocks::new(opened, "a.img", Locking::On, true).unwrap();
        b.prepare(Perms::NONE, reader()).unwrap();
        assert_eq!(b.taken.lock().not_shared, Perm::empty());
    }
}
