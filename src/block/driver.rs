//! The contract between the block layer and what implements it: formats, filters and protocols.
//!
//! Callers hold a [`Node`](super::Node), which checks every request once; a [`Driver`] can rely on
//! what is promised here, and its first line is its real work.
//!
//! # What a node has checked before a driver sees a request
//!
//! * The range lies inside [`Driver::len`] (rounded up to `request_align` for transfers), and is not
//!   empty.
//! * For reads and writes: offset and length are multiples of [`Traits::request_align`], the length
//!   is at most [`Traits::max_transfer`], and the memory is aligned to [`Traits::buffer_align`].
//! * For zero and discard: offset and length are multiples of the driver's own alignment, and the
//!   length is at most its own limit.
//! * The caller's permission: a node without the write permission gets no writes.
//! * A write, zero or discard never overlaps a read-modify-write of the same bytes.
//!
//! Past the end go only writes and zero requests marked `GROW`, to drivers with [`Abilities::GROW`],
//! for users with the resize permission.
//!
//! # Ordering
//!
//! Requests in flight together have no order among themselves. A completed write is seen by every
//! later read of any worker. [`Driver::flush`] makes durable every write completed, on any worker,
//! before the flush was called; it waits for no others.
//!
//! # State on each worker
//!
//! Requests come on every worker that serves a user of the node, and a driver is shared by all of them. If
//! it needs something that each worker has for itself (a queue pair, a connection), it declares a
//! [`PerWorker`](crate::io::PerWorker). The first request of the slow road on a worker makes the state;
//! [`Driver::map`] asks whether there is one, and the leaf finds it by its index. A driver closes its slot
//! in [`Driver::close`], before what the states stand on goes, and waits until the workers have let go.
//! A worker that ends lets go of its state before.

use super::{Child, DriverEntry, Image};
use crate::io::{Durable, Errno, InFlight, IoResult, IoVec, Op, Segments, Started};
use crate::options::Map;
use std::fs::File;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A future that stays on the worker it was made on.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// How the next process knows that a killed one's I/O has ended. What the kernel or a server were still
/// doing for it when it died could otherwise undo what comes later.
#[derive(Clone, Debug)]
pub enum Fence {
    /// It does not.
    Never,
    /// The I/O ends with the workers' rings; nothing of this storage tells when these have ended.
    Rings,
    /// As `Rings`; and the next process needs locks that belong to these open files. While a ring keeps
    /// the files ([`crate::io::Local::attach_pinned`]), the locks outlive all that is in flight in it,
    /// on whichever storage.
    Locks(Vec<Arc<File>>),
    /// Whoever opens the storage waits for it.
    Storage,
}

impl Fence {
    /// Of two storages that one request may need.
    pub fn and(self, other: Fence) -> Fence {
        match (self, other) {
            (Fence::Never, _) | (_, Fence::Never) => Fence::Never,
            (Fence::Locks(mut all), Fence::Locks(more)) => {
                all.extend(more);
                Fence::Locks(all)
            }
            (Fence::Locks(files), _) | (_, Fence::Locks(files)) => Fence::Locks(files),
            (Fence::Rings, _) | (_, Fence::Rings) => Fence::Rings,
            (Fence::Storage, Fence::Storage) => Fence::Storage,
        }
    }

    /// Whether the next process does know.
    pub fn holds(&self) -> bool {
        matches!(self, Fence::Locks(_) | Fence::Storage)
    }

    /// The files that rings with I/O of the storage have to keep open.
    pub fn files(&self) -> &[Arc<File>] {
        match self {
            Fence::Locks(files) => files,
            _ => &[],
        }
    }
}

