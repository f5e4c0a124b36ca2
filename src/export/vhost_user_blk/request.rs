//! Block requests (virtio 1.2, section 5.2.6): what the guest asks for, checked, and the slow road
//! for all that the fast one leaves.

use super::config::{self, DiskOptions};
use crate::block::{Child, Node, SECTOR, WriteFlags, ZeroFlags};
use crate::export::core::failure::{Action, Failure, Failures, Operation};
use crate::export::core::hand_over::HandOver;
use crate::export::core::journal::Journal;
use crate::export::core::loss::Losses;
use crate::export::core::metrics::ExportMetrics;
use crate::export::core::watch::Lingering;
use crate::export::core::write_cache::WriteCache;
use crate::io::iovec::iovec;
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult, IoVec, SourceId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use virtio_bindings::virtio_blk::*;

/// The byte that ends every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl From<IoResult> for Status {
    fn from(result: IoResult) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(errno) if errno == Errno::ENOTSUP => Status::Unsupported,
            Err(_) => Status::IoError,
        }
    }
}

/// A disk as its queues see it, on whatever worker.
pub struct Disk {
    /// Whose place another may take while nothing is in flight.
    pub root: Child,
    pub options: DiskOptions,
    /// The virtio features that guests are offered, which may not change under them.
    pub features: u64,
    /// In sectors of 512 bytes.
    pub capacity: AtomicU64,
    /// Writes must be durable before they complete: the guest switched the write cache off, or
    /// knows of none.
    pub write_through: AtomicBool,
    pub write_cache: WriteCache,
    pub counters: Counters,
    pub failures: Failures,
    /// `None`: nobody watches.
    pub metrics: Option<Arc<ExportMetrics>>,
    pub lingering: Lingering,
    /// The queues that run: worker and source. For those who have something to say to all of them.
    pub running: Mutex<Vec<(usize, SourceId)>>,
    pub hand_over: HandOver,
    pub journal: Journal,
    pub losses: Losses,
}

/// Requests since the export began. Queues count on their own and add up when they stop, so that
/// workers share no cache line while they work.
#[derive(Default)]
pub struct Counters {
    pub requests: AtomicU64,
    pub slow: AtomicU64,
    pub flushes: AtomicU64,
    pub errors: AtomicU64,
}

/// How a request ended that the storage has not failed.
pub struct Ended {
    pub status: Status,
    /// Bytes written to the guest's memory.
    pub written: u32,
    /// Bytes of the disk that it was about.
    pub bytes: u32,
}

impl From<Status> for Ended {
    fn from(status: Status) -> Ended {
        Ended { status, written: 0, bytes: 0 }
    }
}

/// What one request wants, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    In,
    Out,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
}

/// The 16 bytes that every request begins with.
#[derive(Clone, Copy)]
pub struct Header {
    kind: u32,
    pub sector: u64,
}

pub const HEADER_LEN: usize = 16;

impl Header {
    /// Copies the header from the front of `out`, which holds that much.
    #[inline]
    pub fn read(out: &[libc::iovec]) -> [u8; HEADER_LEN] {
        match out {
            [first, ..] if first.iov_len >= HEADER_LEN => {
                // SAFETY: the segment is mapped and holds that many bytes; the guest may have put it at
                // any address, and may be writing to it.
                unsafe { first.iov_base.cast_const().cast::<[u8; HEADER_LEN]>().read_volatile() }
            }
            _ => {
                let mut header = [0; HEADER_LEN];
                // SAFETY: the segments are mapped guest memory.
                unsafe { IoVec::from_raw(out) }.copy_to(&mut header);
                header
            }
        }
    }

    pub fn parse(bytes: [u8; HEADER_LEN]) -> Header {
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let sector = u64::from_le_bytes(sector);
        Header { kind: u32::from_le_bytes([a, b, c, d]) & !VIRTIO_BLK_T_BARRIER, sector }
    }

    pub fn kind(self) -> Option<Kind> {
        Some(match self.kind {
            VIRTIO_BLK_T_IN => Kind::In,
            VIRTIO_BLK_T_OUT => Kind::Out,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => return None,
        })
    }
}

