//! The drivers `file` and `host_device`: regular files and block devices, over the worker's ring.
//!
//! | file | it holds |
//! |---|---|
//! | `options`, `open` | what may be asked for, and what is taken for which driver |
//! | `limits` | alignment of direct I/O, abilities |
//! | `flush` | which flushes share an fsync; a failed one is never forgiven |
//! | `zero`, `status` | holes: made and found |
//! | `lock` | QEMU's lock bytes |
//! | `create` | new files |
//! | `entry` | the two entries in the list of drivers |
//! | `sys` | system calls, and all unsafe code but that of the fast path |
//!
//! The driver keeps the file's length itself: it changes by [`Image::resize`], by writes past the end of users that
//! may, and by writes to the last, incomplete sector, never because somebody else makes the file longer.

pub mod create;
mod entry;
mod flush;
mod limits;
mod lock;
mod open;
mod options;
mod status;
mod sys;
mod zero;

pub use entry::{FILE, HOST_DEVICE};
pub use open::Flavour;
pub use options::{Aio, FileOptions, Locking};

use crate::block::node::SECTOR;
use crate::block::{
    Access, Driver, DriverEntry, Error, Extent, Fence, HandOver, Image, Leaf, LocalFuture, Locks,
    Mapping, NodeOptions, Perms, Place, Preallocation, Precision, Status, Target, Traits,
    WriteFlags, ZeroFlags,
};
use crate::io::{self, Durable, Errno, InFlight, Io, IoResult, IoVec, Op, Started, Token};
use crate::options::{Map, filename};
use flush::Flushes;
use lock::ImageLocks;
use open::Kind;
use status::Found;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use zero::Missing;

/// The longest transfer, in bytes, that a worker does itself on a file in memory. It is a copy, and
/// the ring would hand it to a kernel thread, because tmpfs knows no other way of not waiting: the
/// hand-over costs more than the copy. Longer ones go there, so that they do not keep the worker
/// from its other queues.
const COPY_LIMIT: u64 = 64 << 10;

/// An open file or device.
pub struct FileDriver {
    flavour: Flavour,
    kind: Kind,
    filename: String,
    /// Shared with work that blocks, which may outlive the request that wanted it.
    file: Arc<File>,
    /// Of `file`.
    fd: RawFd,
    traits: Traits,
    /// Bytes.
    len: AtomicU64,
    /// `cache.no-flush`: nothing needs to be durable.
    no_flush: bool,
    in_memory: bool,
    /// A regular file in the host's page cache.
    is_cached: bool,
    /// `drop-cache`: what is in the host's page cache is not to be trusted when the image becomes
    /// ours.
    drops_cache: bool,
    flushes: Flushes,
    missing: Missing,
    /// What io_uring has no operation for.
    blocking: io::Blocking,
    /// The file system does not tell where holes are.
    no_holes: AtomicBool,
    locks: ImageLocks,
}

impl FileDriver {
    /// Opens a file or device. Blocks.
    ///
    /// Unless the node is read-only the file is opened for writing; with `auto_read_only`, and where
    /// that is not allowed, for reading, which [`Driver::traits`] then tells.
    pub fn open(
        flavour: Flavour,
        options: &FileOptions,
        node: &NodeOptions,
        auto_read_only: bool,
    ) -> Result<FileDriver, Error> {
        let opened = open::open(flavour, options, node, auto_read_only)?;
        let traits = limits::traits(&opened, &options.filename, node)?;
        let file = Arc::new(opened.file);
        let locks =
            ImageLocks::new(file.clone(), &options.filename, options.locking, node.force_share)?;
        Ok(FileDriver {
            flavour,
            kind: opened.kind,
            filename: options.filename.clone(),
            fd: file.as_raw_fd(),
            traits,
            len: AtomicU64::new(opened.len),
            no_flush: node.no_flush,
            is_cached: opened.kind == Kind::Regular && !node.direct,
            in_memory: opened.kind == Kind::Regular && sys::is_in_memory(&file),
            drops_cache: options.drop_cache && !node.direct,
            flushes: Flushes::default(),
            missing: Missing::default(),
            blocking: io::Blocking::default(),
            no_holes: AtomicBool::new(opened.kind != Kind::Regular),
            locks,
            file,
        })
    }

    /// As given when it was opened.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// How many fsyncs have reached the file.
    pub fn flushes(&self) -> u64 {
        self.flushes.count()
    }

