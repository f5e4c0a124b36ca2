//! Batches of changes to table entries: concurrent changes of one slice are written together.
//!
//! One write of a slice is under way at a time, made by one of the tasks that wait for it; changes that arrive
//! meanwhile collect for the next write. An entry is shown to readers after it has been handed to the
//! kernel, so that a killed process forgets nothing that was answered.

use super::format::{Format, announce, data, file};
use super::lookup::pin;
use super::table_cache::{Pinned, SliceNo, TableEntry};
use super::tables::Tables;
use super::writable::{Writable, check_sound};
use crate::block::Event;
use crate::io::sync::{Mutex, Waiters};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::Poll;

/// Entries of a slice: indices and new values.
pub type Changes<E> = Vec<(usize, E)>;

/// The slices that tasks are changing.
pub struct Batches<E> {
    slices: Mutex<BTreeMap<SliceNo, Slice<E>>>,
}

/// A slice that tasks are changing.
struct Slice<E> {
    /// How many tasks wait for its batches.
    users: usize,
    is_writing: bool,
    /// The changes that collect for the next write.
    next: Batch<E>,
}

struct Batch<E> {
    changes: Changes<E>,
    end: Arc<Mutex<End>>,
}

impl<E> Default for Batches<E> {
    fn default() -> Batches<E> {
        Batches { slices: Mutex::default() }
    }
}

impl<E> Default for Batch<E> {
    fn default() -> Batch<E> {
        Batch { changes: Vec::new(), end: Arc::default() }
    }
}

/// The end of a batch, for the tasks that are part of it.
#[derive(Default)]
struct End {
    result: Option<IoResult>,
    waiting: Waiters,
}

/// A task's part in the batches of a slice.
struct Member<'a, E> {
    batches: &'a Batches<E>,
    slice: SliceNo,
    end: Arc<Mutex<End>>,
}

/// The task that writes a batch.
struct Leader<'a, E> {
    batches: &'a Batches<E>,
    slice: SliceNo,
    batch: Batch<E>,
}

/// A slice that is being written. When this is dropped before it is settled, because the write has failed or was
/// cancelled, the disk may have another state than readers were shown. It is dropped before the leader is.
struct Doubt<'a, E: TableEntry> {
    tables: &'a Tables<E>,
    slice: SliceNo,
    /// An offset that the slice maps.
    guest: u64,
    pinned: &'a Pinned<'a, E>,
    is_settled: bool,
}

impl<E: TableEntry> Drop for Doubt<'_, E> {
    fn drop(&mut self) {
        if !self.is_settled {
            self.tables.suspect(self.slice, self.guest, self.pinned);
        }
    }
}

impl<E: TableEntry> Batches<E> {
    fn join(&self, slice: SliceNo, changes: impl Iterator<Item = (usize, E)>) -> Member<'_, E> {
        let mut slices = self.slices.lock();
        let state = slices.entry(slice).or_insert_with(|| Slice {
            users: 0,
            is_writing: false,
            next: Batch::default(),
        });
        state.users += 1;
        state.next.changes.extend(changes);
        Member { batches: self, slice, end: state.next.end.clone() }
    }

    /// Makes a task without changes of its own the leader. While the member exists, other tasks alternate with
    /// it.
    async fn lead(&self, slice: SliceNo) -> (Member<'_, E>, Leader<'_, E>) {
        loop {
            let member = self.join(slice, std::iter::empty());
            // Otherwise another task has written, but only the changes of its batch.
            if let Ok(leader) = member.lead().await {
                return (member, leader);
            }
        }
    }
}

impl<'a, E> Member<'a, E> {
    /// Waits for the end of the batch, or until this task is to write it.
    async fn lead(&self) -> Result<Leader<'a, E>, IoResult> {
        poll_fn(|cx| {
            let mut slices = self.batches.slices.lock();
            let mut end = self.end.lock();
            if let Some(result) = end.result {
                return Poll::Ready(Err(result));
            }
            let Some(state) = slices.get_mut(&self.slice) else {
                return Poll::Ready(Err(Err(Errno::EIO)));
            };
            if state.is_writing {
                end.waiting.add(cx);
                return Poll::Pending;
            }
            state.is_writing = true;
            let batch = std::mem::take(&mut state.next);
            Poll::Ready(Ok(Leader { batches: self.batches, slice: self.slice, batch }))
        })
        .await
    }
}