/// What a driver can do and what its requests must look like. Constant but for changes of what it stands on, which are
/// made while nothing is in flight ([`super::current_traits`]).
///
/// Alignments are in bytes: those of transfers powers of two, those of zero and discard requests
/// multiples of `request_align`. Limits are in bytes, multiples of the alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Of offset and length of every read and write. At most 2 MiB.
    pub request_align: u32,
    /// Of each memory segment's address; its length is a multiple of this or of `request_align`,
    /// whichever is less.
    pub buffer_align: u32,
    /// Most bytes in one read or write.
    pub max_transfer: u32,
    /// Most memory segments in one read or write.
    pub max_segments: u32,
    /// Of offset and length of a zero request. At least `request_align`.
    pub zero_align: u32,
    pub max_zero: u64,
    /// Of offset and length of a discard. At least `request_align`.
    pub discard_align: u32,
    pub max_discard: u64,
    /// The size and alignment that writes should have to be quick (a physical block, a cluster).
    pub optimal_io: u32,
    pub abilities: Abilities,
}

bitflags::bitflags! {
    /// What a driver does natively; what is missing here, the node does another way or refuses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Abilities: u32 {
        /// [`Driver::zero`].
        const ZERO = 1;
        /// [`Driver::zero`] gives the space back when asked to ([`ZeroFlags::UNMAP`]).
        const ZERO_UNMAP = 1 << 1;
        /// [`Driver::discard`], and the node is configured to pass it on (`discard=unmap`).
        const DISCARD = 1 << 2;
        /// [`WriteFlags::FUA`] without a flush of everything.
        const FUA = 1 << 3;
        /// A discarded range reads as zeroes.
        const DISCARD_ZEROES = 1 << 4;
        /// Nothing can be written.
        const READ_ONLY = 1 << 5;
        /// Writing or zeroing past the end makes it longer ([`WriteFlags::GROW`]); what was skipped
        /// reads as zeroes. Its [`Driver::map`] answers `Slow` for a write past the end.
        const GROW = 1 << 6;
    }
}

impl Default for Traits {
    /// A driver without limits or abilities, with QEMU's bounds on one request.
    fn default() -> Traits {
        Traits {
            request_align: 1,
            buffer_align: 1,
            max_transfer: Traits::MAX_TRANSFER,
            max_segments: 1024,
            zero_align: 1,
            max_zero: Traits::MAX_TRANSFER as u64,
            discard_align: 1,
            max_discard: Traits::MAX_TRANSFER as u64,
            optimal_io: 0,
            abilities: Abilities::empty(),
        }
    }
}

impl Traits {
    /// The most that one request may transfer anywhere: 2 GiB less a 64 KiB page, what the kernel
    /// takes in one read (MAX_RW_COUNT), rounded so that any alignment fits.
    pub const MAX_TRANSFER: u32 = 0x7fe0_0000;
}

/// The most memory that one request takes in a driver itself, not counting what stands below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// Writes that begin or end inside such a unit, in bytes, copy the rest of it through memory. 0: none do.
    pub copy_unit: u32,
    /// What any request may take beside that, in bytes.
    pub other: u32,
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    /// A write that is durable when it completes: only to be answered with `Data` where the mapping
    /// itself is durable, and by a leaf that has [`Abilities::FUA`].
    DurableWrite,
}

impl Access {
    /// The operation that does this from `offset` on, with the memory of `segments`.
    #[inline]
    pub fn op(self, offset: u64, segments: Segments) -> Op {
        match self {
            Access::Read => Op::Read { offset, segments },
            Access::Write => Op::Write { offset, segments, durable: Durable::No },
            Access::DurableWrite => Op::Write { offset, segments, durable: Durable::Yes },
        }
    }
}

/// Where the first `len` bytes of a range live.
pub struct Mapping<'a> {
    /// Bytes, from the start of the range; not zero, and never more than was asked.
    pub len: u64,
    pub target: Target<'a>,
}

pub enum Target<'a> {
    /// At `offset` of a leaf, unchanged. The caller may start the transfer on the leaf directly.
    Data { leaf: &'a dyn Leaf, offset: u64 },
    /// Nowhere: the bytes read as zeroes.
    Zero,
    /// Not to be told without I/O, locks or allocation: take the slow road.
    Slow,
}

