//! The driver `nbd`: a disk that a server exports (the NBD protocol's client).
//!
//! | file | it holds |
//! |---|---|
//! | `entry` | the entry in the list of drivers; making an image on an export |
//! | `options`, `name` | options, and the names `nbd://…` |
//! | `connect`, `handshake` | connections, and what is agreed on |
//! | `shared` | what all workers have of an export |
//! | `link` | a worker's connection: a source of the worker |
//! | `requests`, `ranges`, `send`, `receive` | requests in flight, and the bytes that go there and back |
//! | `reconnect`, `flushes` | what becomes of them when a connection is lost |
//! | `submit` | requests of the slow path: over this worker's connection or another's |
//!
//! The fast path ends here as it ends at a file, once the worker has a connection: data go straight from and to
//! the guest's memory. With a server that allows it (MULTI_CONN) each worker has its own connection; with others
//! one worker has the only one, and the rest hand their requests over.

mod connect;
mod entry;
mod flushes;
mod handshake;
mod link;
mod name;
mod options;
mod ranges;
mod receive;
mod reconnect;
mod requests;
mod send;
mod shared;
mod submit;

pub use entry::ENTRY;

use crate::block::{
    Abilities, Access, Driver, DriverEntry, Error, Extent, HandOver, Image, Leaf, LocalFuture,
    Mapping, NodeOptions, Place, Preallocation, Precision, Status, Target as MapTarget, Traits,
    WriteFlags, ZeroFlags,
};
use crate::io::{Durable, Errno, InFlight, Io, IoResult, IoVec, Op, Started, Token};
use crate::nbd::request::{
    CMD_BLOCK_STATUS, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
};
use crate::nbd::{Allocation, CommandFlags, ExportFlags, MAX_DATA};
use crate::options::Map;
use connect::{Connection, Target};
use requests::{Ask, Memory, Owner};
use shared::Shared;
use std::sync::Arc;

/// Bytes that one request without data is for: servers take their time.
const MOST_WITHOUT_DATA: u64 = 1 << 30;

/// An export, open.
pub struct Nbd {
    shared: Arc<Shared>,
    traits: Traits,
    /// `cache.no-flush`: nothing needs to be durable.
    no_flush: bool,
}

impl Nbd {
    fn new(target: Target, connection: Connection, node: &NodeOptions) -> Nbd {
        let agreed = connection.agreed;
        let has = |flag| agreed.flags.contains(flag);
        let is_read_only = has(ExportFlags::READ_ONLY);
        let mut abilities = Abilities::empty();
        abilities.set(Abilities::READ_ONLY, node.read_only || is_read_only);
        abilities.set(Abilities::FUA, has(ExportFlags::SEND_FUA));
        let zeroes = has(ExportFlags::SEND_WRITE_ZEROES) && !is_read_only;
        abilities.set(Abilities::ZERO | Abilities::ZERO_UNMAP, zeroes);
        let trims = has(ExportFlags::SEND_TRIM) && !is_read_only && node.discard;
        abilities.set(Abilities::DISCARD, trims);
        // A server that says nothing takes whole sectors, if it has nothing else.
        let usual = if agreed.size.is_multiple_of(512) { 512 } else { 1 };
        let align = agreed.sizes.map_or(usual, |sizes| sizes.minimum);
        let down = |len: u64| len - len % u64::from(align);
        let maximum = agreed.sizes.map_or(MAX_DATA, |sizes| sizes.maximum.min(MAX_DATA));
        let traits = Traits {
            request_align: align,
            buffer_align: 1,
            max_transfer: down(maximum.into()).max(align.into()) as u32,
            max_segments: send::MOST_SEGMENTS,
            zero_align: align,
            max_zero: MOST_WITHOUT_DATA,
            discard_align: align,
            max_discard: MOST_WITHOUT_DATA,
            optimal_io: agreed.sizes.map_or(0, |sizes| sizes.preferred),
            abilities,
        };
        let shared = Arc::new(Shared::new(target, connection));
        Nbd { shared, traits, no_flush: node.no_flush }
    }

    fn flags(&self) -> ExportFlags {
        self.shared.agreed.flags
    }

    fn durable(&self, wanted: bool) -> CommandFlags {
        match wanted && !self.no_flush && self.flags().contains(ExportFlags::SEND_FUA) {
            true => CommandFlags::FUA,
            false => CommandFlags::empty(),
        }
    }

    async fn run(&self, command: u16, flags: CommandFlags, offset: u64, len: u64) -> IoResult {
        let ask = Ask { command, flags, offset, len, memory: None };
        submit::run(&self.shared, ask).await.map(|_| ())
    }

    async fn flush_all(&self) -> IoResult {
        let flush = self.shared.flushes.begin()?;
        // A server without flushes has nothing to flush.
        if self.flags().contains(ExportFlags::SEND_FLUSH) {
            self.run(CMD_FLUSH, CommandFlags::empty(), 0, 0).await?;
        }
        self.shared.flushes.end(flush)
    }

