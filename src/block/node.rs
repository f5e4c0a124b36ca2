//! A node of the block graph, as its users hold it.
//!
//! A node does once what no driver should do again: range, permission, overlap, the ladder of ways to write
//! zeroes (`requests`), alignment with bounce buffers and splitting to limits (`pieces`). Its driver is
//! called only with requests that obey the contract in [`super::driver`]. The fast path ([`Node::map`]) is here.

mod pieces;
mod requests;

use super::bitmap::Bitmaps;
use super::current_traits::{self, CurrentTraits};
use super::driver::{Abilities, Access, Driver, Mapping, ReadMapping, Target};
use super::event::Unflushed;
use super::overlap::Overlap;
use super::threshold::WriteMarks;
use super::working_memory::{CurrentWorkingMemory, WorkingMemory};
use super::{Notices, Perm, Perms};
use crate::io::sync::Mutex;
use crate::io::{Blocking, Errno, InFlight, IoResult, epoch};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};

/// QEMU's sector: lengths are rounded up to it, whatever the image's is.
pub const SECTOR: u64 = 512;

/// Common options of every node, whatever its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// No writes, ever.
    pub read_only: bool,
    /// `discard=unmap`: discards are passed on, and zeroing may give space back.
    pub discard: bool,
    pub detect_zeroes: DetectZeroes,
    /// `cache.direct`: around the host's page cache.
    pub direct: bool,
    /// `cache.no-flush`: a flush does nothing.
    pub no_flush: bool,
    /// Opened without locks and read-only, whoever else uses it.
    pub force_share: bool,
}

/// Whether writes of nothing but zero bytes become zero requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    #[default]
    Off,
    On,
    /// As `On`, and the space may be deallocated.
    Unmap,
}

/// Counts of the discards that were passed to a driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discards {
    pub worked: u64,
    pub failed: u64,
    /// Of those that worked.
    pub bytes: u64,
}