impl Disk {
    /// The disk that an export of `node` is.
    pub fn new(node: Arc<Node>, options: DiskOptions) -> Disk {
        Disk {
            features: config::features(&node, &options),
            capacity: AtomicU64::new(node.len() / SECTOR),
            write_through: AtomicBool::new(options.write_through),
            write_cache: WriteCache::default(),
            counters: Counters::default(),
            failures: Failures::default(),
            metrics: None,
            lingering: Lingering::default(),
            running: Mutex::default(),
            hand_over: HandOver::default(),
            journal: Journal::default(),
            losses: Losses::default(),
            root: Child::new("root", node),
            options,
        }
    }

    /// What the disk is on, for all but the fast road.
    pub fn node(&self) -> Arc<Node> {
        self.root.node()
    }

    /// Checks a transfer's range and gives its offset in bytes. It begins at a block and is made of
    /// whole sectors; its end may lie inside a block, as qemu-storage-daemon allows: the block size
    /// is advice to the guest, not the unit of the protocol (section 5.2.4).
    pub fn transfer_range(&self, sector: u64, len: u64) -> Option<u64> {
        let mask = self.options.logical_block_size as u64 - 1;
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        let inside = end <= self.capacity.load(Ordering::Relaxed) * SECTOR;
        (inside && offset & mask == 0 && len.is_multiple_of(SECTOR)).then_some(offset)
    }

    /// Does a request on the slow road. `out` is what follows the header, `into` what comes before
    /// the status byte; both hold less than 4 GiB.
    ///
    /// # Errors
    /// What the storage has failed.
    pub async fn run(
        &self,
        kind: Kind,
        sector: u64,
        out: IoVec<'_>,
        into: IoVec<'_>,
        durable: bool,
    ) -> Result<Ended, Failure> {
        let ended = self.run_once(kind, sector, out, into, durable).await;
        if ended.is_err() {
            self.losses.note(self.failures.export(), &self.node()).await;
        }
        ended
    }

