//! The cache of mapping tables: slices of entries that are read without a lock.
//!
//! A slot holds one slice of a table under a sequence count. A reader reads the count, the tag and the
//! entry, and then the count again; if it has changed, or is odd, the reader has read nothing. Tag and
//! entry are read in one window, so a slot that is being refilled never answers with an entry of another
//! slice. Readers write nothing; all changes are made under one mutex, and only memory is touched while it
//! is held.
//!
//! A slice is examined before its entries can be followed, and [`TableCache::find_slice`] shows it from
//! before that: code that publishes something to the examination, and then looks at all slices, misses no
//! slice whose examination missed it.
//!
//! A pinned slot keeps its slice, which is about to be changed. Slices that were not used for a while are
//! given back, page by page, under readers who do not trust what they find there.

use crate::io::IoResult;
use crate::io::atomics::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use crate::io::pages::{PAGE, Pages};
use crate::io::sync::{Mutex, Waiters};
use crate::io::task::yield_now;
use std::fmt::Debug;
use std::future::Future;
use std::marker::PhantomData;
use std::ops::Range;

/// An entry of a mapping table: one or two numbers in host byte order, whatever its form on the disk.
pub trait TableEntry: Copy + PartialEq + Debug + Send + Sync + 'static {
    /// `second` is zero where entries have one word.
    fn from_words(first: u64, second: u64) -> Self;
    fn words(self) -> [u64; 2];
}

/// Slots that a slice may be in.
const WAYS: usize = 8;
const EMPTY: u64 = u64::MAX;
/// How often a reader tries again before it takes the slow path.
const RETRIES: usize = 4;
/// So many entries are examined before other tasks of the worker have their turn.
const ENTRIES_AT_ONCE: usize = 8192;

/// A slice's number: the guest's clusters, divided by the entries of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SliceNo(pub u64);

/// See the module's text.
pub struct TableCache<E> {
    sets: u64,
    /// Entries of a slice.
    entries: usize,
    /// Words of an entry: 1 or 2.
    words: usize,
    slots: Box<[Slot]>,
    /// The slots' slices, one after the other.
    data: Pages,
    state: Mutex<State>,
    entry: PhantomData<fn() -> E>,
}

struct Slot {
    sequence: AtomicU32,
    tag: AtomicU64,
    /// It was used since unused slots were last given back. Written once in between.
    is_used: AtomicBool,
}

#[derive(Default)]
struct State {
    slots: Vec<SlotState>,
    /// Slices that are being read.
    loading: Vec<SliceNo>,
    waiting: Waiters,
    clock: u64,
}

#[derive(Clone, Copy, Default)]
struct SlotState {
    pins: u32,
    /// It has the entries of a slice that readers do not find yet.
    is_examined: bool,
    /// When it was filled: the oldest goes first.
    filled: u64,
}

/// A slice that stays in its slot until this is dropped.
pub struct Pinned<'a, E: TableEntry> {
    cache: &'a TableCache<E>,
    slot: usize,
}

/// A slice that the holder of this is reading.
struct Loading<'a, E: TableEntry> {
    cache: &'a TableCache<E>,
    slice: SliceNo,
    slot: usize,
}

