//! Block status through a whole backing chain, in runs of equal status.

use super::{Decider, Extent, Kind, Node, Place, Precision, Role, Status};
use crate::io::IoResult;
use std::sync::Arc;

/// The most that is asked about at once, in bytes.
const MOST: u64 = 1 << 30;

/// What is behind a driver's own end; zeroes before it continue there.
pub(super) const REST: Status = Status::ZERO.union(Status::ALLOCATED);

impl Node {
    /// The rest of the last sector, behind the driver's own end: zeroes, beside the last byte.
    pub(super) async fn status_of_rest(
        &self,
        at: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<Extent> {
        let Some(last) = self.driver().len().checked_sub(1) else {
            return Ok(Extent { len, status: REST, place: None });
        };
        let place = self.driver().status(last, 1, precision).await?.place;
        let place = place.map(|place| Place { offset: place.offset + (at - last), ..place });
        Ok(Extent { len, status: REST, place })
    }
}

/// The status of a range.
#[derive(Clone)]
pub struct Run {
    /// Bytes.
    pub start: u64,
    pub len: u64,
    pub status: Status,
    /// How many backing files down the contents come from.
    pub depth: u32,
    /// Where they are kept as they are: a protocol's node, and the offset in it.
    pub file: Option<(Arc<Node>, u64)>,
}

impl Run {
    /// Whether `next`, which begins where this ends, is of the same kind.
    fn continues(&self, next: &Run) -> bool {
        let same_file = match (&self.file, &next.file) {
            (Some((a, at)), Some((b, next_at))) => Arc::ptr_eq(a, b) && at + self.len == *next_at,
            (None, None) => true,
            _ => false,
        };
        self.status == next.status && self.depth == next.depth && same_file
    }

    pub fn has(&self, status: Status) -> bool {
        self.status.contains(status)
    }
}

/// The image that `node` takes what it has not from.
pub fn backing(node: &Node) -> Option<Arc<Node>> {
    let children = node.driver().children();
    children.iter().find(|child| child.is_backing()).map(|child| child.node())
}

/// The image in the chain from `node` down that decides what the first bytes of a range are, and how many; none if
/// they are past the end of the image that would be asked, and are zeroes.
pub async fn decided(node: &Arc<Node>, at: u64, mut len: u64) -> IoResult<Decider> {
    let mut layer = node.clone();
    loop {
        let there = layer.len().saturating_sub(at);
        if there == 0 {
            return Ok((None, len));
        }
        len = len.min(there);
        match layer.driver().decider(at, len).await? {
            (Some(below), part) => (layer, len) = (below, part),
            (None, part) => return Ok((Some(layer), part)),
        }
    }
}

/// The status of the beginning of a range of `node` and of the backing files below it, down to and without `base`.
/// Beyond the end of a backing file there are zeroes, and they are its own.
pub async fn query(
    node: &Arc<Node>,
    start: u64,
    len: u64,
    precision: Precision,
    base: Option<&Arc<Node>>,
) -> IoResult<Run> {
    query_chain(node, start, len, precision, (base, BeyondEnd::Allocated)).await
}

/// Who has the zeroes that are read where a backing file has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BeyondEnd {
    /// The backing file.
    Allocated,
    /// Nobody, and they are seen where the backing file would have been asked.
    Nowhere,
}

async fn query_chain(
    node: &Arc<Node>,
    start: u64,
    len: u64,
    precision: Precision,
    (base, beyond): (Option<&Arc<Node>>, BeyondEnd),
) -> IoResult<Run> {
    let mut layer = node.clone();
    // Where the range begins in the layer.
    let mut at = start;
    let mut len = len.min(MOST);
    let mut depth = 0;
    loop {
        if at >= layer.len() {
            let status = Status::ZERO | Status::ALLOCATED;
            return Ok(Run { start, len, status, depth, file: None });
        }
        let within = len.min(layer.len() - at);
        let below =
            backing(&layer).filter(|below| beyond == BeyondEnd::Allocated || at < below.len());
        let is_base = |below: &Arc<Node>| base.is_some_and(|base| Arc::ptr_eq(base, below));
        if let Some(below) = below.as_ref().filter(|below| !is_base(below)) {
            // What the layers below have is not asked here: each is asked once, when it is its turn.
            let own = layer.status(at, within, Precision::Allocation).await?;
            if !own.status.contains(Status::ALLOCATED) {
                (layer, len) = (below.clone(), own.len);
                depth += 1;
                continue;
            }
        }
        let extent = layer.status(at, within, precision).await?;
        len = extent.len;
        if let Some(below) = passed_on(&layer, at, &extent) {
            (layer, at) = below;
            continue;
        }
        match below {
            Some(below) if !extent.status.contains(Status::ALLOCATED) && !is_base(&below) => {
                layer = below;
                depth += 1;
            }
            _ => {
                let file = extent.place.and_then(|place| {
                    let node = match place.child {
                        Some(child) => layer.driver().children().get(child)?.node(),
                        None => layer.clone(),
                    };
                    Some((node, place.offset))
                });
                let mut status = extent.status;
                // Nobody has it: it reads as zeroes.
                status.set(Status::ZERO, status.is_empty() || status.contains(Status::ZERO));
                return Ok(Run { start, len, status, depth, file });
            }
        }
    }
}

/// The node that has what another passes on, and where it has it: the image that is a part of a disk, or what a filter
/// stands on, if that has backing files to be asked.
fn passed_on(layer: &Node, at: u64, extent: &Extent) -> Option<(Arc<Node>, u64)> {
    if backing(layer).is_some() {
        return None;
    }
    let place = extent.place?;
    let child = layer.driver().children().get(place.child?)?;
    let node = child.node();
    let is_image = child.role() == Role::Extent && node.driver().entry().kind == Kind::Format;
    let is_unknown = !extent.status.intersects(Status::ALLOCATED | Status::ZERO);
    (is_image || is_unknown && place.offset == at).then_some((node, place.offset))
}

/// The longest run of one kind at the beginning of a range, as `map` tells it.
pub async fn run(node: &Arc<Node>, start: u64, len: u64) -> IoResult<Run> {
    let query =
        |start, len| query_chain(node, start, len, Precision::Zeroes, (None, BeyondEnd::Nowhere));
    let mut all = query(start, len).await?;
    while all.len < len {
        let next = query(start + all.len, len - all.len).await?;
        if !all.continues(&next) {
            break;
        }
        all.len += next.len;
    }
    Ok(all)
}
