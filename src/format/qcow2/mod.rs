//! qcow2: versions 2 and 3, as QEMU's docs/interop/qcow2 describes them.
//!
//! | file | it holds |
//! |---|---|
//! | `header`, `extensions` | the header, read and written |
//! | `layout` | sizes, indices, table entries |
//! | `options`, `settings`, `open` | what can be asked for, and was; opening |
//! | `life` | whether the image was prepared for writes, and whether it is frozen |
//! | `unclosed` | the mark of an image that is being written |
//! | `order` | the order in which things reach the disk, and who waits for whom |
//! | `nodes` | the file, the backing file, the external data file |
//! | `mapping` | the tables in memory; what [`crate::cow`] asks of the format to find and read a guest's bytes |
//! | `compressed` | compressed clusters: packing and unpacking them |
//! | `clean` | memory of cached tables that were not used is given back |
//! | `create`, `new_image`, `amend`, `downgrade` | making images, and making them others |
//! | `measure` | how long the file of a new image has to be |
//! | `snapshots` | internal snapshots |
//! | `bitmaps` | persistent dirty bitmaps: loaded, marked as in use, stored |
//! | `check`, `info` | checking and repairing; what an image says of itself |
//! | `write`, `zero` | writing, zeroing and discarding: what changes the mapping |
//! | `tables` | new tables, and what has to be on the disk before the first write |
//! | `image_header`, `header_cluster`, `header_steps` | the header in memory, its one writer, and the order of its writes |
//! | `journal` | what the layer's journal of waiting entries asks of the format |
//! | `resize`, `preallocate` | another length of the disk |
//! | `vmstate` | the state of a virtual machine, behind the disk |
//! | `space` | host clusters: taken, counted, given back |
//! | `flush`, `hand_over` | flushing and closing; another process's image that becomes ours |
//! | `backing`, `discard_all` | another backing file; discarding all data |
//! | `metadata` | the parts that say where metadata is, as others look at them |
//! | `overlap`, `metadata_map`, `corrupt` | metadata that must not be overwritten, and its places; reports of corrupt images |

mod amend;
mod backing;
pub mod bitmaps;
pub mod check;
mod clean;
mod compressed;
mod corrupt;
mod create;
mod create_on_nodes;
mod discard_all;
mod downgrade;
pub mod extensions;
mod fields;
mod flush;
mod hand_over;
pub mod header;
mod header_cluster;
mod header_steps;
mod image_header;
pub mod info;
mod journal;
pub mod layout;
mod life;
mod mapping;
mod measure;
mod metadata;
mod metadata_map;
mod new_image;
mod nodes;
mod open;
mod options;
pub mod order;
mod overlap;
mod preallocate;
mod resize;
mod settings;
pub mod snapshots;
mod space;
mod tables;
mod unclosed;
mod vmstate;
mod write;
mod zero;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{
    self, Stop, Unclosed, Unpacking, decider, discard_range, fast_read, read_range, settle_journal,
    status, store_packed, without_fast_writes, write_range, zero_range,
};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use crate::options::Map;
use bitmaps::ImageBitmaps;
use corrupt::Corruption;
use header::Header;
use image_header::ImageHeader;
use layout::Geometry;
use life::Life;
use mapping::ImageMapping;
use metadata::Metadata;
use nodes::Nodes;
use overlap::Overlaps;
use settings::Settings;
use snapshots::ImageSnapshots;
use space::Space;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing, Role::DataFile],
    options: options::HELP,
    create: Some(&create::CREATE),
    features: Features::all(),
    growth: Growth::Own(&Preallocation::ALL),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("qcow2", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image: parts that own their state. The image decides what they do and when.
///
/// Locks that are held across waits are taken in this order:
///
/// 1. a range of guest clusters, the turn to change the L1 table, the turn to settle the journal and the turn to write a
///    slice (`mapping`);
/// 2. the directory on disk (`bitmaps`);
/// 3. the places of compressed clusters, then the refcounts (`space`);
/// 4. the turn to make a child longer (`nodes`);
/// 5. the turn to change the header (`header`).
pub struct Qcow2 {
    settings: Settings,
    geometry: Geometry,
    /// Of the disk, in bytes.
    size: AtomicU64,
    life: Life,
    unclosed: Unclosed,
    nodes: Nodes,
    header: ImageHeader,
    mapping: ImageMapping,
    space: Space,
    snapshots: ImageSnapshots,
    bitmaps: ImageBitmaps,
    overlaps: Overlaps,
    corruption: Corruption,
    unpacking: Unpacking,
}

impl Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Tells debugging filters below what is about to be done to the image.
    async fn event(&self, event: Event) {
        self.nodes.event(event).await;
    }

    fn file(&self) -> Arc<Node> {
        self.nodes.file()
    }

    /// The node that holds the guest's data.
    fn data(&self) -> Arc<Node> {
        self.nodes.data()
    }

    fn backing(&self) -> Option<Arc<Node>> {
        self.nodes.backing_child().map(Child::node)
    }

    /// What a part looks at besides its own.
    fn metadata(&self) -> Metadata<'_> {
        Metadata {
            geometry: &self.geometry,
            nodes: &self.nodes,
            header: &self.header,
            mapping: &self.mapping,
            snapshots: &self.snapshots,
            overlaps: &self.overlaps,
            corruption: &self.corruption,
        }
    }

    /// Gives the result of a request or an operation back. Before an error, ensures that the header says what was
    /// found.
    async fn marked<T, E>(&self, result: Result<T, E>) -> Result<T, E> {
        if result.is_err() && self.corruption.is_fatal() {
            self.metadata().mark_corrupt().await;
        }
        result
    }

    /// Notes where all metadata is, as it was read from the file.
    async fn note_metadata(&self) {
        self.metadata().note_metadata().await;
        self.space.note_blocks(self.metadata()).await;
    }
}

