//! compress, a filter whose writes are stored compressed by the image below.
//!
//! Requests are rounded out to whole units of the image, which the node does. What is stored once is not
//! written over: such a write fails, as in QEMU.

use crate::block::pass_through::{PassThrough, inside};
use crate::block::*;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef};
use serde::Deserialize;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: &[OptionHelp { name: "file", value: "node", help: "The image that stores it" }],
    ..DriverEntry::new("compress", Kind::Filter, |opening, options| {
        Box::pin(open(opening, options))
    })
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
}

struct CompressFilter {
    file: [Child; 1],
    /// Of the image when it was opened, in bytes.
    align: u32,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(options)?;
    let file = opening.child(Role::File, options.file, Perms::NONE).await?;
    let node = file.node();
    let Some(unit) = node.compression_unit() else {
        return Err(Error::new(format!(
            "Compression is not supported for underlying format: {}",
            node.driver().name()
        )));
    };
    let align =
        u32::try_from(unit).map_err(|_| Error::new("The image's clusters are too large"))?;
    Ok(Box::new(CompressFilter { file: [file], align }))
}

impl CompressFilter {
    /// The unit of the image that is below now, in bytes.
    fn align(&self) -> u32 {
        let unit = self.node().compression_unit().and_then(|unit| u32::try_from(unit).ok());
        unit.unwrap_or(self.align)
    }
}

impl PassThrough for CompressFilter {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn below(&self) -> &[Child; 1] {
        &self.file
    }

    fn traits(&self) -> Traits {
        let (below, align) = (self.node().traits(), self.align());
        let unit = u64::from(align);
        let whole = |limit: u64| (limit / unit * unit).max(unit);
        Traits {
            request_align: align,
            zero_align: align,
            discard_align: align,
            optimal_io: align,
            max_transfer: whole(below.max_transfer.into()) as u32,
            max_zero: whole(below.max_zero),
            max_discard: whole(below.max_discard),
            abilities: below.abilities - Abilities::FUA - Abilities::GROW,
            ..below
        }
    }

    fn scratch(&self) -> Scratch {
        // The plain units and the packed ones.
        let packing = 2 * compress::together(u64::from(self.align()));
        Scratch { other: u32::try_from(packing).unwrap_or(u32::MAX), ..Scratch::default() }
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        match access {
            Access::Read => self.file[0].fast(inflight).map(inflight, at, want, access),
            _ => Mapping::slow(want),
        }
    }

    async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        let node = self.node();
        let len = inside(&node, at, from.len());
        node.write_compressed(at, &from.slice(0, len), flags).await
    }

    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let node = self.node();
        node.zero(at, inside(&node, at, len), flags).await
    }

    async fn discard(&self, at: u64, len: u64) -> IoResult {
        let node = self.node();
        node.discard(at, inside(&node, at, len)).await
    }

    fn info(&self) -> ImageInfo {
        let cluster_size = self.node().compression_unit();
        ImageInfo { cluster_size, ..ImageInfo::default() }
    }
}
