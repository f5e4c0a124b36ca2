//! Writing: over what is there, or into clusters that are allocated for it.
//!
//! A write to clusters that no other entry refers to goes to the same place as a fast one. Any other takes the range of
//! its guest clusters, writes the data together with what must be copied or zeroed around it, and only then changes
//! the mapping:
//!
//! 1. the allocator's clusters are safe from other owners ([`Allocator::take`](super::Allocator::take));
//! 2. data and copied bytes are written; if the new cluster did not already read as the disk did, durably, they are
//!    flushed;
//! 3. the entry is written, or kept in the [journal](super::journal);
//! 4. readers are shown the entry, and the guest is answered;
//! 5. what the old entry referred to is released.
//!
//! Different clusters are written in parallel.

use super::allocator::Taken;
use super::batch::change_entries;
use super::format::{announce, backing, data};
use super::journal::{Kept, keep_entries, settle_journal};
use super::lookup::{Found, find, lookup, pin};
use super::read::read_range;
use super::writer::{Need, Writer};
use crate::block::working_memory::COPY_LIMIT;
use crate::block::{Access, Event};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use smallvec::{SmallVec, smallvec};
use std::ops::Range;

/// A part of a write that one change of the mapping makes visible: guest clusters side by side, in
/// host clusters side by side.
struct Part<E> {
    /// The guest offset of the first cluster.
    start: u64,
    /// The guest offsets of the data.
    data: Range<u64>,
    /// The clusters' entries before the write.
    old: Entries<E>,
}

/// What a write copied into its host clusters beside the data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copied {
    /// Nothing: the rest of the clusters shows what it showed before, durably.
    Nothing,
    /// Bytes that must be durable before the entries are.
    NeedsFlush,
}

/// What the ends of copies are aligned to that do not reach to the ends of their clusters.
const ALIGN: u64 = 4096;

/// Entries of a write: mostly one.
type Entries<E> = SmallVec<[E; 2]>;

/// Writes guest bytes from `at` on.
pub async fn write_range<F: Writer>(image: &F, at: u64, from: &IoVec<'_>) -> IoResult {
    image.prepare().await?;
    let mut done = 0;
    while done < from.len() {
        let rest = from.slice(done, from.len() - done);
        done += match overwrite(image, at + done, &rest).await? {
            0 => write_new(image, at + done, &rest).await?,
            n => n,
        };
    }
    Ok(())
}

/// Writes as much from the start on as needs no change of the mapping; returns how much that was.
async fn overwrite<F: Writer>(image: &F, at: u64, from: &IoVec<'_>) -> IoResult<u64> {
    let _visit = image.tables().visits.enter();
    if !image.may_overwrite() {
        return Ok(0);
    }
    let found = find(image, at, from.len()).await?;
    let piece = found.map_err(|(entry, bad)| image.bad_entry(at, entry, bad, Access::Write))?;
    let Found::Data { host, exclusive: true } = piece.found else { return Ok(0) };
    image.write_data(host, &from.slice(0, piece.len)).await?;
    Ok(piece.len)
}

/// Writes from the start on what one change of the mapping makes visible; returns how much that was.
async fn write_new<F: Writer>(image: &F, at: u64, from: &IoVec<'_>) -> IoResult<u64> {
    let bits = image.tables().shape.cluster_bits;
    let first = at >> bits;
    // What one slice of entries maps.
    let entries = image.tables().cache.entries() as u64;
    let last = ((at + from.len() - 1) >> bits).min(first | (entries - 1));
    let len = from.len().min(((last + 1) << bits) - at);
    let _range = image.tables().ranges.lock(first..last + 1).await;
    let _visit = image.tables().visits.enter();
    image.ensure_table(at).await?;
    let (need, old) = needs(image, first, last).await?;
    let start = first << bits;
    let end = (start + ((old.len() as u64) << bits)).min(at + len);
    let part = Part { start, data: at..end, old };
    match need {
        // Another write has done it meanwhile.
        Need::Nothing => Ok(0),
        Need::Cluster => write_to_new(image, part, from).await,
        Need::Fill { host } => {
            let from = from.slice(0, end - at);
            write_and_map(image, &part, host, &from).await?;
            Ok(end - at)
        }
    }
}

/// What the first of the guest clusters needs, and the entries of all behind it that need the
/// same, if that is new clusters.
async fn needs<F: Writer>(image: &F, first: u64, last: u64) -> IoResult<(Need, Entries<F::Entry>)> {
    let bits = image.tables().shape.cluster_bits;
    let pinned = pin(image, first << bits).await?;
    let (_, index) = image.tables().slice_of(first << bits);
    let mut old = Entries::new();
    let mut need = Need::Nothing;
    for n in 0..=last - first {
        let entry = pinned.get(index + n as usize);
        let guest = (first + n) << bits;
        let bad = |bad| image.bad_entry(guest, entry, bad, Access::Write);
        let this = image.need(entry).map_err(bad)?;
        match (n, this) {
            (0, Need::Fill { .. }) => return Ok((this, smallvec![entry])),
            (0, Need::Nothing) => return Ok((this, old)),
            (_, Need::Cluster) => {}
            _ => break,
        }
        need = this;
        old.push(entry);
    }
    Ok((need, old))
}