/// Another node than the one that was asked, if one decides, and for how many bytes.
pub type Decider = (Option<Arc<super::Node>>, u64);

/// What one node says to a read on the fast road.
pub enum Way<'a> {
    Here(Mapping<'a>),
    /// The first bytes, this many, are those that the node's backing file has in the same place.
    Below(&'a super::Node, u64),
}

impl Mapping<'_> {
    pub fn slow(len: u64) -> Self {
        Mapping { len, target: Target::Slow }
    }
}

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct WriteFlags: u32 {
        /// Durable at completion, the mapping of the bytes included.
        const FUA = 1;
        /// The bytes reach past the end, which moves. Set by the node, whatever its callers say.
        const GROW = 1 << 1;
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ZeroFlags: u32 {
        /// The space may be given back (deallocated).
        const UNMAP = 1;
        /// Fail with ENOTSUP rather than write out zeroes: only a quick way is wanted.
        const NO_FALLBACK = 1 << 1;
        /// Durable at completion.
        const FUA = 1 << 2;
        /// As [`WriteFlags::GROW`].
        const GROW = 1 << 3;
    }

    /// What is known of a range ([`Driver::status`]).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Status: u32 {
        /// The bytes are stored somewhere, and must be read to be known.
        const DATA = 1;
        /// The bytes read as zeroes.
        const ZERO = 1 << 1;
        /// This node decides what is read, not its backing file.
        const ALLOCATED = 1 << 2;
        /// Stored compressed: the offset is of no use to a reader.
        const COMPRESSED = 1 << 3;
    }
}

/// What is known of the first `len` bytes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not zero, at most what was asked.
    pub len: u64,
    pub status: Status,
    /// Where the bytes are kept: the driver's child, and the offset in it. For a protocol, its own
    /// offset and no child.
    pub place: Option<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into [`Driver::children`]; `None` for the node itself.
    pub child: Option<usize>,
    /// Bytes.
    pub offset: u64,
}

/// How much a status request may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Find out which parts read as zeroes, even if the file system has to be asked.
    Zeroes,
    /// Only tell whether this node or its backing file decides; data that is really a hole may be
    /// called data.
    Allocation,
}

