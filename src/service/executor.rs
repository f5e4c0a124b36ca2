//! The control executor, which runs everything but serving guests as tasks.
//!
//! A task waits for storage, guests, locks and other tasks without keeping a thread.
//!
//! The rules held here: a task never blocks its thread, blocking calls go to [`io::offload`]; and a task runs
//! to its end, whether or not anybody still wants its result.

use crate::block::Error;
use crate::io::sync::Mutex;
use crate::io::task::apart;
use crate::io::{self, Worker, WorkerOptions};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

pub(super) struct Executor {
    worker: Worker,
    tasks: Arc<Tasks>,
}

/// The tasks under way, and the sign that some have ended.
struct Tasks {
    names: Mutex<BTreeMap<u64, &'static str>>,
    next: AtomicU64,
    event: EventFd,
}

/// The result of a task. The task continues if nobody waits for it any more.
pub struct Pending<T>(mpsc::Receiver<T>);

impl<T> Pending<T> {
    /// The result, if the task has ended. It comes once.
    pub fn take(&self) -> Option<T> {
        self.0.try_recv().ok()
    }

    /// The result, if it comes within `time`.
    pub(super) fn wait_for(&self, time: Duration) -> Option<T> {
        self.0.recv_timeout(time).ok()
    }

    /// Waits for the result. Not to be called on a worker, nor on a thread that serves others.
    pub fn wait(self) -> T {
        self.0.recv().expect("a task runs to its end")
    }
}

impl Executor {
    pub(super) fn start() -> Result<Executor, Error> {
        let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let worker = super::objects::start_worker("control", options)?;
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let event = event.map_err(|e| Error::os("eventfd", e))?;
        let tasks = Tasks { names: Mutex::default(), next: AtomicU64::new(0), event };
        Ok(Executor { worker, tasks: Arc::new(tasks) })
    }

    /// Starts a task.
    pub(super) fn spawn<T, F>(
        &self,
        name: &'static str,
        make: impl FnOnce() -> F + Send + 'static,
    ) -> Pending<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        let tasks = self.tasks.clone();
        let id = tasks.next.fetch_add(1, Ordering::Relaxed);
        tasks.names.lock().insert(id, name);
        self.worker.send(move |local| {
            let future = make();
            local.io().spawn(async move {
                let result = future.await;
                tasks.names.lock().remove(&id);
                let _ = sender.send(result);
                let _ = tasks.event.write(1);
            });
        });
        Pending(receiver)
    }

    /// The names of the tasks under way, oldest first.
    pub(super) fn tasks(&self) -> Vec<&'static str> {
        self.tasks.names.lock().values().copied().collect()
    }

    /// Readable once a task has ended, until [`Executor::clear_event`].
    pub(super) fn descriptor(&self) -> RawFd {
        self.tasks.event.as_raw_fd()
    }

    /// To be called before the results are looked at.
    pub(super) fn clear_event(&self) {
        let _ = self.tasks.event.read();
    }
}

/// The result of a future, if it comes within `time`. The future continues as a task of its own.
pub(super) async fn within<T: 'static>(
    time: Duration,
    future: impl Future<Output = T> + 'static,
) -> Option<T> {
    io::in_time(time, apart(future)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_waits_holds_up_no_other_and_ends_when_it_can() {
        let executor = Executor::start().unwrap();
        let (open, gate) = mpsc::channel::<()>();
        let waits = executor.spawn("waits", move || io::offload(move || gate.recv().is_ok()));
        let limited = executor.spawn("limited", || async {
            let never = async { std::future::pending::<()>().await };
            within(Duration::from_millis(1), never).await
        });
        assert_eq!(executor.spawn("quick", || async { 7 }).wait(), 7);
        assert_eq!(limited.wait(), None);
        assert_eq!(waits.take(), None);
        assert_eq!(executor.tasks(), ["waits"]);
        open.send(()).unwrap();
        assert!(waits.wait());
        assert_eq!(executor.tasks(), [""; 0]);
        // A task that waits forever keeps its thread, and this test.
        std::mem::forget(executor);
    }
}
