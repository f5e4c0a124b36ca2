//! The driver `nvme`: a namespace of an NVMe controller that this process drives itself ([`vublk_vfio`]).
//!
//! | file | it holds |
//! |---|---|
//! | `entry` | options, the name `nvme://…`, the entry in the list of drivers |
//! | `shared` | the controllers of this process, shared by the nodes on them |
//! | `worker_queue` | a worker's queue pair: starting, polling, sleeping, ending |
//! | `submit` | requests of the slow path: by this worker's queue pair or another's |
//!
//! The fast path ends here as it ends at a file, once the worker has a queue pair. A guest's memory is
//! reached by the device where it is; what it does not reach, or NVMe cannot name, is copied.

mod entry;
mod shared;
mod submit;
mod worker_queue;

pub use entry::{ENTRY, NvmeOptions};
pub use shared::adopt;

use crate::block::{
    Abilities, Access, Admission, DeviceMemory, Drive, Driver, DriverEntry, Error, Extent, Fence,
    GuestRegion, HandOver, Image, Leaf, LocalFuture, Mapping, NodeOptions, OwnLength, Perms, Place,
    Preallocation, Precision, Signal, Status, Target, Traits, WriteFlags, ZeroFlags,
};
use crate::io::{self, Durable, Errno, InFlight, Io, IoResult, IoVec, Op, Started, Token};
use crate::options::Map;
use shared::{Claim, Shared};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vublk_vfio::{HostRange, Namespace, Segments};

/// An open namespace.
pub struct Nvme {
    filename: String,
    namespace: Namespace,
    /// Bytes, as the users of the node know it.
    len: AtomicU64,
    length: Arc<Signal>,
    /// Called by the controller when a namespace has changed.
    _listener: Arc<dyn Fn() + Send + Sync>,
    traits: Traits,
    /// `cache.no-flush`: nothing needs to be durable.
    no_flush: bool,
    /// There is a cache that loses what it has when the power fails.
    has_cache: bool,
    guest_dma: bool,
    /// Dropped last: with it goes the controller, if no other node is on it.
    claim: Claim,
}

impl Nvme {
    fn new(
        claim: Claim,
        namespace: Namespace,
        options: &NvmeOptions,
        node: &NodeOptions,
    ) -> Result<Nvme, Error> {
        let (identity, limits) = (*namespace.identity(), namespace.limits());
        let controller = claim.shared().controller()?;
        let block = namespace.block_size();
        let mut abilities = Abilities::FUA;
        abilities.set(Abilities::ZERO, limits.zero > 0);
        abilities.set(Abilities::ZERO_UNMAP, limits.zero > 0 && identity.zeroes_deallocate);
        abilities.set(Abilities::DISCARD, limits.discard > 0);
        abilities.set(Abilities::READ_ONLY, node.read_only || identity.is_protected);
        let traits = Traits {
            request_align: block,
            // What NVMe cannot name is copied.
            buffer_align: 1,
            max_transfer: limits.transfer,
            zero_align: block,
            max_zero: limits.zero.max(u64::from(block)),
            discard_align: block,
            max_discard: limits.discard.max(u64::from(block)),
            optimal_io: identity.write_granularity.unwrap_or(0).saturating_mul(block),
            abilities,
            ..Traits::default()
        };
        let length = Signal::new()?;
        let clone = length.clone();
        let listener: Arc<dyn Fn() + Send + Sync> = Arc::new(move || clone.notify());
        // Before the length is queried: later changes are reported.
        controller.listen(&listener);
        Ok(Nvme {
            filename: options.filename(),
            len: AtomicU64::new(namespace.len()),
            namespace,
            length,
            _listener: listener,
            traits,
            no_flush: node.no_flush,
            has_cache: controller.identity().has_write_cache,
            guest_dma: options.guest_dma,
            claim,
        })
    }

    fn shared(&self) -> &Arc<Shared> {
        self.claim.shared()
    }

    /// Asks the controller how long the namespace is.
    async fn refresh_length(&self) -> Result<(), Error> {
        let controller = self.shared().controller()?;
        crate::io::offload(move || controller.refresh()).await;
        self.take();
        Ok(())
    }
}

impl Driver for Nvme {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn filename(&self) -> Option<String> {
        Some(self.filename.clone())
    }

    fn own_options(&self) -> Map {
        Map::from_iter([("filename", &*self.filename)])
    }

