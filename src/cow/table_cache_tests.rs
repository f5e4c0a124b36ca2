//! Tests of the cache of mapping tables; `tests/models` has those of its memory orders.

use super::*;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

type Pair = [u64; 2];
type Cache = TableCache<Pair>;

impl TableEntry for Pair {
    fn from_words(first: u64, second: u64) -> Pair {
        [first, second]
    }
    fn words(self) -> [u64; 2] {
        self
    }
}

/// A slice all entries of which are the same.
fn slice_of(cache: &Cache, word: u64) -> Vec<Pair> {
    vec![[word, if cache.words == 2 { word } else { 0 }]; cache.entries()]
}

fn pin_now<'a>(cache: &'a Cache, slice: u64, entries: &[Pair]) -> Option<Pinned<'a, Pair>> {
    let load = std::future::ready(Ok(entries.to_vec()));
    let mut future = pin!(cache.pin(SliceNo(slice), load, |_| ()));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result.unwrap()),
        Poll::Pending => None,
    }
}

#[test]
fn what_was_loaded_is_read_and_what_was_published_replaces_it() {
    let cache = Cache::new(4096, 32, 2).unwrap();
    assert_eq!(cache.entries(), 32);
    assert_eq!(cache.get(SliceNo(3), 1), None);
    let entries: Vec<Pair> = (0..32).map(|n| [2 * n, 2 * n + 1]).collect();
    let pinned = pin_now(&cache, 3, &entries).unwrap();
    assert_eq!(cache.get(SliceNo(3), 1), Some([2, 3]));
    pinned.publish(&[(1, [70, 71])]);
    assert_eq!(cache.get(SliceNo(3), 1), Some([70, 71]));
    assert_eq!(pinned.get(31), [62, 63]);
    assert_eq!(pinned.entries(0..3).collect::<Vec<_>>(), [[0, 1], [70, 71], [4, 5]]);
}

#[test]
fn pinned_slices_stay_and_the_oldest_of_the_others_goes() {
    let cache = Cache::new(0, 64, 1).unwrap();
    let words = |n: u64| slice_of(&cache, n);
    let first = pin_now(&cache, 0, &words(0)).unwrap();
    for n in 1..WAYS as u64 {
        pin_now(&cache, n, &words(n)).unwrap();
    }
    pin_now(&cache, 100, &words(100)).unwrap();
    assert_eq!(cache.get(SliceNo(0), 5).unwrap()[0], 0);
    assert_eq!(cache.get(SliceNo(1), 5), None, "the oldest that is not pinned");
    assert_eq!(cache.get(SliceNo(100), 5).unwrap()[0], 100);
    drop(first);
    let pins: Vec<_> =
        (200..200 + WAYS as u64).map(|n| pin_now(&cache, n, &words(n)).unwrap()).collect();
    assert!(pin_now(&cache, 300, &words(300)).is_none(), "all slots are pinned");
    drop(pins);
    assert!(pin_now(&cache, 300, &words(300)).is_some());
}

#[test]
fn what_was_not_examined_is_given_back_and_what_is_pinned_stays() {
    // Eight slots to a page, and one to a page.
    for bytes in [512, 4096] {
        let cache = Cache::new(64 * bytes, bytes as usize / 8, 1).unwrap();
        let words = slice_of(&cache, 7);
        let pinned = pin_now(&cache, 1, &words).unwrap();
        (2..64).for_each(|n| drop(pin_now(&cache, n, &words).unwrap()));
        cache.give_back_unused();
        assert!((1..64).all(|n| cache.get(SliceNo(n), 0).is_some()), "all were used");
        cache.give_back_unused();
        assert_eq!(cache.get(SliceNo(9), 3).unwrap()[0], 7);
        cache.give_back_unused();
        let there = |n| cache.get(SliceNo(n), 3).is_some();
        let all = cache.data.words().iter();
        let zeroes = all.filter(|word| word.load(Ordering::Relaxed) == 0).count();
        assert!(zeroes >= 48 * words.len(), "{zeroes} words");
        assert_eq!((1..64).filter(|&n| there(n)).collect::<Vec<_>>(), [1, 9]);
        assert_eq!(pinned.get(3)[0], 7);
        drop(pinned);
        assert!(pin_now(&cache, 20, &words).is_some() && there(20));
    }
}

#[test]
fn a_look_at_all_slices_sees_one_that_is_just_being_examined() {
    let cache = Cache::new(0, 64, 1).unwrap();
    let seen = || {
        let all = std::cell::RefCell::new(Vec::new());
        let mut future = pin!(cache.find_slice(|entries| {
            all.borrow_mut().push(entries[0][0]);
            None::<()>
        }));
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(future.as_mut().poll(&mut cx), Poll::Ready(None));
        all.take()
    };
    pin_now(&cache, 1, &slice_of(&cache, 1));
    let look = |entries: &[Pair]| {
        assert_eq!((entries, cache.get(SliceNo(2), 0)), (&slice_of(&cache, 2)[..], None));
        assert_eq!(seen(), [1, 2]);
    };
    let load = std::future::ready(Ok(slice_of(&cache, 2)));
    let mut future = pin!(cache.pin(SliceNo(2), load, look));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(matches!(future.as_mut().poll(&mut cx), Poll::Ready(Ok(_))));
    assert!(cache.get(SliceNo(2), 0).is_some());
}

#[test]
fn looking_at_all_slices_lets_others_have_their_turns_and_ends_with_what_it_finds() {
    let cache = Cache::new(64 << 13, 1 << 13, 1).unwrap();
    let words = |n: u64| slice_of(&cache, n);
    (0..8).for_each(|n| drop(pin_now(&cache, n, &words(n)).unwrap()));
    let looks = std::cell::Cell::new(0);
    let mut future = pin!(cache.find_slice(|entries| {
        looks.set(looks.get() + 1);
        (entries[0][0] == 5).then_some(5)
    }));
    let mut polls = 1;
    let mut cx = Context::from_waker(Waker::noop());
    let found = loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(found) => break found,
            Poll::Pending => polls += 1,
        }
    };
    assert_eq!((found, looks.get(), polls), (Some(5), 6, 6));
}

#[test]
fn a_slot_that_is_refilled_never_gives_an_entry_of_another_slice() {
    let cache = Cache::new(0, 32, 2).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..20_000u64 {
                let slice = round % 50;
                pin_now(&cache, slice, &slice_of(&cache, slice + 1));
                if round % 64 == 0 {
                    cache.give_back_unused();
                }
            }
            stop.store(true, Ordering::SeqCst);
        });
        while !stop.load(Ordering::SeqCst) {
            for slice in 0..50 {
                if let Some(words) = cache.get(SliceNo(slice), 7) {
                    assert_eq!(words, [slice + 1; 2]);
                }
            }
        }
    });
}
