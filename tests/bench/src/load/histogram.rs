//! Latencies in buckets whose width grows with the value: 32 per power of two, 3 % wide at most.

const STEPS: usize = 32;
const STEP_BITS: u32 = STEPS.trailing_zeros();

/// Counts of latencies in nanoseconds.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; STEPS * 64], total: 0 }
    }
}

fn bucket(ns: u64) -> usize {
    if ns < STEPS as u64 {
        return ns as usize;
    }
    let shift = ns.ilog2() - STEP_BITS;
    STEPS * (shift as usize + 1) + (ns >> shift) as usize - STEPS
}

/// The middle of a bucket.
fn value(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let shift = (bucket / STEPS - 1) as u32;
    let low = ((STEPS + bucket % STEPS) as u64) << shift;
    low + (1u64 << shift) / 2
}

impl Histogram {
    pub fn add(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
    }

    pub fn merge(&mut self, other: &Histogram) {
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a += b;
        }
        self.total += other.total;
    }

    /// The latency that `fraction` of the samples do not exceed; 0 without samples.
    pub fn percentile(&self, fraction: f64) -> u64 {
        let rank = (self.total as f64 * fraction).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank.max(1) {
                return value(bucket);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_lands_within_three_percent_of_itself() {
        for ns in [0, 1, 31, 32, 33, 1000, 43_210, 9_999_999, u64::MAX >> 2] {
            let back = value(bucket(ns));
            assert!(back.abs_diff(ns) as f64 <= ns as f64 * 0.032, "{ns}: {back}");
        }
    }

    #[test]
    fn percentiles_are_ranks() {
        let mut h = Histogram::default();
        assert_eq!(h.percentile(0.5), 0);
        (1..=100).for_each(|ns| h.add(ns));
        assert_eq!(h.percentile(0.01), 1);
        assert!(h.percentile(0.5).abs_diff(50) <= 1);
        assert!(h.percentile(0.99).abs_diff(99) <= 2);
    }
}
