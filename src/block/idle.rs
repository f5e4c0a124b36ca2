//! Idle images, whose drivers then undo marks that writing has left in them.

use super::{Error, LocalFuture, Signal};
use crate::io::sync::Mutex;
use crate::io::{IoResult, periodic};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The interval at which a clock checks whether its image is idle.
const LOOK: Duration = Duration::from_secs(1);

/// Implemented by drivers that do something when their image is idle.
pub trait Idle: Send + Sync {
    /// The clock that signals idleness; none if the image never changes.
    fn signal(&self) -> Option<Arc<Signal>>;

    /// Does the work, if the image is still idle. Requests may be in flight, and others come.
    fn rest(&self) -> LocalFuture<'_, IoResult>;
}

/// Raises a signal when nothing has changed for some time.
pub struct IdleClock {
    after: Duration,
    signal: Arc<Signal>,
    state: Mutex<State>,
}

struct State {
    /// When something changed last.
    changed: Instant,
    /// Somebody looks.
    is_watched: bool,
}

impl IdleClock {
    /// A clock that does not run until something changes.
    ///
    /// # Errors
    /// The system has no more descriptors.
    pub fn new(after: Duration) -> Result<Arc<IdleClock>, Error> {
        let state = State { changed: Instant::now(), is_watched: false };
        Ok(Arc::new(IdleClock { after, signal: Signal::new()?, state: Mutex::new(state) }))
    }

    pub fn signal(&self) -> Arc<Signal> {
        self.signal.clone()
    }

    /// Something changes now.
    pub fn touch(self: &Arc<IdleClock>) {
        self.state.lock().changed = Instant::now();
        self.watch();
    }

    /// Whether nothing has changed for so long.
    pub fn is_idle(&self) -> bool {
        self.state.lock().changed.elapsed() >= self.after
    }

    /// Ensures that the signal is raised when the time has come.
    pub fn watch(self: &Arc<IdleClock>) {
        if std::mem::replace(&mut self.state.lock().is_watched, true) {
            return;
        }
        let clock = Arc::downgrade(self);
        periodic::every(LOOK, move || clock.upgrade().is_some_and(|clock| !clock.check()));
    }

    /// Tells the signal if it is time; returns whether it did.
    fn check(&self) -> bool {
        let mut state = self.state.lock();
        let is_idle = state.changed.elapsed() >= self.after;
        if is_idle {
            state.is_watched = false;
            self.signal.notify();
        }
        is_idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_tells_its_signal_when_nothing_changes_any_more() {
        let clock = IdleClock::new(Duration::from_millis(1)).unwrap();
        assert!(!clock.signal.is_raised());
        for _ in 0..2 {
            clock.touch();
            let end = Instant::now() + Duration::from_secs(60);
            while !clock.signal.take() {
                assert!(Instant::now() < end, "it is never told");
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(clock.is_idle());
        }
    }
}
