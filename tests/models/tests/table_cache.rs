//! The cache of mapping tables under loom: lock-free readers beside loads, changes and evictions.

use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use vublk_models::cow::table_cache::{SliceNo, TableCache};
use vublk_models::fixture::{Pair, explore};

/// One set of slots, one entry of two words to a slice.
fn cache() -> Arc<TableCache<Pair>> {
    Arc::new(TableCache::new(0, 1, 2).unwrap())
}

async fn load(cache: &TableCache<Pair>, slice: u64) {
    let word = slice + 10;
    let entries = vec![Pair(word, word)];
    drop(cache.pin(SliceNo(slice), std::future::ready(Ok(entries)), |_| ()).await.unwrap());
}

#[test]
fn a_slot_that_is_refilled_gives_no_entry_of_another_slice() {
    explore(2, || {
        let cache = cache();
        block_on(load(&cache, 0));
        let changer = {
            let cache = cache.clone();
            thread::spawn(move || {
                cache.forget(|_| true);
                block_on(load(&cache, 1));
            })
        };
        for slice in [1, 0] {
            let word = slice + 10;
            let found = cache.get(SliceNo(slice), 0);
            assert!(found.is_none_or(|entry| entry == Pair(word, word)), "{slice}: {found:?}");
        }
        changer.join().unwrap();
    });
}

#[test]
fn both_words_of_an_entry_are_of_one_moment() {
    explore(2, || {
        let cache = cache();
        block_on(load(&cache, 0));
        let changer = {
            let cache = cache.clone();
            thread::spawn(move || {
                let load = std::future::ready(Ok(Vec::new()));
                let pinned = block_on(cache.pin(SliceNo(0), load, |_| ())).unwrap();
                pinned.publish(&[(0, Pair(20, 20))]);
            })
        };
        let (first, second) = (cache.get(SliceNo(0), 0), cache.get(SliceNo(0), 0));
        for Pair(one, other) in first.into_iter().chain(second) {
            assert_eq!(one, other);
        }
        if let (Some(first), Some(second)) = (first, second) {
            assert!(first.0 <= second.0, "{first:?} after {second:?}");
        }
        changer.join().unwrap();
    });
}

#[test]
fn memory_that_is_given_back_is_not_taken_for_entries() {
    explore(2, || {
        let cache = cache();
        block_on(load(&cache, 0));
        // The slice counts as used until the first call.
        cache.give_back_unused();
        let changer = {
            let cache = cache.clone();
            thread::spawn(move || cache.give_back_unused())
        };
        let found = cache.get(SliceNo(0), 0);
        assert!(found.is_none_or(|entry| entry == Pair(10, 10)), "{found:?}");
        changer.join().unwrap();
    });
}

#[test]
fn a_slice_is_loaded_once_however_many_tasks_want_it() {
    explore(2, || {
        let cache = cache();
        let loads = Arc::new(AtomicUsize::new(0));
        let want = {
            let (cache, loads) = (cache.clone(), loads.clone());
            move || {
                let load = async {
                    loads.fetch_add(1, Ordering::Relaxed);
                    Ok(vec![Pair(10, 10)])
                };
                let pinned = block_on(cache.pin(SliceNo(0), load, |_| ())).unwrap();
                assert_eq!(pinned.get(0), Pair(10, 10));
            }
        };
        let other = thread::spawn(want.clone());
        want();
        other.join().unwrap();
        assert_eq!(loads.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_look_at_all_slices_misses_none_whose_examination_missed_what_was_published() {
    explore(2, || {
        let cache = cache();
        let published = Arc::new(AtomicBool::new(false));
        let loader = {
            let (cache, published) = (cache.clone(), published.clone());
            thread::spawn(move || {
                let mut was_published = false;
                let look = |_: &[Pair]| was_published = published.load(Ordering::SeqCst);
                let load = std::future::ready(Ok(vec![Pair(10, 10)]));
                drop(block_on(cache.pin(SliceNo(0), load, look)).unwrap());
                was_published
            })
        };
        published.store(true, Ordering::SeqCst);
        let found =
            block_on(cache.find_slice(|entries| (entries[0] == Pair(10, 10)).then_some(())));
        let was_published = loader.join().unwrap();
        assert!(found.is_some() || was_published);
    });
}
