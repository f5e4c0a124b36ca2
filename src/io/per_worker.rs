//! State that each worker has for itself: a driver's connections, queue pairs or caches.
//!
//! A driver declares a [`PerWorker`]. Each worker that serves the driver makes its own state when it first
//! needs it, and finds it again by an index: without a hash, a lock or a write to shared memory.
//!
//! The rule it guards: state is made, used, told of its end and dropped on one thread, that of its worker.
//! So it needs no locks, need not be [`Send`], and may own sources and operations of the worker.

use super::sync::{Mutex, Waiters};
use super::worker::{self, Io, Shared};
use super::{Errno, IoResult, current, in_time};
use std::any::Any;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// What one worker has.
pub trait WorkerState: Any {
    /// The slot is closed, or the worker ends: the state is not found any more, and no request will come.
    /// Ends what it still does. The worker drops the state when the future is done.
    fn leave(self: Rc<Self>) -> Pin<Box<dyn Future<Output = ()>>>;
}

/// A slot that each worker fills for itself. Dropping it closes it, without waiting for the workers.
pub struct PerWorker<T> {
    declared: Arc<Declared>,
    state: PhantomData<fn() -> T>,
}

/// The slot's place on all workers. It is taken as long as any worker has a state there.
struct Declared {
    index: usize,
    holders: Mutex<Holders>,
}

/// Workers that have a state, make one, or let theirs go.
#[derive(Default)]
struct Holders {
    workers: Vec<Arc<Shared>>,
    closed: bool,
    /// The tasks that wait until there are none.
    waiting: Waiters,
}

/// The lowest index that was never used, and those that were given back.
static INDEXES: Mutex<(usize, Vec<usize>)> = Mutex::new((0, Vec::new()));

/// The states of one worker, by index.
#[derive(Default)]
pub(super) struct States(RefCell<Vec<State>>);

#[derive(Default)]
enum State {
    #[default]
    None,
    /// A task makes it; others wait for that.
    Making(Waiters),
    Made(Rc<dyn WorkerState>, Arc<Declared>),
    /// It has been told to leave.
    Leaving,
}

impl<T: WorkerState> Default for PerWorker<T> {
    fn default() -> PerWorker<T> {
        let mut indexes = INDEXES.lock();
        let index = indexes.1.pop().unwrap_or_else(|| {
            indexes.0 += 1;
            indexes.0 - 1
        });
        let declared = Declared { index, holders: Mutex::default() };
        PerWorker { declared: Arc::new(declared), state: PhantomData }
    }
}

impl Drop for Declared {
    fn drop(&mut self) {
        INDEXES.lock().1.push(self.index);
    }
}

impl<T: WorkerState> PerWorker<T> {
    /// The state of the worker that this thread is, if it has one.
    #[inline]
    pub fn get(&self, io: &Io) -> Option<Rc<T>> {
        match io.states.0.borrow().get(self.declared.index)? {
            State::Made(state, _) => (state.clone() as Rc<dyn Any>).downcast().ok(),
            _ => None,
        }
    }

    /// Whether the worker that this thread is has one.
    #[inline]
    pub fn is_here(&self) -> bool {
        worker::with_current(|io| {
            let states = io.states.0.borrow();
            matches!(states.get(self.declared.index), Some(State::Made(..)))
        })
    }

    /// The state of the worker that this thread is, made by `make` if it has none. One task makes it, and
    /// others wait for that; if it fails, the next one tries.
    ///
    /// # Errors
    /// ENODEV: the slot is closed. Otherwise those of `make`.
    pub async fn get_or_make(
        &self,
        make: impl AsyncFnOnce(&Rc<Io>) -> IoResult<Rc<T>>,
    ) -> IoResult<Rc<T>> {
        let io = current();
        loop {
            if let Some(state) = self.get(&io) {
                return Ok(state);
            }
            if self.is_closed() {
                return Err(Errno(libc::ENODEV));
            }
            if io.states.begin(self.declared.index).await? {
                break;
            }
        }
        let making = Making { io: &io, declared: &self.declared };
        if !self.declared.join(&io.shared) {
            return Err(Errno(libc::ENODEV));
        }
        let state = make(&io).await?;
        // From here on it leaves as any other.
        std::mem::forget(making);
        let made = State::Made(state.clone(), self.declared.clone());
        io.states.replace(self.declared.index, made);
        if self.is_closed() {
            // Its worker was notified before there was anything to leave.
            io.tell_to_leave(self.declared.index);
            return Err(Errno(libc::ENODEV));
        }
        Ok(state)
    }

    /// Whether it is closed, or about to be.
    pub fn is_closed(&self) -> bool {
        self.declared.holders.lock().closed
    }

    /// Waits until all workers have released their states, at most for `time`. False if some have not. For slots that
    /// are closed.
    pub async fn left_within(&self, time: Duration) -> bool {
        let left = self.declared.holders.wait_for(|holders| match holders.workers.is_empty() {
            true => Ok(()),
            false => Err(&mut holders.waiting),
        });
        in_time(time, left).await.is_some()
    }
}

