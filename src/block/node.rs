//! A node of the block graph: what callers hold.
//!
//! A node does once what no driver should do again: range, permission, alignment (with bounce
//! buffers), splitting to limits, overlap, the ladder of ways to write zeroes. Its driver is called
//! only with requests that obey the contract in [`super::driver`].

use super::bitmap::Bitmaps;
use super::current_traits::{self, CurrentTraits};
use super::driver::*;
use super::event::{self, Unflushed};
use super::extents::REST;
use super::overlap::Overlap;
use super::threshold::WriteMarks;
use super::working_memory::{CurrentWorkingMemory, WorkingMemory};
use super::{Event, Notices, Perm, Perms};
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Blocking, Errno, InFlight, IoResult, IoVec, epoch, is_aligned};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};

/// QEMU's sector: lengths are rounded up to it, whatever the image's is.
pub const SECTOR: u64 = 512;

/// The most memory that one request may take for a bounce buffer, in bytes, unless one block is more;
/// longer requests go in pieces.
pub const BOUNCE_LIMIT: u64 = 1 << 20;

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
    /// Opened without locks, read-only, beside anybody.
    pub force_share: bool,
}

/// Whether writes of nothing but zero bytes become zero requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    #[default]
    Off,
    On,
    /// And the space may be given back.
    Unmap,
}

/// What has become of the discards that were passed to a driver.
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

/// An open disk, or a layer of one. Shared by everyone who uses it.
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
    /// What takes longer than a worker may be kept.
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
    /// Who may have requests on the fast road through this node.
    pub(super) members: Mutex<Vec<Arc<epoch::Member>>>,
}

impl Node {
    /// A node that nobody holds a permission on yet.
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