impl<E> Drop for Member<'_, E> {
    fn drop(&mut self) {
        let mut slices = self.batches.slices.lock();
        let Some(state) = slices.get_mut(&self.slice) else { return };
        state.users -= 1;
        if state.users == 0 {
            slices.remove(&self.slice);
        } else if self.end.lock().result.is_none() {
            // It was cancelled, and may have been the one that was woken to write the batch.
            drop(slices);
            let waiting = self.end.lock().waiting.take();
            waiting.wake();
        }
    }
}

impl<E> Leader<'_, E> {
    /// Ends the batch for all tasks that are part of it.
    fn end(self, result: IoResult) -> IoResult {
        self.batch.end.lock().result = Some(result);
        result
    }
}

impl<E> Drop for Leader<'_, E> {
    /// Ends the lead; if it was cancelled, the batch has failed.
    fn drop(&mut self) {
        let mut end = self.batch.end.lock();
        if end.result.is_none() {
            end.result = Some(Err(Errno::EIO));
        }
        let waiting = end.waiting.take();
        drop(end);
        let mut slices = self.batches.slices.lock();
        if let Some(state) = slices.get_mut(&self.slice) {
            state.is_writing = false;
            let next = state.next.end.clone();
            drop(slices);
            next.lock().waiting.wake_one();
        }
        waiting.wake();
    }
}

/// Gives guest clusters from `guest` on, all of one slice, new entries: they are handed to the kernel, and
/// then shown to readers. The caller holds their range; the table exists and may be changed.
///
/// After an error the disk may have the old entries or the new ones; readers go on with the old ones.
pub async fn change_entries<F: Writable>(image: &F, guest: u64, entries: &[F::Entry]) -> IoResult {
    check_sound(image).await?;
    let tables = image.tables();
    let (slice, first) = tables.slice_of(guest);
    let pinned = pin(image, guest).await?;
    let changes = entries.iter().enumerate().map(|(n, &entry)| (first + n, entry));
    let member = tables.batches.join(slice, changes);
    match member.lead().await {
        Err(result) => result,
        Ok(leader) => {
            let mut doubt = Doubt { tables, slice, guest, pinned: &pinned, is_settled: false };
            let changes = &leader.batch.changes;
            let result = write_changes(image, guest, &pinned, changes, changes).await;
            doubt.is_settled = result.is_ok();
            drop(doubt);
            leader.end(result)
        }
    }
}

/// Writes a slice again, as readers see it, and the changes that wait to be written with it.
pub(super) async fn rewrite_slice<F: Writable>(
    image: &F,
    slice: SliceNo,
    guest: u64,
    pinned: &Pinned<'_, F::Entry>,
) -> IoResult {
    let (_member, leader) = image.tables().batches.lead(slice).await;
    let changes = &leader.batch.changes;
    let mut result = write_slice(image, slice, guest, pinned).await;
    if result.is_ok() {
        result = write_changes(image, guest, pinned, changes, changes).await;
    }
    leader.end(result)
}

/// Hands over the entries of a slice that `due` returns ([journal](super::journal)), and the changes that wait
/// to be written.
pub(super) async fn settle_slice<F: Writable>(
    image: &F,
    slice: SliceNo,
    guest: u64,
    due: impl FnOnce() -> Changes<F::Entry>,
) -> IoResult {
    let tables = image.tables();
    let pinned = pin(image, guest).await?;
    let (_member, leader) = tables.batches.lead(slice).await;
    let mut doubt = Doubt { tables, slice, guest, pinned: &pinned, is_settled: false };
    let mut all = due();
    all.extend_from_slice(&leader.batch.changes);
    let result = write_changes(image, guest, &pinned, &leader.batch.changes, &all).await;
    doubt.is_settled = result.is_ok();
    drop(doubt);
    leader.end(result)
}