impl<T> PerWorker<T> {
    /// Tells all workers to release their states; none makes one from now on.
    pub fn close(&self) {
        let mut holders = self.declared.holders.lock();
        if std::mem::replace(&mut holders.closed, true) {
            return;
        }
        let workers = holders.workers.clone();
        drop(holders);
        let index = self.declared.index;
        for worker in workers {
            // The index stays taken until the worker has processed the message.
            let declared = self.declared.clone();
            worker.run(move |local| {
                local.io().tell_to_leave(index);
                drop(declared);
            });
        }
    }
}

impl<T> Drop for PerWorker<T> {
    fn drop(&mut self) {
        self.close();
    }
}

impl Declared {
    /// A worker is going to have a state. False if the slot is closed.
    fn join(&self, worker: &Arc<Shared>) -> bool {
        let mut holders = self.holders.lock();
        let may = !holders.closed;
        if may {
            holders.workers.push(worker.clone());
        }
        may
    }

    /// A worker has none any more.
    fn leave(&self, worker: &Arc<Shared>) {
        let mut holders = self.holders.lock();
        holders.workers.retain(|other| !Arc::ptr_eq(other, worker));
        let waiting = match holders.workers.is_empty() {
            true => holders.waiting.take(),
            false => Waiters::new(),
        };
        drop(holders);
        waiting.wake();
    }
}

/// A state is being made. Dropped before it has been: the next task may try.
struct Making<'a> {
    io: &'a Rc<Io>,
    declared: &'a Declared,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.io.states.replace(self.declared.index, State::None);
        self.declared.leave(&self.io.shared);
    }
}

impl States {
    /// True if the caller is to make the state of this index. False, after a while, if it is to look again.
    ///
    /// # Errors
    /// The worker ends, or the slot is closed.
    async fn begin(&self, index: usize) -> IoResult<bool> {
        let mut has_waited = false;
        poll_fn(|cx| {
            let mut states = self.0.borrow_mut();
            if states.len() <= index {
                states.resize_with(index + 1, State::default);
            }
            match &mut states[index] {
                _ if has_waited => Poll::Ready(Ok(false)),
                state @ State::None => {
                    *state = State::Making(Waiters::new());
                    Poll::Ready(Ok(true))
                }
                State::Making(waiting) => {
                    has_waited = true;
                    waiting.add(cx);
                    Poll::Pending
                }
                State::Made(..) => Poll::Ready(Ok(false)),
                State::Leaving => Poll::Ready(Err(Errno(libc::ENODEV))),
            }
        })
        .await
    }

    fn replace(&self, index: usize, new: State) {
        let old = std::mem::replace(&mut self.0.borrow_mut()[index], new);
        if let State::Making(waiting) = old {
            waiting.wake();
        }
    }
}

impl Io {
    /// Makes a state leave, if there is one.
    fn tell_to_leave(self: &Rc<Io>, index: usize) {
        let mut states = self.states.0.borrow_mut();
        let Some(state @ State::Made(..)) = states.get_mut(index) else { return };
        let State::Made(state, declared) = std::mem::replace(state, State::Leaving) else { return };
        drop(states);
        let io = self.clone();
        self.spawn(async move {
            state.leave().await;
            io.states.replace(index, State::None);
            declared.leave(&io.shared);
        });
    }

