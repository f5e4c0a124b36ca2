//! Parallels' expandable images, version 2 (QEMU's docs/interop/parallels).
//!
//! Clusters are behind one flat catalogue, without reference counts.
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header, read and made |
//! | `create` | new images |
//! | `open` | opening an image |
//! | `mapping` | how an image maps a guest's clusters |
//! | `catalogue` | the whole catalogue: which clusters it names |
//! | `space` | clusters for what is new |
//! | `write` | writing, zeroing, flushing, closing, and in which order |
//! | `extension` | the extension, and the dirty bitmaps in it |
//! | `bundle` | disks whose images `DiskDescriptor.xml` names |
//! | `check` | checking and repairing |

mod bundle;
mod catalogue;
mod check;
mod create;
mod extension;
mod header;
mod mapping;
mod open;
mod space;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{
    self, FileEnd, Lock, Stop, Tables, decider, fast_read, read_range, status, traits_over,
    without_fast_writes,
};
use crate::io::sync::Mutex;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::{Map, Value};
use extension::Bitmap;
use header::{Header, State};
use mapping::{Entry, Stretch};
use space::Preallocating;
use std::sync::atomic::{AtomicBool, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: open::HELP,
    create: Some(&create::CREATE),
    features: Features::CHECKS.union(Features::REPAIRS),
    growth: Growth::Own(&[]),
    probe: Some(Probe::Bytes(
        |head, _| {
            if Header::probe(head) || bundle::probe(head) { 100 } else { 0 }
        },
    )),
    ..DriverEntry::new("parallels", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
///
/// Locks that are held across waits are taken in this order: a range of guest clusters (`mapping`), the turn to write a
/// slice (`mapping`), that of `space`, `state`.
pub struct Parallels {
    /// The node's, for what is logged.
    name: String,
    /// As it was when the image was opened: all of it but the state stays so.
    header: Header,
    stretch: Stretch,
    /// `file`, then `backing` if there is one.
    children: Vec<Child>,
    mapping: Tables<Entry>,
    space: FileEnd,
    preallocating: Preallocating,
    is_writable: bool,
    /// The image says, durably, that it is in use.
    is_prepared: AtomicBool,
    /// Nothing is written until it is thawed ([`Driver::freeze`]).
    is_frozen: AtomicBool,
    /// As it is on the disk.
    state: Lock<State>,
    /// The dirty bitmaps that the image has, until it is written.
    bitmaps: Mutex<Vec<Bitmap>>,
    /// An entry that makes no sense was reported.
    has_reported: AtomicBool,
}

impl Parallels {
    async fn read_all(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let mut done = 0;
        while done < into.len() {
            let (place, len) = self.stretch.first(at + done, into.len() - done);
            read_range(self, place, &into.slice(done, len)).await?;
            done += len;
        }
        Ok(())
    }
}

impl Driver for Parallels {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let abilities = match self.is_writable {
            true => Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD,
            false => Abilities::READ_ONLY,
        };
        let cluster = self.header.cluster_size();
        // What aligned parts of the disk are aligned to in the file.
        let aligned = 1 << cluster.trailing_zeros();
        traits_over(self.children[0].node().traits(), aligned, cluster, abilities)
    }

    fn len(&self) -> u64 {
        self.header.size
    }

    /// Zeroes are written around what goes to a cluster that was used before, and copies where there is a backing file.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: 1 << self.stretch.bits, ..Scratch::default() }
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
        let (place, len) = self.stretch.first(at, want);
        cow::map(self, inflight, place, len, access)
    }

    fn map_read<'a>(&'a self, inflight: &'a InFlight, at: u64, want: u64) -> ReadMapping<'a> {
        let (place, len) = self.stretch.first(at, want);
        fast_read(self, inflight, place, len)
    }

    fn decider(&self, at: u64, len: u64) -> LocalFuture<'_, IoResult<Decider>> {
        let (place, len) = self.stretch.first(at, len);
        Box::pin(decider(self, place, len))
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(self.read_all(at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        _: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(self.write_all(at, from))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(self.zero_all(at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.discard_all(at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.flush_all())
    }

    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            self.bring_to_rest().await?;
            self.is_frozen.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn thaw(&self) {
        self.is_frozen.store(false, Ordering::SeqCst);
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.bring_to_rest())
    }

    fn child_perms(&self, child: usize, own: Perms) -> Perms {
        if child > 0 {
            return Perms::backing(own);
        }
        let ends_with_writes = self.is_writable && !self.is_frozen.load(Ordering::SeqCst);
        Perms::format_with_end(own, ends_with_writes)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let (place, len) = self.stretch.first(at, len);
        Box::pin(status(self, place, len, precision))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for Parallels {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.children[0].node())
    }

    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            let file = self.children[0].node();
            if fix == Fix::Nothing {
                return check::check(&file, fix, say).await;
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
            check::check(&file, fix, say).await
        })
    }

    /// QEMU 7.2 tells nothing.
    fn has_info(&self) -> bool {
        false
    }

    /// The bitmaps, under the names that qcow2 has for them.
    fn info(&self) -> ImageInfo {
        let bitmaps: Vec<Value> = self.bitmaps.lock().iter().map(Bitmap::to_value).collect();
        if bitmaps.is_empty() {
            return ImageInfo::default();
        }
        let data = Map::from_iter([("bitmaps", Value::List(bitmaps))]);
        let specific = [("type", Value::from(ENTRY.name)), ("data", Value::Map(data))];
        ImageInfo { specific: Some(Value::Map(Map::from_iter(specific))), ..ImageInfo::default() }
    }
}
