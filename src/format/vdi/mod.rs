//! VDI, VirtualBox's format, version 1.1: blocks of 1 MiB behind one flat map.
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header, checked |
//! | `open` | opening an image |
//! | `mapping` | how an image maps a guest's blocks |
//! | `check` | checking |
//!
//! Images are read so far, not written. Differencing images and snapshots are refused, as QEMU refuses them.

mod check;
mod header;
mod mapping;
mod open;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{Tables, fast_read_through, read_range, status, traits_over};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use header::Header;
use mapping::Entry;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: open::HELP,
    features: Features::CHECKS,
    growth: Growth::Own(&[]),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("vdi", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
pub struct Vdi {
    header: Header,
    children: [Child; 1],
    mapping: Tables<Entry>,
}

impl Driver for Vdi {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let block = 1 << header::BLOCK_BITS;
        traits_over(self.children[0].node().traits(), block, block, Abilities::READ_ONLY)
    }

    fn len(&self) -> u64 {
        self.header.size
    }

    fn children(&self) -> &[Child] {
        &self.children
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        match access {
            Access::Read => fast_read_through(self, inflight, at, want),
            Access::Write | Access::DurableWrite => Mapping::slow(want),
        }
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

impl Image for Vdi {
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
            match fix {
                Fix::Nothing => check::check(&self.children[0].node(), say).await,
                _ => Err(Error::new("This image format does not support checks")
                    .with_errno(Errno::ENOTSUP)),
            }
        })
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: Some(1 << header::BLOCK_BITS), ..ImageInfo::default() }
    }
}