enum Begun<'a, E: TableEntry> {
    There(Pinned<'a, E>),
    Load(Loading<'a, E>),
}

impl<E: TableEntry> TableCache<E> {
    /// A cache of about `bytes`, for slices of `entries` (a power of two) that have `words` words each: 1 or 2.
    ///
    /// # Errors
    /// There is not so much memory.
    pub fn new(bytes: u64, entries: usize, words: usize) -> IoResult<TableCache<E>> {
        let slice_words = entries * words;
        let sets = (bytes / (slice_words as u64 * 8)).div_ceil(WAYS as u64).max(1);
        let count = sets as usize * WAYS;
        let slots = (0..count).map(|_| Slot {
            sequence: AtomicU32::new(0),
            tag: AtomicU64::new(EMPTY),
            is_used: AtomicBool::new(false),
        });
        let state = State { slots: vec![SlotState::default(); count], ..State::default() };
        Ok(TableCache {
            data: Pages::new(count * slice_words)?,
            sets,
            entries,
            words,
            slots: slots.collect(),
            state: Mutex::new(state),
            entry: PhantomData,
        })
    }

    /// Entries of a slice.
    pub fn entries(&self) -> usize {
        self.entries
    }

    fn set(&self, slice: SliceNo) -> Range<usize> {
        let first = (slice.0 % self.sets) as usize * WAYS;
        first..first + WAYS
    }

    /// An entry, if its slice is there: no lock, no write.
    pub fn get(&self, slice: SliceNo, index: usize) -> Option<E> {
        for n in self.set(slice) {
            let slot = &self.slots[n];
            for _ in 0..RETRIES {
                if slot.tag.load(Ordering::Acquire) != slice.0 {
                    break;
                }
                if let Some(entry) = self.read_of(n, slice, index) {
                    slot.mark_used();
                    return Some(entry);
                }
            }
        }
        None
    }

    /// The slice, kept in its slot; read by `load` if it is not there. `load` gives all entries of the slice;
    /// `look` sees them before readers do.
    pub async fn pin(
        &self,
        slice: SliceNo,
        load: impl Future<Output = IoResult<Vec<E>>>,
        look: impl FnOnce(&[E]),
    ) -> IoResult<Pinned<'_, E>> {
        let begun =
            self.state.wait_for(|state| self.begin(state, slice).ok_or(&mut state.waiting)).await;
        match begun {
            Begun::There(pinned) => Ok(pinned),
            Begun::Load(loading) => {
                let entries = load.await?;
                loading.place(&entries);
                look(&entries);
                Ok(loading.show())
            }
        }
    }

    fn begin(&self, state: &mut State, slice: SliceNo) -> Option<Begun<'_, E>> {
        if state.loading.contains(&slice) {
            return None;
        }
        let mut set = self.set(slice);
        if let Some(slot) = set.clone().find(|&n| self.tag(n) == slice.0) {
            state.slots[slot].pins += 1;
            self.slots[slot].mark_used();
            return Some(Begun::There(Pinned { cache: self, slot }));
        }
        let oldest = set.clone().filter(|&n| state.slots[n].pins == 0);
        // None: all are pinned, which passes with the writes that pin them.
        let slot = match set.find(|&n| self.tag(n) == EMPTY && state.slots[n].pins == 0) {
            Some(empty) => empty,
            None => oldest.min_by_key(|&n| state.slots[n].filled)?,
        };
        state.slots[slot].pins = 1;
        state.loading.push(slice);
        // Readers no longer find what it held.
        self.slots[slot].change(|| self.slots[slot].tag.store(EMPTY, Ordering::Relaxed));
        Some(Begun::Load(Loading { cache: self, slice, slot }))
    }

    /// The words of a slot.
    fn data(&self, slot: usize) -> &[AtomicU64] {
        let len = self.entries * self.words;
        &self.data.words()[slot * len..][..len]
    }

    /// An entry, if the slot holds `slice` and nothing changes meanwhile.
    fn read_of(&self, slot: usize, slice: SliceNo, index: usize) -> Option<E> {
        let Slot { sequence, tag, .. } = &self.slots[slot];
        let before = sequence.load(Ordering::Acquire);
        let same = tag.load(Ordering::Relaxed) == slice.0;
        let entry = self.entry_at(slot, index);
        fence(Ordering::Acquire);
        let still = before & 1 == 0 && sequence.load(Ordering::Relaxed) == before;
        (same && still).then_some(entry)
    }

    /// An entry of a slot as its words are now.
    fn entry_at(&self, slot: usize, index: usize) -> E {
        let (data, at) = (self.data(slot), index * self.words);
        let first = data[at].load(Ordering::Relaxed);
        let second = if self.words == 2 { data[at + 1].load(Ordering::Relaxed) } else { 0 };
        E::from_words(first, second)
    }

    /// Sets an entry of a slot, inside [`Slot::change`].
    fn store_at(&self, slot: usize, index: usize, entry: E) {
        let (data, at) = (self.data(slot), index * self.words);
        let words = entry.words();
        for (place, word) in data[at..at + self.words].iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
    }

    /// Gives back the memory of slices that were not used since this was last called.
    pub fn give_back_unused(&self) {
        let len = self.entries * self.words;
        // Slots that share a page go together.
        let group = (PAGE / 8).div_ceil(len);
        for first in (0..self.slots.len()).step_by(group) {
            let slots = first..(first + group).min(self.slots.len());
            let state = self.state.lock();
            for n in slots.clone() {
                let was_used = self.slots[n].is_used.swap(false, Ordering::Relaxed);
                if !was_used && state.slots[n].pins == 0 && self.tag(n) != EMPTY {
                    let slot = &self.slots[n];
                    slot.change(|| slot.tag.store(EMPTY, Ordering::Relaxed));
                }
            }
            let is_free = |n: usize| state.slots[n].pins == 0 && self.tag(n) == EMPTY;
            if slots.clone().all(is_free) {
                self.data.give_back(slots.start * len..slots.end * len);
            }
        }
    }

    /// Changes are made under the mutex, so that this is exact there.
    fn tag(&self, slot: usize) -> u64 {
        self.slots[slot].tag.load(Ordering::Relaxed)
    }

    /// The first result of `look` over the slices that are in the cache or are being examined.
    pub async fn find_slice<T>(&self, mut look: impl FnMut(&[E]) -> Option<T>) -> Option<T> {
        let mut entries = Vec::new();
        let (mut at, mut examined) = (0, 0);
        while let Some(n) = self.copy_next(at, &mut entries) {
            if let Some(found) = look(&entries) {
                return Some(found);
            }
            at = n + 1;
            examined += entries.len();
            if examined >= ENTRIES_AT_ONCE {
                examined = 0;
                yield_now().await;
            }
        }
        None
    }

    /// The first slot from `at` on that has a slice; copies its entries.
    fn copy_next(&self, at: usize, entries: &mut Vec<E>) -> Option<usize> {
        // Nothing changes meanwhile.
        let state = self.state.lock();
        let is_filled = |&n: &usize| self.tag(n) != EMPTY || state.slots[n].is_examined;
        let n = (at..self.slots.len()).find(is_filled)?;
        entries.clear();
        entries.extend((0..self.entries).map(|index| self.entry_at(n, index)));
        Some(n)
    }

    /// Removes the slices that `which` chooses, except pinned ones.
    pub fn forget(&self, which: impl Fn(SliceNo) -> bool) {
        let state = self.state.lock();
        for (n, slot) in self.slots.iter().enumerate() {
            let tag = self.tag(n);
            if state.slots[n].pins == 0 && tag != EMPTY && which(SliceNo(tag)) {
                slot.change(|| slot.tag.store(EMPTY, Ordering::Relaxed));
            }
        }
    }
}