/// Writes all of these changes, if there are any. `newer` are the changes that may be newer than what waits in
/// the journal; the others are what waits there.
async fn write_changes<F: Writable>(
    image: &F,
    guest: u64,
    pinned: &Pinned<'_, F::Entry>,
    newer: &Changes<F::Entry>,
    all: &Changes<F::Entry>,
) -> IoResult {
    let tables = image.tables();
    let (slice, _) = tables.slice_of(guest);
    if tables.journal.has_one_of(slice, newer) {
        // What the disk goes on showing of these was not durable until now.
        data(image).flush().await?;
        tables.journal.mark(slice, newer);
    }
    match all.is_empty() {
        true => Ok(()),
        false => write_batch(image, guest, pinned, all).await,
    }
}

async fn write_batch<F: Writable>(
    image: &F,
    guest: u64,
    pinned: &Pinned<'_, F::Entry>,
    changes: &Changes<F::Entry>,
) -> IoResult {
    image.check_intact().await?;
    let at = image.slice_offset(guest)?;
    let (slice, _) = image.tables().slice_of(guest);
    let range = range_of(image, guest, changes);
    let start = range.start;
    let bytes = encode(image, slice, pinned, range, changes)?;
    image.check_table_write(at + start, bytes.len() as u64)?;
    announce(image, Event::L2Update).await;
    image.write_table(guest, at + start, &bytes).await?;
    image.tables().journal.handed_over(slice, changes);
    pinned.publish(changes);
    Ok(())
}

/// Writes a whole slice again.
async fn write_slice<F: Writable>(
    image: &F,
    slice: SliceNo,
    guest: u64,
    pinned: &Pinned<'_, F::Entry>,
) -> IoResult {
    let at = image.slice_offset(guest)?;
    let len = stored_len(image, guest);
    let bytes = encode(image, slice, pinned, 0..len, &Changes::new())?;
    image.check_table_write(at, len)?;
    image.write_table(guest, at, &bytes).await
}

/// Bytes of a slice on the disk.
fn stored_len<F: Format>(image: &F, guest: u64) -> u64 {
    image.slice_len(guest) as u64 * image.tables().shape.entry_bytes
}

/// The bytes of a slice that have to be written to change these entries, of which there is at least one.
fn range_of<F: Format>(image: &F, guest: u64, changes: &Changes<F::Entry>) -> Range<u64> {
    let size = image.tables().shape.entry_bytes;
    let indices = changes.iter().map(|&(index, _)| index as u64);
    let (low, high) =
        indices.fold((u64::MAX, 0), |(low, high), n| (low.min(n * size), high.max(n * size)));
    let align = u64::from(file(image).traits().request_align);
    let unit = size.max(align).min(image.tables().slice_bytes());
    low / unit * unit..(high + size).next_multiple_of(unit).min(stored_len(image, guest))
}

/// A part of a slice, in bytes, as the disk is to have it.
fn encode<F: Writable>(
    image: &F,
    slice: SliceNo,
    pinned: &Pinned<'_, F::Entry>,
    range: Range<u64>,
    changes: &Changes<F::Entry>,
) -> IoResult<AlignedBuf> {
    let size = image.tables().shape.entry_bytes;
    let len = (range.end - range.start) as usize;
    let mut bytes = AlignedBuf::for_overwriting(len, 4096).ok_or(Errno::ENOMEM)?;
    let inside = (range.start / size) as usize..(range.end / size) as usize;
    let stored = bytes.chunks_exact_mut(size as usize);
    for (bytes, entry) in stored.zip(pinned.entries(inside.clone())) {
        F::store(entry, bytes);
    }
    // Readers see more than the disk may have yet.
    let waiting = image.tables().journal.on_disk(slice, inside, changes);
    for &(index, entry) in waiting.iter().chain(changes) {
        let at = (index as u64 * size - range.start) as usize;
        F::store(entry, &mut bytes[at..at + size as usize]);
    }
    Ok(bytes)
}