    /// What the server says of a range.
    async fn ask_status(&self, at: u64, len: u64) -> IoResult<(u64, u64)> {
        let align = u64::from(self.traits.request_align);
        let begin = at - at % align;
        let end = (at + len.min(MOST_WITHOUT_DATA)).next_multiple_of(align);
        let end = end.min(self.shared.agreed.size);
        let ask = Ask {
            command: CMD_BLOCK_STATUS,
            flags: CommandFlags::REQ_ONE,
            offset: begin,
            len: end - begin,
            memory: None,
        };
        let (found, flags) = submit::run(&self.shared, ask).await?.ok_or(Errno::EIO)?;
        match found.saturating_sub(at - begin).min(len) {
            // Less than a block, which the protocol forbids.
            0 => Err(Errno::EIO),
            found => Ok((found, flags)),
        }
    }
}

impl Driver for Nbd {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn len(&self) -> u64 {
        self.shared.agreed.size
    }

    fn filename(&self) -> Option<String> {
        name::of(&self.shared.target.options)
    }

    fn own_options(&self) -> Map {
        self.shared.target.options.to_map()
    }

    fn map<'a>(&'a self, _: &'a InFlight, at: u64, want: u64, access: Access) -> Mapping<'a> {
        // A worker gets its connection with its first request of the slow path.
        if access == Access::DurableWrite && !self.traits.abilities.contains(Abilities::FUA)
            || !self.shared.links.is_here()
        {
            return Mapping::slow(want);
        }
        Mapping { len: want, target: MapTarget::Data { leaf: self, offset: at } }
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(submit::read(&self.shared, at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        let flags = self.durable(flags.contains(WriteFlags::FUA));
        Box::pin(submit::write(&self.shared, at, from, flags))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, wanted: ZeroFlags) -> LocalFuture<'a, IoResult> {
        let is_durable = wanted.contains(ZeroFlags::FUA);
        let mut flags = self.durable(is_durable);
        flags.set(CommandFlags::NO_HOLE, !wanted.contains(ZeroFlags::UNMAP));
        let is_fast = wanted.contains(ZeroFlags::NO_FALLBACK);
        flags.set(CommandFlags::FAST_ZERO, is_fast);
        Box::pin(async move {
            if is_fast && !self.flags().contains(ExportFlags::SEND_FAST_ZERO) {
                return Err(Errno::ENOTSUP);
            }
            self.run(CMD_WRITE_ZEROES, flags, at, len).await?;
            let is_owed = is_durable && !self.no_flush && !flags.contains(CommandFlags::FUA);
            if is_owed { self.flush_all().await } else { Ok(()) }
        })
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.run(CMD_TRIM, CommandFlags::empty(), at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.flush_all())
    }

    /// `base:allocation` tells holes, which have undefined data unless they are zeroes. A dirty bitmap that stands
    /// in for it has the same bit for what is dirty, so that maps show that as no data, as QEMU's do.
    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move {
            let place = Some(Place { child: None, offset: at });
            let extent =
                |len, status| Ok(Extent { len, status: status | Status::ALLOCATED, place });
            let has_bitmap = self.shared.target.options.dirty_bitmap.is_some();
            if self.shared.agreed.context.is_none()
                || precision == Precision::Allocation && !has_bitmap
            {
                return extent(len, Status::DATA);
            }
            let (found, flags) = match self.ask_status(at, len).await {
                Ok(found) => found,
                Err(errno) if has_bitmap => return Err(errno),
                // What nobody can tell is data.
                Err(_) => return extent(len, Status::DATA),
            };
            let flags = Allocation::from_bits_retain(flags);
            let is_hole = flags.contains(Allocation::HOLE);
            if flags.contains(Allocation::ZERO) {
                let data = if is_hole { Status::empty() } else { Status::DATA };
                return extent(found, Status::ZERO | data);
            }
            // A hole that may read as anything is data to who copies it.
            match is_hole && has_bitmap {
                true => Ok(Extent { len: found, status: Status::ALLOCATED, place: None }),
                false => extent(found, Status::DATA),
            }
        })
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn leaf(&self) -> Option<&dyn Leaf> {
        Some(self)
    }

    fn uses_network(&self) -> bool {
        true
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.shared.close())
    }
}

impl Leaf for Nbd {
    unsafe fn start(&self, _: &Io, op: Op, token: Token) -> Started {
        let (command, flags, offset, segments) = match op {
            Op::Read { offset, segments } => (CMD_READ, CommandFlags::empty(), offset, segments),
            Op::Write { offset, segments, durable } => {
                (CMD_WRITE, self.durable(durable == Durable::Yes), offset, segments)
            }
            _ => return Started::Done(Err(Errno::ENOTSUP)),
        };
        let io = crate::io::current();
        // `map` has answered that there is one.
        let Some(link) = self.shared.links.get(&io) else {
            return Started::Done(Err(Errno::EIO));
        };
        // SAFETY: the caller keeps the list in place and the memory mapped until the completion.
        let memory = Some(unsafe { Memory::new(segments) });
        let ask = Ask { command, flags, offset, len: segments.len(), memory };
        link.submit(&io, ask, Owner::Queue(token));
        Started::Pending
    }
}

/// Nothing is kept here of what is on the export but its length.
impl HandOver for Nbd {}

impl Image for Nbd {
    fn resize(&self, len: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            match len == self.len() {
                true => Ok(()),
                false => Err(Error::new("Cannot resize NBD nodes")),
            }
        })
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            ENTRY.growth.check(preallocation)?;
            match len <= self.len() {
                true => Ok(()),
                false => Err(Error::new("Cannot grow NBD nodes")),
            }
        })
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }
}
