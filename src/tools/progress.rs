//! The progress of long work: a bar on a terminal, QEMU's lines with `-p`, or a line on a signal.

use super::output::{self, errln};
use crate::io::sync::Mutex;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A signal has asked how far the work has come (SIGUSR1). Set by the signal's handler, answered at
/// the next step.
pub static ASKED: AtomicBool = AtomicBool::new(false);

/// Percents between two lines.
const STEP: f32 = 1.0;
/// The bar's steps in a percent.
const FINE: f32 = 100.0;
const BAR: &str = "[{wide_bar}] {percent:>3}%{msg}, {eta} left";

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// Only a signal is answered.
    Nothing,
    /// Lines on standard output, as QEMU's tools print them.
    Lines,
    /// On standard error, which is a terminal; gone when the work has ended.
    Bar,
}

/// The progress of one piece of work. Steps may come from any worker.
pub struct Progress {
    shows_lines: bool,
    bar: Option<ProgressBar>,
    began: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The work reported by [`Progress::advance`].
    parts: u64,
    /// Percents.
    done: f32,
    printed: f32,
}

impl Progress {
    pub fn new(show: Show) -> Progress {
        let bar = (show == Show::Bar).then(|| {
            let style = ProgressStyle::with_template(BAR).ok();
            let style = style.unwrap_or_else(ProgressStyle::default_bar).progress_chars("=> ");
            ProgressBar::new((100.0 * FINE) as u64).with_style(style)
        });
        let shows_lines = show == Show::Lines;
        Progress { shows_lines, bar, began: Instant::now(), state: Mutex::default() }
    }

    /// `part` of `whole` bytes, which are the same each time, more is done.
    pub fn advance(&self, part: u64, whole: u64) {
        let mut state = self.state.lock();
        state.parts += part;
        state.done = (100.0 * state.parts as f64 / whole as f64) as f32;
        if let Some(bar) = &self.bar {
            let seconds = self.began.elapsed().as_secs_f64().max(0.001);
            bar.set_message(format!(", {:.0} MB/s", state.parts as f64 / seconds / 1e6));
        }
        self.report(&mut state);
    }

    /// `part` of `whole` more is done; of nothing, all. Its percents are rounded before they are added, as
    /// QEMU does that for some work.
    pub fn step(&self, part: u64, whole: u64) {
        let mut state = self.state.lock();
        let percent = if whole == 0 { 100.0 } else { part as f32 / whole as f32 * 100.0 };
        state.done = (state.done + percent).min(100.0);
        self.report(&mut state);
    }

    /// So many percents are done.
    pub fn set(&self, percent: f32) {
        let mut state = self.state.lock();
        state.done = percent;
        self.report(&mut state);
    }

    fn report(&self, state: &mut State) {
        if let Some(bar) = &self.bar {
            bar.set_position((state.done * FINE) as u64);
        }
        if !self.shows_lines {
            if ASKED.swap(false, Ordering::Relaxed) {
                self.aside(|| errln!("    ({:.2}/100%)", state.done));
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

    /// Has `print` write to the terminal beside the progress.
    pub fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// The work has ended, one way or another.
    pub fn end(&self) {
        if self.shows_lines {
            output::write(format_args!("\n"));
        }
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
