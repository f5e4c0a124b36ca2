//! Workers without a thread of their own, which the thread that made them runs while it waits.
//!
//! They are for tests and fuzz targets that need one thread, no real sleep, and the same order of events each time.

use super::Local;
use super::sim::{Disorder, Reorder, SimRing};
use super::worker::{self, Io, Shared, Worker, WorkerOptions};
use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// The longest sleep of such a worker: the thread looks between two sleeps whether what it waits for is there.
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

thread_local! {
    /// The workers that this thread runs.
    static DRIVEN: RefCell<Vec<Rc<Driven>>> = const { RefCell::new(Vec::new()) };
}

struct Driven {
    io: Rc<Io>,
    reorder: Reorder,
    local: RefCell<Local>,
}

impl Driven {
    /// Does something as the worker.
    fn with<T>(&self, work: impl FnOnce(&mut Local) -> T) -> T {
        let before = worker::replace_current(Some(self.io.clone()));
        let result = work(&mut self.local.borrow_mut());
        worker::replace_current(before);
        result
    }
}

impl Worker {
    /// A worker that the calling thread runs. Work that blocks is done in place. The thread must be the only
    /// one that waits for it, and the one that drops it.
    pub fn driven(name: &str, ring: SimRing) -> std::io::Result<Worker> {
        let poll_max = Duration::ZERO;
        let shared = Shared::new(name, WorkerOptions { poll_max, cpu: None, may_block: true })?;
        let before = worker::replace_current(None);
        let reorder = ring.reorder();
        let mut local = Local::new(Box::new(ring), shared.clone());
        // It begins to watch its mail, so that the first run is like later ones.
        local.round();
        worker::replace_current(before);
        local.sleep_at_most(LONGEST_SLEEP);
        let driven = Driven { io: local.io().clone(), reorder, local: RefCell::new(local) };
        DRIVEN.with_borrow_mut(|all| all.push(Rc::new(driven)));
        Ok(Worker::without_thread(shared))
    }

    /// Runs a future to its end on a driven worker, as [`run_local`](super::run_local) does on a new one. Events
    /// come in an order that `disorder` decides.
    ///
    /// # Panics
    /// The calling thread does not run this worker.
    pub fn drive<T, F>(&self, disorder: Disorder, make: impl FnOnce(&mut Local) -> F) -> T
    where
        T: 'static,
        F: Future<Output = T> + 'static,
    {
        let driven = find(self.shared()).expect("a worker that this thread runs");
        let result = Rc::new(RefCell::new(None));
        let clone = result.clone();
        driven.with(|local| {
            driven.reorder.set(disorder);
            let future = make(local);
            local.io().spawn(async move {
                let value = future.await;
                *clone.borrow_mut() = Some(value);
            });
        });
        loop {
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            driven.with(Local::round);
        }
    }
}

fn find(shared: &Arc<Shared>) -> Option<Rc<Driven>> {
    let is_match = |driven: &&Rc<Driven>| Arc::ptr_eq(&driven.io.shared, shared);
    DRIVEN.with_borrow(|all| all.iter().find(is_match).cloned())
}

/// Gives each worker that this thread runs one round. False if there is none.
fn run_all() -> bool {
    let all = DRIVEN.with_borrow(Vec::clone);
    all.iter().for_each(|driven| {
        driven.with(Local::round);
    });
    !all.is_empty()
}

/// Runs a driven worker to its end, which has been asked for.
pub(super) fn end(shared: &Arc<Shared>) {
    let Some(driven) = find(shared) else { return };
    while driven.with(Local::round) {}
    DRIVEN.with_borrow_mut(|all| all.retain(|other| !Rc::ptr_eq(other, &driven)));
}

/// Waits for a message of a worker's, as [`Receiver::recv`].
pub fn receive<T>(from: &Receiver<T>) -> Result<T, RecvError> {
    loop {
        match from.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) if run_all() => {}
            Err(TryRecvError::Empty) => return from.recv(),
        }
    }
}

/// Waits for a message of a worker's for at most `time`, as [`Receiver::recv_timeout`].
pub fn receive_within<T>(from: &Receiver<T>, time: Duration) -> Result<T, RecvTimeoutError> {
    let began = Instant::now();
    loop {
        match from.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) if began.elapsed() >= time => {
                return Err(RecvTimeoutError::Timeout);
            }
            Err(TryRecvError::Empty) if run_all() => {}
            Err(TryRecvError::Empty) => return from.recv_timeout(time),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{current, offload, sleep};
    use super::*;
    use std::sync::mpsc;

    fn driven(name: &str) -> Worker {
        let ring = SimRing::new(Disorder::wild(1)).unwrap();
        Worker::driven(name, ring).unwrap()
    }

    #[test]
    fn a_thread_runs_its_workers_while_it_waits_for_one_of_them() {
        let (a, b) = (driven("a"), driven("b"));
        let here = std::thread::current().id();
        let on = a.block_on(|| async {
            sleep(Duration::from_secs(1_000)).await;
            offload(|| std::thread::current().id()).await
        });
        assert_eq!(on, here);
        let (sender, receiver) = mpsc::channel();
        b.send(move |_| sender.send(std::thread::current().id()).unwrap());
        assert_eq!(a.call(|_| 7), 7);
        assert_eq!(receiver.try_recv(), Ok(here), "the other one has had its turn");
    }

    #[test]
    fn a_driven_worker_begins_each_run_with_the_order_that_it_is_given() {
        let worker = driven("again");
        let run = |seed| {
            worker.drive(Disorder::wild(seed), |_| async {
                let before = current().now();
                for _ in 0..8 {
                    sleep(Duration::from_nanos(1)).await;
                }
                current().now() - before
            })
        };
        assert_eq!(run(1), run(1));
        assert!((2..10).any(|seed| run(seed) != run(1)));
    }

    #[test]
    fn a_driven_worker_ends_with_its_handle() {
        let worker = driven("ends");
        let (sender, receiver) = mpsc::channel();
        worker.send(move |local| {
            local.io().spawn(async move {
                sleep(Duration::from_secs(1)).await;
                sender.send(()).unwrap();
            });
        });
        drop(worker);
        assert_eq!(receiver.try_recv(), Ok(()), "its tasks end first");
        assert!(!run_all());
    }
}
