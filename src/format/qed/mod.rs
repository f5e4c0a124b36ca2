//! QED: clusters behind two levels of tables, without reference counts (QEMU's docs/interop/qed_spec).
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header, checked |
//! | `open` | opening an image: the header, the L1 table, the children |
//! | `mapping` | how an image maps a guest's clusters |
//! | `check` | checking |
//!
//! Images are read so far, not written.

mod check;
mod header;
mod mapping;
mod open;

use super::read_only;
use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{Tables, TopTable, decider, fast_read, read_range, status, traits_over};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use header::Header;
use mapping::{L1Entry, L2Entry};
use std::sync::atomic::AtomicBool;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: open::HELP,
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("qed", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
pub struct Qed {
    /// The node's, for what is logged.
    name: String,
    header: Header,
    /// As it is stored.
    backing_name: Option<String>,
    /// Of the file's whole clusters when the image was opened, in bytes.
    file_len: u64,
    /// `file`, then `backing` if there is one.
    children: Vec<Child>,
    l1: TopTable<L1Entry>,
    mapping: Tables<L2Entry>,
    /// An entry that makes no sense was reported.
    has_reported: AtomicBool,
}

impl Driver for Qed {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let cluster = self.header.geometry.cluster_size();
        traits_over(self.children[0].node().traits(), cluster, cluster, Abilities::READ_ONLY)
    }

    fn len(&self) -> u64 {
        self.header.size
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
        if access != Access::Read {
            return Mapping::slow(want);
        }
        match self.way(inflight, at, want) {
            Way::Here(mapping) => mapping,
            Way::Below(backing, len) => backing.map_chain(inflight, at, len),
        }
    }

    fn way<'a>(&'a self, inflight: &'a InFlight, at: u64, want: u64) -> Way<'a> {
        fast_read(self, inflight, at, want)
    }

    fn decider(&self, at: u64, len: u64) -> LocalFuture<'_, IoResult<Decider>> {
        Box::pin(decider(self, at, len))
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(read_range(self, at, into))
    }

    fn write<'a>(&'a self, _: u64, _: &'a IoVec<'a>, _: WriteFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(std::future::ready(Err(Errno::EPERM)))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.children[0].node().flush().await })
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(status(self, at, len, precision))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for Qed {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(std::future::ready(Err(read_only::cannot_write("qed"))))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        read_only::allocated(&self.children[0])
    }

    fn check<'a>(
        &'a self,
        fix: Fix,
        _: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            match fix {
                Fix::Nothing => check::check(&self.children[0].node()).await,
                _ => Err(read_only::cannot_write("qed")),
            }
        })
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            cluster_size: Some(self.header.geometry.cluster_size()),
            backing_filename: self.backing_name.clone(),
            backing_format: self.header.backing_format().map(str::to_owned),
            ..ImageInfo::default()
        }
    }
}
