//! Zeroing and discarding: changes of the mapping, and zeroes that are written where a mapping cannot say it.

use super::batch::change_entries;
use super::format::backing;
use super::lookup::{Found, lookup, pin};
use super::write::{reads_zero, write_range};
use super::zeroing::{Empty, Zeroing};
use crate::block::{Access, Precision, Status, ZeroFlags, extents};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::ops::Range;

/// Zeroes that are written at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// Makes a range read as zeroes, as [`Driver::zero`](crate::block::Driver::zero) asks.
pub async fn zero_range<F: Zeroing>(image: &F, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
    image.prepare().await?;
    let kind = if flags.contains(ZeroFlags::UNMAP) { Empty::Unmap } else { Empty::Zero };
    let may_write = !flags.contains(ZeroFlags::NO_FALLBACK);
    let unit = image.unit();
    let end = at + len;
    let mut at = at;
    while at < end {
        let start = at / unit * unit;
        // Past the end of the disk there is nothing to keep.
        let unit_end = (start + unit).min(image.disk_len().max(end));
        if start < at || end < unit_end {
            let stop = end.min(unit_end);
            zero_part(image, at..stop, start..unit_end, kind, may_write).await?;
            at = stop;
            continue;
        }
        let whole = if end >= image.disk_len() { end } else { end / unit * unit };
        at = zero_units(image, at..whole, kind, may_write).await?;
    }
    Ok(())
}

/// A part of a unit: all of the unit, if the rest reads as zeroes anyway; none of it, where entries cannot say zeroes
/// and it shows them already.
async fn zero_part<F: Zeroing>(
    image: &F,
    part: Range<u64>,
    unit: Range<u64>,
    kind: Empty,
    may_write: bool,
) -> IoResult {
    let tables = image.tables();
    if image.has_zero_entries() {
        let cluster = part.start >> tables.shape.cluster_bits;
        let _range = tables.ranges.lock(cluster..cluster + 1).await;
        let _visit = tables.visits.enter();
        if shows_zeroes(image, unit.start..part.start).await?
            && shows_zeroes(image, part.end..unit.end).await?
        {
            return empty_units(image, unit, kind).await;
        }
    } else {
        let _visit = tables.visits.enter();
        if reads_zero(image, part.clone()).await? {
            return Ok(());
        }
    }
    if may_write { write_zeroes(image, part).await } else { Err(Errno::ENOTSUP) }
}

/// Writes zeroes as data.
pub async fn write_zeroes<F: Zeroing>(image: &F, range: Range<u64>) -> IoResult {
    let most = (range.end - range.start).min(CHUNK);
    let zeroes = AlignedBuf::new(most as usize, 4096).ok_or(Errno::ENOMEM)?;
    let mut at = range.start;
    while at < range.end {
        let n = (range.end - at).min(most);
        let part = zeroes.source().slice(0, n);
        Box::pin(write_range(image, at, &part)).await?;
        at += n;
    }
    Ok(())
}

/// Whole units, up to the end of a slice at most; returns where that is.
async fn zero_units<F: Zeroing>(
    image: &F,
    range: Range<u64>,
    kind: Empty,
    may_write: bool,
) -> IoResult<u64> {
    match image.has_zero_entries() {
        true => zero_by_entries(image, range, kind, may_write).await,
        false => zero_without_entries(image, range, may_write).await,
    }
}

async fn zero_by_entries<F: Zeroing>(
    image: &F,
    range: Range<u64>,
    kind: Empty,
    may_write: bool,
) -> IoResult<u64> {
    let tables = image.tables();
    let (bits, size) = (tables.shape.cluster_bits, tables.shape.cluster_size());
    let first = range.start >> bits;
    let last = ((range.end - 1) >> bits).min(first | (tables.cache.entries() as u64 - 1));
    let mut range = range.start..range.end.min((last + 1) << bits);
    let is_partial = |range: &Range<u64>| {
        !range.start.is_multiple_of(size)
            || !range.end.is_multiple_of(size) && range.end < image.disk_len()
    };
    if is_partial(&range) && first < last {
        // Whole clusters by themselves, and parts of clusters by themselves.
        let cut = if range.start.is_multiple_of(size) { last } else { first + 1 };
        range.end = cut << bits;
    }
    let last = (range.end - 1) >> bits;
    let locked = tables.ranges.lock(first..last + 1).await;
    let _visit = tables.visits.enter();
    if is_partial(&range) {
        let piece = lookup(image, range.start, range.end - range.start).await?;
        if matches!(piece.found, Found::Compressed(_)) {
            drop(locked);
            return match may_write {
                true => write_zeroes(image, range.clone()).await.map(|()| range.end),
                false => Err(Errno::ENOTSUP),
            };
        }
    }
    empty_units(image, range.clone(), kind).await?;
    Ok(range.end)
}

/// One cluster, where entries cannot say that it is zero.
async fn zero_without_entries<F: Zeroing>(
    image: &F,
    range: Range<u64>,
    may_write: bool,
) -> IoResult<u64> {
    let tables = image.tables();
    let end = range.end.min(range.start + tables.shape.cluster_size());
    let is_zero = {
        let _visit = tables.visits.enter();
        reads_zero(image, range.start..end).await?
    };
    match is_zero {
        true => Ok(end),
        false if !may_write => Err(Errno::ENOTSUP),
        false => {
            write_zeroes(image, range.start..end).await?;
            Ok(end)
        }
    }
}