/// Writes to host clusters that are taken now, as many as there are side by side; returns how many bytes of the data
/// that was.
async fn write_to_new<F: Writer>(
    image: &F,
    mut part: Part<F::Entry>,
    from: &IoVec<'_>,
) -> IoResult<u64> {
    let bits = image.tables().shape.cluster_bits;
    if let Some(host) = image.fixed_host(part.start) {
        let from = from.slice(0, part.data.end - part.data.start);
        write_and_map(image, &part, host, &from).await?;
        return Ok(from.len());
    }
    let taken = image.take(part.old.len() as u64).await?;
    let run = taken.run;
    part.old.truncate(run.count as usize);
    part.data.end = part.data.end.min(part.start + (run.count << bits));
    let from = from.slice(0, part.data.end - part.data.start);
    let host = taken.host();
    let copied = write_around(image, &part, host, run.is_fresh, &from).await?;
    map_part(image, &part, host, Some(taken), copied).await?;
    Ok(from.len())
}

/// Writes to host clusters that belong to the guest clusters already.
async fn write_and_map<F: Writer>(
    image: &F,
    part: &Part<F::Entry>,
    host: u64,
    from: &IoVec<'_>,
) -> IoResult {
    let copied = write_around(image, part, host, false, from).await?;
    map_part(image, part, host, None, copied).await
}

/// Writes the data, and around it what the new mapping will show.
async fn write_around<F: Writer>(
    image: &F,
    part: &Part<F::Entry>,
    host: u64,
    is_fresh: bool,
    from: &IoVec<'_>,
) -> IoResult<Copied> {
    let shown = shown(image, part);
    let was_zero = is_fresh && reads_zero(image, shown.clone()).await?;
    if was_zero && shown != part.data {
        // Fresh clusters read as zeroes already.
        announce(image, Event::ClusterAllocSpace).await;
    }
    let near = near(&shown, &part.data);
    if !was_zero {
        for far in [shown.start..near.start, near.end..shown.end] {
            copy_far(image, part, host, far).await?;
        }
    }
    let head = match was_zero {
        true => None,
        false => copy_of(image, near.start..part.data.start).await?,
    };
    let tail = match was_zero {
        true => None,
        false => copy_of(image, part.data.end..near.end).await?,
    };
    if head.is_some() || tail.is_some() {
        announce(image, Event::CowWrite).await;
    }
    let [before, after] =
        [&head, &tail].map(|copy| copy.as_ref().map_or(IoVec::empty(), AlignedBuf::source));
    let start = part.data.start - before.len();
    let all = IoVec::concat(&[&before, from, &after]);
    image.write_data(host + (start - part.start), &all).await?;
    let is_more = copy_apart(image, part, host, &shown).await?;
    Ok(if was_zero && !is_more { Copied::Nothing } else { Copied::NeedsFlush })
}

/// What of the bytes that are shown is written together with the data: so much on both sides that memory is bounded.
fn near(shown: &Range<u64>, data: &Range<u64>) -> Range<u64> {
    let start = data.start.saturating_sub(COPY_LIMIT).next_multiple_of(ALIGN);
    let end = (data.end + COPY_LIMIT) / ALIGN * ALIGN;
    start.max(shown.start)..end.min(shown.end)
}

/// Copies a part of large clusters, piece by piece, before the data beside it is written.
async fn copy_far<F: Writer>(
    image: &F,
    part: &Part<F::Entry>,
    host: u64,
    far: Range<u64>,
) -> IoResult {
    let mut at = far.start;
    while at < far.end {
        let end = far.end.min(at + COPY_LIMIT);
        if let Some(copy) = copy_of(image, at..end).await? {
            announce(image, Event::CowWrite).await;
            image.write_data(host + (at - part.start), &copy.source()).await?;
        }
        at = end;
    }
    Ok(())
}

/// Copies the parts of the first and of the last cluster that have to move and do not lie beside what is `shown`;
/// returns whether there are such.
async fn copy_apart<F: Writer>(
    image: &F,
    part: &Part<F::Entry>,
    host: u64,
    shown: &Range<u64>,
) -> IoResult<bool> {
    let unit = image.unit();
    let (first, last) = outer(image, part);
    let end = shown.end.next_multiple_of(image.tables().shape.cluster_size());
    let mut is_more = false;
    for (old, range) in [(first, part.start..shown.start), (last, shown.end..end)] {
        let mut at = range.start / unit * unit;
        while at < range.end {
            let start = at;
            while at < range.end && image.must_relocate(old, at) {
                at += unit;
            }
            if let Some(copy) = copy_of(image, start..at).await? {
                announce(image, Event::CowWrite).await;
                let place = host + (start - part.start);
                image.write_data(place, &copy.source()).await?;
                is_more = true;
            }
            at += unit;
        }
    }
    Ok(is_more)
}