    /// Moves bytes in place, between here and the page cache, where that may be waited for. Whether
    /// all were moved; if not, the ring is to do it, which knows what to make of a short transfer.
    fn moved_in_place(&self, at: u64, memory: &IoVec<'_>, direction: sys::Direction) -> bool {
        if !self.is_cached || !io::may_block() {
            return false;
        }
        // The storage is waited for by the ring, so that others can be asked meanwhile.
        let direction = match direction {
            sys::Direction::Read if !self.in_memory => sys::Direction::ReadCached,
            direction => direction,
        };
        // SAFETY: the list's memory stays mapped as long as it is borrowed.
        let moved = unsafe { sys::transfer(self.fd, at, memory.as_raw(), direction) };
        moved as u64 == memory.len()
    }

    fn length(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Books that bytes up to `end` have been written or zeroed.
    ///
    /// Only the incomplete last sector is past the length. A direct write to it ends on a larger block, and what it
    /// added to the file beyond the sector is cut off again: the disk does not grow by being written. The node runs
    /// no other write to that block meanwhile.
    async fn grown(&self, end: u64) -> IoResult {
        let len = self.length();
        if end <= len || self.kind != Kind::Regular {
            return Ok(());
        }
        let most = len.next_multiple_of(SECTOR);
        self.len.fetch_max(end.min(most), Ordering::Relaxed);
        if end > most {
            let file = self.file.clone();
            self.blocking.run(move || file.set_len(most)).await?;
        }
        Ok(())
    }

    async fn write_durable(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        let Err(errno) = io::write(self.fd, at, from, Durable::Yes).await else { return Ok(()) };
        // The failure was of the write, which is this request's alone, or of making it durable,
        // which has also used up the kernel's report of other writes that did not land: a later
        // fsync would succeed. If the write by itself works, it was the latter.
        if io::write(self.fd, at, from, Durable::No).await.is_ok() {
            log::error!("'{}': a durable write failed: {errno}", self.filename);
            self.flushes.poison(errno);
        }
        Err(errno)
    }

    async fn resize_to(
        &self,
        len: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let old = self.length();
        if len < old && preallocation != Preallocation::Off {
            return Err(Error::new("Cannot use preallocation for shrinking files"));
        }
        if len < old && !shrink {
            return Err(Error::new(format!(
                "'{}': {len} bytes are less than its {old}, and shrinking was not asked for",
                self.filename
            )));
        }
        let file = self.file.clone();
        if len < old {
            self.blocking
                .run(move || file.set_len(len))
                .await
                .map_err(|e| Error::os("Could not resize file", e))?;
        } else {
            self.blocking.run(move || create::grow(&file, old, len, preallocation)).await?;
        }
        self.len.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// A device has the length it has; asking for it makes a change that happened outside known. It is to
    /// have exactly that length, or at least.
    async fn resize_device(&self, len: u64, exactly: bool) -> Result<(), Error> {
        let file = self.file.clone();
        let found =
            self.blocking.run(move || sys::seek(&file, 0, sys::Seek::End)).await.map_err(|e| {
                Error::os(format!("Could not tell the size of '{}'", self.filename), e)
            })?;
        self.len.store(found, Ordering::Relaxed);
        match exactly {
            true if len != found => Err(Error::new("Cannot resize device files")),
            false if len > found => Err(Error::new("Cannot grow device files")),
            _ => Ok(()),
        }
    }

    async fn query_extent(&self, at: u64, len: u64, precision: Precision) -> Extent {
        let place = Some(Place { child: None, offset: at });
        let data = Extent { len, status: Status::DATA | Status::ALLOCATED, place };
        if precision == Precision::Allocation || self.no_holes.load(Ordering::Relaxed) {
            return data;
        }
        let file = self.file.clone();
        match self.blocking.run(move || status::query(&file, at, len)).await {
            Found::Data(len) => Extent { len, ..data },
            Found::Hole(len) => Extent { len, status: Status::ZERO | Status::ALLOCATED, place },
            Found::Unknown => {
                self.no_holes.store(true, Ordering::Relaxed);
                data
            }
        }
    }
}

impl Driver for FileDriver {
    fn entry(&self) -> &'static DriverEntry {
        self.flavour.entry()
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn len(&self) -> u64 {
        self.length()
    }

    fn filename(&self) -> Option<String> {
        Some(filename::plain(&self.filename).into_owned())
    }

    fn own_options(&self) -> Map {
        Map::from_iter([("filename", &*self.filename)])
    }

    fn map<'a>(&'a self, _: &'a InFlight, at: u64, want: u64, access: Access) -> Mapping<'a> {
        let slow = match access {
            Access::Read => false,
            // The length changes.
            Access::Write => at + want > self.length(),
            // Its failure must be looked at here: see `write_durable`.
            Access::DurableWrite => !self.no_flush || at + want > self.length(),
        };
        if slow {
            return Mapping::slow(want);
        }
        Mapping { len: want, target: Target::Data { leaf: self, offset: at } }
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            match self.moved_in_place(at, into, sys::Direction::Read) {
                true => Ok(()),
                false => io::read(self.fd, at, into).await,
            }
        })
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let grow = flags.contains(WriteFlags::GROW);
            if grow {
                // Also if it fails: what it has left there must not look as if it were not there.
                self.len.fetch_max(at + from.len(), Ordering::Relaxed);
            }
            if flags.contains(WriteFlags::FUA) && !self.no_flush {
                self.write_durable(at, from).await?;
            } else if !self.moved_in_place(at, from, sys::Direction::Write) {
                io::write(self.fd, at, from, Durable::No).await?;
            }
            if grow { Ok(()) } else { self.grown(at + from.len()).await }
        })
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(self.zero_range(at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.discard_range(at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        let fsync = async {
            match io::fsync(self.fd).await {
                // Such a device has no cache that could be flushed.
                Err(Errno::EINVAL) if self.kind == Kind::CharacterDevice => Ok(()),
                result => result,
            }
        };
        Box::pin(self.flushes.flush(fsync))
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move { Ok(self.query_extent(at, len, precision).await) })
    }

    fn locks(&self) -> Option<&dyn Locks> {
        Some(&self.locks)
    }

    /// Requests in flight hold the file's description open, and with it the locks; those of other
    /// files do if the ring keeps the file.
    fn fence(&self, own: Perms) -> Fence {
        match self.locks.exclude(own) {
            true => Fence::Locks(vec![self.file.clone()]),
            false => Fence::Rings,
        }
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn is_poisoned(&self) -> bool {
        self.flushes.is_poisoned()
    }

    fn forgive(&self) {
        self.flushes.forgive();
    }

    fn leaf(&self) -> Option<&dyn Leaf> {
        Some(self)
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Leaf for FileDriver {
    unsafe fn start(&self, io: &Io, mut op: Op, token: Token) -> Started {
        let (offset, segments, direction) = match &mut op {
            Op::Read { offset, segments } => (*offset, *segments, sys::Direction::Read),
            Op::Write { offset, segments, durable } => {
                if self.no_flush {
                    *durable = Durable::No;
                }
                (*offset, *segments, sys::Direction::Write)
            }
            _ => return Started::Done(Err(Errno::ENOTSUP)),
        };
        if self.in_memory && segments.len() <= COPY_LIMIT {
            // SAFETY: the caller keeps the list in place and the segments mapped.
            let moved = unsafe { sys::transfer(self.fd, offset, segments.as_slice(), direction) };
            if moved as u64 == segments.len() {
                return Started::Done(Ok(()));
            }
            // Short or failed: once more, whole, by the way that knows what to make of it.
        }
        // SAFETY: the caller keeps the segments mapped and their list in place until the
        // completion.
        unsafe { io.start(self.fd, op, token) }
    }
}

impl HandOver for FileDriver {
    /// The file may have another length, and the host's page cache may hold what another host has
    /// written over since.
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let (file, kind, cached) = (self.file.clone(), self.kind, self.drops_cache);
            let found = self.blocking.run(move || {
                if cached {
                    sys::drop_cache(&file);
                }
                open::length(&file, kind)
            });
            let len = found.await.map_err(|errno| {
                Error::os(format!("Could not tell the size of '{}'", self.filename), errno)
            })?;
            self.len.store(len, Ordering::Relaxed);
            Ok(())
        })
    }
}

impl Image for FileDriver {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            match self.kind {
                Kind::Regular => self.resize_to(len, shrink, Preallocation::Off).await,
                _ => self.resize_device(len, true).await,
            }
        })
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            match (self.kind, preallocation) {
                (Kind::Regular, _) => self.resize_to(len, false, preallocation).await,
                (_, Preallocation::Off) => self.resize_device(len, false).await,
                _ => Err(Error::new(format!(
                    "Preallocation mode '{}' unsupported for this non-regular file",
                    preallocation.name()
                ))),
            }
        })
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(async move {
            let file = self.file.clone();
            let metadata = self.blocking.run(move || file.metadata().map_err(Errno::from)).await?;
            // Always in units of 512 bytes, whatever the file system's blocks are.
            Ok(metadata.blocks() * 512)
        })
    }
}