    /// Makes all states leave, because the worker ends. True as long as any is left.
    pub(super) fn leave_all(self: &Rc<Io>) -> bool {
        let count = self.states.0.borrow().len();
        (0..count).for_each(|index| self.tell_to_leave(index));
        self.states.0.borrow().iter().any(|state| !matches!(state, State::None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::{Disorder, SimRing};
    use crate::io::{Worker, WorkerOptions, run_on, sleep};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{self, ThreadId};

    /// What has happened to states, in order.
    type Report = Arc<Mutex<Vec<(&'static str, ThreadId)>>>;

    struct Counted {
        number: usize,
        reported: Report,
    }

    impl Counted {
        fn record(&self, what: &'static str) {
            self.reported.lock().push((what, thread::current().id()));
        }
    }

    impl WorkerState for Counted {
        fn leave(self: Rc<Self>) -> Pin<Box<dyn Future<Output = ()>>> {
            self.record("told");
            Box::pin(async move {
                sleep(Duration::from_millis(1)).await;
                self.record("left");
            })
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.record("dropped");
        }
    }

    static NUMBERS: AtomicUsize = AtomicUsize::new(0);

    /// The state of this worker, which takes a while to make.
    async fn find(slot: &PerWorker<Counted>, reported: &Report) -> IoResult<usize> {
        let state = slot.get_or_make(async |_| {
            sleep(Duration::from_millis(1)).await;
            let number = NUMBERS.fetch_add(1, Ordering::SeqCst);
            Ok(Rc::new(Counted { number, reported: reported.clone() }))
        });
        Ok(state.await?.number)
    }

    fn worker() -> Worker {
        Worker::start("states", WorkerOptions::default()).unwrap()
    }

    #[test]
    fn each_worker_has_its_own_which_hears_of_the_close_and_goes_where_it_was_made() {
        let slot = Arc::new(PerWorker::<Counted>::default());
        let reported = Report::default();
        let workers = [worker(), worker()];
        let find_on = |worker: &Worker| {
            let (slot, reported) = (slot.clone(), reported.clone());
            worker.block_on(move || async move { find(&slot, &reported).await })
        };
        let threads = workers.each_ref().map(|worker| worker.call(|_| thread::current().id()));
        let numbers = workers.each_ref().map(|worker| find_on(worker).unwrap());
        assert_ne!(numbers[0], numbers[1]);
        assert_eq!(workers.each_ref().map(|worker| find_on(worker).unwrap()), numbers);
        let closed = slot.clone();
        workers[0].block_on(move || async move {
            closed.close();
            assert!(closed.left_within(Duration::from_secs(60)).await);
        });
        for id in threads {
            let all = reported.lock();
            let its: Vec<_> =
                all.iter().filter(|(_, at)| *at == id).map(|(what, _)| *what).collect();
            assert_eq!(its, ["told", "left", "dropped"]);
        }
        assert_eq!(find_on(&workers[1]), Err(Errno(libc::ENODEV)), "it is closed for good");
    }

    #[test]
    fn a_worker_that_ends_lets_go_of_its_state_and_others_keep_theirs() {
        let slot = Arc::new(PerWorker::<Counted>::default());
        let reported = Report::default();
        let (first, second) = (worker(), worker());
        for worker in [&first, &second] {
            let (slot, reported) = (slot.clone(), reported.clone());
            worker.block_on(move || async move { find(&slot, &reported).await }).unwrap();
        }
        let id = first.call(|_| thread::current().id());
        drop(first);
        assert_eq!(*reported.lock(), [("told", id), ("left", id), ("dropped", id)]);
        assert_eq!(slot.declared.holders.lock().workers.len(), 1);
    }

    #[test]
    fn tasks_that_come_together_have_one_made_and_one_that_fails_lets_the_next_try() {
        run_on(Box::new(SimRing::new(Disorder::wild(1)).unwrap()), async {
            let slot = Rc::new(PerWorker::<Counted>::default());
            let reported = Report::default();
            let results: Rc<RefCell<Vec<IoResult<usize>>>> = Rc::default();
            for n in 0..4 {
                let (slot, reported, results) = (slot.clone(), reported.clone(), results.clone());
                current().spawn(async move {
                    let result = match n {
                        0 => {
                            let failing = slot.get_or_make(async |_| {
                                sleep(Duration::from_millis(1)).await;
                                Err(Errno::EIO)
                            });
                            failing.await.map(|state| state.number)
                        }
                        _ => find(&slot, &reported).await,
                    };
                    results.borrow_mut().push(result);
                });
            }
            while results.borrow().len() < 4 {
                sleep(Duration::from_millis(1)).await;
            }
            let results = results.take();
            assert_eq!(results[0], Err(Errno::EIO));
            assert!(results[1].is_ok() && results[1..].iter().all(|result| *result == results[1]));
        });
    }

    #[test]
    fn a_slot_that_closes_while_a_state_is_made_has_it_leave() {
        run_on(Box::new(SimRing::new(Disorder::wild(2)).unwrap()), async {
            let (slot, reported) = (Rc::new(PerWorker::<Counted>::default()), Report::default());
            let clone = slot.clone();
            let made = slot.get_or_make(async |_| {
                clone.close();
                sleep(Duration::from_millis(1)).await;
                Ok(Rc::new(Counted { number: 0, reported: reported.clone() }))
            });
            assert_eq!(made.await.map(|_| ()), Err(Errno(libc::ENODEV)));
            assert!(slot.left_within(Duration::from_secs(60)).await);
            let all: Vec<_> = reported.lock().iter().map(|(what, _)| *what).collect();
            assert_eq!(all, ["told", "left", "dropped"]);
        });
    }

    #[test]
    fn a_slot_finds_nothing_that_was_another_ones() {
        run_on(Box::new(SimRing::new(Disorder::wild(3)).unwrap()), async {
            let reported = Report::default();
            for _ in 0..8 {
                let slots: Vec<_> = (0..3).map(|_| PerWorker::<Counted>::default()).collect();
                for slot in &slots {
                    assert!(!slot.is_here() && slot.get(&current()).is_none());
                }
                let number = find(&slots[1], &reported).await.unwrap();
                assert_eq!(slots[1].get(&current()).unwrap().number, number);
                assert!(!slots[0].is_here() && !slots[2].is_here());
            }
        });
    }
}
