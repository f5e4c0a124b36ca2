//! Ranges, visits and records under loom.

use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use vublk_models::cow::ranges::Ranges;
use vublk_models::cow::record::{
    Left, RECORD, clear_record, mark_record, read_records, write_record,
};
use vublk_models::cow::visits::Visits;
use vublk_models::fixture::{Pair, explore};

/// What a range guards: loom reports two threads that are in it at once.
#[derive(Default)]
struct Guarded {
    ranges: Ranges,
    changes: UnsafeCell<u32>,
}

// SAFETY: the cell is used under a range that all users lock; loom fails the test where that does not hold.
unsafe impl Sync for Guarded {}

#[test]
fn tasks_with_overlapping_ranges_exclude_each_other_and_none_is_forgotten() {
    explore(3, || {
        let guarded = Arc::new(Guarded::default());
        let tasks = [0..2, 1..3].map(|range| {
            let guarded = guarded.clone();
            thread::spawn(move || {
                let _range = block_on(guarded.ranges.lock(range));
                // SAFETY: as above.
                guarded.changes.with_mut(|changes| unsafe { *changes += 1 });
            })
        });
        let range = block_on(guarded.ranges.lock(1..2));
        // SAFETY: as above.
        guarded.changes.with_mut(|changes| unsafe { *changes += 1 });
        drop(range);
        tasks.into_iter().for_each(|task| task.join().unwrap());
        // SAFETY: the others have ended.
        guarded.changes.with(|changes| assert_eq!(unsafe { *changes }, 3));
    });
}

#[test]
fn a_cluster_is_reused_after_the_visits_that_may_have_looked_it_up() {
    explore(3, || {
        let visits = Arc::new(Visits::default());
        let (is_named, is_reused) =
            (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let visitor = {
            let (visits, is_named, is_reused) =
                (visits.clone(), is_named.clone(), is_reused.clone());
            thread::spawn(move || {
                let _visit = visits.enter();
                if is_named.load(Ordering::Acquire) {
                    assert!(!is_reused.load(Ordering::Acquire), "the cluster has another owner");
                }
            })
        };
        is_named.store(false, Ordering::Release);
        block_on(visits.older());
        is_reused.store(true, Ordering::Release);
        visitor.join().unwrap();
    });
}

#[test]
fn a_record_is_whole_or_absent_at_every_moment() {
    let made = |n: u64| (n, Pair(10 * n, 10 * n + 1), Pair(10 * n + 2, 10 * n + 3));
    explore(3, move || {
        let words: Arc<[AtomicU64; RECORD]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let writer = {
            let words = words.clone();
            thread::spawn(move || {
                for n in [1, 2] {
                    let (cluster, old, new) = made(n);
                    write_record(&words[..], 0, cluster, old, new);
                    mark_record(&words[..], 0);
                    clear_record(&words[..], 0);
                }
            })
        };
        // A record that is there before and after is what a kill in between would have left.
        let before = words[0].load(Ordering::Acquire);
        let left: Vec<Left<Pair>> = read_records(&words[..]);
        let is_unchanged = before != 0 && words[0].load(Ordering::Acquire) == before;
        for Left { cluster, old, new, .. } in left.into_iter().filter(|_| is_unchanged) {
            assert_eq!((cluster, old, new), made(cluster));
        }
        writer.join().unwrap();
        assert!(read_records::<Pair>(&words[..]).is_empty());
    });
}
