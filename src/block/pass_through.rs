//! Drivers that pass requests on to one child: the defaults for all that a filter leaves unchanged.
//!
//! A filter implements [`PassThrough`] with what it changes, and is a [`Driver`] by that. On the fast path nothing is
//! added: every method is known when the filter is compiled.

use super::*;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::Map;
use std::sync::Arc;

/// A driver that passes all requests on to its only child. Each method's default does that, and changes nothing; what
/// is promised to a [`Driver`] is promised here.
#[expect(
    async_fn_in_trait,
    reason = "requests stay on their worker, so that their futures need not be Send"
)]
#[expect(
    clippy::len_without_is_empty,
    reason = "a disk is asked how long it is, not whether it is"
)]
pub trait PassThrough: Send + Sync + 'static {
    /// As [`Driver::entry`].
    fn entry(&self) -> &'static DriverEntry;

    /// The child.
    fn below(&self) -> &[Child; 1];

    /// The child's node, for the slow path and the control plane.
    fn node(&self) -> Arc<Node> {
        self.below()[0].node()
    }

    /// As [`Driver::traits`].
    fn traits(&self) -> Traits {
        self.node().traits()
    }

    /// As [`Driver::scratch`].
    fn scratch(&self) -> Scratch {
        Scratch::default()
    }

    /// As [`Driver::len`].
    fn len(&self) -> u64 {
        self.node().driver().len()
    }

    /// As [`Driver::map`].
    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        self.below()[0].fast(inflight).map(inflight, at, want, access)
    }

    /// As [`Driver::read`]. What was rounded out beyond the child's end reads as zeroes.
    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        read_inside(&self.node(), at, into).await
    }

    /// As [`Driver::write`]. What was rounded out beyond the child's end is left out.
    async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        write_inside(&self.node(), at, from, flags).await
    }

    /// As [`Driver::zero`].
    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.node().zero(at, len, flags).await
    }

    /// As [`Driver::discard`].
    async fn discard(&self, at: u64, len: u64) -> IoResult {
        self.node().discard(at, len).await
    }

    /// As [`Driver::flush`].
    async fn flush(&self) -> IoResult {
        self.node().flush().await
    }

    /// As [`Driver::status`].
    async fn status(&self, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
        status_of(&self.node(), at, len, precision).await
    }

    /// As [`Driver::child_perms`].
    fn perms(&self, own: Perms) -> Perms {
        self.below()[0].role().perms(self.entry().kind, own)
    }

    /// As [`Image::resize`].
    async fn resize(&self, len: u64, shrink: bool) -> Result<(), Error> {
        self.node().resize(len, shrink).await
    }

    /// As [`Image::grow`].
    async fn grow(&self, len: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.node().grow(len, preallocation).await
    }

    /// As [`Image::info`]: what the child reports about itself is not said of this node.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    /// As [`Driver::own_options`].
    fn own_options(&self) -> Map {
        Map::new()
    }

    /// As [`Driver::name_over`].
    fn name_over(&self, child: Option<&str>) -> Option<String> {
        let _ = child;
        None
    }

    /// As [`Driver::hand_over`].
    fn hand_over(&self) -> Option<&dyn HandOver> {
        None
    }

    /// As [`Driver::debugger`].
    fn debugger(&self) -> Option<&dyn Debugger> {
        None
    }

    /// As [`Driver::unwritten`].
    fn unwritten(&self) -> Option<LocalFuture<'_, IoResult>> {
        None
    }

    /// As [`Driver::freeze`].
    async fn freeze(&self) -> IoResult {
        Ok(())
    }

    /// As [`Driver::thaw`].
    fn thaw(&self) {}

    /// As [`Driver::close`].
    async fn close(&self) -> IoResult {
        Ok(())
    }
}

/// Of `len` bytes from `at` on, how many the node has. A request that was rounded out to the alignment of the one
/// above may end beyond its end.
pub fn inside(node: &Node, at: u64, len: u64) -> u64 {
    len.min(node.len().saturating_sub(at))
}

/// Reads what the node has of a range; the rest are zeroes.
pub async fn read_inside(node: &Node, at: u64, into: &IoVec<'_>) -> IoResult {
    let len = inside(node, at, into.len());
    if len == into.len() {
        return node.read(at, into).await;
    }
    into.slice(len, into.len() - len).zero();
    node.read(at, &into.slice(0, len)).await
}

/// Writes what the node has of a range, or all of it if it is to grow.
pub async fn write_inside(node: &Node, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
    let len = inside(node, at, from.len());
    if len == from.len() || flags.contains(WriteFlags::GROW) {
        return node.write(at, from, flags).await;
    }
    node.write(at, &from.slice(0, len), flags).await
}

/// The status of a range that is in the same place of the only child.
pub async fn status_of(node: &Node, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
    let extent = node.status(at, len, precision).await?;
    Ok(Extent { place: Some(Place { child: Some(0), offset: at }), ..extent })
}

impl<P: PassThrough> Driver for P {
    fn entry(&self) -> &'static DriverEntry {
        PassThrough::entry(self)
    }

    fn traits(&self) -> Traits {
        PassThrough::traits(self)
    }

    fn scratch(&self) -> Scratch {
        PassThrough::scratch(self)
    }

    fn len(&self) -> u64 {
        PassThrough::len(self)
    }

    fn children(&self) -> &[Child] {
        self.below()
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        PassThrough::map(self, inflight, at, want, access)
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(PassThrough::read(self, at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(PassThrough::write(self, at, from, flags))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(PassThrough::zero(self, at, len, flags))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(PassThrough::discard(self, at, len))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(PassThrough::flush(self))
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(PassThrough::status(self, at, len, precision))
    }

    fn child_perms(&self, _: usize, own: Perms) -> Perms {
        self.perms(own)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        PassThrough::hand_over(self)
    }

    fn debugger(&self) -> Option<&dyn Debugger> {
        PassThrough::debugger(self)
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn own_options(&self) -> Map {
        PassThrough::own_options(self)
    }

    fn name_over(&self, child: Option<&str>) -> Option<String> {
        PassThrough::name_over(self, child)
    }

    fn unwritten(&self) -> Option<LocalFuture<'_, IoResult>> {
        PassThrough::unwritten(self)
    }

    fn freeze(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(PassThrough::freeze(self))
    }

    fn thaw(&self) {
        PassThrough::thaw(self);
    }

    fn close(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(PassThrough::close(self))
    }
}

impl<P: PassThrough> Image for P {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(PassThrough::resize(self, len, shrink))
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(PassThrough::grow(self, len, preallocation))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.node())
    }

    fn info(&self) -> ImageInfo {
        PassThrough::info(self)
    }
}
