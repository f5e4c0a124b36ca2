//! Work that really blocks (ioctl, lseek for holes, open) or takes long (decompression) on threads of
//! its own, so that it never stops a worker, unless the worker may be stopped.

use super::may_block;
use super::pool::{Job, Limits, Pool};
use super::sync::{Mutex, Waiters};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

static POOL: Pool<Call> = Pool::new("offload", Limits { each: 16, all: 64 });

/// The blocking work of one disk, or of whatever else should not be held up by its neighbours. No
/// more than 16 of its calls run at a time; the others wait for these, and for nobody else's. Clones are the
/// same disk's.
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
    /// Runs `work` on a thread that may block: this one, if it may. It goes on to its end even if nobody waits
    /// for it.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        if may_block() {
            return work();
        }
        let slot = Arc::new(Mutex::new((None, Waiters::new())));
        let theirs = slot.clone();
        let work = Box::new(move || {
            let result = work();
            let waiting = {
                let mut slot = theirs.lock();
                slot.0 = Some(result);
                slot.1.take()
            };
            waiting.wake();
        });
        POOL.submit([Call { owner: self.0, work }]);
        slot.wait_for(|(result, waiting)| result.take().ok_or(waiting)).await
    }
}

/// Runs one piece of work that is no disk's on a thread that may block: this one, if it may. It waits
/// for nothing else; what guests can ask for any number of times goes through [`Blocking`].
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    Blocking::default().run(work).await
}
