//! VDI, VirtualBox's format, version 1.1: blocks of 1 MiB behind one flat map.
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header, read and made |
//! | `create` | new images |
//! | `open` | opening an image |
//! | `mapping` | how an image maps a guest's blocks |
//! | `blocks` | the whole map: which blocks are named, and making it agree with the header |
//! | `space` | blocks for what is new |
//! | `write` | writing, zeroing, flushing, closing, and in which order |
//! | `check` | checking |
//!
//! Differencing images and snapshots are refused, as QEMU refuses them.

mod blocks;
mod check;
mod create;
mod header;
mod mapping;
mod open;
mod space;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{self, FileEnd, Lock, Tables, read_range, status, traits_over, write_range};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use blocks::{Emptied, Head};
use header::Header;
use mapping::Entry;
use std::sync::atomic::{AtomicBool, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: open::HELP,
    create: Some(&create::CREATE),
    features: Features::CHECKS,
    growth: Growth::Own(&[]),
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("vdi", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image.
///
/// Locks that are held across waits are taken in this order: a range of guest blocks (`mapping`), the turn to write a
/// slice (`mapping`), that of `space`, `head`.
pub struct Vdi {
    /// The node's, for what is logged.
    name: String,
    /// As it was when the image was opened, but for the number of allocated blocks all that it will ever say.
    header: Header,
    children: [Child; 1],
    mapping: Tables<Entry>,
    space: FileEnd,
    is_writable: bool,
    /// Something was written.
    is_prepared: AtomicBool,
    /// Nothing is written until it is thawed ([`Driver::freeze`]).
    is_frozen: AtomicBool,
    /// As it is on the disk.
    head: Lock<Head>,
}

impl Driver for Vdi {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let abilities = match self.is_writable {
            true => Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD,
            false => Abilities::READ_ONLY,
        };
        let block = header::BLOCK_SIZE;
        traits_over(self.children[0].node().traits(), block, block, abilities)
    }

    fn len(&self) -> u64 {
        self.header.size
    }

    /// Zeroes are written around what goes to a block that was used before.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: header::BLOCK_SIZE as u32, ..Scratch::default() }
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
        Box::pin(self.zero_blocks(at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.discard_blocks(at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.flush_all())
    }

    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            self.bring_to_rest(Emptied::Stay).await?;
            self.is_frozen.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn thaw(&self) {
        self.is_frozen.store(false, Ordering::SeqCst);
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.bring_to_rest(Emptied::Go))
    }

    fn child_perms(&self, _: usize, own: Perms) -> Perms {
        let ends_with_writes = self.is_writable && !self.is_frozen.load(Ordering::SeqCst);
        Perms::format_with_end(own, ends_with_writes)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
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
        ImageInfo { cluster_size: Some(header::BLOCK_SIZE), ..ImageInfo::default() }
    }
}
