//! Blocking or long work on threads of its own, so that it never stops a worker.
//!
//! Examples are ioctl, lseek for holes, open, and decompression. Workers that may block run it themselves.

use super::may_block;
use super::pool::{Job, Limits, Pool};
use super::sync::{Mutex, Waiters};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// For calls that wait, and for work that computes. A storage that stalls keeps threads of the first kind as long as it
/// likes; what computes always comes to an end, and must not stand behind that.
static CALLS: Pool<Call> = Pool::new("offload", Limits { each: 16, all: 64 });
static WORK: Pool<Call> = Pool::new("compute", Limits { each: 16, all: 64 });

/// The blocking work of one disk, or of something else that its neighbours must not hold up. Of its calls 16 run at
/// a time, and as many of its pieces of work that compute; the others wait for these, and for nobody else's.
/// Clones are the same disk's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocking(u64);

/// Work that has an owner.
struct Call {
    owner: u64,
    work: Box<dyn FnOnce() + Send>,
}

impl Job for Call {
    fn owner(&self) -> u64 {
        self.owner
    }

    fn run(self) {
        (self.work)();
    }
}

impl Default for Blocking {
    fn default() -> Blocking {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Blocking(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Blocking {
    /// Runs a call that may wait for the storage on a thread that may block: this one, if it may. It continues to its
    /// end even if nobody waits for it.
    pub async fn run<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> T {
        self.run_in(&CALLS, call).await
    }

    /// As [`Blocking::run`], for work that takes long and waits for nothing: decompression, ciphers.
    pub async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.run_in(&WORK, work).await
    }

    async fn run_in<T: Send + 'static>(
        &self,
        pool: &'static Pool<Call>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if may_block() {
            return work();
        }
        let slot = Arc::new(Mutex::new((None, Waiters::new())));
        let clone = slot.clone();
        let work = Box::new(move || {
            let result = work();
            let waiting = {
                let mut slot = clone.lock();
                slot.0 = Some(result);
                slot.1.take()
            };
            waiting.wake();
        });
        pool.submit([Call { owner: self.0, work }]);
        slot.wait_for(|(result, waiting)| result.take().ok_or(waiting)).await
    }
}

/// Runs one piece of work that is no disk's on a thread that may block: this one, if it may. It waits
/// for nothing else; what guests can ask for any number of times goes through [`Blocking`].
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    Blocking::default().run(work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::task::yield_now;
    use crate::io::{Worker, WorkerOptions, current};
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::mpsc::channel;

    #[test]
    fn what_a_disk_computes_does_not_wait_for_its_calls() {
        let worker = Worker::start("offload", WorkerOptions::default()).unwrap();
        worker.block_on(|| async {
            let disk = Blocking::default();
            let (stalled, storage) = channel::<()>();
            let (storage, ended) = (Arc::new(Mutex::new(storage)), Rc::new(Cell::new(0)));
            // More than its share: the last ones wait for a thread.
            for _ in 0..20 {
                let (disk, storage, ended) = (disk.clone(), storage.clone(), ended.clone());
                current().spawn(async move {
                    disk.run(move || storage.lock().recv().is_ok()).await;
                    ended.set(ended.get() + 1);
                });
            }
            yield_now().await;
            assert_eq!(disk.compute(|| 7).await, 7);
            assert_eq!(ended.get(), 0, "all calls are still waited for");
            drop(stalled);
            while ended.get() < 20 {
                yield_now().await;
            }
        });
    }
}
