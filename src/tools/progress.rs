//! How far long work has come, for whoever waits: in steps with `-p`, or when a signal asks.

use super::output;
use crate::io::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// A signal has asked how far the work has come (SIGUSR1). Set by the signal's handler, answered at
/// the next step.
pub static ASKED: AtomicBool = AtomicBool::new(false);

/// Percents between two lines.
const STEP: f32 = 2.0;

/// The progress of one piece of work. Steps may come from any worker.
pub struct Progress {
    shown: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Percents.
    done: f32,
    printed: f32,
}

impl Progress {
    /// `shown`: lines on standard output (`-p`). Otherwise only a signal is answered.
    pub fn new(shown: bool) -> Progress {
        Progress { shown, state: Mutex::default() }
    }

    /// `part` of `whole` more is done; of nothing, all.
    pub fn advance(&self, part: u64, whole: u64) {
        let percent = if whole == 0 { 100.0 } else { part as f32 / whole as f32 * 100.0 };
        self.step(percent);
    }

    /// So many percents more are done.
    pub fn step(&self, percent: f32) {
        let mut state = self.state.lock();
        state.done = (state.done + percent).min(100.0);
        self.tell(&mut state);
    }

    /// So many percents are done.
    pub fn set(&self, percent: f32) {
        let mut state = self.state.lock();
        state.done = percent;
        self.tell(&mut state);
    }

    fn tell(&self, state: &mut State) {
        if !self.shown {
            if ASKED.swap(false, Ordering::Relaxed) {
                eprintln!("    ({:.2}/100%)", state.done);
            }
            return;
        }
        let due = state.done > state.printed + STEP || state.done < state.printed;
        if due || state.done == 100.0 || state.done == 0.0 {
            state.printed = state.done;
            output::write(format_args!("    ({:.2}/100%)\r", state.done));
            output::flush();
        }
    }

    /// The work has ended, one way or another.
    pub fn end(&self) {
        if self.shown {
            output::write(format_args!("\n"));
        }
    }
}
