//! The common parts of read-only formats that do not use the layer of tables.
//!
//! They have one file, no writing, and a disk of which nothing is known before it is read.

use crate::block::*;
use crate::io::{Errno, IoResult, IoVec};
use crate::options::{Map, NodeRef};
use serde::Deserialize;
use std::future::Future;

/// The options of such a format.
pub static HELP: &[OptionHelp] =
    &[OptionHelp { name: "file", value: "node", help: "The node that holds the image" }];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
}

/// Opens the file of an image.
///
/// # Errors
/// In QEMU's words, when it is to be written.
pub async fn open_file(opening: &mut Opening, map: Map) -> Result<Child, Error> {
    let options: Options = opening.parse(map)?;
    if !opening.options().read_only && !opening.auto_read_only() {
        return Err(Error::new("Image is read-only").with_errno(Errno(libc::EACCES)));
    }
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    opening.child(Role::File, options.file, during).await
}

/// An image of such a format.
pub trait Content: Send + Sync + 'static {
    fn entry(&self) -> &'static DriverEntry;

    /// `file` alone.
    fn children(&self) -> &[Child; 1];

    /// The length of the disk, in bytes.
    fn len(&self) -> u64;

    /// Reads bytes of the disk.
    fn read(&self, at: u64, into: &IoVec<'_>) -> impl Future<Output = IoResult>;
}

/// The driver of an image.
pub struct ReadOnly<C>(pub C);

impl<C: Content> Driver for ReadOnly<C> {
    fn entry(&self) -> &'static DriverEntry {
        self.0.entry()
    }

    /// Requests of any shape are copied together.
    fn traits(&self) -> Traits {
        Traits { abilities: Abilities::READ_ONLY, ..Traits::default() }
    }

    fn len(&self) -> u64 {
        self.0.len()
    }

    fn children(&self) -> &[Child] {
        self.0.children()
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(self.0.read(at, into))
    }

    fn write<'a>(&'a self, _: u64, _: &'a IoVec<'a>, _: WriteFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(std::future::ready(Err(Errno::EPERM)))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn status(&self, _: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let status = Status::DATA | Status::ALLOCATED;
        Box::pin(std::future::ready(Ok(Extent { len, status, place: None })))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl<C: Content> Image for ReadOnly<C> {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn has_info(&self) -> bool {
        false
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.0.children()[0].node())
    }
}
