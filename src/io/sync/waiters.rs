//! The list of tasks that wait for something behind a mutex to change.

use super::Mutex;
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

impl<T> Mutex<T> {
    /// Waits until `look` gives a result. Until then `look` names the list in which to wait for the next change; the
    /// task that makes the change takes that list, and wakes it after it has released the lock.
    pub async fn wait_for<R>(&self, mut look: impl FnMut(&mut T) -> Result<R, &mut Waiters>) -> R {
        poll_fn(|cx| match look(&mut self.lock()) {
            Ok(result) => Poll::Ready(result),
            Err(waiters) => {
                waiters.add(cx);
                Poll::Pending
            }
        })
        .await
    }
}

/// Tasks that wait for something behind a [`Mutex`] to change. The list is behind the mutex too; where what changes
/// is elsewhere, the list is all that the mutex guards.
#[derive(Debug, Default)]
#[must_use = "tasks that are taken and not woken wait for ever"]
pub struct Waiters(Vec<Waker>);

impl Waiters {
    pub const fn new() -> Waiters {
        Waiters(Vec::new())
    }

    /// Lists the task that polls, once.
    pub fn add(&mut self, cx: &Context<'_>) {
        if !self.0.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.0.push(cx.waker().clone());
        }
    }

    /// All that are listed. They are to be woken when the lock has been released.
    pub fn take(&mut self) -> Waiters {
        std::mem::take(self)
    }

    /// Makes them look again. Those that still wait list themselves once more.
    pub fn wake(self) {
        self.0.into_iter().for_each(Waker::wake);
    }

    /// Makes one of them look again; it stays in the list.
    pub fn wake_one(&self) {
        self.0.iter().take(1).for_each(Waker::wake_by_ref);
    }
}

impl Mutex<Waiters> {
    /// Waits until `is_so`. [`Mutex::wake_all`] is called after each change that may make it so.
    pub async fn wait_until(&self, mut is_so: impl FnMut() -> bool) {
        self.wait_for(|waiters| if is_so() { Ok(()) } else { Err(waiters) }).await;
    }

    /// Makes all tasks in the list look again.
    pub fn wake_all(&self) {
        let waiters = self.lock().take();
        waiters.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Counted>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_task_that_looks_often_is_listed_once_and_woken_at_a_change() {
        let counted = Arc::new(Counted::default());
        let waker = Waker::from(counted.clone());
        let mut cx = Context::from_waker(&waker);
        let state = Mutex::new((0, Waiters::new()));
        let mut waiting = pin!(state.wait_for(|(value, waiters)| match value {
            0 => Err(waiters),
            value => Ok(*value),
        }));
        for _ in 0..3 {
            assert!(waiting.as_mut().poll(&mut cx).is_pending());
        }
        let waiters = {
            let mut state = state.lock();
            state.0 = 7;
            state.1.take()
        };
        waiters.wake();
        assert_eq!(counted.0.load(Ordering::Relaxed), 1);
        assert_eq!(waiting.as_mut().poll(&mut cx), Poll::Ready(7));
    }
}
