//! A ring's clock: nanoseconds since it was made.
//!
//! Where the kernel itself tells the time by the processor's counter of cycles, that is read without
//! the kernel's part, in a third of the time; it is set by the kernel's clock now and then.

use std::cell::Cell;
use std::sync::LazyLock;
use std::time::Instant;

/// Cycles after which the kernel's clock is looked at again: some tens of milliseconds.
const TRUST: u64 = 1 << 27;
/// Nanoseconds that the speed of the counter is measured over, at least.
const BASELINE: u64 = 10_000_000;

/// Nanoseconds that it may be ahead of the kernel's clock where it is set by that.
const TOO_FAST: u64 = 1_000_000;

/// Cycles that looking at the kernel's clock takes at most, if nothing comes in between.
const TIGHT: u64 = 20_000;

/// See the module's text.
pub struct Clock {
    began: Instant,
    /// The counter when the kernel's clock was looked at last, and what the clock showed.
    cycles: Cell<u64>,
    ns: Cell<u64>,
    /// Nanoseconds for a cycle, in 2^-32; zero: not known.
    speed: Cell<u64>,
    /// The same from the start, for the speed.
    first: Cell<Option<(u64, u64)>>,
}

/// Whether the counter runs evenly, and alike on all processors: the kernel relies on it too.
static IS_EVEN: LazyLock<bool> = LazyLock::new(|| {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    cfg!(target_arch = "x86_64") && std::fs::read_to_string(path).is_ok_and(|s| s.trim() == "tsc")
});

#[cfg(target_arch = "x86_64")]
fn cycles() -> u64 {
    // SAFETY: every processor of this architecture has the instruction. A process that is kept from it
    // has asked for that itself.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn cycles() -> u64 {
    0
}

impl Clock {
    pub fn new() -> Clock {
        // Not when a sandbox may keep the file from us.
        LazyLock::force(&IS_EVEN);
        Clock {
            began: Instant::now(),
            cycles: Cell::new(0),
            ns: Cell::new(0),
            speed: Cell::new(0),
            first: Cell::new(None),
        }
    }

    /// It never goes back.
    #[inline]
    pub fn now(&self) -> u64 {
        if self.speed.get() != 0 {
            // Of another processor it may be a little behind, which looks like very much.
            let passed = cycles().wrapping_sub(self.cycles.get());
            if passed < TRUST {
                return self.ns.get() + ((passed * self.speed.get()) >> 32);
            }
        }
        self.set()
    }

    /// The kernel's time, by which the counter is set.
    #[cold]
    fn set(&self) -> u64 {
        let before = cycles();
        let now = self.began.elapsed().as_nanos() as u64;
        if !*IS_EVEN {
            return now;
        }
        let cycles = cycles();
        // What was shown last, if that was more.
        let passed = cycles.saturating_sub(self.cycles.get()).min(TRUST);
        let kernel = now;
        let now = kernel.max(self.ns.get() + ((passed * self.speed.get()) >> 32));
        if cycles.saturating_sub(before) > TIGHT {
            // The thread was kept waiting in between: the two do not belong together.
            self.speed.set(0);
            self.ns.set(now);
            return now;
        }
        if now - kernel > TOO_FAST {
            // The counter is not what it was: its speed is measured again.
            self.first.set(None);
            self.speed.set(0);
        }
        let (first_cycles, first) = self.first.get().unwrap_or((cycles, kernel));
        self.first.set(Some((first_cycles, first)));
        if kernel - first >= BASELINE && cycles > first_cycles {
            let speed = (u128::from(kernel - first) << 32) / u128::from(cycles - first_cycles);
            // Faster than 2^30 cycles a second, so that nothing overflows above.
            self.speed.set(u64::try_from(speed).ok().filter(|&s| s < 1 << 32).unwrap_or(0));
        }
        self.cycles.set(cycles);
        self.ns.set(now);
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_never_goes_back_and_agrees_with_the_kernels_clock() {
        let clock = Clock::new();
        let mut last = 0;
        // Long enough for the counter to be set some times.
        while clock.began.elapsed() < Duration::from_millis(300) {
            let before = clock.began.elapsed().as_nanos() as u64;
            let now = clock.now();
            let after = clock.began.elapsed().as_nanos() as u64;
            assert!(now >= last, "{now} after {last}");
            // A thousandth is far more than the speed is wrong by.
            let error = after / 1000 + 1000;
            assert!(
                (before.saturating_sub(error)..=after + error).contains(&now),
                "{before} {now}"
            );
            last = now;
        }
        assert_eq!(clock.speed.get() != 0, *IS_EVEN);
    }
}
