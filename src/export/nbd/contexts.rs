//! Contexts: the kinds of block status that an export can tell, and the extents of each.

use crate::block::bitmap::{Bitmap, Bits};
use crate::block::extents::query;
use crate::block::{Node, Precision, Status};
use crate::io::IoResult;
use crate::nbd::reply::Extent;
use crate::nbd::{Allocation, BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP};
use std::sync::Arc;

/// The most extents that one reply tells of.
const MOST_EXTENTS: usize = 8192;
/// How often the graph is asked for one reply at most.
const MOST_LOOKS: usize = 16384;
/// The most bits of a bitmap that are looked at for one reply.
const MOST_BITS: u64 = 1 << 26;

/// One kind of block status of an export.
pub(super) struct Context {
    /// How replies name it.
    pub id: u32,
    pub name: String,
    kind: Kind,
}

enum Kind {
    Allocation,
    Depth,
    Bitmap(Arc<Bitmap>),
}

/// All contexts of an export with these bitmaps.
pub(super) fn all(bitmaps: &[Arc<Bitmap>], depth: bool) -> Vec<Context> {
    let mut all = vec![Context { id: 0, name: BASE_ALLOCATION.into(), kind: Kind::Allocation }];
    if depth {
        all.push(Context { id: 1, name: QEMU_ALLOCATION_DEPTH.into(), kind: Kind::Depth });
    }
    for (id, bitmap) in (2..).zip(bitmaps) {
        let name = format!("{QEMU_DIRTY_BITMAP}{}", bitmap.name());
        all.push(Context { id, name, kind: Kind::Bitmap(bitmap.clone()) });
    }
    all
}

/// The contexts of these names.
pub(super) fn chosen<'a>(all: &'a [Context], queries: &[&str]) -> Vec<&'a Context> {
    all.iter().filter(|context| queries.contains(&&*context.name)).collect()
}

/// The contexts that these queries list: all without a query, a whole namespace by its beginning.
pub(super) fn listed<'a>(all: &'a [Context], queries: &[&str]) -> Vec<&'a Context> {
    let is_listed = |context: &&Context| {
        queries.is_empty()
            || queries.iter().any(|query| match *query {
                "base:" | "qemu:" | QEMU_DIRTY_BITMAP => context.name.starts_with(query),
                query => context.name == query,
            })
    };
    all.iter().filter(is_listed).collect()
}

impl Context {
    /// What the context says of the beginning of a range, as long as the reply may be: at least of its first byte.
    /// `one`: no more than the first extent.
    pub async fn extents(
        &self,
        node: &Arc<Node>,
        at: u64,
        len: u64,
        one: bool,
    ) -> IoResult<Vec<Extent>> {
        let most = if one { 1 } else { MOST_EXTENTS };
        match &self.kind {
            Kind::Allocation => looked(node, at, len, most, false).await,
            Kind::Depth => looked(node, at, len, most, true).await,
            Kind::Bitmap(bitmap) => Ok(dirty(&bitmap.bits(), at, len, most)),
        }
    }
}

/// Extents as they come together, those that are alike in one.
struct Extents {
    list: Vec<Extent>,
    most: usize,
}

impl Extents {
    /// False if there is no room for it.
    fn push(&mut self, length: u64, flags: u64) -> bool {
        let count = self.list.len();
        match self.list.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ if count == self.most => return false,
            _ => self.list.push(Extent { length, flags }),
        }
        true
    }
}

/// What the graph tells of a range: allocation, or how deep in the chain it is.
async fn looked(
    node: &Arc<Node>,
    at: u64,
    len: u64,
    most: usize,
    depth: bool,
) -> IoResult<Vec<Extent>> {
    let mut extents = Extents { list: Vec::new(), most };
    let precision = if depth { Precision::Allocation } else { Precision::Zeroes };
    let mut done = 0;
    for _ in 0..MOST_LOOKS {
        if done == len {
            break;
        }
        let run = query(node, at + done, len - done, precision, None).await?;
        let flags = match depth {
            true if run.has(Status::ALLOCATED) => u64::from(run.depth) + 1,
            true => 0,
            false => {
                let mut flags = Allocation::empty();
                flags.set(Allocation::HOLE, !run.has(Status::DATA));
                flags.set(Allocation::ZERO, run.has(Status::ZERO));
                flags.bits()
            }
        };
        if !extents.push(run.len, flags) {
            break;
        }
        done += run.len;
    }
    Ok(extents.list)
}

