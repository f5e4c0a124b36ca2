//! The contract between the block layer and its drivers: formats, filters and protocols.
//!
//! Callers hold a [`Node`](super::Node), which checks every request once; a [`Driver`] can rely on
//! what is promised here, and its first line is its real work.
//!
//! # What a node has checked before a driver sees a request
//!
//! * The range is inside [`Driver::len`] (rounded up to `request_align` for transfers), and is not empty.
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
//! Requests come on every worker that serves a user of the node, and a driver is shared by all of them. If it needs
//! something that each worker has for itself (a queue pair, a connection), it declares a
//! [`PerWorker`](crate::io::PerWorker). The first request of the slow path on a worker makes the state;
//! [`Driver::map`] asks whether there is one, and the leaf finds it by its index. A driver closes its slot in
//! [`Driver::close`], before the resources of the states are freed, and waits until the workers have released them. A
//! worker that ends releases its state before.

mod fence;
mod flags;
mod mapping;
mod parts;
mod traits;

pub use crate::io::task::LocalFuture;
pub use fence::Fence;
pub use flags::{Extent, Place, Precision, Status, WriteFlags, ZeroFlags};
pub use mapping::{Access, Decider, Leaf, Mapping, ReadMapping, Target};
pub use parts::{HandOver, Journaled, Locks, Survivor};
pub use traits::{Abilities, Scratch, Traits};

use super::{Child, DriverEntry, Image};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use crate::options::Map;

/// A format, filter or protocol. The module's text says what has been checked before.
#[expect(
    clippy::len_without_is_empty,
    reason = "a disk is asked how long it is, not whether it is"
)]
pub trait Driver: Send + Sync + 'static {
    /// The facts that hold for every node of the driver.
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

    /// The nodes below this one. Their number and roles are constant while it is open.
    fn children(&self) -> &[Child] {
        &[]
    }

    /// Where the bytes from `at` on are stored. Every request of the fast path calls this, so it does
    /// no I/O, takes no lock, allocates nothing and writes no memory that workers share.
    ///
    /// The answer is valid until `inflight` is dropped, or longer.
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

    /// [`Driver::map`] for reads. A driver with a backing file returns [`ReadMapping::Below`] for ranges that it
    /// does not store; the node then walks down the chain without recursion.
    fn map_read<'a>(&'a self, inflight: &'a InFlight, at: u64, want: u64) -> ReadMapping<'a> {
        ReadMapping::Here(self.map(inflight, at, want, Access::Read))
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

    /// Makes the range read as zeroes without writing them; ENOTSUP if it cannot for this range: then the node writes
    /// zeroes.
    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        let _ = (at, len, flags);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// The bytes are no longer needed. This is advice: ranges that cannot be deallocated are left alone, without an
    /// error. Called only with [`Abilities::DISCARD`].
    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        let _ = (at, len);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult>;

    /// The status of the range from `at` on. Agrees byte for byte with `map` and `read`.
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

    /// Whether a flush of its own storage, that of its children apart, has failed permanently, so that all later ones
    /// will ([`Node::is_poisoned`](super::Node::is_poisoned)).
    fn is_poisoned(&self) -> bool {
        false
    }

    /// An operator accepts what failed flushes of its own storage have lost: later ones are done again.
    fn forgive(&self) {}

    /// Where I/O can be started without suspending, if this driver is the bottom of the graph.
    fn leaf(&self) -> Option<&dyn Leaf> {
        None
    }

    /// The interface by which its device reaches guests' memory, if it has one.
    fn memory(&self) -> Option<&dyn super::DeviceMemory> {
        None
    }

    /// Whether it connects to servers while it serves. The sandbox leaves a process the system calls for that
    /// only if a node that is open says so.
    fn uses_network(&self) -> bool {
        false
    }

    /// The drive that it controls itself, if the drive reports its health.
    fn drive(&self) -> Option<std::sync::Arc<dyn super::Drive>> {
        None
    }

    /// The receiver of events of requests above it ([`super::event`]).
    fn debugger(&self) -> Option<&dyn super::Debugger> {
        None
    }

    /// The work that it does when its image is idle, if there is any.
    fn idle(&self) -> Option<&dyn super::Idle> {
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

    /// Undoes what it did for writers while there are none: called when the last user that could write has left. None
    /// if there is nothing to undo. Until it is done, [`Driver::child_perms`] may keep what it needs for it.
    fn unwritten(&self) -> Option<LocalFuture<'_, IoResult>> {
        None
    }

    /// Nobody will write to the image until it is opened again, or thawed, because it is put below another: brings
    /// everything to the storage, as [`Driver::close`] does, and from then on [`Driver::child_perms`] asks for no
    /// more than reading takes, and [`Driver::close`] writes nothing. No request is in flight, and none but reads
    /// will come.
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