    async fn run_once(
        &self,
        kind: Kind,
        sector: u64,
        out: IoVec<'_>,
        into: IoVec<'_>,
        durable: bool,
    ) -> Result<Ended, Failure> {
        let failed =
            |operation, offset, len| move |errno| Failure { operation, offset, len, errno };
        let ok = |written, bytes| Ok(Ended { status: Status::Ok, written, bytes });
        match kind {
            Kind::In => {
                let len = into.len();
                let Some(at) = self.transfer_range(sector, len) else {
                    return Ok(Status::IoError.into());
                };
                self.node().read(at, &into).await.map_err(failed(Operation::Read, at, len))?;
                ok(len as u32, len as u32)
            }
            Kind::Out => {
                let len = out.len();
                let at = match self.transfer_range(sector, len) {
                    Some(at) if self.options.writable => at,
                    _ => return Ok(Status::IoError.into()),
                };
                let flags = if durable { WriteFlags::FUA } else { WriteFlags::empty() };
                let written = self.node().write(at, &out, flags).await;
                written.map_err(failed(Operation::Write, at, len))?;
                ok(0, len as u32)
            }
            Kind::Flush if self.losses.any() => Err(failed(Operation::Flush, 0, 0)(Errno::EIO)),
            Kind::Flush => {
                self.node().flush().await.map_err(failed(Operation::Flush, 0, 0))?;
                ok(0, 0)
            }
            Kind::GetId => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                let serial = self.options.serial.as_bytes();
                let n = serial.len().min(id.len());
                id[..n].copy_from_slice(&serial[..n]);
                into.copy_from(&id);
                ok(into.len().min(id.len() as u64) as u32, 0)
            }
            Kind::Discard | Kind::WriteZeroes => self.discard_or_zero(kind, &out, durable).await,
        }
    }

    /// One segment of section 5.2.6's `virtio_blk_discard_write_zeroes`; the configuration space
    /// says that we take no more.
    async fn discard_or_zero(
        &self,
        kind: Kind,
        out: &IoVec<'_>,
        durable: bool,
    ) -> Result<Ended, Failure> {
        const SEGMENT: usize = 16;
        if !self.options.writable {
            return Ok(Status::IoError.into());
        }
        if out.len() > SEGMENT as u64 {
            return Ok(Status::Unsupported.into());
        }
        if out.len() < SEGMENT as u64 {
            return Ok(Status::IoError.into());
        }
        let mut bytes = [0; SEGMENT];
        out.copy_to(&mut bytes);
        let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
        let sector = u64::from_le_bytes(sector);
        let count = u32::from_le_bytes([a, b, c, d]);
        let flags = u32::from_le_bytes([e, f, g, h]);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let unknown = flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if count > config::MAX_DISCARD_SECTORS {
            return Ok(Status::IoError.into());
        }
        let len = count as u64 * SECTOR;
        let Some(at) = self.transfer_range(sector, len) else {
            return Ok(Status::IoError.into());
        };
        // After the range, as qemu-storage-daemon does: guests see one order of checks.
        if unknown || unmap && kind == Kind::Discard {
            return Ok(Status::Unsupported.into());
        }
        let (operation, result) = match kind {
            Kind::Discard => (Operation::Discard, self.node().discard(at, len).await),
            _ => {
                let mut zero = ZeroFlags::empty();
                zero.set(ZeroFlags::UNMAP, unmap);
                zero.set(ZeroFlags::FUA, durable);
                (Operation::WriteZeroes, self.node().zero(at, len, zero).await)
            }
        };
        result.map_err(|errno| Failure { operation, offset: at, len, errno })?;
        Ok(Ended { status: Status::Ok, written: 0, bytes: len as u32 })
    }

    /// Decides what is done about a request that the storage has failed, and tells of it.
    pub fn failed(&self, failure: Failure) -> Action {
        let mut action = self.options.failures.action(&failure);
        let durable = match failure.operation {
            Operation::Flush => true,
            Operation::Read => false,
            _ => self.write_through.load(Ordering::Relaxed) && self.node().is_poisoned(),
        };
        let in_vain = action == Action::Stop && durable;
        if in_vain {
            action = Action::Report;
        }
        self.log_failure(&failure, in_vain);
        self.failures.note(self.node().name(), failure, action);
        action
    }

    pub fn log_failure(&self, failure: &Failure, in_vain: bool) {
        let seen = self.counters.errors.fetch_add(1, Ordering::Relaxed) + 1;
        let (export, node) = (self.failures.export(), self.node());
        let node = node.name();
        let Failure { operation, offset, len, errno } = failure;
        let operation = operation.name();
        let why = if in_vain {
            "; it is reported, not held: after a failed fsync the kernel says yes to the next one, \
             and what did not land is lost all the same"
        } else {
            ""
        };
        log::warn!(
            export;
            "{node}: {operation} of {len} bytes at {offset} failed: {errno} (error {seen}){why}"
        );
    }
}

/// The part of a list of segments from byte `from` on, `len` bytes long, without allocation where
/// the cut falls between segments or inside the first and last: the list is changed in place.
///
/// Returns the range of segments that remain. `from + len` must lie inside the list.
pub fn trim(list: &mut [libc::iovec], from: usize, len: usize) -> std::ops::Range<usize> {
    let mut start = 0;
    let mut skip = from;
    while start < list.len() && skip >= list[start].iov_len {
        skip -= list[start].iov_len;
        start += 1;
    }
    if skip > 0 {
        let segment = list[start];
        list[start] =
            iovec(segment.iov_base.cast::<u8>().wrapping_add(skip), segment.iov_len - skip);
    }
    let mut end = start;
    let mut left = len;
    while left > 0 {
        let n = left.min(list[end].iov_len);
        list[end].iov_len = n;
        left -= n;
        end += 1;
    }
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trim_keeps_exactly_the_asked_bytes() {
        let bytes: Vec<u8> = (0..60).collect();
        let lens = [16usize, 1, 20, 3, 20];
        for from in 0..=60 {
            for len in 0..=60 - from {
                let mut at = 0;
                let mut list: Vec<_> = lens
                    .iter()
                    .map(|&n| {
                        at += n;
                        iovec(bytes.as_ptr().cast_mut().wrapping_add(at - n), n)
                    })
                    .collect();
                let range = trim(&mut list, from, len);
                let mut got = vec![0; len];
                // SAFETY: all inside `bytes`, and only read.
                let part = unsafe { IoVec::from_raw(&list[range]) };
                assert_eq!(part.len(), len as u64);
                part.copy_to(&mut got);
                assert_eq!(got, bytes[from..from + len]);
            }
        }
    }
}
