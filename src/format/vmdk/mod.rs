//! VMDK, VMware's format (Virtual Disk Format 5.0): a text descriptor and a sequence of extents.
//!
//! Extents are flat, or sparse of three kinds.
//!
//! | file | it holds |
//! |---|---|
//! | `descriptor` | the text, read |
//! | `edit` | changes of the text |
//! | `encoding` | names in other encodings |
//! | `header` | the header of a hosted sparse extent, and of new ones |
//! | `esx` | the headers of COWD and seSparse extents |
//! | `layout` | what all headers come to, inside limits |
//! | `open` | opening an image: the descriptor, the extents, the parent |
//! | `shared` | what the extents have in common: children, the descriptor as it changes |
//! | `sparse` | how a sparse extent maps its part of the disk |
//! | `packed` | compressed grains |
//! | `space` | grains for what is new |
//! | `write` | writing a sparse extent, and in which order |
//! | `disk` | the disk: requests that are given to the extents |
//! | `empty` | emptying an image over its parent |
//! | `journal` | entries that wait in the front end's memory |
//! | `hand_over` | an image that goes to another process, and comes from one |
//! | `check` | checking |
//! | `info` | what an image says of itself |
//! | `create` | new images |
//! | `create_on_nodes` | the same on nodes of a graph |

mod check;
mod create;
mod create_on_nodes;
mod descriptor;
mod disk;
mod edit;
mod empty;
mod encoding;
mod esx;
mod hand_over;
mod header;
mod info;
mod journal;
mod layout;
mod open;
mod packed;
mod shared;
mod space;
mod sparse;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::format::children;
use crate::io::{InFlight, IoResult, IoVec};
use layout::Packing;
use shared::Shared;
use sparse::Sparse;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: children::HELP,
    features: Features::CHECKS.union(Features::COMPRESSION),
    growth: Growth::Own(&[]),
    create: Some(&create::CREATE),
    probe: Some(Probe::Bytes(|head, _| if probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("vmdk", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// Sparse extents of all kinds that are known by their first bytes, and descriptors.
fn probe(head: &[u8]) -> bool {
    head.starts_with(header::MAGIC) || head.starts_with(esx::COWD_MAGIC) || descriptor::probe(head)
}

/// Bytes of a grain that are taken for the best size of requests where there is none.
const FLAT_UNIT: u64 = 64 << 10;

/// An open image.
///
/// Locks that are held across waits are taken in this order: a range of grains (a sparse extent's `mapping`), its `lock`,
/// the turn to write a slice (`mapping`), that of its `space`, the text of the descriptor (`shared`).
pub struct Vmdk {
    shared: Arc<Shared>,
    /// The disk, from its beginning to its end.
    parts: Vec<Part>,
}

/// An extent, and the bytes of the disk that it has.
struct Part {
    start: u64,
    end: u64,
    kind: descriptor::Kind,
    extent: Extent,
}

enum Extent {
    Sparse(Box<Sparse>),
    /// The disk's bytes, from an offset of a child on.
    Flat {
        child: usize,
        offset: u64,
    },
    Zero,
    /// Nothing may be read of it or written.
    Shut,
}

impl Vmdk {
    /// All sparse extents.
    fn sparse(&self) -> impl Iterator<Item = &Sparse> {
        self.parts.iter().filter_map(|part| match &part.extent {
            Extent::Sparse(sparse) => Some(&**sparse),
            _ => None,
        })
    }

    /// The extent that is all of the disk and compressed, if it is one.
    fn packed(&self) -> Option<&Sparse> {
        let [part] = &self.parts[..] else { return None };
        match &part.extent {
            Extent::Sparse(sparse) if sparse.layout.packing != Packing::No => Some(sparse),
            _ => None,
        }
    }

    /// The largest grain.
    fn grain_size(&self) -> Option<u64> {
        self.sparse().map(|sparse| sparse.layout.grain_size()).max()
    }
}

impl Driver for Vmdk {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.common_traits()
    }

    fn len(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// Copies around a write. Unpacking is bounded by itself.
    fn scratch(&self) -> Scratch {
        let other = self.packed().map_or(0, |sparse| 2 * sparse.packed_limit() as u32);
        Scratch { copy_unit: self.grain_size().unwrap_or(0) as u32, other, ..Scratch::default() }
    }

    fn children(&self) -> &[Child] {
        &self.shared.children
    }

    fn filename(&self) -> Option<String> {
        self.shared.children[0].node().driver().filename()
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        self.map_extent(inflight, at, want, access)
    }

    fn map_read<'a>(&'a self, inflight: &'a InFlight, at: u64, want: u64) -> ReadMapping<'a> {
        self.map_read_in_extents(inflight, at, want)
    }

    fn decider(&self, at: u64, len: u64) -> LocalFuture<'_, IoResult<Decider>> {
        Box::pin(self.decide(at, len))
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(self.read_extents(at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        _: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(self.write_extents(at, from))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(self.zero_extents(at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.discard_extents(at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.flush_all())
    }

    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            self.close_image().await?;
            self.shared.is_frozen.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn thaw(&self) {
        self.shared.is_frozen.store(false, Ordering::SeqCst);
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.close_image())
    }

    fn child_perms(&self, child: usize, own: Perms) -> Perms {
        if self.shared.backing == Some(child) {
            return Perms::backing(own);
        }
        // Closing cuts files when all users are gone.
        let is_frozen = self.shared.is_frozen.load(Ordering::SeqCst);
        Perms::format_with_end(own, self.shared.is_writable && !is_frozen)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn journaled(&self) -> Option<&dyn Journaled> {
        self.journaled_extent().map(|sparse| sparse as &dyn Journaled)
    }

    fn status(
        &self,
        at: u64,
        len: u64,
        precision: Precision,
    ) -> LocalFuture<'_, IoResult<crate::block::Extent>> {
        Box::pin(self.status_of(at, len, precision))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn compress(&self) -> Option<&dyn Compress> {
        Some(self)
    }
}

impl Compress for Vmdk {
    fn unit(&self) -> u64 {
        self.grain_size().unwrap_or(FLAT_UNIT)
    }

    /// Images that keep nothing compressed store it as it is, as in QEMU.
    fn packer(&self) -> Packer {
        match self.packed() {
            Some(_) => packed::packer(),
            None => Arc::new(|_| None),
        }
    }

    fn store<'a>(&'a self, at: u64, units: &'a [&'a [u8]]) -> LocalFuture<'a, IoResult> {
        match self.packed() {
            Some(sparse) => Box::pin(sparse.store_units(at, units)),
            None => Box::pin(std::future::ready(Err(crate::io::Errno::ENOTSUP))),
        }
    }

    fn is_only_way(&self) -> bool {
        self.packed().is_some()
    }
}

impl Image for Vmdk {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(async move {
            let mut sum = 0;
            for child in self.shared.children.iter().filter(|child| !child.is_backing()) {
                sum += allocated_in(child.node()).await?;
            }
            Ok(sum)
        })
    }

    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            match fix {
                Fix::Nothing => self.check_extents(say).await,
                _ => Err(Error::new("This image format does not support checks")
                    .with_errno(crate::io::Errno::ENOTSUP)),
            }
        })
    }

    fn set_backing<'a>(
        &'a self,
        name: Option<&'a str>,
        _: Option<&'a str>,
        node: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(self.change_parent(name, node))
    }

    fn make_empty(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.empty())
    }

    fn info(&self) -> ImageInfo {
        self.image_info()
    }
}
