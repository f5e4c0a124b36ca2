//! Epochs under shuttle: a queue on the fast path beside a change that waits until nothing relies on the old state.

use shuttle::future::block_on;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::{Runner, thread};
use std::sync::{Arc, Mutex, PoisonError};
use vublk_models::shuttled::epoch::{Announcer, Grace, synchronize};

const SCHEDULES: usize = 2000;

/// One model at a time: the epochs are statics, and belong to one scheduler.
static RUNNING: Mutex<()> = Mutex::new(());

/// Runs a model under schedules of two kinds, with fixed seeds.
fn explore(model: impl Fn() + Send + Sync + Copy + 'static) {
    let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let config = shuttle::Config::default;
    Runner::new(RandomScheduler::new_from_seed(1, SCHEDULES), config()).run(model);
    Runner::new(PctScheduler::new_from_seed(1, 3, SCHEDULES), config()).run(model);
}

/// What fast requests rely on, and what they leave behind.
#[derive(Default)]
struct Graph {
    is_paused: AtomicBool,
    /// Requests that are in flight.
    in_flight: AtomicU64,
    is_changed: AtomicBool,
}

/// Two turns of a queue, each with a request that ends after the turn.
fn serve(graph: &Graph, announcer: &Announcer) {
    for _ in 0..2 {
        let guard = announcer.enter();
        let mut begun = None;
        if !graph.is_paused.load(Ordering::SeqCst) {
            begun = Some(guard.begin());
            assert!(!graph.is_changed.load(Ordering::SeqCst), "the change did not wait");
            graph.in_flight.fetch_add(1, Ordering::SeqCst);
        }
        drop(guard);
        announcer.settle();
        if let Some(generation) = begun {
            assert!(!graph.is_changed.load(Ordering::SeqCst), "changed under a request");
            graph.in_flight.fetch_sub(1, Ordering::SeqCst);
            announcer.end(generation);
            announcer.settle();
        }
    }
}

#[test]
fn a_change_waits_for_every_request_that_began_before_it() {
    explore(|| {
        let graph = Arc::new(Graph::default());
        // SAFETY: the one change below knows the member before the first turn.
        let announcer = unsafe { Announcer::new() };
        let member = announcer.member().clone();
        let changer = {
            let graph = graph.clone();
            thread::spawn(move || {
                graph.is_paused.store(true, Ordering::SeqCst);
                block_on(synchronize(&[member]));
                assert_eq!(graph.in_flight.load(Ordering::SeqCst), 0);
                graph.is_changed.store(true, Ordering::SeqCst);
            })
        };
        serve(&graph, &announcer);
        changer.join().unwrap();
    });
}

#[test]
fn a_grace_that_has_passed_leaves_no_older_request() {
    explore(|| {
        let graph = Arc::new(Graph::default());
        // SAFETY: as above.
        let announcer = unsafe { Announcer::new() };
        let members = [announcer.member().clone()];
        let changer = {
            let graph = graph.clone();
            thread::spawn(move || {
                graph.is_paused.store(true, Ordering::SeqCst);
                let grace = Grace::begin();
                if grace.has_passed(&members) {
                    assert_eq!(graph.in_flight.load(Ordering::SeqCst), 0);
                    graph.is_changed.store(true, Ordering::SeqCst);
                }
            })
        };
        serve(&graph, &announcer);
        changer.join().unwrap();
    });
}

/// The model finds the fault that it is there for.
#[test]
#[should_panic(expected = "the change did not wait")]
fn a_change_that_does_not_wait_is_found() {
    explore(|| {
        let graph = Arc::new(Graph::default());
        // SAFETY: nothing waits for the member: that is the fault.
        let announcer = unsafe { Announcer::new() };
        let changer = {
            let graph = graph.clone();
            thread::spawn(move || {
                graph.is_paused.store(true, Ordering::SeqCst);
                graph.is_changed.store(true, Ordering::SeqCst);
            })
        };
        serve(&graph, &announcer);
        changer.join().unwrap();
    });
}