    /// Whether it was opened to be written to and lies below others now.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// For the graph, which has seen to it that nobody writes, or that the driver is thawed.
    pub(super) fn set_frozen(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Relaxed);
        if frozen {
            // What the image keeps is as it was stored.
            self.bitmaps.keep_stored(&self.members());
        }
    }

    /// Takes over what is known of a node that this one succeeds, and that its image does not keep. Nothing of
    /// either is in flight.
    pub(super) fn continue_from(&self, old: &Node) {
        self.marks.continue_from(&old.marks);
        self.discards.continue_from(&old.discards);
        self.bitmaps.continue_from(&old.bitmaps, &self.members());
        self.bitmaps.resize(self.len(), &self.members());
    }

    /// The disk's length as its users see it: in bytes, a multiple of [`SECTOR`]. What lies between
    /// the driver's own length and this reads as zeroes until it is written.
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

    // ---- The fast road

    /// Where the bytes from `at` on live, without I/O, locks or allocation. A write that must wait
    /// for another, has to be aligned, or is not permitted, is answered with `Slow`.
    ///
    /// The caller has checked that the range lies inside the disk ([`Node::len`]), because asking
    /// all nodes on the way for their length would cost more than the rest.
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

    /// Where the bytes of a read from `at` on live, of a disk that may end before: down a chain of backing files,
    /// as far as need be.
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
            match layer.driver.way(inflight, at, want) {
                Way::Here(mapping) => return mapping,
                Way::Below(below, len) => (layer, want) = (below, len),
            }
        }
    }

    /// Whether the driver can take a transfer as it is.
    fn takes(&self, at: u64, len: u64) -> bool {
        (at | len) & (self.traits.request_align() as u64 - 1) == 0
            && len <= self.traits.max_transfer() as u64
    }

    // ---- The slow road

    /// Reads. Any offset and length inside the disk, any memory.
    pub async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        self.check_range(at, into.len())?;
        if into.is_empty() {
            return Ok(());
        }
        let align = self.traits.request_align() as u64;
        if (at | into.len()) & (align - 1) == 0 && into.is_aligned(self.traits.buffer_align()) {
            return self.read_pieces(at, into).await;
        }
        // Bounce: whole blocks into memory of our own, and from there.
        let mut done = 0;
        while done < into.len() {
            let start = round_down(at + done, align);
            let end = (at + into.len()).next_multiple_of(align).min(start + self.bounce_limit());
            let mut bounce = self.bounce(end - start)?;
            self.read_pieces(start, &bounce.io_vec()).await?;
            let skip = at + done - start;
            let n = (into.len() - done).min(end - start - skip);
            into.slice(done, n).copy_from(&bounce[skip as usize..][..n as usize]);
            done += n;
        }
        Ok(())
    }

    /// Writes. Any offset and length inside the disk, any memory. With the resize permission, on a
    /// disk that can ([`Abilities::GROW`]), also past the end, which moves, for direct I/O to the end
    /// of the block.
    pub async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        self.check_writable()?;
        let mut flags = flags;
        flags.set(WriteFlags::GROW, self.grows(at, from.len())?);
        if from.is_empty() {
            return if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) };
        }
        self.mark_write(at, from.len());
        let (_writing, _recorded) = (self.writing(), self.record(at, from.len()));
        if self.options.detect_zeroes != DetectZeroes::Off && is_zero(from) {
            let mut zero = ZeroFlags::empty();
            zero.set(ZeroFlags::UNMAP, self.options.detect_zeroes == DetectZeroes::Unmap);
            zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
            return self.zero(at, from.len(), zero).await;
        }
        let native = self.traits.abilities().contains(Abilities::FUA);
        let pass = if native { flags } else { flags - WriteFlags::FUA };
        let align = self.traits.request_align() as u64;
        if (at | from.len()) & (align - 1) == 0 {
            let _listed = self.overlap.write(at..at + from.len()).await;
            self.event(Event::Pwritev).await;
            self.write_aligned(at, from, pass).await?;
        } else {
            self.write_modified(at, from, pass).await?;
        }
        self.event(Event::PwritevDone).await;
        if flags.contains(WriteFlags::FUA) && !native { self.flush().await } else { Ok(()) }
    }

    pub(super) fn unflushed(&self) -> &Unflushed {
        &self.unflushed
    }

    /// Makes a range read as zeroes, by the quickest way there is. Past the end as [`Node::write`].
    pub async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.check_writable()?;
        let mut flags = flags;
        flags.set(ZeroFlags::GROW, self.grows(at, len)?);
        self.mark_write(at, len);
        let (_writing, _recorded) = (self.writing(), self.record(at, len));
        let mut pass = flags - ZeroFlags::FUA;
        if !self.options.discard {
            pass -= ZeroFlags::UNMAP;
        }
        let align = self.traits.zero_align() as u64;
        let end = at + len;
        let (middle, middle_end) = (at.next_multiple_of(align).min(end), end - end % align);
        self.event(Event::PwritevZero).await;
        if middle < middle_end && self.traits.abilities().contains(Abilities::ZERO) {
            self.zero_written(at, middle - at, flags).await?;
            let mut pos = middle;
            while pos < middle_end {
                let n = (middle_end - pos).min(self.traits.max_zero());
                let listed = self.overlap.write(pos..pos + n).await;
                let result = self.driver.zero(pos, n, pass).await;
                drop(listed);
                match result {
                    Err(errno) if errno.is_unsupported() => {
                        self.zero_written(pos, n, flags).await?
                    }
                    other => other?,
                }
                pos += n;
            }
            self.zero_written(middle_end, end - middle_end, flags).await?;
        } else {
            self.zero_written(at, len, flags).await?;
        }
        self.event(Event::PwritevDone).await;
        if flags.contains(ZeroFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    /// Advises that a range is no longer needed. What does not fill whole units, or cannot be given
    /// back, is left as it is, and that is success.
    pub async fn discard(&self, at: u64, len: u64) -> IoResult {
        self.check_writable()?;
        self.check_range(at, len)?;
        if !self.traits.abilities().contains(Abilities::DISCARD) {
            return Ok(());
        }
        let align = self.traits.discard_align() as u64;
        let (mut pos, end) = (at.next_multiple_of(align), (at + len) - (at + len) % align);
        let (_writing, _recorded) = (self.writing(), self.record(pos, end.saturating_sub(pos)));
        while pos < end {
            let n = (end - pos).min(self.traits.max_discard());
            let _listed = self.overlap.write(pos..pos + n).await;
            let result = self.driver.discard(pos, n).await;
            self.discards.count(n, result.is_ok());
            match result {
                Err(errno) if errno.is_unsupported() => return Ok(()),
                other => other?,
            }
            pos += n;
        }
        Ok(())
    }

    /// Makes what this node takes from its backing file in a range its own: reads it and writes it
    /// back, with no other write in between. The range grows to whole blocks; what the node has
    /// itself is left as it is.
    pub async fn populate(&self, at: u64, len: u64) -> IoResult {
        self.check_writable()?;
        self.check_range(at, len)?;
        let align = self.traits.request_align() as u64;
        let (start, end) = (round_down(at, align), (at + len).next_multiple_of(align));
        let _listed = self.overlap.serialise(start..end, || self.members()).await;
        let mut pos = start;
        while pos < end.min(self.driver.len()) {
            let left = end.min(self.driver.len()) - pos;
            let extent = self.driver.status(pos, left, Precision::Allocation).await?;
            let n = extent.len.next_multiple_of(align).min(self.bounce_limit());
            if !extent.status.contains(Status::ALLOCATED) {
                let mut bounce = self.bounce(n)?;
                self.read_pieces(pos, &bounce.io_vec()).await?;
                self.event(Event::CorWrite).await;
                self.write_back(pos, &bounce.io_vec()).await?;
            }
            pos += n;
        }
        Ok(())
    }

    /// Zeroes are written as such, which may cost no space.
    async fn write_back(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        let (len, align) = (from.len(), self.traits.zero_align() as u64);
        let fits = at.is_multiple_of(align) && len.is_multiple_of(align);
        if fits
            && at + len <= self.len()
            && len <= self.traits.max_zero()
            && self.traits.abilities().contains(Abilities::ZERO)
            && is_zero(from)
        {
            match self.driver.zero(at, len, ZeroFlags::empty()).await {
                Err(errno) if errno.is_unsupported() => {}
                result => return result,
            }
        }
        self.write_pieces(at, from, WriteFlags::empty()).await
    }

    /// Makes every write completed before, on any worker, durable.
    pub async fn flush(&self) -> IoResult {
        if self.options.no_flush || self.traits.abilities().contains(Abilities::READ_ONLY) {
            return Ok(());
        }
        match event::are_heard() {
            true => self.flush_heard().await,
            false => self.driver.flush().await,
        }
    }

    /// What is known of a range: at least its first byte, at most `len` bytes.
    pub async fn status(&self, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
        self.check_range(at, len)?;
        let own = self.driver.len();
        if at >= own {
            return self.status_of_rest(at, len, precision).await;
        }
        let mut extent = self.driver.status(at, len.min(own - at), precision).await?;
        extent.len = extent.len.min(len);
        if at + extent.len == own && extent.status == REST {
            extent.len = len;
        }
        Ok(extent)
    }

    /// Records a write in the bitmaps now, and once more when it has ended.
    pub(super) fn record(&self, at: u64, len: u64) -> Recorded<'_> {
        let recorded = Recorded { node: self, at, len };
        recorded.mark();
        recorded
    }

    pub(super) fn check_range(&self, at: u64, len: u64) -> IoResult {
        match at.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// Whether a write to this range reaches past the end, with the blocks that it is rounded out to.
    ///
    /// # Errors
    /// It must not.
    fn grows(&self, at: u64, len: u64) -> IoResult<bool> {
        let may =
            self.traits.abilities().contains(Abilities::GROW) && self.held().contains(Perm::RESIZE);
        if !may {
            return self.check_range(at, len).map(|()| false);
        }
        let align = self.traits.request_align() as u64;
        let end = at.checked_add(len).and_then(|end| end.checked_next_multiple_of(align));
        let end = end.filter(|&end| i64::try_from(end).is_ok()).ok_or(Errno::EIO)?;
        Ok(len > 0 && end > self.driver.len())
    }

    /// Lists a write of whole blocks as under way, once those that it must wait for have ended.
    pub(super) async fn list_write(&self, range: Range<u64>) -> super::overlap::Listed<'_> {
        self.overlap.write(range).await
    }

    pub(super) fn check_writable(&self) -> IoResult {
        let may = self.held().intersects(Perm::WRITE | Perm::WRITE_UNCHANGED);
        if may && !self.traits.abilities().contains(Abilities::READ_ONLY) {
            Ok(())
        } else {
            Err(Errno::EPERM)
        }
    }

    /// The longest bounce buffer, in bytes: a whole number of blocks.
    fn bounce_limit(&self) -> u64 {
        BOUNCE_LIMIT.max(self.traits.request_align() as u64)
    }

    /// Memory whose every byte is written before it is used.
    fn bounce(&self, len: u64) -> IoResult<AlignedBuf> {
        AlignedBuf::for_overwriting(len as usize, self.memory_align()).ok_or(Errno::ENOMEM)
    }

    fn memory_align(&self) -> usize {
        self.traits.buffer_align().max(self.traits.request_align()) as usize
    }

    /// The next piece of `all` from `done` on that fits the limits of one transfer.
    fn piece<'m>(&self, all: &IoVec<'m>, done: u64) -> IoVec<'m> {
        let mut n = (all.len() - done).min(self.traits.max_transfer() as u64);
        let mut piece = all.slice(done, n);
        let most = self.traits.max_segments() as usize;
        if piece.as_raw().len() > most {
            n = piece.as_raw()[..most].iter().map(|s| s.iov_len as u64).sum();
            n = round_down(n, self.traits.request_align() as u64);
            // So many tiny segments that they do not even fill a block: go by what memory gives.
            n = n.max(self.traits.request_align() as u64).min(all.len() - done);
            piece = all.slice(done, n);
        }
        piece
    }

    /// Whether a transfer fits the limits as it is.
    fn is_one_piece(&self, all: &IoVec<'_>) -> bool {
        let segments = all.as_raw().len() as u64;
        all.len() <= self.traits.max_transfer() as u64
            && segments <= self.traits.max_segments() as u64
    }

    async fn read_pieces(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        if self.is_one_piece(into) {
            return self.driver.read(at, into).await;
        }
        let mut done = 0;
        while done < into.len() {
            let piece = self.piece(into, done);
            if piece.as_raw().len() > self.traits.max_segments() as usize {
                let mut bounce = self.bounce(piece.len())?;
                self.driver.read(at + done, &bounce.io_vec()).await?;
                piece.copy_from(&bounce);
            } else {
                self.driver.read(at + done, &piece).await?;
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Reads a block that a request covers in part: the one that it begins in, ends in, or both.
    async fn read_rest(&self, at: u64, into: &IoVec<'_>, (head, tail): (bool, bool)) -> IoResult {
        self.rounding_event(head.then_some(Event::PwritevRmwHead)).await;
        self.rounding_event(tail.then_some(Event::PwritevRmwTail)).await;
        self.read_block(at, into).await?;
        self.rounding_event(head.then_some(Event::PwritevRmwAfterHead)).await;
        self.rounding_event(tail.then_some(Event::PwritevRmwAfterTail)).await;
        Ok(())
    }

    /// Reads one block, into memory that is aligned for blocks but perhaps not for the disk. Past the
    /// end there are zeroes.
    async fn read_block(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        if at >= self.len() {
            into.zero();
            return Ok(());
        }
        if into.is_aligned(self.traits.buffer_align()) {
            return self.read_pieces(at, into).await;
        }
        let mut bounce = self.bounce(into.len())?;
        self.read_pieces(at, &bounce.io_vec()).await?;
        into.copy_from(&bounce);
        Ok(())
    }

    async fn write_pieces(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        if self.is_one_piece(from) {
            return self.driver.write(at, from, flags).await;
        }
        let mut done = 0;
        while done < from.len() {
            let piece = self.piece(from, done);
            if piece.as_raw().len() > self.traits.max_segments() as usize {
                let mut bounce = self.bounce(piece.len())?;
                piece.copy_to(&mut bounce);
                self.driver.write(at + done, &bounce.io_vec(), flags).await?;
            } else {
                self.driver.write(at + done, &piece, flags).await?;
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Writes whole blocks, from memory that may not be aligned.
    async fn write_aligned(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        if is_aligned(from.as_raw(), self.traits.buffer_align()) {
            return self.write_pieces(at, from, flags).await;
        }
        let mut done = 0;
        while done < from.len() {
            let n = (from.len() - done).min(self.bounce_limit());
            let mut bounce = self.bounce(n)?;
            from.slice(done, n).copy_to(&mut bounce);
            self.write_pieces(at + done, &bounce.io_vec(), flags).await?;
            done += n;
        }
        Ok(())
    }

    /// Read-modify-write: blocks that the request covers in part are read, changed and written
    /// whole, with no other write to them in between.
    async fn write_modified(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        let align = self.traits.request_align() as u64;
        let (start, end) = (round_down(at, align), (at + from.len()).next_multiple_of(align));
        let _listed = self.overlap.serialise(start..end, || self.members()).await;
        let mut pos = start;
        while pos < end {
            let n = (end - pos).min(self.bounce_limit());
            let mut bounce = self.bounce(n)?;
            let tail = n - align;
            let has_tail = pos + n > at + from.len();
            if pos < at {
                let events = (true, has_tail && tail == 0);
                self.read_rest(pos, &bounce.io_vec().slice(0, align), events).await?;
            }
            if has_tail && (tail > 0 || pos >= at) {
                let rest = bounce.io_vec().slice(tail, align);
                self.read_rest(pos + tail, &rest, (false, true)).await?;
            }
            let skip = at.saturating_sub(pos);
            let done = (pos + skip) - at;
            let take = (from.len() - done).min(n - skip);
            from.slice(done, take).copy_to(&mut bounce[skip as usize..][..take as usize]);
            self.event(Event::Pwritev).await;
            self.write_pieces(pos, &bounce.io_vec(), flags).await?;
            pos += n;
        }
        Ok(())
    }

    /// The last rung of the zero ladder: zeroes written as data.
    async fn zero_written(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        if len == 0 {
            return Ok(());
        }
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(Errno::ENOTSUP);
        }
        let memory = len.min(BOUNCE_LIMIT) as usize;
        let zeroes = AlignedBuf::new(memory, self.memory_align()).ok_or(Errno::ENOMEM)?;
        let align = self.traits.request_align() as u64;
        let mut pass = WriteFlags::empty();
        pass.set(WriteFlags::GROW, flags.contains(ZeroFlags::GROW));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeroes.len() as u64);
            let part = zeroes.source().slice(0, n);
            if ((at + done) | n) & (align - 1) == 0 {
                let _listed = self.overlap.write(at + done..at + done + n).await;
                self.write_aligned(at + done, &part, pass).await?;
            } else {
                self.write_modified(at + done, &part, pass).await?;
            }
            done += n;
        }
        Ok(())
    }
}

/// A slow write, until it has ended.
pub(super) struct Recorded<'a> {
    node: &'a Node,
    at: u64,
    len: u64,
}

impl Recorded<'_> {
    fn mark(&self) {
        let Recorded { node, at, len } = *self;
        if !node.bitmaps.is_idle() {
            node.bitmaps.record(at, len, node.len(), || node.members());
        }
    }
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        self.mark();
    }
}

fn round_down(value: u64, align: u64) -> u64 {
    value & !(align - 1)
}

/// Whether all bytes are zero. The memory may change meanwhile; a caller that acts on the answer
/// writes zeroes, which is one of the values that the guest may expect to find.
fn is_zero(list: &IoVec<'_>) -> bool {
    let mut chunk = [0u8; 4096];
    let mut at = 0;
    while at < list.len() {
        let n = (list.len() - at).min(chunk.len() as u64);
        list.slice(at, n).copy_to(&mut chunk);
        if chunk[..n as usize].iter().any(|&b| b != 0) {
            return false;
        }
        at += n;
    }
    true
}
