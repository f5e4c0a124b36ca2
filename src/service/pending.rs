//! Results that come later, so that whoever asked for them can do something else meanwhile.

use crate::io::Worker;
use std::sync::mpsc;
use std::time::Duration;

/// The result of work that goes on elsewhere. The work goes on if nobody waits for it any more.
pub struct Pending<T>(mpsc::Receiver<T>);

impl<T: Send + 'static> Pending<T> {
    /// Begins a future on a worker.
    pub(super) fn start<F>(worker: &Worker, make: impl FnOnce() -> F + Send + 'static) -> Pending<T>
    where
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        worker.send(move |local| {
            let future = make();
            local.io().spawn(async move {
                let _ = sender.send(future.await);
            });
        });
        Pending(receiver)
    }

    /// The result, if it comes within `wait`. It comes once.
    pub fn poll(&self, wait: Duration) -> Option<T> {
        self.0.recv_timeout(wait).ok()
    }
}
