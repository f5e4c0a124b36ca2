//! The choice between notifying the guest in the middle of a turn and at its end, by cost.
//!
//! A guest that has just kicked goes to sleep next. Told of its first results at once, while we work
//! on the others, one with a processor of its own is caught before it sleeps and need not be woken,
//! which costs more than many requests. One that shares our processor takes it from us at each call.
//! Which of them it is shows in our own processor time: both ways are tried now and then, and the
//! cheaper one is kept.

/// Requests that a way is tried for.
const TRIAL: u32 = 4096;
/// Requests until both are tried again.
const KEEP: u32 = 1 << 18;

#[derive(Debug)]
pub struct CallPolicy {
    /// Whether the guest is called in the middle of turns.
    early: bool,
    stage: Stage,
    /// Requests left in this stage.
    left: u32,
    /// The worker's processor time, in nanoseconds, when the stage began.
    began: u64,
}

#[derive(Debug)]
enum Stage {
    /// Nothing is known yet.
    New,
    TryEarly,
    /// With the time that the early way took.
    TryLate(u64),
    Keep,
}

impl Default for CallPolicy {
    fn default() -> CallPolicy {
        CallPolicy { early: true, stage: Stage::New, left: 0, began: 0 }
    }
}

impl CallPolicy {
    /// Whether to call the guest now, in the middle of a turn, if it wants to be called.
    pub fn is_early(&self) -> bool {
        self.early
    }

    /// Books a turn's requests. `clock` gives the worker's processor time in nanoseconds.
    pub fn taken(&mut self, requests: u32, clock: impl FnOnce() -> u64) {
        if self.left > requests {
            self.left -= requests;
            return;
        }
        let now = clock();
        let spent = now.saturating_sub(self.began);
        self.began = now;
        (self.stage, self.early, self.left) = match self.stage {
            Stage::New | Stage::Keep => (Stage::TryEarly, true, TRIAL),
            Stage::TryEarly => (Stage::TryLate(spent), false, TRIAL),
            Stage::TryLate(early) => (Stage::Keep, early < spent, KEEP),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is kept, when a turn of 32 requests costs so much the two ways.
    fn kept(early: u64, late: u64) -> bool {
        let mut policy = CallPolicy::default();
        let mut clock = 0;
        for _ in 0..1000 {
            clock += if policy.is_early() { early } else { late };
            policy.taken(32, || clock);
        }
        assert!(matches!(policy.stage, Stage::Keep));
        policy.is_early()
    }

    #[test]
    fn the_cheaper_way_is_kept() {
        assert!(kept(3_000, 14_000), "a guest that is caught before it sleeps");
        assert!(!kept(8_000, 5_000), "a guest on our own processor");
    }

    #[test]
    fn both_ways_are_tried_again_after_a_while() {
        let mut policy = CallPolicy::default();
        let mut tries = 0;
        for _ in 0..3 * (KEEP + 2 * TRIAL) / 32 {
            let before = matches!(policy.stage, Stage::TryEarly);
            policy.taken(32, || 0);
            tries += u32::from(!before && matches!(policy.stage, Stage::TryEarly));
        }
        assert_eq!(tries, 3);
    }
}
