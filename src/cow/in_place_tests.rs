//! Tests of [`super`] under every interleaving that a scheduler tries.
//!
//! Fast writes, as an image does them, run beside changes that withdraw a permission. Each fault of the order is
//! shown to be found.

use super::*;
use crate::io::epoch::Announcer;
use shuttle::scheduler::RandomScheduler;
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, AtomicU64};
use shuttle::thread;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

const SCHEDULES: usize = 1000;

/// An image of one cluster, and the queues that may be on the fast path to it.
#[derive(Default)]
struct Model {
    are_writes_stopped: AtomicBool,
    is_at_rest: AtomicBool,
    has_bad_entry: AtomicBool,
    /// The entry: the cluster is shared.
    is_shared: AtomicBool,
    /// The entry: it leads to metadata.
    is_bad: AtomicBool,
    /// What was written to the cluster: the number of writes.
    written: AtomicU64,
    /// What was written when nothing may be written any more.
    kept: AtomicU64,
    members: Mutex<Vec<Arc<Member>>>,
}

impl Model {
    fn are_writes_stopped(&self) -> bool {
        self.are_writes_stopped.load(Ordering::SeqCst)
    }

    fn is_at_rest(&self) -> bool {
        self.is_at_rest.load(Ordering::SeqCst)
    }

    fn has_bad_entry(&self) -> bool {
        self.has_bad_entry.load(Ordering::SeqCst)
    }
}

/// How a write looks: at the entry, and whether it may follow that.
type Look = fn(&Model) -> ((bool, bool), bool);

fn entry(model: &Model) -> (bool, bool) {
    (model.is_shared.load(Ordering::SeqCst), model.is_bad.load(Ordering::SeqCst))
}

/// As the image does it.
fn in_order(model: &Model) -> ((bool, bool), bool) {
    look_between(
        || !model.are_writes_stopped() && !model.is_at_rest(),
        || entry(model),
        || !model.has_bad_entry(),
    )
}

/// The other way round.
fn turned_round(model: &Model) -> ((bool, bool), bool) {
    look_between(
        || !model.has_bad_entry(),
        || entry(model),
        || !model.are_writes_stopped() && !model.is_at_rest(),
    )
}

impl Model {
    fn members(&self) -> Vec<Arc<Member>> {
        self.members.lock().unwrap().clone()
    }

    /// A queue with two fast writes, whose I/O goes on when its turn has ended.
    fn write_twice(&self, look: Look) {
        let announcer = Announcer::default();
        self.members.lock().unwrap().push(announcer.member().clone());
        for _ in 0..2 {
            let guard = announcer.enter();
            let ((is_shared, is_bad), is_allowed) = look(self);
            if is_allowed && !is_shared {
                assert!(!is_bad, "a write has followed an entry that leads to metadata");
                let generation = guard.begin();
                drop(guard);
                self.written.fetch_add(1, Ordering::SeqCst);
                announcer.end(generation);
                announcer.settle();
            }
        }
    }
}

/// Waits as a task does, but for the waker, which other tests of this process would call.
fn wait_for(future: impl Future<Output = ()>) {
    let mut future = pin!(future);
    while future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
        thread::yield_now();
    }
}

/// Whether all goes well in all schedules: two queues write while `change` is made, after which nothing
/// is written that was not kept.
fn holds(look: Look, change: fn(&Model)) -> bool {
    let run = move || {
        let model = Arc::new(Model::default());
        let writers: Vec<_> = (0..2)
            .map(|_| {
                let model = model.clone();
                thread::spawn(move || model.write_twice(look))
            })
            .collect();
        change(&model);
        for writer in writers {
            writer.join().unwrap();
        }
        let (written, kept) =
            (model.written.load(Ordering::SeqCst), model.kept.load(Ordering::SeqCst));
        assert!(written == kept || kept == NOTHING, "{written} writes, {kept} of them kept");
    };
    let mut config = shuttle::Config::default();
    // Wakers of other tests may be called on them.
    config.stack_size = 1 << 20;
    let runner = shuttle::Runner::new(RandomScheduler::new_from_seed(1, SCHEDULES), config);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runner.run(run))).is_ok()
}

/// The change keeps nothing of what is written.
const NOTHING: u64 = u64::MAX;

/// What a snapshot does to the entry of a cluster that it takes.
fn share(model: &Model) {
    model.kept.store(model.written.load(Ordering::SeqCst), Ordering::SeqCst);
    model.is_shared.store(true, Ordering::SeqCst);
}

fn make_snapshot(model: &Model) {
    wait_for(withdraw(
        || model.are_writes_stopped.store(true, Ordering::SeqCst),
        || model.members(),
    ));
    share(model);
    model.are_writes_stopped.store(false, Ordering::SeqCst);
}

fn make_snapshot_without_waiting(model: &Model) {
    model.are_writes_stopped.store(true, Ordering::SeqCst);
    share(model);
    model.are_writes_stopped.store(false, Ordering::SeqCst);
}

/// The queues that are asked are those of before.
fn make_snapshot_of_known_queues(model: &Model) {
    let members = model.members();
    wait_for(withdraw(|| model.are_writes_stopped.store(true, Ordering::SeqCst), || members));
    share(model);
    model.are_writes_stopped.store(false, Ordering::SeqCst);
}

/// What is stored, such as bitmaps, tells of all that was written.
fn bring_to_rest(model: &Model) {
    wait_for(withdraw(|| model.is_at_rest.store(true, Ordering::SeqCst), || model.members()));
    model.kept.store(model.written.load(Ordering::SeqCst), Ordering::SeqCst);
}

fn bring_to_rest_before_it_is_said(model: &Model) {
    wait_for(epoch::synchronize(&model.members()));
    model.kept.store(model.written.load(Ordering::SeqCst), Ordering::SeqCst);
    model.is_at_rest.store(true, Ordering::SeqCst);
}

fn meet_bad_entry(model: &Model) {
    model.kept.store(NOTHING, Ordering::SeqCst);
    model.has_bad_entry.store(true, Ordering::SeqCst);
    model.is_bad.store(true, Ordering::SeqCst);
}

fn meet_bad_entry_too_late(model: &Model) {
    model.kept.store(NOTHING, Ordering::SeqCst);
    model.is_bad.store(true, Ordering::SeqCst);
    model.has_bad_entry.store(true, Ordering::SeqCst);
}

#[test]
fn no_fast_write_goes_into_a_snapshot_that_is_made_beside_it() {
    assert!(holds(in_order, make_snapshot));
    assert!(!holds(turned_round, make_snapshot), "the fault is not found");
    assert!(!holds(in_order, make_snapshot_without_waiting), "the fault is not found");
    assert!(!holds(in_order, make_snapshot_of_known_queues), "the fault is not found");
}

#[test]
fn what_is_stored_when_an_image_comes_to_rest_reports_all_fast_writes() {
    assert!(holds(in_order, bring_to_rest));
    assert!(!holds(in_order, bring_to_rest_before_it_is_said), "the fault is not found");
}

#[test]
fn no_fast_write_follows_an_entry_that_leads_to_metadata() {
    assert!(holds(in_order, meet_bad_entry));
    assert!(!holds(turned_round, meet_bad_entry), "the fault is not found");
    assert!(!holds(in_order, meet_bad_entry_too_late), "the fault is not found");
}
