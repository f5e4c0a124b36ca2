//! Work that really blocks (ioctl, lseek for holes, open) on a few threads of its own, so that it
//! never stops a worker, unless the worker may be stopped.

use super::may_block;
use super::pool::Pool;
use super::sync::Mutex;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Threads at most, for the whole process.
const THREADS: usize = 16;
static POOL: Pool<Box<dyn FnOnce() + Send>> = Pool::new("offload", THREADS);

struct Slot<T> {
    result: Option<T>,
    waker: Option<Waker>,
}

/// The result of [`offload`]. The work goes on to its end even if nobody waits for it.
struct Offloaded<T>(Arc<Mutex<Slot<T>>>);

impl<T> Future for Offloaded<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut slot = self.0.lock();
        match slot.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Runs `work` on a thread that may block: this one, if it may.
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if may_block() {
        return work();
    }
    let slot = Arc::new(Mutex::new(Slot { result: None, waker: None }));
    let theirs = slot.clone();
    let job: Box<dyn FnOnce() + Send> = Box::new(move || {
        let result = work();
        let mut slot = theirs.lock();
        slot.result = Some(result);
        let waker = slot.waker.take();
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    });
    POOL.submit([job]);
    Offloaded(slot).await
}
