//! Bundles: folders whose `DiskDescriptor.xml` names the images of a disk.
//!
//! A disk may lie in several parts, each with snapshots below its top image. QEMU has no such driver.
//!
//! | file | it holds |
//! |---|---|
//! | `elements` | XML, as far as it is needed |
//! | `descriptor` | what the text says, inside limits |
//! | `open` | opening the images |
//! | `disk` | requests, which are given to the parts |
//!
//! Each part is a node of its own, a chain of Parallels images over a Parallels image or a raw one: they do all of the
//! reading and writing. Neither the descriptor nor an image below the top is ever written.

mod descriptor;
mod disk;
mod elements;
mod open;

pub(super) use descriptor::probe;
pub(super) use open::open;

use super::ENTRY;
use crate::block::*;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::{Map, Value};
use descriptor::Type;
use std::sync::Arc;

/// An open bundle.
struct Bundle {
    /// `file`, the descriptor, then the parts in their order.
    children: Vec<Child>,
    /// One for each child behind the first. At least one.
    parts: Vec<Part>,
}

/// A part of the disk.
struct Part {
    /// Bytes of the disk.
    start: u64,
    end: u64,
    /// As the descriptor has them, the top one first.
    images: Vec<descriptor::Image>,
}

impl Bundle {
    /// The nodes of the parts.
    fn nodes(&self) -> impl Iterator<Item = Arc<Node>> {
        self.children[1..].iter().map(Child::node)
    }
}

impl Driver for Bundle {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.common_traits()
    }

    fn len(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
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
        self.map_part(inflight, at, want, access)
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(self.read_parts(at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(self.write_parts(at, from, flags))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(self.zero_parts(at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(self.discard_parts(at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            for node in self.nodes() {
                node.flush().await?;
            }
            Ok(())
        })
    }

    fn child_perms(&self, child: usize, own: Perms) -> Perms {
        match child {
            // It is only read, once.
            0 => Perms { held: own.held & Perm::CONSISTENT_READ, shared: Perm::all() },
            _ => Perms::format(own),
        }
    }

    /// The parts hand over what they have.
    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(self.status_of(at, len, precision))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl HandOver for Bundle {}

impl Image for Bundle {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(async move {
            let mut sum = 0;
            for child in &self.children {
                sum += allocated_in(child.node()).await?;
            }
            Ok(sum)
        })
    }

    /// Checks the images of all parts; those below the top are repaired where they are opened by themselves.
    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(self.check_images(fix, say))
    }

    /// The parts, under the names that vmdk has for its own, and what each of them is in.
    fn info(&self) -> ImageInfo {
        let mut extents = Vec::new();
        for part in &self.parts {
            let images = part.images.iter().map(|image| {
                let kind = match image.kind {
                    Type::Plain => "raw",
                    Type::Expanding => ENTRY.name,
                };
                let text = |text: &str| Value::Str(text.to_owned());
                let fields = [
                    ("filename", text(&image.file)),
                    ("format", text(kind)),
                    ("guid", text(&image.guid)),
                ];
                Value::Map(Map::from_iter(fields))
            });
            let mut extent = Map::new();
            extent.insert("virtual-size", Value::from(part.end - part.start));
            extent.insert("images", Value::List(images.collect()));
            extents.push(Value::Map(extent));
        }
        let data = Map::from_iter([("extents", Value::List(extents))]);
        let specific = [("type", Value::from(ENTRY.name)), ("data", Value::Map(data))];
        ImageInfo { specific: Some(Value::Map(Map::from_iter(specific))), ..ImageInfo::default() }
    }
}
