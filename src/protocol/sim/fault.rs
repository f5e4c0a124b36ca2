//! Seeded faults of a simulated disk: which operations fail, when, and how.

use crate::io::Errno;
use fastrand::Rng;
use std::ops::Range;
use std::time::Duration;

bitflags::bitflags! {
    /// Kinds of operations.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Kinds: u8 {
        const READ = 1;
        const WRITE = 1 << 1;
        const ZERO = 1 << 2;
        const DISCARD = 1 << 3;
        const FLUSH = 1 << 4;
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is done.
    Fail(Errno),
    /// A part of the transfer is done, and then this.
    Tear(Errno),
    /// The transfer comes out short by something.
    Shorten,
    /// It takes so much longer.
    Delay(Duration),
    /// It stops until [`SimDisk::release`](super::SimDisk::release).
    Hang,
}

/// One rule. Built up from [`Fault::new`], which strikes every operation of its kinds forever.
#[derive(Clone, Debug)]
pub struct Fault {
    kinds: Kinds,
    effect: Effect,
    range: Range<u64>,
    spare: u64,
    times: u64,
    probability: f64,
    on_holes: bool,
}

impl Fault {
    pub fn new(kinds: Kinds, effect: Effect) -> Fault {
        Fault {
            kinds,
            effect,
            range: 0..u64::MAX,
            spare: 0,
            times: u64::MAX,
            probability: 1.0,
            on_holes: false,
        }
    }

    /// Only operations that touch these bytes. Flushes touch all.
    pub fn within(self, range: Range<u64>) -> Fault {
        Fault { range, ..self }
    }

    /// Lets the first `spare` operations pass.
    pub fn after(self, spare: u64) -> Fault {
        Fault { spare, ..self }
    }

    /// Only operations that would take room: those that touch sectors without any.
    pub fn on_holes(self) -> Fault {
        Fault { on_holes: true, ..self }
    }

    /// Strikes at most this many times.
    pub fn times(self, times: u64) -> Fault {
        Fault { times, ..self }
    }

    pub fn once(self) -> Fault {
        self.times(1)
    }

    /// Strikes only so often, from 0 to 1.
    pub fn with_probability(self, probability: f64) -> Fault {
        Fault { probability, ..self }
    }

    /// Whether it may make operations wait.
    pub(super) fn waits(&self) -> bool {
        matches!(self.effect, Effect::Delay(_) | Effect::Hang)
    }
}

/// The rules in force. The first that strikes decides.
#[derive(Default)]
pub(super) struct Faults {
    rules: Vec<Fault>,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.rules.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// What strikes an operation.
    pub(super) fn strike(
        &mut self,
        rng: &mut Rng,
        kind: Kinds,
        range: Range<u64>,
        is_hole: impl Fn() -> bool,
    ) -> Option<Effect> {
        for rule in &mut self.rules {
            let touches = kind == Kinds::FLUSH
                || rule.range.start < range.end && range.start < rule.range.end;
            if !rule.kinds.contains(kind) || !touches || rule.times == 0 {
                continue;
            }
            if rule.on_holes && !is_hole() {
                continue;
            }
            if rule.spare > 0 {
                rule.spare -= 1;
                continue;
            }
            if rng.f64() < rule.probability {
                rule.times = rule.times.saturating_sub((rule.times != u64::MAX) as u64);
                return Some(rule.effect);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_its_kind_in_its_range_in_its_time() {
        let mut faults = Faults::default();
        let eio = Effect::Fail(Errno::EIO);
        faults.add(Fault::new(Kinds::WRITE, eio).within(100..200).after(1).times(2));
        let mut rng = Rng::with_seed(1);
        let mut strike = |kind, range| faults.strike(&mut rng, kind, range, || false);
        assert_eq!(strike(Kinds::READ, 100..200), None);
        assert_eq!(strike(Kinds::WRITE, 0..100), None);
        assert_eq!(strike(Kinds::WRITE, 0..101), None, "one is spared");
        assert_eq!(strike(Kinds::WRITE, 199..300), Some(eio));
        assert_eq!(strike(Kinds::WRITE, 0..300), Some(eio));
        assert_eq!(strike(Kinds::WRITE, 0..300), None, "twice is enough");
    }
}
