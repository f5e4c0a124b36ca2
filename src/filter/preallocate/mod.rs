//! preallocate, a filter that grows the file in large steps ahead of the format's writes.
//!
//! File systems that allocate slowly are called less often, and the file fragments less.
//!
//! The node's length is where the data ends, as if there were no filter; the file continues behind it with zeroes
//! that are allocated already. Three rules:
//!
//! * Bytes of the file behind the data's end read as zeroes. So the end moves with every write,
//!   a failed one too, and zeroing there is done when the end has moved.
//! * What the file has too much is cut off when the last writer leaves, and when the node is closed.
//!   Until then the file stays locked.
//! * Preallocation is a favour: where it fails, the write makes the file longer by itself.
//!
//! Inside the data the fast path is the file's own.

mod gate;

use crate::block::pass_through::{PassThrough, write_inside};
use crate::block::*;
use crate::io::{Errno, InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef};
use gate::{Gate, Inside};
use serde::Deserialize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: &[
        OptionHelp { name: "file", value: "node", help: "The file that shall grow in steps" },
        OptionHelp {
            name: "prealloc-align",
            value: "int",
            help: "The file's length becomes a multiple of this, in bytes (1 MiB)",
        },
        OptionHelp {
            name: "prealloc-size",
            value: "int",
            help: "How far ahead of a write it grows, in bytes (128 MiB)",
        },
    ],
    ..DriverEntry::new("preallocate", Kind::Filter, |opening, options| {
        Box::pin(open(opening, options))
    })
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    #[serde(default = "default_align")]
    prealloc_align: i64,
    #[serde(default = "default_size")]
    prealloc_size: i64,
}

fn default_align() -> i64 {
    1 << 20
}

fn default_size() -> i64 {
    128 << 20
}

struct Preallocate {
    file: [Child; 1],
    /// Bytes; at least 1.
    align: u64,
    /// Bytes.
    size: u64,
    /// In bytes. Behind it the file has zeroes, if anything.
    data_end: AtomicU64,
    /// Writes past the data's end are inside; cutting off the rest of the file needs the gate alone.
    writers: Gate,
    /// Up to there the file is known to go, in bytes; what is behind the data's end there is zeroed.
    reserved: AtomicU64,
    /// Who zeroes ahead is alone; writes that make the file longer by themselves are inside.
    growing: Gate,
    /// Up to where the file could not be made longer: it is not tried again.
    failed: AtomicU64,
    /// What the file has behind the data is none of this node's.
    is_frozen: AtomicBool,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(options)?;
    let size = non_negative("prealloc-size", options.prealloc_size)?;
    let align = non_negative("prealloc-align", options.prealloc_align)?;
    if !align.is_multiple_of(SECTOR) {
        return Err(Error::new(
            "prealloc-align parameter of preallocate filter is not aligned to 512",
        ));
    }
    let file = opening.child(Role::File, options.file, Perms::NONE).await?;
    let node = file.node();
    Ok(Box::new(Preallocate {
        align: align.max(1),
        size,
        data_end: AtomicU64::new(node.driver().len()),
        reserved: AtomicU64::new(node.driver().len()),
        writers: Gate::default(),
        growing: Gate::default(),
        failed: AtomicU64::new(0),
        is_frozen: AtomicBool::new(false),
        file: [file],
    }))
}

fn non_negative(name: &str, value: i64) -> Result<u64, Error> {
    u64::try_from(value).map_err(|_| {
        Error::new(format!("Parameter '{name}' expects a non-negative number below 2^64"))
    })
}

impl Preallocate {
    fn data_end(&self) -> u64 {
        self.data_end.load(Ordering::SeqCst)
    }

    /// Whether the file is longer than its data.
    fn has_more(&self) -> bool {
        !self.is_frozen.load(Ordering::SeqCst) && self.node().driver().len() > self.data_end()
    }