/// A format, filter or protocol. The module's text says what has been checked before.
#[expect(
    clippy::len_without_is_empty,
    reason = "a disk is asked how long it is, not whether it is"
)]
pub trait Driver: Send + Sync + 'static {
    /// What is true of every node of the driver.
    fn entry(&self) -> &'static DriverEntry;

    /// As in `driver=NAME`.
    fn name(&self) -> &'static str {
        self.entry().name
    }

    fn traits(&self) -> Traits;

    /// As constant as the traits; what is asked for before a request begins ([`super::working_memory`]).
    fn scratch(&self) -> Scratch {
        Scratch::default()
    }

    /// The length of the disk, in bytes. Any length: not necessarily a multiple of anything.
    fn len(&self) -> u64;

    /// The nodes that this one stands on. Their number and roles are constant while it is open.
    fn children(&self) -> &[Child] {
        &[]
    }

    /// Where do the bytes from `at` on live? On the way of every request of the fast road, so:
    /// no I/O, no lock, no allocation, no write to memory that workers share.
    ///
    /// What it answers holds as long as `inflight` does, or longer.
    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        let _ = (inflight, at, access);
        Mapping::slow(want)
    }

    /// [`Driver::map`] for reads. Drivers with backing files leave those that they have nothing for to the
    /// node, which goes down the chain without recursion.
    fn way<'a>(&'a self, inflight: &'a InFlight, at: u64, want: u64) -> Way<'a> {
        Way::Here(self.map(inflight, at, want, Access::Read))
    }

    /// The backing file that decides what the first bytes of a range are, or none if the driver decides itself;
    /// and for how many bytes this holds, more than zero.
    fn decider(&self, at: u64, len: u64) -> LocalFuture<'_, IoResult<Decider>> {
        let _ = at;
        Box::pin(std::future::ready(Ok((None, len))))
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult>;

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult>;

    /// Makes the range read as zeroes, in a quicker way than writing them out; ENOTSUP when there is
    /// none for this range, and the node writes.
    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        let _ = (at, len, flags);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// The bytes are no longer needed. Advice: what cannot be given back is left alone, and that is
    /// success. Called only with [`Abilities::DISCARD`].
    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        let _ = (at, len);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult>;

    /// What is known of the range from `at` on. Agrees byte for byte with `map` and `read`.
    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>>;

    /// What it holds on a child, by index, and allows others there, when this node's own users hold and allow
    /// `own`. The default follows from the child's role.
    fn child_perms(&self, child: usize, own: super::Perms) -> super::Perms {
        self.children()[child].role().perms(self.entry().kind, own)
    }

    /// Locks of the storage that follow the permissions, for protocols that can tell other
    /// processes.
    fn locks(&self) -> Option<&dyn Locks> {
        None
    }

    /// How a process that opens the same storage with the same permissions after this one was killed
    /// knows that all of this one's I/O has ended. `own` is what the node's users hold and allow
    /// together; of an inactive node, what they will. Asked of drivers without children only
    /// ([`Node::fence`](super::Node::fence)).
    fn fence(&self, own: super::Perms) -> Fence {
        let _ = own;
        Fence::Never
    }

    /// How the image goes over to another process and comes from one. Without it the node can be
    /// neither opened inactive nor made so.
    fn hand_over(&self) -> Option<&dyn HandOver> {
        None
    }

    /// How the driver keeps what was answered in memory that outlives the process. Without it all of that
    /// is with the kernel.
    fn journaled(&self) -> Option<&dyn Journaled> {
        None
    }

    /// Whether a flush of its own storage, that of its children apart, has failed in such a way that all later
    /// ones will ([`Node::is_poisoned`](super::Node::is_poisoned)).
    fn is_poisoned(&self) -> bool {
        false
    }

    /// An operator accepts what failed flushes of its own storage have lost: later ones are done again.
    fn forgive(&self) {}

    /// Where I/O can be started without suspending, if this driver is the bottom of the graph.
    fn leaf(&self) -> Option<&dyn Leaf> {
        None
    }

    /// What lets its device reach a guest's memory, if it has one that does.
    fn memory(&self) -> Option<&dyn super::DeviceMemory> {
        None
    }

    /// Whether it connects to servers while it serves. The sandbox leaves a process the system calls for that
    /// only if a node that is open says so.
    fn uses_network(&self) -> bool {
        false
    }

    /// The drive that it works on itself, if that tells of its health.
    fn drive(&self) -> Option<std::sync::Arc<dyn super::Drive>> {
        None
    }

    /// What hears the events of the requests that pass ([`super::event`]).
    fn debugger(&self) -> Option<&dyn super::Debugger> {
        None
    }

    /// The length of its storage, if that changes by itself.
    fn own_length(&self) -> Option<&dyn super::OwnLength> {
        None
    }

    /// Operations on the disk as a whole.
    fn image(&self) -> Option<&dyn Image> {
        None
    }

    /// How the image keeps bitmaps, if it can.
    fn bitmap_store(&self) -> Option<&dyn super::BitmapStore> {
        None
    }

    /// How it stores data compressed, if it can.
    fn compress(&self) -> Option<&dyn super::Compress> {
        None
    }

    /// The file that the disk is in, as it was named: a protocol's own, or that of the only child.
    fn filename(&self) -> Option<String> {
        match self.children() {
            [child] => child.node().driver().filename(),
            _ => None,
        }
    }

    /// Its own options that decide which data the disk has, as they were given.
    fn own_options(&self) -> Map {
        Map::new()
    }

    /// A file name that stands for the node, with its options and what is below it, which `child` stands for
    /// if it has a name itself. Formats without options of their own are called as their file, and need none.
    fn name_over(&self, child: Option<&str>) -> Option<String> {
        let _ = child;
        if self.children().is_empty() { self.filename() } else { None }
    }

    /// Undoes what it did for those who wrote, as long as nobody does: asked for when the last user
    /// who could write has left. None if there is nothing to undo. Until it is done,
    /// [`Driver::child_perms`] may keep what it needs for it.
    fn unwritten(&self) -> Option<LocalFuture<'_, IoResult>> {
        None
    }

    /// Nobody will write to the image until it is opened again, or thawed, as it comes to lie below another: brings
    /// everything to the storage, as [`Driver::close`] does, and from then on [`Driver::child_perms`] asks for
    /// no more than reading takes, and [`Driver::close`] writes nothing. No request is in flight, and none but
    /// reads will come.
    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes [`Driver::freeze`] back: requests of all kinds may come again. Nobody has written to its storage
    /// meanwhile.
    fn thaw(&self) {}

    /// Brings everything to a rest before the driver is dropped: metadata written, hints given. No
    /// request is in flight and none will come.
    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The bottom of the graph on the fast road: starts a transfer and comes back at once.
