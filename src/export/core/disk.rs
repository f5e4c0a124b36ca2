//! An exported disk: its node, the guarantees that requests need, and the slow path of requests.
//!
//! The rule held here: after a failed fsync no flush succeeds until an operator accepts the loss. A transport
//! sends every flush through [`Disk::run`].

use super::failure::{Action, Failure, FailureOptions, Failures, Operation};
use super::hand_over::HandOver;
use super::journal::Journal;
use super::loss::Losses;
use super::metrics::{ExportMetrics, Serves};
use super::watch::Lingering;
use super::write_cache::WriteCache;
use crate::block::{Child, Node, Role, SECTOR, WriteFlags, ZeroFlags};
use crate::io::task::yield_now;
use crate::io::{Budget, Errno, IoResult, IoVec, turn_share};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What every export is configured with.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    pub writable: bool,
    /// Every write is durable before it completes, whatever the guest says of the write cache.
    pub write_through: bool,
    /// The reaction to requests that the storage fails.
    pub failures: FailureOptions,
}

/// A disk as the queues of an export see it, on any worker.
pub struct Disk {
    /// The export's name, for the log and for listings.
    pub name: String,
    /// Another node may take its place while nothing is in flight.
    pub root: Child,
    pub options: DiskOptions,
    /// Bytes, a power of two: requests begin at a multiple of it.
    pub block_size: u32,
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
    pub hand_over: HandOver,
    pub journal: Journal,
    pub losses: Losses,
    /// What its requests on the slow path may hold of our memory.
    pub memory: Arc<Budget>,
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

/// One request to a disk. Ranges are checked ([`Disk::transfer_range`]), in bytes.
pub enum Request<'a> {
    Read { at: u64, into: IoVec<'a> },
    Write { at: u64, from: IoVec<'a>, flags: WriteFlags },
    Flush,
    Discard { at: u64, len: u64 },
    WriteZeroes { at: u64, len: u64, flags: ZeroFlags },
}

impl Request<'_> {
    /// What it is and where, as a failure tells it.
    fn place(&self) -> (Operation, u64, u64) {
        match *self {
            Request::Read { at, ref into } => (Operation::Read, at, into.len()),
            Request::Write { at, ref from, .. } => (Operation::Write, at, from.len()),
            Request::Flush => (Operation::Flush, 0, 0),
            Request::Discard { at, len } => (Operation::Discard, at, len),
            Request::WriteZeroes { at, len, .. } => (Operation::WriteZeroes, at, len),
        }
    }
}

impl Disk {
    /// The disk that an export of `node` is.
    pub fn new(
        name: &str,
        node: Arc<Node>,
        options: DiskOptions,
        block_size: u32,
        metrics: Option<Arc<ExportMetrics>>,
    ) -> Disk {
        let memory =
            metrics.as_ref().map_or_else(Budget::of_disk, |metrics| metrics.memory.clone());
        let lost = metrics.as_ref().map(|metrics| metrics.flush_failed.clone());
        Disk {
            name: name.to_owned(),
            capacity: AtomicU64::new(node.len() / SECTOR),
            write_through: AtomicBool::new(options.write_through),
            write_cache: WriteCache::default(),
            counters: Counters::default(),
            failures: Failures::default(),
            metrics,
            lingering: Lingering::default(),
            hand_over: HandOver::default(),
            journal: Journal::default(),
            losses: Losses::new(lost.unwrap_or_default()),
            memory,
            root: Child::new(Role::Root, node),
            options,
            block_size,
        }
    }

    /// What the disk is on, for all but the fast path.
    pub fn node(&self) -> Arc<Node> {
        self.root.node()
    }

    /// The disk is on another node from now on. The graph keeps the old one until all workers have passed.
    pub fn change_node(&self, node: &Arc<Node>) {
        drop(self.root.replace(node.clone()));
        if let Some(metrics) = &self.metrics {
            *metrics.serves.lock() = Serves::of(node);
        }
    }

    /// Takes over the node's size. True if it is news.
    pub fn take_size(&self) -> bool {
        let sectors = self.node().len() / SECTOR;
        if let Some(metrics) = &self.metrics {
            metrics.size.store(sectors * SECTOR, Ordering::Relaxed);
        }
        self.capacity.swap(sectors, Ordering::SeqCst) != sectors
    }

    /// Checks a transfer's range and gives its offset in bytes. It begins at a block and is made of whole sectors;
    /// its end may be inside a block, as qemu-storage-daemon allows: the block size is advice to the guest.
    pub fn transfer_range(&self, sector: u64, len: u64) -> Option<u64> {
        let mask = self.block_size as u64 - 1;
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        let inside = end <= self.capacity.load(Ordering::Relaxed) * SECTOR;
        (inside && offset & mask == 0 && len.is_multiple_of(SECTOR)).then_some(offset)
    }

    /// Does a request on the slow path.
    ///
    /// # Errors
    /// What the storage has failed. If it has lost data, that is recorded by then.
    pub async fn run(&self, request: Request<'_>) -> Result<(), Failure> {
        let (operation, offset, len) = request.place();
        let result = match request {
            Request::Read { at, into } => {
                let node = self.node();
                for_each_piece(&into, async |done, piece| node.read(at + done, piece).await).await
            }
            Request::Write { at, from, flags } => {
                let node = self.node();
                let write =
                    async |done, piece: &IoVec<'_>| node.write(at + done, piece, flags).await;
                for_each_piece(&from, write).await
            }
            Request::Flush if self.losses.any() => Err(Errno::EIO),
            Request::Flush => self.node().flush().await,
            Request::Discard { at, len } => self.node().discard(at, len).await,
            Request::WriteZeroes { at, len, flags } => self.node().zero(at, len, flags).await,
        };
        match result {
            Ok(()) => Ok(()),
            Err(errno) => {
                self.losses.note(&self.name, &self.node()).await;
                Err(Failure { operation, offset, len, errno })
            }
        }
    }

    /// Decides what is done about a request that the storage has failed, and reports it.
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
        let (export, node) = (&*self.name, self.node());
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

    /// Says in the log what the export has done, at its end.
    pub fn log_end(&self) {
        let Counters { requests, slow, flushes, errors } = &self.counters;
        log::info!(
            export = &*self.name;
            "ended: requests={} slow={} flushes={} errors={}",
            requests.load(Ordering::Relaxed),
            slow.load(Ordering::Relaxed),
            flushes.load(Ordering::Relaxed),
            errors.load(Ordering::Relaxed),
        );
    }
}

/// Runs `transfer` on a request's memory in pieces that are no longer than a turn's share, each with its
/// offset; others on the worker have their turn in between.
async fn for_each_piece<'m>(
    memory: &IoVec<'m>,
    transfer: impl AsyncFn(u64, &IoVec<'m>) -> IoResult,
) -> IoResult {
    if memory.len() <= turn_share::BYTES {
        return transfer(0, memory).await;
    }
    let mut done = 0;
    while done < memory.len() {
        let n = (memory.len() - done).min(turn_share::BYTES);
        transfer(done, &memory.slice(done, n)).await?;
        done += n;
        yield_now().await;
    }
    Ok(())
}