/// What of a range is dirty.
fn dirty(bits: &Bits, at: u64, len: u64, most: usize) -> Vec<Extent> {
    let mut extents = Extents { list: Vec::new(), most };
    let shift = bits.granularity_bits();
    let end = at + len.min(MOST_BITS << shift);
    let mut pos = at;
    while pos < end {
        let (is_set, next) = run(bits, pos >> shift, end.div_ceil(1 << shift));
        let stop = (next << shift).min(end);
        if !extents.push(stop - pos, is_set.into()) {
            break;
        }
        pos = stop;
    }
    extents.list
}

/// Whether a bit is set, and the first bit behind it, up to `end`, that is not like it.
fn run(bits: &Bits, from: u64, end: u64) -> (bool, u64) {
    let mut words = bits.words_from((from / 64) as usize);
    let first = words.next().unwrap_or(0) >> (from % 64);
    let is_set = first & 1 != 0;
    // Bits that are not like it.
    let others = |word: u64| if is_set { !word } else { word };
    let within = 64 - from % 64;
    let same = u64::from(others(first).trailing_zeros());
    let mut next = from + same.min(within);
    if same >= within {
        for word in words {
            let same = u64::from(others(word).trailing_zeros());
            next += same;
            if same < 64 || next >= end {
                break;
            }
        }
    }
    // What lies behind the bitmap is not dirty.
    let next = if !is_set && next < end && next >= bits.len().div_ceil(1 << bits.granularity_bits())
    {
        end
    } else {
        next.min(end)
    };
    (is_set, next.max(from + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_choose_and_list() {
        let bits = Bits::new(1 << 20, 16).unwrap();
        let bitmap = Bitmap::new("b".into(), bits, Default::default());
        let all = all(&[Arc::new(bitmap)], true);
        let names = |contexts: Vec<&Context>| -> Vec<u32> {
            contexts.iter().map(|context| context.id).collect()
        };
        let listed = |queries: &[&str]| names(super::listed(&all, queries));
        assert_eq!(listed(&[]), [0, 1, 2]);
        assert_eq!(listed(&["base:"]), [0]);
        assert_eq!(listed(&["qemu:"]), [1, 2]);
        assert_eq!(listed(&["qemu:dirty-bitmap:"]), [2]);
        assert_eq!(listed(&["qemu:dirty-bitmap:c", "x"]), [0; 0]);
        let chosen = |queries: &[&str]| names(super::chosen(&all, queries));
        assert_eq!(chosen(&[]), [0; 0]);
        assert_eq!(chosen(&["base:", "qemu:dirty-bitmap:"]), [0; 0]);
        assert_eq!(chosen(&["qemu:dirty-bitmap:b", "base:allocation"]), [0, 2]);
    }

    #[test]
    fn a_bitmap_is_told_in_runs_as_a_walk_over_its_bits_finds_them() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let len = rng.u64(1..300 * 512);
            let bits = Bits::new(len, 9).unwrap();
            for _ in 0..rng.u32(..6) {
                let at = rng.u64(..len);
                bits.mark(at, rng.u64(1..=(len - at).min(90 * 512)));
            }
            let words: Vec<u64> = bits.words().collect();
            let is_dirty = |byte: u64| words[(byte / 512 / 64) as usize] >> (byte / 512 % 64) & 1;
            let at = rng.u64(..len);
            let asked = rng.u64(1..=len - at);
            let extents = dirty(&bits, at, asked, usize::MAX);
            let mut pos = at;
            for (n, extent) in extents.iter().enumerate() {
                assert!(n == 0 || extents[n - 1].flags != extent.flags);
                for byte in pos..pos + extent.length {
                    assert_eq!(is_dirty(byte), extent.flags, "{byte}");
                }
                pos += extent.length;
            }
            assert_eq!(pos, at + asked);
            assert_eq!(dirty(&bits, at, asked, 1), extents[..1]);
        }
    }
}
