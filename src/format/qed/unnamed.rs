//! Clusters that no table named when an image was opened that had not been closed: a killed process had taken them.
//!
//! Memory that outlives that process may name some of them. The others are used again when that memory has come, or when
//! the image says that there is none ([`crate::cow::Unclosed`]).

use crate::cow::{FileEnd, Run};
use crate::io::sync::Mutex;
use std::collections::BTreeSet;

/// See the module's text.
#[derive(Default)]
pub struct Unnamed(Mutex<State>);

#[derive(Default)]
struct State {
    /// In order; none if the image had been closed.
    runs: Option<Vec<Run>>,
    /// Of these, those that memory has named.
    claimed: BTreeSet<u64>,
}

impl Unnamed {
    pub fn new(runs: Option<Vec<Run>>) -> Unnamed {
        Unnamed(Mutex::new(State { runs, claimed: BTreeSet::new() }))
    }

    pub fn replace(&self, runs: Option<Vec<Run>>) {
        *self.0.lock() = State { runs, claimed: BTreeSet::new() };
    }

    /// Claims clusters that memory names. Returns whether no table named any of them; none if the image had been closed.
    pub fn claim(&self, clusters: &BTreeSet<u64>) -> Option<bool> {
        let mut state = self.0.lock();
        let runs = state.runs.as_ref()?;
        let is_unnamed = |&cluster: &u64| {
            let behind = runs.partition_point(|run| run.first <= cluster);
            behind > 0 && cluster < runs[behind - 1].first + runs[behind - 1].count
        };
        let are_unnamed = clusters.iter().all(is_unnamed);
        if are_unnamed {
            state.claimed.extend(clusters);
        }
        Some(are_unnamed)
    }

    /// Gives what nobody has claimed to the space that new clusters come from.
    pub fn reuse(&self, space: &FileEnd) {
        let State { runs, claimed } = std::mem::take(&mut *self.0.lock());
        for run in runs.unwrap_or_default() {
            let end = run.first + run.count;
            let mut first = run.first;
            for cluster in claimed.range(run.first..end).copied().chain([end]) {
                if cluster > first {
                    space.put_back(Run { first, count: cluster - first, is_fresh: false });
                }
                first = cluster + 1;
            }
        }
    }

    /// Forgets them. Returns whether there were any.
    pub fn forget(&self) -> bool {
        let State { runs, .. } = std::mem::take(&mut *self.0.lock());
        runs.is_some_and(|runs| !runs.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cow::FileExtent;

    #[test]
    fn what_memory_names_is_not_used_again() {
        let run = |first, count| Run { first, count, is_fresh: false };
        let unnamed = Unnamed::new(Some(vec![run(4, 3), run(10, 4)]));
        assert_eq!(unnamed.claim(&BTreeSet::from([5, 7])), Some(false));
        assert_eq!(unnamed.claim(&BTreeSet::from([5, 10, 13])), Some(true));
        let space = FileEnd::new(FileExtent { used: 14, fresh_from: 14, limit: 100 }, 4096);
        unnamed.reuse(&space);
        let free = (0..14).filter(|&cluster| space.has_free([cluster]));
        assert_eq!(free.collect::<Vec<_>>(), [4, 6, 11, 12]);
        assert_eq!(unnamed.claim(&BTreeSet::from([11])), None);
        assert!(!unnamed.forget());
    }
}