/// Whole units of one slice, whose range the caller holds, and what a data file of its own has of them.
async fn empty_units<F: Zeroing>(image: &F, range: Range<u64>, kind: Empty) -> IoResult {
    image.before_emptying(range.clone(), kind).await?;
    empty_slice(image, range.clone(), kind).await?;
    image.after_emptying(range, kind).await
}

/// Whether a range reads as zeroes, as far as that can be told without reading. What a backing file's storage says of
/// holes counts for this moment only.
async fn shows_zeroes<F: Zeroing>(image: &F, guest: Range<u64>) -> IoResult<bool> {
    let mut at = guest.start;
    while at < guest.end {
        let piece = lookup(image, at, guest.end - at).await?;
        let mut len = piece.len;
        let in_backing = image.backing_start() + at;
        let below = backing(image).filter(|backing| in_backing < backing.len());
        let is_zero = match (piece.found, below) {
            (Found::Zero { .. }, _) | (Found::Unallocated { .. }, None) => true,
            (Found::Unallocated { .. }, Some(below)) => {
                let there = len.min(below.len() - in_backing);
                let run =
                    extents::query(&below, in_backing, there, Precision::Zeroes, None).await?;
                len = run.len;
                run.has(Status::ZERO)
            }
            _ => false,
        };
        if !is_zero {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

/// Discards the whole clusters of a range, as [`Driver::discard`](crate::block::Driver::discard) asks.
pub async fn discard_range<F: Zeroing>(image: &F, at: u64, len: u64) -> IoResult {
    image.prepare().await?;
    let tables = image.tables();
    let (bits, size) = (tables.shape.cluster_bits, tables.shape.cluster_size());
    let end = at + len;
    // The last cluster ends with the disk.
    let end = match end >= image.disk_len() {
        true => end.next_multiple_of(size),
        false => end / size * size,
    };
    let mut at = at.next_multiple_of(size);
    let has_backing = image.backing_child().is_some();
    // Without an entry that says so, the backing file would show.
    if !image.has_zero_entries() && has_backing {
        return Err(Errno::ENOTSUP);
    }
    while at < end {
        let first = at >> bits;
        let last = ((end - 1) >> bits).min(first | (tables.cache.entries() as u64 - 1));
        let stop = (last + 1) << bits;
        let _range = tables.ranges.lock(first..last + 1).await;
        let _visit = tables.visits.enter();
        if !has_backing && !image.has_table(at) {
            // Nothing is there.
            let covered = (tables.shape.table_index(at) + 1) * tables.shape.coverage();
            at = stop.max(covered.min(end) / size * size);
            continue;
        }
        empty_units(image, at..stop, Empty::Discard).await?;
        at = stop;
    }
    Ok(())
}

/// Empties the entries of whole guest clusters, as far as there are tables for them.
pub async fn empty_clusters<F: Zeroing>(image: &F, guest: Range<u64>, kind: Empty) -> IoResult {
    let tables = image.tables();
    let bits = tables.shape.cluster_bits;
    let slice = (tables.cache.entries() as u64) << bits;
    let coverage = tables.shape.coverage();
    let mut at = guest.start;
    while at < guest.end {
        if !image.has_table(at) {
            at = (at / coverage + 1) * coverage;
            continue;
        }
        let end = ((at / slice + 1) * slice).min(guest.end);
        let _range = tables.ranges.lock(at >> bits..end >> bits).await;
        let _visit = tables.visits.enter();
        empty_slice(image, at..end, kind).await?;
        at = end;
    }
    Ok(())
}

/// Empties the entries of whole units of one slice, whose range the caller holds.
async fn empty_slice<F: Zeroing>(image: &F, range: Range<u64>, kind: Empty) -> IoResult {
    let tables = image.tables();
    let bits = tables.shape.cluster_bits;
    image.ensure_table(range.start).await?;
    let (first, last) = (range.start >> bits, (range.end - 1) >> bits);
    let (mut entries, mut releases) = (Vec::new(), Vec::new());
    let (mut is_changed, mut kept) = (false, Vec::new());
    {
        let pinned = pin(image, range.start).await?;
        let (_, index) = tables.slice_of(range.start);
        for n in 0..=last - first {
            let old = pinned.get(index + n as usize);
            let guest = (first + n) << bits;
            let inside = range.start.max(guest) - guest..(range.end - guest).min(1 << bits);
            let bad = |bad| image.bad_entry(guest, old, bad, Access::Write);
            let (new, frees) = image.emptied(old, guest, inside, kind).map_err(bad)?;
            is_changed |= new != old;
            entries.push(new);
            if frees {
                releases.extend(image.emptied_references(old, kind));
            } else if new != old {
                kept.extend(image.kept_place(old, new, kind));
            }
        }
    }
    if !is_changed {
        return Ok(());
    }
    change_entries(image, first << bits, &entries).await?;
    image.release(&releases).await;
    match kept.is_empty() {
        true => Ok(()),
        false => image.discard_kept(&kept).await,
    }
}