pub trait Leaf: Send + Sync {
    /// Starts a read or a write ([`Access::op`]) that obeys the traits of the leaf's node, at an offset
    /// in the leaf's own space. It is done as a whole or fails. What else an [`Op`] may ask for, it need
    /// not do (ENOTSUP).
    ///
    /// `token`'s source is told of the completion, unless the answer is `Started::Done`.
    ///
    /// # Safety
    /// The list of segments stays in place, and the memory mapped, until the completion.
    unsafe fn start(&self, io: &crate::io::Io, op: Op, token: crate::io::Token) -> Started;
}

/// What a driver does when its image becomes ours, and when it becomes another's
/// ([`super::graph::Activity`]). The defaults suit one that keeps nothing of what is in the image.
pub trait HandOver: Send + Sync {
    /// Others may have changed the image since it was opened or ours: forgets what it knows of it
    /// and looks anew. What the node stands on has done so, the locks are held, and no request is
    /// in flight.
    fn activate(&self) -> LocalFuture<'_, Result<(), super::Error>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Writes all that it has to; the node is flushed afterwards. No request is in flight, and none
    /// but reads comes before [`HandOver::activate`]. What it stands on is still active.
    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Memory that outlives the process, for whoever takes over when it was killed. It is zeroes at first, and
/// what it holds when it comes from another process may be anything.
pub trait Survivor: Send + Sync {
    fn words(&self) -> &[AtomicU64];
}

/// What a driver keeps in memory that outlives the process, instead of waiting for the storage.
pub trait Journaled: Send + Sync {
    /// Takes up what an earlier process has left there, and keeps its own there from now on, if nobody
    /// else's memory is used. No request of those that the memory comes from is in flight.
    ///
    /// # Errors
    /// What was left cannot be taken up: it is lost if anybody writes to the disk.
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), super::Error>>;

    /// Hands over all that it keeps, and uses the memory no more; also if it fails.
    fn detach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, IoResult>;
}

/// How permissions reach other processes: prepared for all nodes of a change first, and then either
/// all committed or all rolled back.
pub trait Locks: Send + Sync {
    /// Takes what `new` has and `old` has not; gives nothing up. May open the file anew.
    fn prepare(&self, old: super::Perms, new: super::Perms) -> Result<(), super::Error>;
    /// Gives up what only `old` has. Cannot fail.
    fn commit(&self, old: super::Perms, new: super::Perms);
    /// Undoes `prepare`. Cannot fail.
    fn rollback(&self, old: super::Perms, new: super::Perms);
    /// Takes what stands for `held`, which nobody objects to, as `from` has it: the locks of another node with the
    /// same storage, which gives them up then.
    ///
    /// # Errors
    /// It is other storage.
    fn take_over(&self, from: &dyn Locks, held: super::Perms) -> Result<(), super::Error>;
    /// The device and the number of the file that is locked, if it is one.
    fn file(&self) -> Option<(u64, u64)> {
        None
    }
}