#[derive(Default)]
struct DiscardCounts {
    worked: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

impl DiscardCounts {
    fn continue_from(&self, old: &DiscardCounts) {
        for (new, old) in
            [(&self.worked, &old.worked), (&self.failed, &old.failed), (&self.bytes, &old.bytes)]
        {
            new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn count(&self, bytes: u64, worked: bool) {
        match worked {
            true => {
                self.worked.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            false => {
                self.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// An open disk, or a layer of one, shared by all its users.
pub struct Node {
    name: String,
    driver: Box<dyn Driver>,
    pub(super) traits: CurrentTraits,
    pub(super) working_memory: CurrentWorkingMemory,
    options: NodeOptions,
    overlap: Overlap,
    bitmaps: Arc<Bitmaps>,
    marks: WriteMarks,
    discards: DiscardCounts,
    /// The threads for work that blocks or takes long.
    blocking: Blocking,
    notices: Arc<Notices>,
    /// The permissions that all users hold together ([`Perm`]), none while inactive; set by the
    /// graph.
    held: AtomicU8,
    /// The same whether active or not, and, in the upper half, what they allow others; set by the
    /// graph.
    perms: AtomicU16,
    /// Its image is ours ([`super::graph::Activity`]); set by the graph.
    active: AtomicBool,
    /// Nothing can be written any more ([`Driver::freeze`]); set by the graph.
    frozen: AtomicBool,
    unflushed: Unflushed,
    /// The queues that may have requests on the fast path through this node.
    pub(super) members: Mutex<Vec<Arc<epoch::Member>>>,
}

impl Node {
    /// A node without users.
    pub fn new(
        name: String,
        driver: Box<dyn Driver>,
        options: NodeOptions,
        notices: Arc<Notices>,
    ) -> Arc<Node> {
        Node::with_share(name, driver, options, notices, Blocking::default())
    }

    /// As [`Node::new`]; its work that blocks is done in this share of the threads.
    pub fn with_share(
        name: String,
        driver: Box<dyn Driver>,
        options: NodeOptions,
        notices: Arc<Notices>,
        blocking: Blocking,
    ) -> Arc<Node> {
        let traits = current_traits::of_node(&*driver, &options);
        let bitmaps = driver.bitmap_store().map(|store| store.bitmaps().clone());
        Arc::new(Node {
            name,
            bitmaps: bitmaps.unwrap_or_default(),
            working_memory: WorkingMemory::of(&*driver, &traits).into(),
            driver,
            traits: traits.into(),
            options,
            overlap: Overlap::default(),
            marks: WriteMarks::default(),
            discards: DiscardCounts::default(),
            blocking,
            notices,
            held: AtomicU8::new(0),
            perms: AtomicU16::new(0),
            active: AtomicBool::new(true),
            frozen: AtomicBool::new(false),
            unflushed: Unflushed::default(),
            members: Mutex::default(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What runs work that blocks, for all nodes of the disk.
    pub fn blocking(&self) -> &Blocking {
        &self.blocking
    }

    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    pub fn options(&self) -> NodeOptions {
        self.options
    }

    /// Whether nobody can have a permission to write to it.
    pub fn is_read_only(&self) -> bool {
        self.traits.abilities().contains(Abilities::READ_ONLY) || self.is_frozen()
    }

    /// Whether it was opened to be written to and is below others now.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// For the graph, which has ensured that nobody writes, or that the driver is thawed.
    pub(super) fn set_frozen(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Relaxed);
        if frozen {
            // What the image keeps is as it was stored.
            self.bitmaps.keep_stored(&self.members());
        }
    }

    /// Takes over the state of the node that this one succeeds, as far as its image does not store it. Nothing of
    /// either is in flight.
    pub(super) fn continue_from(&self, old: &Node) {
        self.marks.continue_from(&old.marks);
        self.discards.continue_from(&old.discards);
        self.bitmaps.continue_from(&old.bitmaps, &self.members());
        self.bitmaps.resize(self.len(), &self.members());
    }

    /// The disk's length as its users see it: in bytes, a multiple of [`SECTOR`]. What is between the driver's own
    /// length and this reads as zeroes until it is written.
    pub fn len(&self) -> u64 {
        self.driver.len().next_multiple_of(SECTOR)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bitmaps that record what is written to the node.
    pub fn bitmaps(&self) -> &Arc<Bitmaps> {
        &self.bitmaps
    }

    /// The memory that requests may need here and below.
    pub fn working_memory(&self) -> WorkingMemory {
        self.working_memory.get()
    }

    pub(super) fn marks(&self) -> &WriteMarks {
        &self.marks
    }

    pub(super) fn notices(&self) -> &Notices {
        &self.notices
    }

    /// The discards that were passed on so far.
    pub fn discards(&self) -> Discards {
        let DiscardCounts { worked, failed, bytes } = &self.discards;
        let [worked, failed, bytes] = [worked, failed, bytes].map(|n| n.load(Ordering::Relaxed));
        Discards { worked, failed, bytes }
    }

    /// What all users hold together.
    pub fn held(&self) -> Perm {
        Perm::from_bits_retain(self.held.load(Ordering::Relaxed))
    }

    /// For the graph, when a change of permissions is committed.
    pub(super) fn set_perms(&self, perms: Perms) {
        let both = u16::from_le_bytes([perms.held.bits(), perms.shared.bits()]);
        self.perms.store(both, Ordering::Relaxed);
        let held = if self.is_active() { perms.held } else { Perm::empty() };
        self.held.store(held.bits(), Ordering::Relaxed);
    }

    pub(super) fn perms(&self) -> Perms {
        let [held, shared] = self.perms.load(Ordering::Relaxed).to_le_bytes();
        Perms { held: Perm::from_bits_retain(held), shared: Perm::from_bits_retain(shared) }
    }

    /// Whether the image is ours: its locks are held, and it can be written to if it can at all.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// For the graph, which takes the locks before and gives them up after.
    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
        self.set_perms(self.perms());
    }

    /// The first node from this one downwards that keeps what was answered in memory that outlives the
    /// process; none where flushes, which hand over what is kept, do nothing.
    pub fn journaled(self: &Arc<Node>) -> Option<Arc<Node>> {
        let mut at = self.clone();
        while at.driver.journaled().is_none() {
            let below = at.primary()?;
            at = below;
        }
        (!at.options.no_flush).then_some(at)
    }

    // ---- The fast path

    /// Maps the bytes from `at` on, without I/O, locks or allocation. The answer is `Slow` for a write that must wait
    /// for another, must be aligned, or is not permitted.
    ///
    /// The caller has checked that the range is inside the disk ([`Node::len`]), because asking all nodes on the way
    /// for their length would cost more than the rest.
    pub fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        if access != Access::Read
            && (self.overlap.has_barrier()
                || self.options.detect_zeroes != DetectZeroes::Off
                || self.check_writable().is_err()
                || !self.marks.allows(at + want))
        {
            return Mapping::slow(want);
        }
        if !self.takes(at, want) {
            return Mapping::slow(want);
        }
        let mapping = self.driver.map(inflight, at, want, access);
        if access != Access::Read
            && let Target::Data { .. } = mapping.target
            && !self.bitmaps.record_fast(inflight, at, mapping.len)
        {
            return Mapping::slow(want);
        }
        mapping
    }

    /// Maps a read from `at` on, down a chain of backing files. The disk may end before the range does.
    pub fn map_chain<'a>(&'a self, inflight: &'a InFlight, at: u64, mut want: u64) -> Mapping<'a> {
        let mut layer = self;
        loop {
            let there = layer.len().saturating_sub(at);
            if there == 0 {
                return Mapping { len: want, target: Target::Zero };
            }
            want = want.min(there);
            if !layer.takes(at, want) {
                return Mapping::slow(want);
            }
            match layer.driver.map_read(inflight, at, want) {
                ReadMapping::Here(mapping) => return mapping,
                ReadMapping::Below(below, len) => (layer, want) = (below, len),
            }
        }
    }

    /// Whether the driver can take a transfer as it is.
    fn takes(&self, at: u64, len: u64) -> bool {
        (at | len) & (self.traits.request_align() as u64 - 1) == 0
            && len <= self.traits.max_transfer() as u64
    }

    pub(super) fn unflushed(&self) -> &Unflushed {
        &self.unflushed
    }

    pub(super) fn check_writable(&self) -> IoResult {
        let may = self.held().intersects(Perm::WRITE | Perm::WRITE_UNCHANGED);
        if may && !self.traits.abilities().contains(Abilities::READ_ONLY) {
            Ok(())
        } else {
            Err(Errno::EPERM)
        }
    }
}
