//! The disk: requests are cut where extents meet, and each part goes to its extent.

use super::{Extent, Part, Vmdk};
use crate::block::{
    Abilities, Access, Child, Decider, Error, Mapping, Node, Place, Precision, ReadMapping, Status,
    Target, Traits, WriteFlags, ZeroFlags,
};
use crate::cow::{
    decider, fast_read, map, read_padded, read_range, status, stored_status, traits_over,
    write_range,
};
use crate::format::vmdk::descriptor::NO_PARENT;
use crate::format::vmdk::layout::Packing;
use crate::format::vmdk::shared::content_id;
use crate::format::vmdk::sparse::Sparse;
use crate::io::{Errno, InFlight, IoResult, IoVec};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Vmdk {
    /// The extent that has a byte of the disk.
    fn part_at(&self, at: u64) -> Option<&Part> {
        self.parts.get(self.parts.partition_point(|part| part.end <= at))
    }

    pub(super) fn common_traits(&self) -> Traits {
        let abilities = match self.shared.is_writable {
            true if self.sparse().all(Sparse::can_zero) => {
                Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD
            }
            true => Abilities::DISCARD,
            false => Abilities::READ_ONLY,
        };
        let grain = self.grain_size().unwrap_or(super::FLAT_UNIT);
        let nodes =
            || self.shared.children.iter().filter(|child| !child.is_backing()).map(Child::node);
        let file = self.shared.children[0].node().traits();
        let mut traits = traits_over(file, grain, grain, abilities);
        for node in nodes() {
            let of_child = traits_over(node.traits(), grain, grain, abilities);
            // What is aligned for all extents.
            traits.request_align = traits.request_align.max(of_child.request_align);
            traits.buffer_align = traits.buffer_align.max(of_child.buffer_align);
            traits.max_transfer = traits.max_transfer.min(of_child.max_transfer);
            traits.max_segments = traits.max_segments.min(of_child.max_segments);
        }
        let align = u64::from(traits.request_align);
        let is_aligned = |part: &Part| {
            let offset = if let Extent::Flat { offset, .. } = part.extent { offset } else { 0 };
            part.start.is_multiple_of(align) && offset.is_multiple_of(align)
        };
        if !self.parts.iter().all(is_aligned) {
            // Nodes below align by themselves what is not.
            (traits.request_align, traits.buffer_align) = (1, 1);
        }
        traits.zero_align = traits.request_align;
        traits.discard_align = traits.request_align;
        traits
    }

    pub(super) fn map_extent<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        let Some(part) = self.part_at(at) else { return Mapping::slow(want) };
        let (inside, len) = (at - part.start, want.min(part.end - at));
        match (&part.extent, access) {
            (Extent::Sparse(_), Access::Read) => match self.map_read_in_extents(inflight, at, want)
            {
                ReadMapping::Here(mapping) => mapping,
                ReadMapping::Below(backing, len) => backing.map_chain(inflight, at, len),
            },
            (Extent::Sparse(sparse), _) => map(&**sparse, inflight, inside, len, access),
            (Extent::Flat { child, offset }, _) => {
                let is_write = access != Access::Read;
                // Before the first write the content ID changes.
                if is_write && !self.shared.is_marked.load(Ordering::Acquire) {
                    return Mapping::slow(len);
                }
                let child = self.shared.children[*child].fast(inflight);
                match offset + inside + len <= child.len() {
                    true => child.map(inflight, offset + inside, len, access),
                    false => Mapping::slow(len),
                }
            }
            (Extent::Zero, Access::Read) => Mapping { len, target: Target::Zero },
            (Extent::Zero | Extent::Shut, _) => Mapping::slow(len),
        }
    }

    pub(super) fn map_read_in_extents<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
    ) -> ReadMapping<'a> {
        match self.part_at(at) {
            Some(Part { start, end, extent: Extent::Sparse(sparse), .. }) => {
                fast_read(&**sparse, inflight, at - start, want.min(end - at))
            }
            _ => ReadMapping::Here(self.map_extent(inflight, at, want, Access::Read)),
        }
    }

    pub(super) async fn decide(&self, at: u64, len: u64) -> IoResult<Decider> {
        let part = self.part_at(at).ok_or(Errno::EINVAL)?;
        let len = len.min(part.end - at);
        match &part.extent {
            Extent::Sparse(sparse) => decider(&**sparse, at - part.start, len).await,
            _ => Ok((None, len)),
        }
    }

    pub(super) async fn read_extents(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let mut done = 0;
        while done < into.len() {
            let at = at + done;
            let part = self.part_at(at).ok_or(Errno::EINVAL)?;
            let (inside, len) = (at - part.start, (into.len() - done).min(part.end - at));
            let into = into.slice(done, len);
            match &part.extent {
                Extent::Sparse(sparse) => read_range(&**sparse, inside, &into).await?,
                Extent::Flat { child, offset } => {
                    read_padded(&self.shared.children[*child].node(), offset + inside, &into)
                        .await?;
                }
                Extent::Zero => into.zero(),
                Extent::Shut => return Err(Errno(libc::EACCES)),
            }
            done += len;
        }
        Ok(())
    }

    pub(super) async fn write_extents(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        self.shared.check_writable()?;
        let mut done = 0;
        while done < from.len() {
            let at = at + done;
            let part = self.part_at(at).ok_or(Errno::EINVAL)?;
            let (inside, len) = (at - part.start, (from.len() - done).min(part.end - at));
            let from = from.slice(done, len);
            match &part.extent {
                Extent::Sparse(sparse) if sparse.layout.packing != Packing::No => {
                    sparse.write_packed(inside, &from).await?;
                }
                Extent::Sparse(sparse) => write_range(&**sparse, inside, &from).await?,
                Extent::Flat { child, offset } => {
                    self.shared.mark_changed().await?;
                    let child = &self.shared.children[*child];
                    self.write_flat(child, offset + inside, &from).await?;
                }
                Extent::Zero | Extent::Shut => return Err(Errno(libc::EACCES)),
            }
            done += len;
        }
        Ok(())
    }

    /// Writes to a flat extent, whose file may be shorter than the extent.
    async fn write_flat(&self, child: &Child, at: u64, from: &IoVec<'_>) -> IoResult {
        let node = child.node();
        if node.len() < at + from.len() {
            // One at a time: a shorter length that comes later must not cut it off again.
            let _lock = self.shared.text.lock().await;
            if node.len() < at + from.len() {
                crate::cow::lengthen(&node, at + from.len()).await?;
            }
        }
        node.write(at, from, WriteFlags::empty()).await
    }

    pub(super) async fn zero_extents(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.shared.check_writable()?;
        let end = at + len;
        let mut at = at;
        while at < end {
            let part = self.part_at(at).ok_or(Errno::EINVAL)?;
            let len = (end - at).min(part.end - at);
            match &part.extent {
                Extent::Sparse(sparse) => sparse.zero(at - part.start, len, flags).await?,
                Extent::Flat { child, offset } => {
                    self.shared.mark_changed().await?;
                    let (node, host) =
                        (self.shared.children[*child].node(), offset + at - part.start);
                    // What lies past the end of the file reads as zeroes.
                    let there = node.len().saturating_sub(host).min(len);
                    node.zero(host, there, flags).await?;
                }
                Extent::Zero => {}
                Extent::Shut => return Err(Errno(libc::EACCES)),
            }
            at += len;
        }
        Ok(())
    }

    pub(super) async fn discard_extents(&self, at: u64, len: u64) -> IoResult {
        self.shared.check_writable()?;
        let end = at + len;
        let mut at = at;
        while at < end {
            let part = self.part_at(at).ok_or(Errno::EINVAL)?;
            let len = (end - at).min(part.end - at);
            match &part.extent {
                Extent::Sparse(sparse) => sparse.discard(at - part.start, len).await?,
                Extent::Flat { child, offset } => {
                    self.shared.mark_changed().await?;
                    let (node, host) =
                        (self.shared.children[*child].node(), offset + at - part.start);
                    let there = node.len().saturating_sub(host).min(len);
                    node.discard(host, there).await?;
                }
                Extent::Zero | Extent::Shut => {}
            }
            at += len;
        }
        Ok(())
    }

    pub(super) async fn flush_all(&self) -> IoResult {
        if !self.shared.is_marked.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        for sparse in self.sparse() {
            sparse.write_doubtful().await?;
        }
        for child in self.shared.children.iter().filter(|child| !child.is_backing()) {
            child.node().flush().await?;
        }
        Ok(())
    }

    /// Brings the image to rest: nothing is in flight. What was written is durable.
    pub(super) async fn close_image(&self) -> IoResult {
        self.shared.keep_parent().await?;
        self.flush_all().await?;
        for sparse in self.sparse() {
            sparse.close_extent().await?;
        }
        self.shared.is_marked.store(false, Ordering::SeqCst);
        Ok(())
    }

    pub(super) async fn status_of(
        &self,
        at: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<crate::block::Extent> {
        let part = self.part_at(at).ok_or(Errno::EINVAL)?;
        let (inside, len) = (at - part.start, len.min(part.end - at));
        let nowhere = |status| Ok(crate::block::Extent { len, status, place: None });
        match &part.extent {
            Extent::Sparse(sparse) => status(&**sparse, inside, len, precision).await,
            Extent::Flat { child, offset } => {
                let host = offset + inside;
                let node = self.shared.children[*child].node();
                let (len, status) = stored_status(&node, host, len, precision).await?;
                let place = Some(Place { child: Some(*child), offset: host });
                Ok(crate::block::Extent { len, status, place })
            }
            Extent::Zero => nowhere(Status::ZERO | Status::ALLOCATED),
            Extent::Shut => nowhere(Status::DATA | Status::ALLOCATED),
        }
    }

    /// Records another parent, and its content ID. Where that is not known, the image goes on wanting the contents that it
    /// wanted: the parent has another name, or another place.
    pub(super) async fn change_parent(
        &self,
        name: Option<&str>,
        node: Option<&Arc<Node>>,
    ) -> Result<(), Error> {
        if self.sparse().count() < self.parts.len() {
            return Err(Error::new("Flat image can't have backing file"));
        }
        let id = match (name, node) {
            (None, _) => NO_PARENT,
            (Some(_), Some(node)) => {
                let found = content_id(node).await?;
                found.ok_or_else(|| Error::new("backing_file must be a vmdk image"))?
            }
            (Some(_), None) => self.shared.says.lock().parent_cid,
        };
        if name.is_some() && id == NO_PARENT {
            return Err(Error::new("the content ID of the backing file is not known"));
        }
        self.shared.change_parent(name, id).await
    }
}
