//! Changes of L2 entries on their way to the kernel: those of one slice that come together go
//! together.
//!
//! One write of a slice is under way at a time, made by one of those who wait for it; what comes
//! meanwhile collects for the next. An entry is shown to readers once it has been handed over, so
//! that nothing is answered that a killed process would forget.

use super::Qcow2;
use super::l2_cache::{Pinned, SliceNo};
use super::layout::L2Entry;
use super::overlap::Kinds;
use crate::block::{Event, WriteFlags};
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult, IoVec};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

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
    waiting: Vec<Waker>,
}

#[derive(Default)]
struct Batch {
    changes: Changes,
    /// How it ended.
    result: Arc<Mutex<Option<IoResult>>>,
}

/// Somebody's part in a slice's batches.
struct Member<'a> {
    batches: &'a Batches,
    slice: SliceNo,
    result: Arc<Mutex<Option<IoResult>>>,
}

/// The turn to write a batch.
struct Turn<'a> {
    batches: &'a Batches,
    slice: SliceNo,
    batch: Batch,
}

impl Batches {
    fn join(&self, slice: SliceNo, changes: &[(usize, L2Entry)]) -> Member<'_> {
        let mut slices = self.slices.lock();
        let state = slices.entry(slice).or_insert_with(|| Slice {
            users: 0,
            is_writing: false,
            next: Batch::default(),
            waiting: Vec::new(),
        });
        state.users += 1;
        state.next.changes.extend_from_slice(changes);
        Member { batches: self, slice, result: state.next.result.clone() }
    }
}

impl<'a> Member<'a> {
    /// Waits for the end of the batch, or for the turn to write it.
    async fn turn(&self) -> Result<Turn<'a>, IoResult> {
        poll_fn(|cx| {
            let mut slices = self.batches.slices.lock();
            if let Some(result) = *self.result.lock() {
                return Poll::Ready(Err(result));
            }
            let Some(state) = slices.get_mut(&self.slice) else {
                return Poll::Ready(Err(Err(Errno::EIO)));
            };
            if state.is_writing {
                state.waiting.push(cx.waker().clone());
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
        if let Some(state) = slices.get_mut(&self.slice) {
            state.users -= 1;
            if state.users == 0 {
                slices.remove(&self.slice);
            }
        }
    }
}

impl Drop for Turn<'_> {
    /// Ends the turn; if it was given up, the batch has failed.
    fn drop(&mut self) {
        self.batch.result.lock().get_or_insert(Err(Errno::EIO));
        let mut slices = self.batches.slices.lock();
        let Some(state) = slices.get_mut(&self.slice) else { return };
        state.is_writing = false;
        let waiting = std::mem::take(&mut state.waiting);
        drop(slices);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Qcow2 {
    /// Gives guest clusters from `guest` on, all of one slice, new entries: handed to the kernel,
    /// then shown. The caller holds their range, and the L2 table is there and may be changed.
    ///
    /// When it fails the disk may have the old entries or the new; readers go on with the old.
    pub(super) async fn change_entries(&self, guest: u64, entries: &[L2Entry]) -> IoResult {
        self.check_sound().await?;
        let (slice, first) = self.slice_of(guest);
        let pinned = self.pin(guest).await?;
        let changes: Changes =
            entries.iter().enumerate().map(|(n, &entry)| (first + n, entry)).collect();
        let member = self.batches.join(slice, &changes);
        match member.turn().await {
            Err(result) => result,
            Ok(turn) => {
                let result = self.write_batch(guest, &pinned, &turn.batch.changes).await;
                if result.is_err() {
                    self.suspect(slice, guest, pinned);
                }
                *turn.batch.result.lock() = Some(result);
                result
            }
        }
    }

    /// Writes a slice once more, as readers see it, and what is waiting to be written with it.
    pub(super) async fn rewrite_slice(
        &self,
        slice: SliceNo,
        guest: u64,
        pinned: &Pinned<'_>,
    ) -> IoResult {
        let member = self.batches.join(slice, &[]);
        let Ok(turn) = member.turn().await else {
            // Somebody else has written, but only his own entries.
            drop(member);
            return Box::pin(self.rewrite_slice(slice, guest, pinned)).await;
        };
        let mut result = self.write_slice(guest, pinned).await;
        if result.is_ok() && !turn.batch.changes.is_empty() {
            result = self.write_batch(guest, pinned, &turn.batch.changes).await;
        }
        *turn.batch.result.lock() = Some(result);
        result
    }

    async fn write_batch(&self, guest: u64, pinned: &Pinned<'_>, changes: &Changes) -> IoResult {
        self.check_intact().await?;
        let at = self.slice_offset(guest)?;
        let (start, bytes) = self.encode_changes(pinned, changes);
        let bytes = IoVec::from_ref(&bytes);
        self.check_write(at + start, bytes.len(), Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2)?;
        self.event(Event::L2Update).await;
        self.file().write(at + start, &bytes, WriteFlags::empty()).await?;
        pinned.publish(changes);
        Ok(())
    }

    /// What of the slice changes, as it will be: where it begins in the slice, and its bytes.
    fn encode_changes(&self, pinned: &Pinned<'_>, changes: &Changes) -> (u64, Vec<u8>) {
        let size = self.geometry.l2_entry_size();
        let indices = changes.iter().map(|&(index, _)| index as u64);
        let (low, high) =
            indices.fold((u64::MAX, 0), |(low, high), n| (low.min(n * size), high.max(n * size)));
        let unit = size.max(self.file_align).min(self.slice_bytes);
        let range = low / unit * unit..(high + size).next_multiple_of(unit);
        let inside = (range.start / 8) as usize..(range.end / 8) as usize;
        let words = pinned.words()[inside].iter().map(|word| word.load(Ordering::Relaxed));
        let mut words: Vec<u64> = words.collect();
        for &(index, entry) in changes {
            let word = ((index as u64 * size - range.start) / 8) as usize;
            words[word] = entry.word;
            if size == 16 {
                words[word + 1] = entry.bitmap;
            }
        }
        (range.start, words.iter().flat_map(|word| word.to_be_bytes()).collect())
    }
}