impl Slot {
    fn mark_used(&self) {
        if !self.is_used.load(Ordering::Relaxed) {
            self.is_used.store(true, Ordering::Relaxed);
        }
    }

    /// Changes the slot while readers know not to trust it. Under the cache's mutex.
    fn change(&self, change: impl FnOnce()) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }
}

impl<'a, E: TableEntry> Loading<'a, E> {
    /// Puts the entries into the slot, where readers do not find them yet.
    fn place(&self, entries: &[E]) {
        let mut state = self.cache.state.lock();
        state.slots[self.slot].is_examined = true;
        self.cache.slots[self.slot].change(|| {
            for (index, &entry) in entries.iter().enumerate().take(self.cache.entries) {
                self.cache.store_at(self.slot, index, entry);
            }
        });
    }

    fn show(self) -> Pinned<'a, E> {
        let (cache, slot) = (self.cache, self.slot);
        let place = &cache.slots[slot];
        let mut state = cache.state.lock();
        state.clock += 1;
        state.slots[slot].filled = state.clock;
        state.slots[slot].pins += 1;
        place.mark_used();
        place.change(|| place.tag.store(self.slice.0, Ordering::Relaxed));
        drop(state);
        Pinned { cache, slot }
    }
}

impl<E: TableEntry> Drop for Loading<'_, E> {
    /// Also when reading failed or was cancelled: waiting tasks try again.
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        state.slots[self.slot].pins -= 1;
        state.slots[self.slot].is_examined = false;
        state.loading.retain(|slice| *slice != self.slice);
        let waiting = state.waiting.take();
        drop(state);
        waiting.wake();
    }
}

impl<E: TableEntry> Pinned<'_, E> {
    pub fn get(&self, index: usize) -> E {
        loop {
            // Changes take a few stores under a mutex, so this ends.
            let slice = SliceNo(self.cache.tag(self.slot));
            if let Some(entry) = self.cache.read_of(self.slot, slice, index) {
                return entry;
            }
            std::hint::spin_loop();
        }
    }

    /// A range of the slice's entries.
    pub fn entries(&self, range: Range<usize>) -> impl Iterator<Item = E> {
        range.map(|index| self.cache.entry_at(self.slot, index))
    }

    /// Keeps the slice in its slot until [`Pinned::stay_no_longer`].
    pub fn stay(&self) {
        self.cache.state.lock().slots[self.slot].pins += 1;
    }

    pub fn stay_no_longer(self) {
        self.cache.state.lock().slots[self.slot].pins -= 1;
    }

    /// Shows new entries to all readers.
    pub fn publish(&self, entries: &[(usize, E)]) {
        let _state = self.cache.state.lock();
        self.cache.slots[self.slot].change(|| {
            for &(index, entry) in entries {
                self.cache.store_at(self.slot, index, entry);
            }
        });
    }
}

impl<E: TableEntry> Drop for Pinned<'_, E> {
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        state.slots[self.slot].pins -= 1;
        if state.slots[self.slot].pins > 0 {
            return;
        }
        let waiting = state.waiting.take();
        drop(state);
        waiting.wake();
    }
}

#[cfg(test)]
#[path = "table_cache_tests.rs"]
mod tests;
