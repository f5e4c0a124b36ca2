//! VHD, the format of Virtual PC and of Hyper-V before VHDX (Virtual Hard Disk Image Format Specification, version 1.0).
//!
//! Images of fixed size are a disk and a footer. Those that grow have blocks, mostly of 2 MiB, behind one flat table; each
//! block begins with a bitmap of its sectors. Differencing images are such, and what they have not is their parent's.
//!
//! | file | it holds |
//! |---|---|
//! | `bytes` | numbers and checksums as they are stored |
//! | `geometry` | cylinders, heads and sectors |
//! | `footer` | the footer, at both ends of the file |
//! | `header` | the header of an image that grows |
//! | `create` | new images |
//! | `open` | opening an image |
//! | `fixed` | images of fixed size |
//! | `mapping` | how an image maps a guest's blocks |
//! | `bitmap` | which sectors of a block are there |
//! | `parent` | what names the parent of a differencing image |
//! | `space` | blocks for what is new |
//! | `write` | writing, zeroing, flushing, closing, taking the image over, and in which order |
//! | `check` | checking |

mod bitmap;
mod bytes;
mod check;
mod create;
mod fixed;
mod footer;
mod geometry;
mod header;
mod mapping;
mod open;
mod parent;
mod space;
mod write;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::{
    self, FileEnd, Tables, decider, fast_read, read_range, status, traits_over, write_range,
    zero_range,
};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use crate::options::Map;
use footer::Footer;
use header::Header;
use mapping::Entry;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    options: open::HELP,
    create: Some(&create::CREATE),
    features: Features::CHECKS,
    growth: Growth::Own(&[]),
    // What an image of fixed size begins with is the guest's.
    probe: Some(Probe::Bytes(|head, _| if Footer::probe(head) { 100 } else { 0 })),
    ..DriverEntry::new("vpc", Kind::Format, |opening, options| {
        Box::pin(open::open(opening, options))
    })
};

/// An open image that grows.
///
/// Locks that are held across waits are taken in this order: a range of guest blocks (`mapping`), the turn to write a
/// slice (`mapping`), that of `space`.
pub struct Vpc {
    /// The node's, for what is logged.
    name: String,
    footer: Footer,
    header: Header,
    /// Of the disk, in bytes.
    size: u64,
    /// What no block may be over, and where the last of that ends.
    taken: Vec<Range<u64>>,
    clear_from: u64,
    /// `file`, then `backing` if there is one.
    children: Vec<Child>,
    parent: Option<Parent>,
    /// The options that were given beside nodes.
    asked: Map,
    mapping: Tables<Entry>,
    space: FileEnd,
    /// Where new blocks begin, in bytes.
    space_start: AtomicU64,
    /// Where the file ends, as far as entries may lead, in bytes. It is moved on before an entry can lead behind it.
    file_len: AtomicU64,
    /// Whether the footers were found whole, or have been written since.
    head_is_whole: AtomicBool,
    tail_is_whole: AtomicBool,
    is_writable: bool,
    /// Something was written.
    is_prepared: AtomicBool,
    /// Nothing is written until it is thawed ([`Driver::freeze`]).
    is_frozen: AtomicBool,
    /// An entry that makes no sense was reported.
    has_reported: AtomicBool,
}

/// The parent of a differencing image.
struct Parent {
    /// A file name as a user would give it, if the one that is stored can be followed.
    name: Option<String>,
}

impl Vpc {
    fn is_differencing(&self) -> bool {
        self.parent.is_some()
    }
}

impl Driver for Vpc {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let abilities = match (self.is_writable, self.is_differencing()) {
            (true, false) => Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD,
            (true, true) => Abilities::DISCARD,
            (false, _) => Abilities::READ_ONLY,
        };
        // Other programs put blocks at any sector.
        traits_over(self.children[0].node().traits(), SECTOR, self.header.block_size(), abilities)
    }

    fn len(&self) -> u64 {
        self.size
    }

    /// Copies around a write, and zeroes where a block was used before.
    fn scratch(&self) -> Scratch {
        Scratch { copy_unit: self.header.block_size() as u32, ..Scratch::default() }
    }

    fn children(&self) -> &[Child] {
        &self.children
    }

    fn filename(&self) -> Option<String> {
        self.children[0].node().driver().filename()
    }

    fn own_options(&self) -> Map {
        self.asked.clone()
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
        match self.is_differencing() {
            true => Box::pin(zero_range(self, at, len, flags)),
            false => Box::pin(self.zero_bytes(at, len, flags)),
        }
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.discard_bytes(at, len))
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

impl Image for Vpc {
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

    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            match fix {
                Fix::Nothing => self.check_image(say).await,
                _ => Err(Error::new("This image format does not support repairs")
                    .with_errno(Errno::ENOTSUP)),
            }
        })
    }

    fn info(&self) -> ImageInfo {
        let name = self.parent.as_ref().and_then(|parent| parent.name.clone());
        ImageInfo {
            cluster_size: Some(self.header.block_size()),
            backing_format: name.as_ref().map(|_| ENTRY.name.to_owned()),
            backing_filename: name,
            ..ImageInfo::default()
        }
    }
}
