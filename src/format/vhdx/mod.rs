//! VHDX, Hyper-V's format ([MS-VHDX]): blocks of 1 to 256 MiB behind one flat table, which is written through a log.
//!
//! | file | it holds |
//! |---|---|
//! | `bytes` | numbers, GUIDs and checksums as they are stored |
//! | `header` | the two headers |
//! | `regions` | the region table |
//! | `metadata` | the metadata items, and how the disk is laid out |
//! | `layout` | what is no place for a block |
//! | `log` | the log |
//! | `create` | new images |
//! | `open` | opening an image |
//! | `mapping` | how an image maps a guest's blocks |
//! | `parent` | what names the parent of a differencing image |
//! | `linkage` | what an image says of its parent, and how that changes |
//! | `partial` | blocks of which only some sectors are there |
//! | `space` | blocks for what is new |
//! | `write` | writing, zeroing, flushing, closing, and in which order |
//! | `hand_over` | taking the image over from another process |
//! | `check` | checking |

mod bytes;
mod check;
mod create;
mod hand_over;
mod header;
mod layout;
mod linkage;
mod log;
mod mapping;
mod metadata;
mod open;
mod parent;
mod partial;
mod regions;
mod space;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{
    self, FileEnd, Lock, Tables, decider, discard_range, fast_read, read_range, status,
    traits_over, write_range, zero_range,
};
use crate::io::{InFlight, IoResult, IoVec};
use header::Header;
use layout::Layout;
use linkage::Parent;
use log::append::LogEnd;
use mapping::Entry;
use metadata::{Geometry, Metadata};
use regions::Regions;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: open::HELP,
    create: Some(&create::CREATE),
    features: Features::CHECKS.union(Features::REPAIRS),
    growth: Growth::Own(&[]),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("vhdx", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
///
/// Locks that are held across waits are taken in this order: a range of guest blocks (`mapping`), the turn to write a
/// slice (`mapping`), that of `space`, `log`, `header`.
pub struct Vhdx {
    /// The node's, for what is logged.
    name: String,
    regions: Regions,
    metadata: Metadata,
    layout: Layout,
    /// `file`, then `backing` if there is one.
    children: Vec<Child>,
    parent: Option<Parent>,
    mapping: Tables<Entry>,
    space: FileEnd,
    /// Where new blocks begin, in bytes.
    space_start: AtomicU64,
    /// Where the file ends, as far as entries may lead, in bytes. It is moved on before an entry can lead behind it.
    file_len: AtomicU64,
    log: Lock<LogEnd>,
    header: Lock<State>,
    is_writable: bool,
    /// The log was replayed when the image was opened.
    is_replayed: bool,
    /// A header says, durably, that the file changes.
    is_prepared: AtomicBool,
    /// Nothing is written until it is thawed ([`Driver::freeze`]).
    is_frozen: AtomicBool,
    /// An entry that makes no sense was reported.
    has_reported: AtomicBool,
}

/// The current header, as it is on the disk, and which of the two it is.
struct State {
    header: Header,
    place: usize,
}

impl Vhdx {
    fn geometry(&self) -> &Geometry {
        &self.metadata.geometry
    }
}

impl Driver for Vhdx {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let abilities = match self.is_writable {
            true => Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD,
            false => Abilities::READ_ONLY,
        };
        let block = self.geometry().block_size();
        traits_over(self.children[0].node().traits(), block, block, abilities)
    }

    fn len(&self) -> u64 {
        self.geometry().size
    }

    /// Copies around a write, and zeroes where a block was used before.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: self.geometry().block_size() as u32, ..Scratch::default() }
    }

    fn children(&self) -> &[Child] {
        &self.children
    }

    fn filename(&self) -> Option<String> {
        self.children[0].node().driver().filename()
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
        Box::pin(decider(self, at, len))
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(read_range(self, at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        _: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(write_range(self, at, from))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        match self.geometry().has_parent {
            true => Box::pin(zero_range(self, at, len, flags)),
            false => Box::pin(self.zero_bytes(at, len, flags)),
        }
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(discard_range(self, at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.flush_all())
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            self.close_image().await?;
            self.is_frozen.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn thaw(&self) {
        self.is_frozen.store(false, Ordering::SeqCst);
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.close_image())
    }

    fn child_perms(&self, child: usize, own: Perms) -> Perms {
        if child > 0 {
            return Perms::backing(own);
        }
        let ends_with_writes = self.is_writable && !self.is_frozen.load(Ordering::SeqCst);
        Perms::format_with_end(own, ends_with_writes)
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(status(self, at, len, precision))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for Vhdx {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn grow(&self, len: u64, _: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        self.resize(len, false)
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.children[0].node())
    }

    /// All that is repaired is repaired by the log, when the image is opened.
    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            let mut report = check::check(&self.children[0].node(), say).await?;
            if fix != Fix::Nothing && self.is_replayed {
                report.corruptions_fixed += 1;
            }
            Ok(report)
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

    fn info(&self) -> ImageInfo {
        let name = self.parent.as_ref().and_then(|parent| parent.0.lock().name.clone());
        ImageInfo {
            cluster_size: Some(self.geometry().block_size()),
            backing_format: name.as_ref().map(|_| ENTRY.name.to_owned()),
            backing_filename: name,
            ..ImageInfo::default()
        }
    }
}
