//! Raw: the bytes of the file as they are, or a window of them (`offset`, `size`).
//!
//! Several users on one raw node are legal if they allow each other. Below it, nobody else may write
//! or resize: a second guest on the same file, through another node or another process, destroys its
//! file system. (qemu-storage-daemon allows it; its guests' devices, like us, do not.)

use crate::block::create::{CreateEntry, CreateOption, Creation, ValueType};
use crate::block::registry::{DriverEntry, Kind, OptionHelp};
use crate::block::*;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef, Value};
use serde::Deserialize;

pub static ENTRY: DriverEntry = DriverEntry {
    name: "raw",
    kind: Kind::Format,
    open: |opening, options| Box::pin(open(opening, options)),
    options: &[
        OptionHelp { name: "file", value: "node", help: "The node whose bytes these are" },
        OptionHelp { name: "offset", value: "int", help: "Where the disk begins in it, in bytes" },
        OptionHelp { name: "size", value: "int", help: "The disk's length, a multiple of 512" },
    ],
    prefixes: &[],
    create: Some(&CreateEntry {
        options: &[CreateOption {
            name: "size",
            value: ValueType::Size,
            help: "Virtual disk size",
            default: None,
        }],
        create: |creation, options| Box::pin(create(creation, options)),
    }),
    // Anything is raw, if it is nothing else.
    probe: Some(|_, _| 1),
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    offset: Option<i64>,
    size: Option<i64>,
}

struct Raw {
    file: [Child; 1],
    /// Of the disk in the file, in bytes.
    offset: u64,
    /// The disk's length in bytes, a multiple of [`SECTOR`]; none to follow the file's.
    size: Option<u64>,
    traits: Traits,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(options)?;
    let offset = non_negative("offset", options.offset)?;
    let size = non_negative("size", options.size)?;
    let file = opening.child("file", options.file, Inherit::Storage, Perms::NONE).await?;
    let node = file.node();
    let offset = check_window(offset.unwrap_or(0), size, node.len())?;
    let traits = traits(node.traits(), offset);
    Ok(Box::new(Raw { file: [file], offset, size, traits }))
}

fn non_negative(name: &str, value: Option<i64>) -> Result<Option<u64>, Error> {
    let checked = value.map(u64::try_from).transpose();
    checked.map_err(|_| {
        Error::new(format!("Parameter '{name}' expects a non-negative number below 2^64"))
    })
}

/// Whether the window lies in a file of `file_len` bytes; its offset.
fn check_window(offset: u64, size: Option<u64>, file_len: u64) -> Result<u64, Error> {
    if offset > file_len {
        return Err(Error::new(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({file_len})"
        )));
    }
    let Some(size) = size else { return Ok(offset) };
    if size > file_len - offset {
        // The two blanks are QEMU's.
        return Err(Error::new(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
             actual size of the containing file ({file_len})"
        )));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::new("Specified size is not multiple of 512"));
    }
    Ok(offset)
}

/// The file's traits, but for alignments that the window's offset breaks: a request that is aligned
/// here would not be so there, and the file's node aligns it.
fn traits(file: Traits, offset: u64) -> Traits {
    let keeps = |align: u32| offset.is_multiple_of(align as u64);
    let (request_align, buffer_align) = match keeps(file.request_align) {
        true => (file.request_align, file.buffer_align),
        false => (1, 1),
    };
    Traits {
        request_align,
        buffer_align,
        zero_align: if keeps(file.zero_align) { file.zero_align } else { request_align },
        discard_align: if keeps(file.discard_align) { file.discard_align } else { request_align },
        ..file
    }
}

impl Raw {
    fn node(&self) -> std::sync::Arc<Node> {
        self.file[0].node()
    }

    /// Of `len` bytes from `at` on, how many the file has. A request that was rounded out to the
    /// alignment may go beyond the disk's end; what lies there is not its own.
    fn clamp(&self, node: &Node, at: u64, len: u64) -> u64 {
        let end = match self.size {
            Some(size) => (self.offset + size).min(node.len()),
            None => node.len(),
        };
        len.min(end.saturating_sub(self.offset + at))
    }
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    /// Without a size, what the file has from the offset on, in whole sectors: of one that the file
    /// ends in the middle of, a guest could neither read nor write the rest.
    fn len(&self) -> u64 {
        self.size.unwrap_or_else(|| {
            let rest = self.node().len().saturating_sub(self.offset);
            rest - rest % SECTOR
        })
    }

    fn children(&self) -> &[Child] {
        &self.file
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        self.file[0].fast(inflight).map(inflight, self.offset + at, want, access)
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            let len = self.clamp(&node, at, into.len());
            if len == into.len() {
                return node.read(self.offset + at, into).await;
            }
            into.slice(len, into.len() - len).zero();
            node.read(self.offset + at, &into.slice(0, len)).await
        })
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            let len = self.clamp(&node, at, from.len());
            if len == from.len() {
                return node.write(self.offset + at, from, flags).await;
            }
            node.write(self.offset + at, &from.slice(0, len), flags).await
        })
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            node.zero(self.offset + at, self.clamp(&node, at, len), flags).await
        })
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            node.discard(self.offset + at, self.clamp(&node, at, len)).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.node().flush().await })
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move {
            let offset = self.offset + at;
            let extent = self.node().status(offset, len, precision).await?;
            let place = Some(Place { child: Some(0), offset });
            Ok(Extent { status: extent.status | Status::ALLOCATED, place, ..extent })
        })
    }

    fn child_perms(&self, _child: usize, own: Perms) -> Perms {
        // No metadata of its own, so no more is held than the users hold.
        Perms { held: own.held, shared: own.shared - (Perm::WRITE | Perm::RESIZE) }
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for Raw {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if self.size.is_some() {
                return Err(Error::new("Cannot resize fixed-size raw disks"));
            }
            let len = self.offset.checked_add(len).filter(|&len| i64::try_from(len).is_ok());
            let len = len.ok_or_else(|| Error::new("Disk size too large for the chosen offset"))?;
            let node = self.node();
            let image = node.driver().image();
            let image =
                image.ok_or_else(|| Error::new("Image format driver does not support resize"))?;
            image.resize(len, shrink).await
        })
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(async move {
            let node = self.node();
            let image = node.driver().image().ok_or(crate::io::Errno::ENOTSUP)?;
            image.allocated().await
        })
    }
}

/// A raw image is what the protocol makes, in whole sectors.
async fn create(creation: &Creation, mut options: Map) -> Result<(), Error> {
    if let Some(Value::Int(size)) = options.get_mut("size") {
        *size = *size + (SECTOR as i128 - *size % SECTOR as i128) % SECTOR as i128;
    }
    creation.create_file(options).await
}
