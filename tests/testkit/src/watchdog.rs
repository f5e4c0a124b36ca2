//! A time limit for every vhost-user message, which shuts the socket when a reply is late.
//!
//! The `vhost` crate retries a receive that timed out, so a socket timeout bounds nothing; shutting
//! the socket from another thread does.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    deadline: Option<Instant>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches one socket. Dropping it ends its thread.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    limit: Duration,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(crate) fn new(stream: UnixStream, limit: Duration) -> Watchdog {
        let shared = Arc::new(Shared::default());
        let watched = shared.clone();
        let thread = std::thread::spawn(move || watch(&watched, &stream));
        Watchdog { shared, limit, thread: Some(thread) }
    }

    /// Runs `call`; the socket is shut if it takes longer than the limit, which ends it.
    pub(crate) fn bound<T>(&self, call: impl FnOnce() -> T) -> T {
        self.set(Some(Instant::now() + self.limit));
        let result = call();
        self.set(None);
        result
    }

    fn set(&self, deadline: Option<Instant>) {
        self.shared.lock().deadline = deadline;
        self.shared.changed.notify_one();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(shared: &Shared, stream: &UnixStream) {
    let mut state = shared.lock();
    while !state.ended {
        let now = Instant::now();
        let rest = match state.deadline {
            Some(deadline) if deadline <= now => {
                let _ = stream.shutdown(Shutdown::Both);
                state.deadline = None;
                continue;
            }
            Some(deadline) => deadline - now,
            None => Duration::from_secs(3600),
        };
        state = shared.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
    }
}
