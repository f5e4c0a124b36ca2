//! QED: clusters behind two levels of tables, without reference counts (QEMU's docs/interop/qed_spec).
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header, read and written |
//! | `create` | new images |
//! | `open` | opening an image: the header, the L1 table, the children |
//! | `mapping` | how an image maps a guest's clusters |
//! | `space` | host clusters for what is new |
//! | `unnamed` | what a killed process has left |
//! | `write` | writing, zeroing, flushing, closing, and in which order |
//! | `idle` | the mark that an image needs a check |
//! | `journal` | entries that wait in memory that outlives the process |
//! | `hand_over` | images that go to another process, and come from one |
//! | `check` | checking and repairing |

mod check;
mod create;
mod hand_over;
mod header;
mod idle;
mod journal;
mod mapping;
mod open;
mod space;
mod unnamed;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{
    self, FileEnd, Lock, Stop, Tables, TopTable, Unclosed, decider, discard_range, fast_read,
    read_range, status, traits_over, without_fast_writes, write_range, zero_range,
};
use crate::format::children;
use crate::io::sync::Mutex;
use crate::io::{InFlight, IoResult, IoVec};
use header::{Geometry, Header, Layout};
use mapping::{L1Entry, L2Entry};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use unnamed::Unnamed;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: children::HELP,
    create: Some(&create::CREATE),
    features: Features::CHECKS.union(Features::REPAIRS),
    growth: Growth::Own(&[Preallocation::Off]),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("qed", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
///
/// Locks that are held across waits are taken in this order: a range of guest clusters (`mapping`), `l1_lock`, the turn
/// to write a slice (`mapping`), that of `space`, `header`.
pub struct Qed {
    /// The node's, for what is logged.
    name: String,
    layout: Layout,
    l1_offset: u64,
    /// Of the disk, in bytes.
    size: AtomicU64,
    /// What the header records of the backing file.
    backing: Mutex<RecordedName>,
    /// `file`, then `backing` if there is one.
    children: Vec<Child>,
    l1: TopTable<L1Entry>,
    /// Held while an L1 entry changes.
    l1_lock: Lock<()>,
    mapping: Tables<L2Entry>,
    space: FileEnd,
    is_writable: bool,
    /// It may be written: the header promises nothing that a write could break.
    is_prepared: AtomicBool,
    /// The image says, durably, that it needs a check.
    is_marked: AtomicBool,
    /// When clusters were allocated last, of an image that may be written.
    clock: Option<Arc<IdleClock>>,
    /// What is known of a process that did not close the image, and the clusters that it has left.
    unclosed: Unclosed,
    unnamed: Unnamed,
    /// Nothing is written until it is thawed ([`Driver::freeze`]).
    is_frozen: AtomicBool,
    /// As it is on the disk.
    header: Lock<Header>,
    /// An entry that makes no sense was reported.
    has_reported: AtomicBool,
}

/// The name of a backing file as it is stored, and its format, where that is recorded.
#[derive(Clone)]
struct RecordedName {
    name: Option<String>,
    format: Option<&'static str>,
}

impl Qed {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn geometry(&self) -> &Geometry {
        &self.layout.geometry
    }
}

impl Driver for Qed {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let abilities = match self.is_writable {
            true => Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD,
            false => Abilities::READ_ONLY,
        };
        let cluster = self.geometry().cluster_size();
        traits_over(self.children[0].node().traits(), cluster, cluster, abilities)
    }

    fn len(&self) -> u64 {
        self.size()
    }

    /// Copies around a write.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: self.geometry().cluster_size() as u32, ..Scratch::default() }
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
        Box::pin(zero_range(self, at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(discard_range(self, at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.flush_all())
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

    fn idle(&self) -> Option<&dyn Idle> {
        Some(self)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn journaled(&self) -> Option<&dyn Journaled> {
        Some(self)
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(status(self, at, len, precision))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for Qed {
    fn resize(&self, len: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.resize_to(len))
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        if preallocation != Preallocation::Off {
            let mode = preallocation.name();
            let error = Error::new(format!("Unsupported preallocation mode '{mode}'"));
            return Box::pin(std::future::ready(Err(error)));
        }
        self.resize(len, false)
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.children[0].node())
    }

    fn check<'a>(
        &'a self,
        fix: Fix,
        _: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            let file = self.children[0].node();
            if fix == Fix::Nothing {
                return check::check(&file, fix).await;
            }
            if !self.is_writable {
                return Err(Error::new("Image is read-only"));
            }
            if self.is_prepared.load(Ordering::Acquire) {
                return Err(Error::new(
                    "The image was written since it was opened: repair it first",
                ));
            }
            // A repair changes what this node has in memory: until it is opened again, nothing is written.
            without_fast_writes(self, || self.mapping.stopped.stop(Stop::ForGood)).await;
            check::check(&file, fix).await
        })
    }

    fn set_backing<'a>(
        &'a self,
        name: Option<&'a str>,
        format: Option<&'a str>,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(self.change_backing(name, format))
    }

    fn info(&self) -> ImageInfo {
        let RecordedName { name, format } = self.backing.lock().clone();
        ImageInfo {
            cluster_size: Some(self.geometry().cluster_size()),
            backing_filename: name,
            backing_format: format.map(str::to_owned),
            ..ImageInfo::default()
        }
    }
}
