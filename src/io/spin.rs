//! The time that an idle worker spins before it sleeps.

/// How long to spin: as long as work came lately within the time that spinning may take, not at
/// all when it did not.
///
/// One short gap is not enough. A disk at depth 1 has two kinds that take turns, the storage's and
/// the guest's, and spinning through the longer because the shorter was short is a waste.
#[derive(Default)]
pub(super) struct Spin {
    pub(super) limit_ns: u64,
    /// Gaps in a row that spinning would have bridged.
    streak: u32,
}

impl Spin {
    const FIRST_NS: u64 = 4_000;
    const STREAK: u32 = 3;

    /// `gap` is how long there was nothing to do. Gaps longer than half of `max` are left to sleep:
    /// going to sleep and waking up costs less than spinning through them.
    pub(super) fn learn(&mut self, gap: u64, max: u64) {
        if gap > max / 2 {
            *self = Spin::default();
            return;
        }
        self.streak = self.streak.saturating_add(1);
        if self.streak >= Self::STREAK && gap > self.limit_ns {
            self.limit_ns = (self.limit_ns * 2).max(Self::FIRST_NS).max(gap).min(max / 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_begins_with_a_streak_of_short_gaps_and_ends_with_a_long_one() {
        let mut spin = Spin::default();
        for gap in [5_000, 80_000, 5_000, 80_000, 5_000, 5_000] {
            spin.learn(gap, 32_000);
            assert_eq!(spin.limit_ns, 0);
        }
        spin.learn(5_000, 32_000);
        assert_eq!(spin.limit_ns, 5_000);
        spin.learn(15_000, 32_000);
        assert_eq!(spin.limit_ns, 15_000);
        spin.learn(17_000, 32_000);
        assert_eq!(spin.limit_ns, 0);
    }
}