impl Driver for Qcow2 {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        open::traits(self.data().traits(), &self.geometry, self.settings.is_writable)
    }

    /// Unpacking is bounded by itself.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: self.geometry.cluster_size() as u32, ..Scratch::default() }
    }

    fn len(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn children(&self) -> &[Child] {
        self.nodes.children()
    }

    fn filename(&self) -> Option<String> {
        self.file().driver().filename()
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        cow::map(self, inflight, at, want, access)
    }

    fn map_read<'a>(&'a self, inflight: &'a InFlight, at: u64, want: u64) -> ReadMapping<'a> {
        fast_read(self, inflight, at, want)
    }

    fn decider(&self, at: u64, len: u64) -> LocalFuture<'_, IoResult<Decider>> {
        Box::pin(async move { self.marked(decider(self, at, len).await).await })
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.marked(read_range(self, at, into).await).await })
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        _: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.marked(write_range(self, at, from).await).await })
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.marked(zero_range(self, at, len, flags).await).await })
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.marked(discard_range(self, at, len).await).await })
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.marked(self.flush_all().await).await })
    }

    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            if self.settings.is_writable && !self.life.is_frozen() {
                self.marked(self.bring_to_rest().await).await?;
                self.life.freeze();
            }
            Ok(())
        })
    }

    fn thaw(&self) {
        self.life.thaw();
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            match self.life.is_frozen() {
                true => Ok(()),
                false => self.marked(self.close_image().await).await,
            }
        })
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move { self.marked(status(self, at, len, precision).await).await })
    }

    fn child_perms(&self, child: usize, own: Perms) -> Perms {
        if self.nodes.is_backing(child) {
            return Perms::backing(own);
        }
        let mut perms = Perms::format(own);
        if self.nodes.is_data_file(child)
            && !self.settings.is_writable
            && self.settings.readers_share
        {
            // It has nothing but the guest's data, as a raw image does.
            perms.shared |= own.shared & Perm::WRITE;
        }
        if self.settings.is_writable && !self.life.is_frozen() {
            // Closing writes, too, when all users are gone.
            perms.held |= Perm::WRITE | Perm::RESIZE;
        }
        perms
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        // Bitmaps in memory would have to be loaded again.
        match hand_over::has_bitmaps(&self.header.now()) {
            true => None,
            false => Some(self),
        }
    }

    fn compress(&self) -> Option<&dyn Compress> {
        Some(self)
    }

    fn journaled(&self) -> Option<&dyn Journaled> {
        Some(self)
    }
}

impl Compress for Qcow2 {
    fn unit(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn packer(&self) -> Packer {
        let kind = self.settings.compression;
        Arc::new(move |cluster| compressed::pack(kind, cluster))
    }

    fn store<'a>(&'a self, at: u64, units: &'a [&'a [u8]]) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let stored = match self.geometry.external_data {
                true => Err(Errno::ENOTSUP),
                false => store_packed(self, at, units).await,
            };
            self.marked(stored).await
        })
    }
}

impl Image for Qcow2 {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        let resized = self.resize_to(len, shrink, Preallocation::Off);
        Box::pin(async move { self.marked(resized.await).await })
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        let grown = self.resize_to(len, false, preallocation);
        Box::pin(async move { self.marked(grown.await).await })
    }

    fn amend(&self, changes: Map) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.marked(self.amend_to(&changes).await).await })
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.file())
    }

    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            if fix == Fix::Nothing {
                // What this node holds in reserve is counted, but not used: that would be leaks.
                let failed = |errno| Error::os("Check failed", errno);
                settle_journal(self).await.map_err(failed)?;
                return check::check(&self.file(), fix, say).await;
            }
            if !self.settings.is_writable {
                return Err(Error::new("Image is read-only"));
            }
            if self.life.is_prepared() {
                return Err(Error::new(
                    "The image was written since it was opened: repair it first",
                ));
            }
            // A repair changes what this node has in memory: until it is opened again, nothing is
            // written.
            without_fast_writes(self, || self.mapping.tables().stopped.stop(Stop::ForGood)).await;
            let failed = |errno| Error::os("Check failed", errno);
            self.forget_mark().await.map_err(failed)?;
            check::check(&self.file(), fix, say).await
        })
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn set_backing<'a>(
        &'a self,
        name: Option<&'a str>,
        format: Option<&'a str>,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, Result<(), Error>> {
        let changed = self.change_backing(name, format);
        Box::pin(async move { self.marked(changed.await).await })
    }

    fn make_empty(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let failed = |errno| Error::os("Could not change the mapping", errno);
            self.marked(self.discard_all().await.map_err(failed)).await
        })
    }

    fn read_machine<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.marked(self.read_vmstate(at, into).await).await })
    }

    fn write_machine<'a>(&'a self, at: u64, from: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.marked(self.write_vmstate(at, from).await).await })
    }

    fn info(&self) -> ImageInfo {
        // Who wants to know why there is no list asks for it.
        let snapshots = Snapshots::list(self).unwrap_or_default();
        ImageInfo { snapshots, ..info::info(&self.header.now(), &self.bitmaps.shown()) }
    }
}