/// The guest bytes that the new mapping shows from the host clusters: the data, rounded out to what entries can tell
/// apart.
fn shown<F: Writer>(image: &F, part: &Part<F::Entry>) -> Range<u64> {
    let unit = image.unit();
    let Range { mut start, mut end } = part.data;
    let (first, last) = outer(image, part);
    if !image.shows_own(first, start) {
        start = start / unit * unit;
    }
    if !image.shows_own(last, end - 1) {
        end = end.next_multiple_of(unit);
    }
    // Parts that have to move and lie beside it go with it.
    while start > part.start && image.must_relocate(first, start - 1) {
        start -= unit;
    }
    while image.tables().shape.offset_in_cluster(end) > 0 && image.must_relocate(last, end) {
        end += unit;
    }
    start..end
}

/// The first and the last of the old entries that the data is for.
fn outer<F: Writer>(image: &F, part: &Part<F::Entry>) -> (F::Entry, F::Entry) {
    let cluster = |guest: u64| (guest - part.start) >> image.tables().shape.cluster_bits;
    let Range { start, end } = part.data;
    (part.old[cluster(start) as usize], part.old[cluster(end - 1) as usize])
}

/// The guest's bytes as they are, and zeroes past the end of the disk.
async fn copy_of<F: Writer>(image: &F, guest: Range<u64>) -> IoResult<Option<AlignedBuf>> {
    if guest.is_empty() {
        return Ok(None);
    }
    let len = guest.end - guest.start;
    let mut copy = AlignedBuf::for_overwriting(len as usize, 4096).ok_or(Errno::ENOMEM)?;
    let there = image.guest_end(guest.start).saturating_sub(guest.start).min(len);
    if there > 0 {
        announce(image, Event::CowRead).await;
        let into = copy.io_vec().slice(0, there);
        Box::pin(read_range(image, guest.start, &into)).await?;
    }
    copy[there as usize..].fill(0);
    Ok(Some(copy))
}

/// Whether the mapping alone tells that a range reads as zeroes.
pub async fn reads_zero<F: Writer>(image: &F, guest: Range<u64>) -> IoResult<bool> {
    let mut at = guest.start;
    while at < guest.end {
        let piece = lookup(image, at, guest.end - at).await?;
        let is_zero = match piece.found {
            Found::Zero { .. } => true,
            Found::Unallocated { .. } => {
                backing(image).is_none_or(|backing| backing.len() <= image.backing_start() + at)
            }
            _ => false,
        };
        if !is_zero {
            return Ok(false);
        }
        at += piece.len;
    }
    Ok(true)
}

/// Gives the host clusters to the guest, and releases what was there. Copied bytes are durable before the disk has
/// the entries.
async fn map_part<F: Writer>(
    image: &F,
    part: &Part<F::Entry>,
    host: u64,
    taken: Option<Taken<'_, F>>,
    copied: Copied,
) -> IoResult {
    let entries = new_entries(image, part, host);
    let is_new = taken.is_some();
    let is_copied = copied == Copied::NeedsFlush;
    let kept = keep_entries(image, part.start, &part.old, &entries, is_copied).await?;
    if kept != Kept::No {
        if let Some(taken) = taken {
            taken.keep();
        }
        if kept == Kept::HalfFull {
            // Other writes have the second half meanwhile. If this fails, the next flush reports it.
            let _ = settle_journal(image).await;
        }
        return Ok(());
    }
    if is_copied {
        data(image).flush().await?;
    }
    if let Some(taken) = taken {
        // Whether handing over fails or not, an entry may name them.
        taken.keep();
    }
    change_entries(image, part.start, &entries).await?;
    if is_new {
        let releases: Vec<_> = part.old.iter().flat_map(|&old| image.references(old)).collect();
        image.release(&releases).await;
    }
    Ok(())
}

/// The entries that show the data of a part, with its host clusters from `host` on.
fn new_entries<F: Writer>(image: &F, part: &Part<F::Entry>, host: u64) -> Entries<F::Entry> {
    let size = image.tables().shape.cluster_size();
    let shown = shown(image, part);
    let old = part.old.iter().enumerate();
    old.map(|(n, &old)| {
        let guest = part.start + n as u64 * size;
        let inside = shown.start.max(guest) - guest..shown.end.min(guest + size) - guest;
        image.entry_showing(old, host + n as u64 * size, inside)
    })
    .collect()
}
