//! Changes of L2 entries on their way to the kernel: those of one slice that come together go
//! together.
//!
//! One write of a slice is under way at a time, made by one of those who wait for it; what comes
//! meanwhile collects for the next. An entry is shown to readers once it has been handed over, so
//! that nothing is answered that a killed process would forget.

use super::Qcow2;
use super::layout::L2Entry;
use super::overlap::Kinds;
use crate::block::{Event, WriteFlags};
use crate::cow::{Format, Pinned, SliceNo, pin};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::Poll;

/// Entries of a slice: index and what it becomes.
pub type Changes = Vec<(usize, L2Entry)>;

#[derive(Default)]
pub struct Batches {
    slices: Mutex<BTreeMap<SliceNo, Slice>>,
}

/// A slice that somebody changes.
struct Slice {
    /// How many wait for its batches.
    users: usize,
    is_writing: bool,
    /// What collects.
    next: Batch,
}

#[derive(Default)]
struct Batch {
    changes: Changes,
    end: Arc<Mutex<End>>,
}

/// The end of a batch, for those who are part of it.
#[derive(Default)]
struct End {
    result: Option<IoResult>,
    waiting: Waiters,
}

/// Somebody's part in a slice's batches.
struct Member<'a> {
    batches: &'a Batches,
    slice: SliceNo,
    end: Arc<Mutex<End>>,
}

/// The turn to write a batch.
struct Turn<'a> {
    batches: &'a Batches,
    slice: SliceNo,
    batch: Batch,
}

impl Batches {
    fn join(&self, slice: SliceNo, changes: impl Iterator<Item = (usize, L2Entry)>) -> Member<'_> {
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

    /// A turn that was waited for without changes of one's own. As long as the member is there others take
    /// turns with it.
    async fn own_turn(&self, slice: SliceNo) -> (Member<'_>, Turn<'_>) {
        loop {
            let member = self.join(slice, std::iter::empty());
            // Otherwise somebody else has written, but only his own entries.
            if let Ok(turn) = member.turn().await {
                return (member, turn);
            }
        }
    }
}

impl<'a> Member<'a> {
    /// Waits for the end of the batch, or for the turn to write it.
    async fn turn(&self) -> Result<Turn<'a>, IoResult> {
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
            Poll::Ready(Ok(Turn { batches: self.batches, slice: self.slice, batch }))
        })
        .await
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        let mut slices = self.batches.slices.lock();
        let Some(state) = slices.get_mut(&self.slice) else { return };
        state.users -= 1;
        if state.users == 0 {
            slices.remove(&self.slice);
        } else if self.end.lock().result.is_none() {
            // Given up; and perhaps it was, or would be, the one who is told to write the batch.
            drop(slices);
            let waiting = self.end.lock().waiting.take();
            waiting.wake();
        }
    }
}

impl Turn<'_> {
    /// Tells all who are part of the batch.
    fn end(self, result: IoResult) -> IoResult {
        self.batch.end.lock().result = Some(result);
        result
    }
}

impl Drop for Turn<'_> {
    /// Ends the turn; if it was given up, the batch has failed.
    fn drop(&mut self) {
        let mut end = self.batch.end.lock();
        end.result.get_or_insert(Err(Errno::EIO));
        let told = end.waiting.take();
        drop(end);
        let mut slices = self.batches.slices.lock();
        if let Some(state) = slices.get_mut(&self.slice) {
            state.is_writing = false;
            let next = state.next.end.clone();
            drop(slices);
            next.lock().waiting.wake_one();
        }
        told.wake();
    }
}

impl Qcow2 {
    /// Gives guest clusters from `guest` on, all of one slice, new entries: handed to the kernel,
    /// then shown. The caller holds their range, and the L2 table is there and may be changed.
    ///
    /// When it fails the disk may have the old entries or the new; readers go on with the old.
    pub(super) async fn change_entries(&self, guest: u64, entries: &[L2Entry]) -> IoResult {
        self.check_sound().await?;
        let (slice, first) = self.mapping.slice_of(guest);
        let pinned = pin(self, guest).await?;
        let changes = entries.iter().enumerate().map(|(n, &entry)| (first + n, entry));
        let member = self.batches.join(slice, changes);
        match member.turn().await {
            Err(result) => result,
            Ok(turn) => {
                let changes = &turn.batch.changes;
                let result = self.write_changes(guest, &pinned, changes, changes).await;
                if result.is_err() {
                    self.suspect(slice, guest, pinned);
                }
                turn.end(result)
            }
        }
    }

