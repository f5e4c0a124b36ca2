//! Visits: requests on the slow path that use host clusters they have looked up.
//!
//! A cluster that no entry names any more is reused only when all visits have ended that began before the
//! entry changed. (Requests on the fast path announce themselves to [`crate::io::epoch`].)

use crate::io::sync::{Mutex, Waiters};
use std::collections::VecDeque;

/// The visits that are under way, by the time at which they began.
#[derive(Default)]
pub struct Visits {
    state: Mutex<VisitList>,
}

#[derive(Default)]
struct VisitList {
    now: u64,
    /// How many visits began at which time, oldest first.
    begun: VecDeque<(u64, u32)>,
    waiting: Waiters,
}

/// A visit, until it is dropped.
pub struct Visit<'a> {
    visits: &'a Visits,
    began: u64,
}

impl Visits {
    pub fn enter(&self) -> Visit<'_> {
        let mut list = self.state.lock();
        let now = list.now;
        match list.begun.back_mut() {
            Some((at, count)) if *at == now => *count += 1,
            _ => list.begun.push_back((now, 1)),
        }
        Visit { visits: self, began: now }
    }

    /// A moment in time: [`Visits::passed`] tells when all visits that began before it have ended.
    pub fn moment(&self) -> u64 {
        let mut list = self.state.lock();
        list.now += 1;
        list.now
    }

    pub fn passed(&self, moment: u64) -> bool {
        self.state.lock().passed(moment)
    }

    /// Waits until all visits that have begun by now have ended.
    pub async fn older(&self) {
        let moment = self.moment();
        self.state
            .wait_for(|list| match list.passed(moment) {
                true => Ok(()),
                false => Err(&mut list.waiting),
            })
            .await
    }
}

impl VisitList {
    fn passed(&self, moment: u64) -> bool {
        self.begun.front().is_none_or(|&(began, _)| began >= moment)
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut list = self.visits.state.lock();
        if let Some(entry) = list.begun.iter_mut().find(|(at, _)| *at == self.began) {
            entry.1 -= 1;
        }
        if list.begun.front().is_none_or(|&(_, count)| count > 0) {
            return;
        }
        while list.begun.front().is_some_and(|&(_, count)| count == 0) {
            list.begun.pop_front();
        }
        let waiting = list.waiting.take();
        drop(list);
        waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_has_passed_when_older_visits_have_ended() {
        let visits = Visits::default();
        assert!(visits.passed(visits.moment()));
        let old = visits.enter();
        let moment = visits.moment();
        let young = visits.enter();
        assert!(!visits.passed(moment));
        drop(old);
        assert!(visits.passed(moment));
        drop(young);
    }
}
