//! The cache of L2 tables: slices of entries that are read without a lock.
//!
//! A slot holds one slice of an L2 table under a sequence count. A reader looks at the count, the
//! tag and the entry, and at the count again; if it has moved, or is odd, nothing was read. Tag and
//! entry are read in one window, so that a slot which is just being refilled never answers with
//! another slice's entry. Readers write nothing; all changes are made under one mutex, and only
//! memory is touched while it is held.
//!
//! A slice is looked at before its entries can be followed, and is among those that
//! [`L2Cache::find_slice`] shows from before that: who puts something where others look, and then
//! looks at all slices, misses none that has not seen it.
//!
//! A slot that is pinned keeps its slice: somebody is about to change it. What nobody has looked at for a
//! while is given back, page by page, under readers who do not trust what they find there.

use super::layout::L2Entry;
use crate::io::IoResult;
use crate::io::pages::{PAGE, Pages};
use crate::io::sync::Mutex;
use crate::io::task::yield_now;
use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::task::{Poll, Waker};

/// Slots that a slice may be in.
const WAYS: usize = 8;
const EMPTY: u64 = u64::MAX;
/// How often a reader looks again before it takes the slow road.
const RETRIES: usize = 4;
/// So many words are looked through before others on the worker have their turn.
const WORDS_AT_ONCE: usize = 8192;

/// A slice's number: the guest's clusters, divided by the entries of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SliceNo(pub u64);

pub struct L2Cache {
    sets: u64,
    /// Entries of a slice.
    entries: usize,
    /// Words of an entry: 1 or 2.
    words: usize,
    slots: Box<[Slot]>,
    /// The slots' slices, one after the other.
    data: Pages,
    state: Mutex<State>,
}

struct Slot {
    sequence: AtomicU32,
    tag: AtomicU64,
    /// It was looked at since what is unused was last given back. Written once in between.
    is_used: AtomicBool,
}

#[derive(Default)]
struct State {
    slots: Vec<SlotState>,
    /// Slices that are being read.
    loading: Vec<SliceNo>,
    waiting: Vec<Waker>,
    clock: u64,
}

#[derive(Clone, Copy, Default)]
struct SlotState {
    pins: u32,
    /// It has the words of a slice that readers do not find yet.
    is_looked_at: bool,
    /// When it was filled: the oldest goes first.
    filled: u64,
}

/// A slice that stays in its slot until this is dropped.
pub struct Pinned<'a> {
    cache: &'a L2Cache,
    slot: usize,
}

/// A slice that is being read, by whoever holds this.
struct Loading<'a> {
    cache: &'a L2Cache,
    slice: SliceNo,
    slot: usize,
}