    /// Writes a slice once more, as readers see it, and what is waiting to be written with it.
    pub(super) async fn rewrite_slice(
        &self,
        slice: SliceNo,
        guest: u64,
        pinned: &Pinned<'_, L2Entry>,
    ) -> IoResult {
        let (_member, turn) = self.batches.own_turn(slice).await;
        let changes = &turn.batch.changes;
        let mut result = self.write_slice(slice, guest, pinned).await;
        if result.is_ok() {
            result = self.write_changes(guest, pinned, changes, changes).await;
        }
        turn.end(result)
    }

    /// Hands over what `due` tells of the entries of a slice that wait for that
    /// ([`super::journal`]), and what else is waiting to be written.
    pub(super) async fn settle_slice(
        &self,
        slice: SliceNo,
        guest: u64,
        due: impl FnOnce() -> Changes,
    ) -> IoResult {
        let pinned = pin(self, guest).await?;
        let (_member, turn) = self.batches.own_turn(slice).await;
        let mut all = due();
        all.extend_from_slice(&turn.batch.changes);
        let result = self.write_changes(guest, &pinned, &turn.batch.changes, &all).await;
        if result.is_err() {
            self.suspect(slice, guest, pinned);
        }
        turn.end(result)
    }

    /// Writes all of these changes, if there are any. `newer` are those that may be newer than what waits in
    /// the journal; the others are what waits there.
    async fn write_changes(
        &self,
        guest: u64,
        pinned: &Pinned<'_, L2Entry>,
        newer: &Changes,
        all: &Changes,
    ) -> IoResult {
        let (slice, _) = self.mapping.slice_of(guest);
        if self.journal.has_one_of(slice, newer) {
            // What the disk goes on showing of these was not durable until now.
            self.data().flush().await?;
            self.journal.mark(slice, newer);
        }
        match all.is_empty() {
            true => Ok(()),
            false => self.write_batch(guest, pinned, all).await,
        }
    }

    async fn write_batch(
        &self,
        guest: u64,
        pinned: &Pinned<'_, L2Entry>,
        changes: &Changes,
    ) -> IoResult {
        self.check_intact().await?;
        let at = self.slice_offset(guest)?;
        let (slice, _) = self.mapping.slice_of(guest);
        let range = self.range_of(changes);
        let (start, bytes) = (range.start, self.encode(slice, pinned, range, changes)?);
        self.check_write(at + start, bytes.len() as u64, Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2)?;
        self.event(Event::L2Update).await;
        let file = self.file();
        file.write(at + start, &bytes.source(), WriteFlags::empty()).await?;
        self.journal.handed_over(slice, changes);
        pinned.publish(changes);
        Ok(())
    }

    /// Writes a whole slice once more.
    async fn write_slice(
        &self,
        slice: SliceNo,
        guest: u64,
        pinned: &Pinned<'_, L2Entry>,
    ) -> IoResult {
        let at = self.slice_offset(guest)?;
        let bytes = self.encode(slice, pinned, 0..self.mapping.slice_bytes(), &Changes::new())?;
        self.check_write(at, bytes.len() as u64, Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2)?;
        self.file().write(at, &bytes.source(), WriteFlags::empty()).await
    }

    /// The bytes of a slice that are to be written to change these entries, of which there is one.
    fn range_of(&self, changes: &Changes) -> Range<u64> {
        let size = self.geometry.l2_entry_size();
        let indices = changes.iter().map(|&(index, _)| index as u64);
        let (low, high) =
            indices.fold((u64::MAX, 0), |(low, high), n| (low.min(n * size), high.max(n * size)));
        let unit = size.max(self.file_align).min(self.mapping.slice_bytes());
        low / unit * unit..(high + size).next_multiple_of(unit)
    }

    /// A part of a slice, in bytes, as the disk is to have it.
    fn encode(
        &self,
        slice: SliceNo,
        pinned: &Pinned<'_, L2Entry>,
        range: Range<u64>,
        changes: &Changes,
    ) -> IoResult<AlignedBuf> {
        let size = self.geometry.l2_entry_size();
        let len = (range.end - range.start) as usize;
        let mut bytes = AlignedBuf::for_overwriting(len, 4096).ok_or(Errno::ENOMEM)?;
        let inside = (range.start / size) as usize..(range.end / size) as usize;
        let stored = bytes.chunks_exact_mut(size as usize);
        for (bytes, entry) in stored.zip(pinned.entries(inside.clone())) {
            entry.store(bytes);
        }
        // Readers see more than the disk may have yet.
        let waiting = self.journal.on_disk(slice, inside, changes);
        for &(index, entry) in waiting.iter().chain(changes) {
            let at = (index as u64 * size - range.start) as usize;
            entry.store(&mut bytes[at..at + size as usize]);
        }
        Ok(bytes)
    }
}