    fn map<'a>(&'a self, _: &'a InFlight, at: u64, want: u64, _: Access) -> Mapping<'a> {
        // A worker gets its queue pair with its first request of the slow path.
        if !self.shared().worker_queues().is_here() {
            return Mapping::slow(want);
        }
        Mapping { len: want, target: Target::Data { leaf: self, offset: at } }
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(submit::read(self.shared(), into, move |segments, token| {
            self.namespace.read(at, into.len() as u32, segments, token)
        }))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        let durable = flags.contains(WriteFlags::FUA) && !self.no_flush;
        Box::pin(submit::write(self.shared(), from, move |segments, token| {
            self.namespace.write(at, from.len() as u32, segments, durable, token)
        }))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        let durable = flags.contains(ZeroFlags::FUA) && !self.no_flush;
        let unmap = flags.contains(ZeroFlags::UNMAP);
        Box::pin(submit::run_without_data(self.shared(), move |token| {
            self.namespace.zero(at, len, unmap, durable, token)
        }))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let range = self.namespace.discard_range(at, len).map(u64::to_le_bytes).concat();
            submit::write(self.shared(), &IoVec::from_ref(&range), |segments, token| {
                self.namespace.discard(segments, 1, token)
            })
            .await
        })
    }

    /// The controller's own order (NVM Express Base Specification 2.0, section 7.1): what was
    /// completed before, on whatever queue, is durable.
    fn flush(&self) -> LocalFuture<'_, IoResult> {
        if !self.has_cache {
            return Box::pin(std::future::ready(Ok(())));
        }
        Box::pin(submit::run_without_data(self.shared(), |token| self.namespace.flush(token)))
    }

    fn status(&self, at: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let place = Some(Place { child: None, offset: at });
        let extent = Extent { len, status: Status::DATA | Status::ALLOCATED, place };
        Box::pin(std::future::ready(Ok(extent)))
    }

    /// Who takes the controller over stops it first, and nobody can while this process has it.
    fn fence(&self, _: Perms) -> Fence {
        Fence::Storage
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn leaf(&self) -> Option<&dyn Leaf> {
        Some(self)
    }

    fn memory(&self) -> Option<&dyn DeviceMemory> {
        self.guest_dma.then_some(self)
    }

    fn drive(&self) -> Option<Arc<dyn Drive>> {
        Some(self.shared().clone())
    }

    fn own_length(&self) -> Option<&dyn OwnLength> {
        Some(self)
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    /// Shuts the controller down, if no other node is on it.
    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.claim.give_up())
    }
}

impl Leaf for Nvme {
    unsafe fn start(&self, io: &Io, op: Op, token: Token) -> Started {
        // `map` has answered that there is one.
        let Some(worker_queue) = self.shared().worker_queues().get(io) else {
            return Started::Done(Err(Errno::EIO));
        };
        // SAFETY: the caller keeps the list in place and the memory mapped until the completion.
        let list = |segments: io::Segments| unsafe { Segments::new(segments.as_slice()) };
        let token = token.to_bits();
        let request = match op {
            Op::Read { offset, segments } => {
                self.namespace.read(offset, segments.len() as u32, list(segments), token)
            }
            Op::Write { offset, segments, durable } => {
                let durable = durable == Durable::Yes && !self.no_flush;
                let len = segments.len() as u32;
                self.namespace.write(offset, len, list(segments), durable, token)
            }
            _ => return Started::Done(Err(Errno::ENOTSUP)),
        };
        worker_queue.submit(io, request);
        Started::Pending
    }
}

impl DeviceMemory for Nvme {
    fn admit(&self, region: GuestRegion) -> Result<Admission, Error> {
        // SAFETY: the region stays mapped until the admission, which holds the registration, is gone.
        // It is a guest's: nobody holds references to it.
        let Some(memory) = (unsafe { HostRange::new(region.as_ptr(), region.len()) }) else {
            return Err(Error::new("memory at address zero"));
        };
        let registration = self.shared().register(memory)?;
        Ok(Box::new(registration))
    }
}

/// Two processes have one namespace by a controller each, which tell nobody of the other: nothing is
/// kept here of what is on it but its length.
impl HandOver for Nvme {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.refresh_length())
    }
}

impl OwnLength for Nvme {
    fn signal(&self) -> Arc<Signal> {
        self.length.clone()
    }

    fn found(&self) -> u64 {
        self.namespace.len()
    }

    fn take(&self) {
        self.len.store(self.namespace.len(), Ordering::Relaxed);
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        // Who follows the length sees that there is none any more.
        self.length.notify();
    }
}

impl Image for Nvme {
    /// A namespace has the length it has; asking for it makes a change known that the controller did
    /// not tell of.
    fn resize(&self, len: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.refresh_length().await?;
            match len == self.len() {
                true => Ok(()),
                false => Err(Error::new("Cannot resize device files")),
            }
        })
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            ENTRY.growth.check(preallocation)?;
            self.refresh_length().await?;
            match len <= self.len() {
                true => Ok(()),
                false => Err(Error::new("Cannot grow device files")),
            }
        })
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }
}