enum Begun<'a> {
    There(Pinned<'a>),
    Load(Loading<'a>),
}

impl L2Cache {
    /// A cache of about `bytes`, in slices of `slice_bytes`, entries of `words` words.
    ///
    /// # Errors
    /// There is not so much memory.
    pub fn new(bytes: u64, slice_bytes: u64, words: usize) -> IoResult<L2Cache> {
        let sets = (bytes / slice_bytes).div_ceil(WAYS as u64).max(1);
        let count = sets as usize * WAYS;
        let slots = (0..count).map(|_| Slot {
            sequence: AtomicU32::new(0),
            tag: AtomicU64::new(EMPTY),
            is_used: AtomicBool::new(false),
        });
        let state = State { slots: vec![SlotState::default(); count], ..State::default() };
        Ok(L2Cache {
            data: Pages::new(count * slice_bytes as usize / 8)?,
            sets,
            entries: slice_bytes as usize / 8 / words,
            words,
            slots: slots.collect(),
            state: Mutex::new(state),
        })
    }

    /// Entries of a slice.
    pub fn entries(&self) -> usize {
        self.entries
    }

    fn set(&self, slice: SliceNo) -> std::ops::Range<usize> {
        let first = (slice.0 % self.sets) as usize * WAYS;
        first..first + WAYS
    }

    /// An entry, if its slice is there: no lock, no write.
    pub fn get(&self, slice: SliceNo, index: usize) -> Option<L2Entry> {
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

    /// The slice, kept in its slot; read by `load` if it is not there. `load` gives as many words as
    /// a slice has, in host order; `look` sees them before readers do.
    pub async fn pin(
        &self,
        slice: SliceNo,
        load: impl Future<Output = IoResult<Vec<u64>>>,
        look: impl FnOnce(&[u64]),
    ) -> IoResult<Pinned<'_>> {
        let begun = poll_fn(|cx| {
            let mut state = self.state.lock();
            match self.begin(&mut state, slice) {
                Some(begun) => Poll::Ready(begun),
                None => {
                    state.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        match begun {
            Begun::There(pinned) => Ok(pinned),
            Begun::Load(loading) => {
                let words = load.await?;
                loading.place(&words);
                look(&words);
                Ok(loading.show())
            }
        }
    }

    fn begin(&self, state: &mut State, slice: SliceNo) -> Option<Begun<'_>> {
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
        // What it held until now is not there for anybody any more.
        self.slots[slot].change(|| self.slots[slot].tag.store(EMPTY, Ordering::Relaxed));
        Some(Begun::Load(Loading { cache: self, slice, slot }))
    }

    /// The words of a slot.
    fn data(&self, slot: usize) -> &[AtomicU64] {
        let len = self.entries * self.words;
        &self.data.words()[slot * len..][..len]
    }

    /// An entry, if nothing has changed meanwhile and the slot holds `slice`.
    fn read_of(&self, slot: usize, slice: SliceNo, index: usize) -> Option<L2Entry> {
        let Slot { sequence, tag, .. } = &self.slots[slot];
        let before = sequence.load(Ordering::Acquire);
        let same = tag.load(Ordering::Relaxed) == slice.0;
        let (data, at) = (self.data(slot), index * self.words);
        let word = data[at].load(Ordering::Relaxed);
        let bitmap = if self.words == 2 { data[at + 1].load(Ordering::Relaxed) } else { 0 };
        fence(Ordering::Acquire);
        let still = before & 1 == 0 && sequence.load(Ordering::Relaxed) == before;
        (same && still).then_some(L2Entry { word, bitmap })
    }

    /// Gives back the memory of slices that were not looked at since this was last called.
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

    /// What `look` finds first in the words of a slice, of all that are there or are being looked at.
    pub async fn find_slice<T>(&self, mut look: impl FnMut(&[u64]) -> Option<T>) -> Option<T> {
        let mut words = Vec::new();
        let (mut at, mut looked_at) = (0, 0);
        while let Some(n) = self.copy_next(at, &mut words) {
            if let Some(found) = look(&words) {
                return Some(found);
            }
            at = n + 1;
            looked_at += words.len();
            if looked_at >= WORDS_AT_ONCE {
                looked_at = 0;
                yield_now().await;
            }
        }
        None
    }

    /// The first slot from `at` on that has a slice, and its words.
    fn copy_next(&self, at: usize, words: &mut Vec<u64>) -> Option<usize> {
        // Nothing changes meanwhile.
        let state = self.state.lock();
        let has_words = |&n: &usize| self.tag(n) != EMPTY || state.slots[n].is_looked_at;
        let n = (at..self.slots.len()).find(has_words)?;
        words.clear();
        words.extend(self.data(n).iter().map(|word| word.load(Ordering::Relaxed)));
        Some(n)
    }

    /// Forgets the slices that nobody has pinned and that `which` chooses.
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

impl<'a> Loading<'a> {
    /// Puts the words into the slot, where readers do not find them.
    fn place(&self, words: &[u64]) {
        let mut state = self.cache.state.lock();
        state.slots[self.slot].is_looked_at = true;
        self.cache.slots[self.slot].change(|| {
            for (place, &word) in self.cache.data(self.slot).iter().zip(words) {
                place.store(word, Ordering::Relaxed);
            }
        });
    }

    fn show(self) -> Pinned<'a> {
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

impl Drop for Loading<'_> {
    /// Also when reading has failed or was given up: others try again.
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        state.slots[self.slot].pins -= 1;
        state.slots[self.slot].is_looked_at = false;
        state.loading.retain(|slice| *slice != self.slice);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Pinned<'_> {
    pub fn get(&self, index: usize) -> L2Entry {
        loop {
            // Changes take a few stores under a mutex, so this ends.
            let slice = SliceNo(self.cache.tag(self.slot));
            if let Some(entry) = self.cache.read_of(self.slot, slice, index) {
                return entry;
            }
            std::hint::spin_loop();
        }
    }

    /// All words of the slice.
    pub fn words(&self) -> &[AtomicU64] {
        self.cache.data(self.slot)
    }

    /// Keeps the slice in its slot until [`Pinned::stay_no_longer`].
    pub fn stay(self) {
        self.cache.state.lock().slots[self.slot].pins += 1;
    }

    pub fn stay_no_longer(self) {
        self.cache.state.lock().slots[self.slot].pins -= 1;
    }

    /// Shows new entries to all readers.
    pub fn publish(&self, entries: &[(usize, L2Entry)]) {
        let _state = self.cache.state.lock();
        let data = self.cache.data(self.slot);
        self.cache.slots[self.slot].change(|| {
            for &(index, words) in entries {
                let at = index * self.cache.words;
                data[at].store(words.word, Ordering::Relaxed);
                if self.cache.words == 2 {
                    data[at + 1].store(words.bitmap, Ordering::Relaxed);
                }
            }
        });
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        state.slots[self.slot].pins -= 1;
        if state.slots[self.slot].pins > 0 {
            return;
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    fn pin_now<'a>(cache: &'a L2Cache, slice: u64, words: &[u64]) -> Option<Pinned<'a>> {
        let load = std::future::ready(Ok(words.to_vec()));
        let mut future = pin!(cache.pin(SliceNo(slice), load, |_| ()));
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result.unwrap()),
            Poll::Pending => None,
        }
    }

    #[test]
    fn what_was_loaded_is_read_and_what_was_published_replaces_it() {
        let cache = L2Cache::new(4096, 512, 2).unwrap();
        assert_eq!(cache.entries(), 32);
        assert_eq!(cache.get(SliceNo(3), 1), None);
        let words: Vec<u64> = (0..64).collect();
        let pinned = pin_now(&cache, 3, &words).unwrap();
        assert_eq!(cache.get(SliceNo(3), 1), Some(L2Entry { word: 2, bitmap: 3 }));
        let new = L2Entry { word: 70, bitmap: 71 };
        pinned.publish(&[(1, new)]);
        assert_eq!(cache.get(SliceNo(3), 1), Some(new));
        assert_eq!(pinned.get(31), L2Entry { word: 62, bitmap: 63 });
    }

    #[test]
    fn pinned_slices_stay_and_the_oldest_of_the_others_goes() {
        let cache = L2Cache::new(0, 512, 1).unwrap();
        let words = |n: u64| vec![n; 64];
        let first = pin_now(&cache, 0, &words(0)).unwrap();
        for n in 1..WAYS as u64 {
            pin_now(&cache, n, &words(n)).unwrap();
        }
        pin_now(&cache, 100, &words(100)).unwrap();
        assert_eq!(cache.get(SliceNo(0), 5).unwrap().word, 0);
        assert_eq!(cache.get(SliceNo(1), 5), None, "the oldest that is not pinned");
        assert_eq!(cache.get(SliceNo(100), 5).unwrap().word, 100);
        drop(first);
        let pins: Vec<_> =
            (200..200 + WAYS as u64).map(|n| pin_now(&cache, n, &words(n)).unwrap()).collect();
        assert!(pin_now(&cache, 300, &words(300)).is_none(), "all slots are pinned");
        drop(pins);
        assert!(pin_now(&cache, 300, &words(300)).is_some());
    }

    #[test]
    fn what_was_not_looked_at_is_given_back_and_what_is_pinned_stays() {
        // Eight slots to a page, and one to a page.
        for bytes in [512, 4096] {
            let cache = L2Cache::new(64 * bytes, bytes, 1).unwrap();
            let words: Vec<u64> = vec![7; bytes as usize / 8];
            let pinned = pin_now(&cache, 1, &words).unwrap();
            (2..64).for_each(|n| drop(pin_now(&cache, n, &words).unwrap()));
            cache.give_back_unused();
            assert!((1..64).all(|n| cache.get(SliceNo(n), 0).is_some()), "all were used");
            cache.give_back_unused();
            assert_eq!(cache.get(SliceNo(9), 3).unwrap().word, 7);
            cache.give_back_unused();
            let there = |n| cache.get(SliceNo(n), 3).is_some();
            let all = cache.data.words().iter();
            let zeroes = all.filter(|word| word.load(Ordering::Relaxed) == 0).count();
            assert!(zeroes >= 48 * words.len(), "{zeroes} words");
            assert_eq!((1..64).filter(|&n| there(n)).collect::<Vec<_>>(), [1, 9]);
            assert_eq!(pinned.get(3).word, 7);
            drop(pinned);
            assert!(pin_now(&cache, 20, &words).is_some() && there(20));
        }
    }

    #[test]
    fn whoever_looks_at_all_slices_sees_one_that_is_just_being_looked_at() {
        let cache = L2Cache::new(0, 512, 1).unwrap();
        let seen = || {
            let all = std::cell::RefCell::new(Vec::new());
            let mut future = pin!(cache.find_slice(|words| {
                all.borrow_mut().push(words[0]);
                None::<()>
            }));
            let mut cx = Context::from_waker(Waker::noop());
            assert_eq!(future.as_mut().poll(&mut cx), Poll::Ready(None));
            all.take()
        };
        pin_now(&cache, 1, &[1; 64]);
        let look = |words: &[u64]| {
            assert_eq!((words, cache.get(SliceNo(2), 0)), (&[2; 64][..], None));
            assert_eq!(seen(), [1, 2]);
        };
        let load = std::future::ready(Ok(vec![2; 64]));
        let mut future = pin!(cache.pin(SliceNo(2), load, look));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(future.as_mut().poll(&mut cx), Poll::Ready(Ok(_))));
        assert!(cache.get(SliceNo(2), 0).is_some());
    }

    #[test]
    fn looking_at_all_slices_lets_others_have_their_turns_and_ends_with_what_it_finds() {
        let cache = L2Cache::new(64 << 13, 8 << 13, 1).unwrap();
        let words = |n: u64| vec![n; 1 << 13];
        (0..8).for_each(|n| drop(pin_now(&cache, n, &words(n)).unwrap()));
        let looks = std::cell::Cell::new(0);
        let mut future = pin!(cache.find_slice(|words| {
            looks.set(looks.get() + 1);
            (words[0] == 5).then_some(words[0])
        }));
        let mut turns = 1;
        let mut cx = Context::from_waker(Waker::noop());
        let found = loop {
            match future.as_mut().poll(&mut cx) {
                Poll::Ready(found) => break found,
                Poll::Pending => turns += 1,
            }
        };
        assert_eq!((found, looks.get(), turns), (Some(5), 6, 6));
    }

    #[test]
    fn a_slot_that_is_refilled_never_gives_a_strangers_entry() {
        let cache = L2Cache::new(0, 512, 2).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000u64 {
                    let slice = round % 50;
                    pin_now(&cache, slice, &vec![slice + 1; 64]);
                    if round % 64 == 0 {
                        cache.give_back_unused();
                    }
                }
                stop.store(true, Ordering::SeqCst);
            });
            while !stop.load(Ordering::SeqCst) {
                for slice in 0..50 {
                    if let Some(words) = cache.get(SliceNo(slice), 7) {
                        assert_eq!(words, L2Entry { word: slice + 1, bitmap: slice + 1 });
                    }
                }
            }
        });
    }
}
