//! Holding work up, slowing it down and ending it while it runs.
//!
//! The rule held here: work stops only where nothing of it is under way. Each of its members asks at the gate
//! before it begins a piece, and a piece that has begun is done to its end.

use crate::io::in_time;
use crate::io::sync::{Mutex, Waiters};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The work was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled;

/// Requests to running work from other tasks, and the state that the work reports. Safe to share.
#[derive(Default)]
pub struct Control {
    state: Mutex<State>,
    changed: Mutex<Waiters>,
}

#[derive(Default)]
struct State {
    /// How many want the work to rest.
    pauses: usize,
    is_cancelled: bool,
    /// Bytes in a second, at most.
    rate: Option<u64>,
    /// When the next piece may begin, as far as the rate goes.
    due: Option<Instant>,
    members: usize,
    /// Of these, those that wait at the gate.
    waiting: usize,
}

/// Part of some work, such as one copier of a copy.
pub struct Member(Arc<Control>);

impl Control {
    pub fn with_rate(rate: Option<u64>) -> Control {
        let control = Control::default();
        control.set_rate(rate);
        control
    }

    /// Makes the work rest at its next gates, until [`Control::resume`] was called as often as this.
    pub fn pause(&self) {
        self.state.lock().pauses += 1;
        self.changed.wake_all();
    }

    pub fn resume(&self) {
        let mut state = self.state.lock();
        state.pauses = state.pauses.saturating_sub(1);
        drop(state);
        self.changed.wake_all();
    }

    /// Ends the work at its next gates, paused or not.
    pub fn cancel(&self) {
        self.state.lock().is_cancelled = true;
        self.changed.wake_all();
    }

    pub fn is_cancelled(&self) -> bool {
        self.state.lock().is_cancelled
    }

    /// From now on at most this many bytes in a second; none, or 0, for no limit.
    pub fn set_rate(&self, rate: Option<u64>) {
        let mut state = self.state.lock();
        state.rate = rate.filter(|&rate| rate > 0);
        state.due = None;
        drop(state);
        self.changed.wake_all();
    }

    pub fn is_paused(&self) -> bool {
        self.state.lock().pauses > 0
    }

    /// Whether the work is paused and nothing of it is under way.
    pub fn is_resting(&self) -> bool {
        let state = self.state.lock();
        state.pauses > 0
            && !state.is_cancelled
            && state.members > 0
            && state.waiting == state.members
    }

    /// Waits until `is_so`, which is asked again after every change.
    pub async fn until(&self, is_so: impl Fn(&Control) -> bool) {
        self.changed.wait_until(|| is_so(self)).await;
    }

    /// Joins the work. It rests when all of its members do.
    pub fn join(self: &Arc<Control>) -> Member {
        self.state.lock().members += 1;
        Member(self.clone())
    }

    /// How long the next piece, of `len` bytes, has to wait; if not at all, it begins.
    fn try_begin(&self, len: u64) -> Result<Option<Hold>, Cancelled> {
        let mut state = self.state.lock();
        if state.is_cancelled {
            return Err(Cancelled);
        }
        if state.pauses > 0 {
            return Ok(Some(Hold::Paused));
        }
        let Some(rate) = state.rate else { return Ok(None) };
        let now = Instant::now();
        let due = state.due.unwrap_or(now);
        if let Some(early) = due.checked_duration_since(now).filter(|early| !early.is_zero()) {
            return Ok(Some(Hold::Early(early)));
        }
        state.due = Some(due.max(now) + time_of(len, rate));
        Ok(None)
    }
}

/// Why a piece may not begin.
enum Hold {
    Paused,
    Early(Duration),
}

fn time_of(len: u64, rate: u64) -> Duration {
    // No limit is lower than what one piece takes in an hour.
    Duration::from_secs_f64(len as f64 / rate as f64).min(Duration::from_secs(3600))
}

