//! What the models share.

use crate::cow::table_cache::TableEntry;

/// An entry of two words.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair(pub u64, pub u64);

impl TableEntry for Pair {
    fn from_words(first: u64, second: u64) -> Pair {
        Pair(first, second)
    }

    fn words(self) -> [u64; 2] {
        [self.0, self.1]
    }
}

/// Explores all executions with up to `preemptions` switches away from a thread that could continue.
pub fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}
