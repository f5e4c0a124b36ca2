//! copy-on-read, a filter that stores what was read from a backing file in the image above it.
//!
//! The backing file is not read there a second time.
//!
//! Whole clusters are copied. A copy and the writes to its range wait for each other
//! ([`Node::populate`]). A read whose copy cannot be written fails, as in QEMU. Reads of what needs no
//! copy take the fast path once the slow one has found that out (`known`).

mod known;

use crate::block::pass_through::{PassThrough, inside, read_inside};
use crate::block::*;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef};
use known::Known;
use serde::Deserialize;
use std::sync::{Arc, Weak};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: &[
        OptionHelp { name: "file", value: "node", help: "The image that copies are written to" },
        OptionHelp {
            name: "bottom",
            value: "str",
            help: "The lowest node of its backing chain that is copied from",
        },
    ],
    ..DriverEntry::new("copy-on-read", Kind::Filter, |opening, options| {
        Box::pin(open(opening, options))
    })
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    bottom: Option<String>,
}

struct CopyOnRead {
    file: [Child; 1],
    bottom: Option<Weak<Node>>,
    /// What is copied at once, in bytes; a power of two.
    cluster: u64,
    known: Known,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(options)?;
    let file = opening.child(Role::File, options.file, Perms::NONE).await?;
    let node = file.node();
    let traits = node.traits();
    if opening.options().read_only || traits.abilities.contains(Abilities::READ_ONLY) {
        return Err(Error::new("Block node is read-only"));
    }
    let bottom = options.bottom.map(|name| find_bottom(opening, &name, &node)).transpose()?;
    let image = node.below_filters();
    let cluster = image.driver().image().and_then(|image| image.info().cluster_size);
    let cluster = cluster.unwrap_or(0).max(traits.request_align as u64).next_power_of_two();
    let known = Known::new(node.len(), cluster);
    Ok(Box::new(CopyOnRead { file: [file], bottom, cluster, known }))
}

/// The node called `name` in the chain that begins with `top`.
fn find_bottom(opening: &Opening, name: &str, top: &Arc<Node>) -> Result<Weak<Node>, Error> {
    let shown = name.escape_debug();
    let found = opening.find(name);
    if name == opening.name()
        || found.as_ref().is_some_and(|node| node.driver().entry().kind == Kind::Filter)
    {
        return Err(Error::new(format!("Bottom node '{shown}' is a filter")));
    }
    let found = found.ok_or_else(|| Error::new(format!("Bottom node '{shown}' not found")))?;
    let mut layer = Some(top.below_filters());
    while let Some(node) = layer {
        if Arc::ptr_eq(&node, &found) {
            return Ok(Arc::downgrade(&found));
        }
        layer = backing_of(&node);
    }
    Err(Error::new(format!(
        "Bottom node '{shown}' is not in the backing chain of '{}'",
        top.name()
    )))
}

fn backing_of(node: &Node) -> Option<Arc<Node>> {
    extents::backing(node).map(|below| below.below_filters())
}

impl CopyOnRead {
    /// Copies what there is to copy of the clusters that a range touches.
    async fn copy(&self, node: &Node, at: u64, len: u64) -> IoResult {
        // Users without permissions on this node (a format that is being opened) only read.
        if !node.held().intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
            return Ok(());
        }
        let start = at - at % self.cluster;
        let end = (at + len).next_multiple_of(self.cluster).min(node.len());
        let mut pos = start;
        while pos < end {
            let (n, wanted) = self.find_uncopied(node, pos, end - pos).await?;
            if wanted {
                node.populate(pos, n).await?;
            }
            pos += n;
        }
        self.known.add(start..end, node.len());
        Ok(())
    }

    /// For how many bytes the same is true, and whether they are to be copied.
    async fn find_uncopied(&self, node: &Node, at: u64, len: u64) -> IoResult<(u64, bool)> {
        let own = node.status(at, len, Precision::Allocation).await?;
        let allocated = own.status.contains(Status::ALLOCATED);
        let Some(bottom) = self.bottom.as_ref().filter(|_| !allocated) else {
            return Ok((own.len, !allocated));
        };
        let mut len = own.len;
        let mut layer = self.node().below_filters();
        while !std::ptr::eq(bottom.as_ptr(), Arc::as_ptr(&layer)) {
            let Some(next) = backing_of(&layer) else { break };
            let there = next.len().saturating_sub(at);
            if there == 0 {
                // The zeroes behind its end are its own.
                return Ok((len, true));
            }
            let extent = next.status(at, len.min(there), Precision::Allocation).await?;
            len = extent.len;
            if extent.status.contains(Status::ALLOCATED) {
                return Ok((len, true));
            }
            layer = next;
        }
        Ok((len, false))
    }
}

impl PassThrough for CopyOnRead {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn below(&self) -> &[Child; 1] {
        &self.file
    }

    /// What is copied goes through a bounce buffer.
    fn scratch(&self) -> Scratch {
        Scratch { other: working_memory::BOUNCE_LIMIT as u32, ..Scratch::default() }
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        let want = match access {
            Access::Read => match self.known.run(at, want) {
                0 => return Mapping::slow(want),
                known => known,
            },
            _ => want,
        };
        self.file[0].fast(inflight).map(inflight, at, want, access)
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let node = self.node();
        let len = inside(&node, at, into.len());
        if self.known.run(at, len) < len {
            self.copy(&node, at, len).await?;
        }
        read_inside(&node, at, into).await
    }

    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let result = self.node().zero(at, len, flags).await;
        self.known.remove(at..at + len);
        result
    }

    async fn discard(&self, at: u64, len: u64) -> IoResult {
        let result = self.node().discard(at, len).await;
        self.known.remove(at..at + len);
        result
    }

    fn perms(&self, own: Perms) -> Perms {
        let Perms { mut held, shared } = Perms::filter(own);
        if !held.is_empty() {
            held |= Perm::WRITE_UNCHANGED;
        }
        Perms { held, shared }
    }
}