impl Member {
    /// Waits until a piece of at most `len` bytes may begin. Runs on a worker.
    pub async fn gate(&self, len: u64) -> Result<(), Cancelled> {
        let control = &*self.0;
        let first = control.try_begin(len)?;
        let Some(mut hold) = first else { return Ok(()) };
        control.state.lock().waiting += 1;
        control.changed.wake_all();
        let outcome = loop {
            wait(control, hold).await;
            match control.try_begin(len) {
                Ok(Some(another)) => hold = another,
                Ok(None) => break Ok(()),
                Err(cancelled) => break Err(cancelled),
            }
        };
        control.state.lock().waiting -= 1;
        control.changed.wake_all();
        outcome
    }

    /// The piece that the last [`Member::gate`] let pass was `len` bytes shorter than announced.
    pub fn give_back(&self, len: u64) {
        let mut state = self.0.state.lock();
        if let (Some(rate), Some(due)) = (state.rate, state.due)
            && len > 0
        {
            state.due = due.checked_sub(time_of(len, rate));
            drop(state);
            self.0.changed.wake_all();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.0.state.lock().members -= 1;
        self.0.changed.wake_all();
    }
}

/// Waits until what holds a piece up may have ended, or something has changed.
async fn wait(control: &Control, hold: Hold) {
    let early = match hold {
        Hold::Paused => {
            return control.until(|control| !control.is_paused() || control.is_cancelled()).await;
        }
        Hold::Early(early) => early,
    };
    let due = control.state.lock().due;
    let changed = |control: &Control| {
        let state = control.state.lock();
        state.is_cancelled || state.pauses > 0 || state.due < due
    };
    in_time(early, control.until(changed)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Worker, WorkerOptions, current};

    #[test]
    fn a_paused_member_waits_at_the_gate_until_it_was_resumed_as_often() {
        let control = Arc::new(Control::default());
        let worker = Worker::start("control", WorkerOptions::default()).unwrap();
        let clone = control.clone();
        worker.block_on(|| async move {
            let member = clone.join();
            clone.pause();
            clone.pause();
            assert!(!clone.is_resting(), "the member has not come to the gate");
            let passed = Arc::new(Mutex::new(Waiters::new()));
            let done = Arc::new(Mutex::new(false));
            let (reported, so) = (passed.clone(), done.clone());
            current().spawn(async move {
                assert_eq!(member.gate(1).await, Ok(()));
                *so.lock() = true;
                reported.wake_all();
            });
            clone.until(Control::is_resting).await;
            clone.resume();
            assert!(clone.is_resting(), "one of two wants it to go on");
            clone.resume();
            passed.wait_until(|| *done.lock()).await;
            assert!(!clone.is_resting());
        });
    }

    #[test]
    fn cancelled_work_ends_at_the_gate_though_it_is_paused_or_early() {
        let worker = Worker::start("control", WorkerOptions::default()).unwrap();
        worker.block_on(|| async {
            for is_paused in [true, false] {
                let control = Arc::new(Control::with_rate(Some(1)));
                let member = control.join();
                assert_eq!(member.gate(1 << 40).await, Ok(()));
                if is_paused {
                    control.pause();
                }
                let clone = control.clone();
                current().spawn(async move {
                    clone.until(|control| control.state.lock().waiting == 1).await;
                    clone.cancel();
                });
                assert_eq!(member.gate(1).await, Err(Cancelled));
            }
        });
    }

    #[test]
    fn a_limit_that_is_lifted_lets_those_go_on_that_wait_for_it() {
        let worker = Worker::start("control", WorkerOptions::default()).unwrap();
        worker.block_on(|| async {
            let control = Arc::new(Control::with_rate(Some(1)));
            let member = control.join();
            assert_eq!(member.gate(1 << 40).await, Ok(()));
            let clone = control.clone();
            current().spawn(async move {
                clone.until(|control| control.state.lock().waiting == 1).await;
                clone.set_rate(None);
            });
            assert_eq!(member.gate(1).await, Ok(()));
        });
    }
}
