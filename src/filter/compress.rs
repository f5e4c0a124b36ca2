//! compress: what is written is stored compressed by the image below.
//!
//! Requests are rounded out to whole units of the image, which the node does. What is stored once is not
//! written over: such a write fails, as in QEMU.

use super::read_below;
use crate::block::*;
use crate::io::{Errno, InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef};
use serde::Deserialize;
use std::sync::Arc;

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
    traits: Traits,
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
    let below = node.traits();
    let align =
        u32::try_from(unit).map_err(|_| Error::new("The image's clusters are too large"))?;
    let whole = |limit: u64| (limit / unit * unit).max(unit);
    let traits = Traits {
        request_align: align,
        zero_align: align,
        discard_align: align,
        optimal_io: align,
        max_transfer: whole(below.max_transfer.into()) as u32,
        max_zero: whole(below.max_zero),
        max_discard: whole(below.max_discard),
        abilities: below.abilities - Abilities::FUA - Abilities::GROW,
        ..below
    };
    Ok(Box::new(CompressFilter { file: [file], traits }))
}

impl CompressFilter {
    fn node(&self) -> Arc<Node> {
        self.file[0].node()
    }

    /// The part of a range that is inside the disk: it was rounded out.
    fn inside(node: &Node, at: u64, len: u64) -> u64 {
        len.min(node.len().saturating_sub(at))
    }
}

impl Driver for CompressFilter {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn scratch(&self) -> Scratch {
        // The plain units and the packed ones.
        let packing = 2 * compress::together(u64::from(self.traits.request_align));
        Scratch { other: u32::try_from(packing).unwrap_or(u32::MAX), ..Scratch::default() }
    }

    fn len(&self) -> u64 {
        self.node().driver().len()
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
        match access {
            Access::Read => self.file[0].fast(inflight).map(inflight, at, want, access),
            _ => Mapping::slow(want),
        }
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { read_below(&self.node(), at, into).await })
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            let len = Self::inside(&node, at, from.len());
            node.write_compressed(at, &from.slice(0, len), flags).await
        })
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            node.zero(at, Self::inside(&node, at, len), flags).await
        })
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let node = self.node();
            node.discard(at, Self::inside(&node, at, len)).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.node().flush().await })
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move {
            let extent = self.node().status(at, len, precision).await?;
            Ok(Extent { place: Some(Place { child: Some(0), offset: at }), ..extent })
        })
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for CompressFilter {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let node = self.node();
            resizable(&node)?.resize(len, shrink).await
        })
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let node = self.node();
            resizable(&node)?.grow(len, preallocation).await
        })
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(async move {
            let node = self.node();
            node.driver().image().ok_or(Errno::ENOTSUP)?.allocated().await
        })
    }

    fn info(&self) -> ImageInfo {
        let cluster_size = self.node().compression_unit();
        ImageInfo { cluster_size, ..ImageInfo::default() }
    }
}