    /// Makes the file reach beyond `end`, if it can be done quickly. If not, the answer is held while
    /// the write makes the file longer by itself, so that nobody zeroes ahead over it.
    async fn reserve(&self, node: &Node, end: u64) -> Option<Inside<'_>> {
        if end <= self.reserved.load(Ordering::SeqCst) {
            return None;
        }
        if end > self.failed.load(Ordering::SeqCst) {
            let _alone = self.growing.alone().await;
            if end > self.reserved.load(Ordering::SeqCst) {
                self.grow_ahead(node, end).await;
            }
        }
        match end <= self.reserved.load(Ordering::SeqCst) {
            true => None,
            false => Some(self.growing.enter().await),
        }
    }

    async fn grow_ahead(&self, node: &Node, end: u64) {
        let unit = node.traits().zero_align as u64;
        let goal = end.saturating_add(self.size).min(i64::MAX as u64 - self.align - unit);
        let goal = goal.next_multiple_of(self.align).next_multiple_of(unit);
        // What is before the first whole unit is past the end of the file too.
        let start = node.driver().len().next_multiple_of(unit);
        if start >= goal {
            return;
        }
        match node.zero(start, goal - start, ZeroFlags::NO_FALLBACK).await {
            Ok(()) => self.reserved.store(goal, Ordering::SeqCst),
            Err(errno) => {
                log::debug!("preallocating up to {goal}: {errno}");
                self.failed.store(goal, Ordering::SeqCst);
            }
        }
    }

    /// Cuts off what the file has behind the data.
    async fn trim(&self) -> IoResult {
        let _alone = self.writers.alone().await;
        if !self.has_more() {
            return Ok(());
        }
        let (node, end) = (self.node(), self.data_end());
        node.resize(end, true).await.map_err(|error| {
            log::error!("{}: cutting off what was preallocated: {error}", node.name());
            error.errno().unwrap_or(Errno::EIO)
        })?;
        self.reserved.store(end, Ordering::SeqCst);
        self.failed.store(0, Ordering::SeqCst);
        Ok(())
    }

    async fn resize_to(
        &self,
        len: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let _alone = self.writers.alone().await;
        let node = self.node();
        let preallocated = self.data_end()..=node.driver().len();
        if !preallocated.contains(&len) {
            let grows = len > node.driver().len() || preallocation != Preallocation::Off;
            match grows {
                true => node.grow(len, preallocation).await?,
                false => node.resize(len, shrink).await?,
            }
            self.reserved.store(len, Ordering::SeqCst);
        }
        self.data_end.store(len, Ordering::SeqCst);
        Ok(())
    }
}

impl PassThrough for Preallocate {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn below(&self) -> &[Child; 1] {
        &self.file
    }

    fn traits(&self) -> Traits {
        let node = self.node();
        let mut traits = node.traits();
        if node.driver().image().is_none() {
            traits.abilities -= Abilities::GROW;
        }
        traits
    }

    fn len(&self) -> u64 {
        self.data_end()
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        // The end moves on the slow path.
        if access != Access::Read && at + want > self.data_end() {
            return Mapping::slow(want);
        }
        self.file[0].fast(inflight).map(inflight, at, want, access)
    }

    async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        let (node, end) = (self.node(), at + from.len());
        if flags.contains(WriteFlags::GROW) {
            let _inside = self.writers.enter().await;
            let _growing = self.reserve(&node, end).await;
            let result = node.write(at, from, flags).await;
            self.move_end(&node, end);
            return result;
        }
        write_inside(&node, at, from, flags).await?;
        self.fill_sector(end);
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let (node, end) = (self.node(), at + len);
        if !flags.contains(ZeroFlags::GROW) {
            node.zero(at, len, flags).await?;
            self.fill_sector(end);
            return Ok(());
        }
        let _inside = self.writers.enter().await;
        let growing = self.reserve(&node, end).await;
        if growing.is_some() {
            let result = node.zero(at, len, flags).await;
            self.move_end(&node, end);
            return result;
        }
        // Behind the old end there are zeroes.
        let old_end = self.data_end.fetch_max(end, Ordering::SeqCst);
        let end = end.min(old_end);
        if at < end { node.zero(at, end - at, flags).await } else { Ok(()) }
    }

    fn perms(&self, own: Perms) -> Perms {
        let Perms { mut held, mut shared } = Perms::filter(own);
        if self.has_more() {
            held |= Perm::RESIZE;
        }
        if held.intersects(Perm::WRITE | Perm::RESIZE) {
            // Somebody else's end of the data would not be this one's.
            shared -= Perm::WRITE | Perm::RESIZE;
        }
        Perms { held, shared }
    }

    async fn resize(&self, len: u64, shrink: bool) -> Result<(), Error> {
        self.resize_to(len, shrink, Preallocation::Off).await
    }

    async fn grow(&self, len: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.resize_to(len, false, preallocation).await
    }

    fn unwritten(&self) -> Option<LocalFuture<'_, IoResult>> {
        self.has_more().then(|| Box::pin(self.trim()) as LocalFuture<'_, IoResult>)
    }

    async fn freeze(&self) -> IoResult {
        self.trim().await?;
        self.is_frozen.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn thaw(&self) {
        self.is_frozen.store(false, Ordering::SeqCst);
    }

    async fn close(&self) -> IoResult {
        self.trim().await
    }
}

impl Preallocate {
    /// Books a write past the data's end, whatever became of it. A file that has not become long
    /// enough has refused it.
    fn move_end(&self, node: &Node, end: u64) {
        if node.driver().len() >= end {
            self.data_end.fetch_max(end, Ordering::SeqCst);
        }
    }

    /// Books a write of a user that may not lengthen the disk: only the last sector, where the file ends in the
    /// middle of it, is partly behind the data.
    fn fill_sector(&self, end: u64) {
        let data_end = self.data_end();
        if end > data_end {
            self.data_end.fetch_max(end.min(data_end.next_multiple_of(SECTOR)), Ordering::SeqCst);
        }
    }
}
