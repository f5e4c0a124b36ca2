//! Host clusters that entries no longer name, on their way to being free.
//!
//! First the entries that dropped them are made durable, by the guest's flush or one of our own; then all requests
//! have to end that may still have I/O to them under way, which holds up nobody; then the allocator frees them.

use super::{Release, Run, Visits};
use crate::io::IoResult;
use crate::io::epoch::{Grace, Member};
use crate::io::sync::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// So many clusters wait for the guest's next flush, before the format flushes by itself: 1 GiB of clusters of 64 KiB, and
/// 512 KiB of memory.
const WAITING_LIMIT: u64 = 16 << 10;

/// See the module's text.
#[derive(Default)]
pub struct Freed {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Their changed entries have been handed to the kernel.
    dropped: Vec<Release>,
    clusters: u64,
    /// Their changed entries are durable; oldest first.
    durable: VecDeque<FreedBatch>,
    /// Some were added.
    was_used: bool,
    /// Those that were added since [`Freed::watch`].
    watched: Option<Vec<Run>>,
}

/// What a flush makes durable.
pub struct FreedBatch {
    releases: Vec<Release>,
    /// Older visits and older fast requests may use the clusters.
    moment: u64,
    grace: Grace,
}

impl Freed {
    /// Adds clusters that entries, handed to the kernel and shown to readers, no longer name. Returns whether so many
    /// have collected that the format should flush.
    pub fn push(&self, releases: &[Release]) -> bool {
        let mut state = self.state.lock();
        state.was_used = true;
        if let Some(watched) = &mut state.watched {
            watched.extend(releases.iter().map(|release| release.run));
        }
        state.dropped.extend_from_slice(releases);
        state.clusters += releases.iter().map(|release| release.run.count).sum::<u64>();
        state.clusters > WAITING_LIMIT
    }

    /// Forgets everything: nothing is to be freed any more.
    pub fn forget(&self) {
        *self.state.lock() = State::default();
    }

    /// Remembers what is added from now on, for [`Freed::take_watched`]. False, and nothing is remembered, if something
    /// was added before and `is_rest` does not tell that all of it is free by now.
    pub fn watch(&self, is_rest: bool) -> bool {
        let mut state = self.state.lock();
        let is_empty = state.dropped.is_empty() && state.durable.is_empty();
        let can_watch = is_empty && (is_rest || !state.was_used);
        if can_watch {
            state.watched = Some(Vec::new());
        }
        can_watch
    }

    /// What was added since the last call.
    pub fn take_watched(&self) -> Vec<Run> {
        self.state.lock().watched.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub fn end_watching(&self) {
        self.state.lock().watched = None;
    }

    /// Called before a flush: what it makes durable.
    pub fn begin_flush(&self, visits: &Visits) -> Option<FreedBatch> {
        let mut state = self.state.lock();
        state.clusters = 0;
        let releases = std::mem::take(&mut state.dropped);
        if releases.is_empty() {
            return None;
        }
        drop(state);
        Some(FreedBatch { releases, moment: visits.moment(), grace: Grace::begin() })
    }

    /// Called after it, with its result.
    pub fn end_flush(&self, batch: Option<FreedBatch>, result: IoResult) {
        let Some(batch) = batch else { return };
        let mut state = self.state.lock();
        match result {
            Ok(()) => state.durable.push_back(batch),
            Err(_) => state.dropped.extend(batch.releases),
        }
    }

    /// The oldest clusters that no request can use any more. `members`: those that may have fast requests under way.
    pub fn pop_unused(&self, visits: &Visits, members: &[Arc<Member>]) -> Option<Vec<Release>> {
        let mut state = self.state.lock();
        let passed =
            |batch: &FreedBatch| visits.passed(batch.moment) && batch.grace.has_passed(members);
        if !state.durable.front().is_some_and(passed) {
            return None;
        }
        state.durable.pop_front().map(|batch| batch.releases)
    }

    /// Whether clusters wait whose changed entries are durable.
    pub fn has_durable(&self) -> bool {
        !self.state.lock().durable.is_empty()
    }
}
