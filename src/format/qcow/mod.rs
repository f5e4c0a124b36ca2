//! qcow, version 1: clusters behind two levels of tables, packed ones among them, without reference counts.
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header and the entries of tables, read and written |
//! | `create` | new images |
//! | `open` | opening an image: the header, the L1 table, the children |
//! | `entries` | the entries of its tables |
//! | `mapping` | how an image maps a guest's clusters |
//! | `space` | host clusters for what is new, and places for packed ones |
//! | `journal` | entries that wait in memory that outlives the process |
//! | `write` | writing, flushing, closing, emptying, and in which order |
//!
//! Zeroes are written as data: the format has no way to say them. Nothing is given back before the image is emptied.

mod create;
mod entries;
mod header;
mod journal;
mod mapping;
mod open;
mod space;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{
    self, Lock, Tables, TopTable, Unpacking, decider, fast_read, read_range, status, store_packed,
    traits_over, write_range,
};
use crate::format::children;
use crate::format::deflate;
use crate::io::sync::Mutex;
use crate::io::{InFlight, IoResult, IoVec};
use entries::{L1Entry, L2Entry};
use header::{Geometry, Header};
use space::Space;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: children::HELP,
    features: Features::COMPRESSION,
    growth: Growth::Own(&[]),
    create: Some(&create::CREATE),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("qcow", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
///
/// Locks that are held across waits are taken in this order: a range of guest clusters (`mapping`), `l1_lock`, the turn
/// to write a slice (`mapping`), those of `space`, `header`.
pub struct Qcow {
    /// The node's, for what is logged.
    name: String,
    geometry: Geometry,
    /// Of the disk, in bytes.
    size: u64,
    l1_offset: u64,
    /// Where the L1 table ends, in bytes: no table and no data lies before that.
    l1_end: u64,
    /// As it is stored.
    backing_name: Mutex<Option<String>>,
    /// `file`, then `backing` if there is one.
    children: Vec<Child>,
    l1: TopTable<L1Entry>,
    /// Held while an L1 entry changes.
    l1_lock: Lock<()>,
    mapping: Tables<L2Entry>,
    unpacking: Unpacking,
    space: Space,
    is_writable: bool,
    /// The file may be written.
    is_prepared: AtomicBool,
    /// Nothing is written until it is thawed ([`Driver::freeze`]).
    is_frozen: AtomicBool,
    /// As it is on the disk.
    header: Lock<Header>,
    /// An entry that makes no sense was reported.
    has_reported: AtomicBool,
}

impl Driver for Qcow {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let abilities = match self.is_writable {
            true => Abilities::empty(),
            false => Abilities::READ_ONLY,
        };
        let cluster = self.geometry.cluster_size();
        traits_over(self.children[0].node().traits(), cluster, cluster, abilities)
    }

    fn len(&self) -> u64 {
        self.size
    }

    /// Copies around a write. Unpacking is bounded by itself.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: self.geometry.cluster_size() as u32, ..Scratch::default() }
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
        // Closing cuts the file when all users are gone.
        let ends_with_writes = self.is_writable && !self.is_frozen.load(Ordering::SeqCst);
        Perms::format_with_end(own, ends_with_writes)
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(status(self, at, len, precision))
    }

    fn journaled(&self) -> Option<&dyn Journaled> {
        Some(self)
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn compress(&self) -> Option<&dyn Compress> {
        Some(self)
    }
}

impl Compress for Qcow {
    fn unit(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn packer(&self) -> Packer {
        Arc::new(deflate::pack)
    }

    fn store<'a>(&'a self, at: u64, units: &'a [&'a [u8]]) -> LocalFuture<'a, IoResult> {
        Box::pin(store_packed(self, at, units))
    }
}

impl Image for Qcow {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.children[0].node())
    }

    fn set_backing<'a>(
        &'a self,
        name: Option<&'a str>,
        _: Option<&'a str>,
        _: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(self.change_backing(name))
    }

    fn make_empty(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.empty().await.map_err(|errno| Error::os("Could not empty the image", errno))
        })
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            cluster_size: Some(self.geometry.cluster_size()),
            backing_filename: self.backing_name.lock().clone(),
            ..ImageInfo::default()
        }
    }
}
