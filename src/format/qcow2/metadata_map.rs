//! A map of the host clusters that hold metadata.
//!
//! Tables of one cluster are listed singly, longer ones as ranges, so that the table lengths that an image claims
//! cost neither memory nor time.

use super::overlap::Kinds;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

/// See the module's text.
#[derive(Default)]
pub struct MetadataMap {
    single: HashMap<u64, Kinds, ClusterHashes>,
    /// In order, and none touches another's clusters.
    ranges: Vec<(Range<u64>, Kinds)>,
}

/// Hundreds of entries of each slice are looked up, so hashing is one multiplication. Its factor is random:
/// a hostile image cannot choose clusters that all fall into one bucket.
struct ClusterHashes {
    factor: u64,
}

struct ClusterHash {
    factor: u64,
    hash: u64,
}

impl Default for ClusterHashes {
    fn default() -> ClusterHashes {
        ClusterHashes { factor: RandomState::new().hash_one(0) | 1 }
    }
}

impl BuildHasher for ClusterHashes {
    type Hasher = ClusterHash;

    fn build_hasher(&self) -> ClusterHash {
        ClusterHash { factor: self.factor, hash: 0 }
    }
}

impl Hasher for ClusterHash {
    fn finish(&self) -> u64 {
        self.hash
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("clusters are numbers");
    }

    fn write_u64(&mut self, n: u64) {
        self.hash = n.wrapping_mul(self.factor).rotate_left(32);
    }
}

impl MetadataMap {
    /// Adds places of one kind. Many ranges are best added at once.
    pub fn add(&mut self, kind: Kinds, places: impl Iterator<Item = Range<u64>>) {
        let mut long = Vec::new();
        for place in places.filter(|place| !place.is_empty()) {
            match place.end - place.start {
                1 => *self.single.entry(place.start).or_default() |= kind,
                _ => long.push((place, kind)),
            }
        }
        if !long.is_empty() {
            long.append(&mut self.ranges);
            self.ranges = apart(long);
        }
    }

    /// Forgets all places of a kind.
    pub fn remove(&mut self, kind: Kinds) {
        let left = |kinds: &mut Kinds| {
            *kinds -= kind;
            !kinds.is_empty()
        };
        self.single.retain(|_, kinds| left(kinds));
        self.ranges.retain_mut(|(_, kinds)| left(kinds));
    }

    /// Forgets that a kind is in one cluster.
    pub fn remove_at(&mut self, cluster: u64, kind: Kinds) {
        if let Some(kinds) = self.single.get_mut(&cluster) {
            *kinds -= kind;
        }
        if let Some(index) = self.range_at(cluster) {
            let (range, kinds) = self.ranges[index].clone();
            let parts = [
                (range.start..cluster, kinds),
                (cluster..cluster + 1, kinds - kind),
                (cluster + 1..range.end, kinds),
            ];
            let parts =
                parts.into_iter().filter(|(part, kinds)| !part.is_empty() && !kinds.is_empty());
            self.ranges.splice(index..=index, parts);
        }
    }

    /// What may be in a cluster.
    pub fn at(&self, cluster: u64) -> Kinds {
        let single = self.single.get(&cluster).copied().unwrap_or_default();
        self.range_at(cluster).map_or(single, |index| single | self.ranges[index].1)
    }

    fn range_at(&self, cluster: u64) -> Option<usize> {
        let index = self.ranges.partition_point(|(range, _)| range.end <= cluster);
        self.ranges.get(index).is_some_and(|(range, _)| range.start <= cluster).then_some(index)
    }
}

/// The same places, in order, none of which touches another's clusters.
fn apart(places: Vec<(Range<u64>, Kinds)>) -> Vec<(Range<u64>, Kinds)> {
    // Where a kind begins, and where it ends.
    let mut edges: Vec<(u64, bool, Kinds)> = places
        .into_iter()
        .flat_map(|(place, kinds)| {
            kinds.iter().flat_map(move |kind| [(place.start, true, kind), (place.end, false, kind)])
        })
        .collect();
    edges.sort_unstable_by_key(|&(at, begins, _)| (at, begins));
    let mut depth = [0u32; 16];
    let mut now = Kinds::empty();
    let mut all: Vec<(Range<u64>, Kinds)> = Vec::new();
    let mut start = 0;
    for (at, begins, kind) in edges {
        if at > start && !now.is_empty() {
            match all.last_mut() {
                Some((last, kinds)) if last.end == start && *kinds == now => last.end = at,
                _ => all.push((start..at, now)),
            }
        }
        start = at;
        let depth = &mut depth[kind.bits().trailing_zeros() as usize];
        *depth = if begins { *depth + 1 } else { *depth - 1 };
        now.set(kind, *depth > 0);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_single_clusters_agree_with_a_set() {
        let kinds = [Kinds::ACTIVE_L1, Kinds::INACTIVE_L1, Kinds::REFCOUNT_TABLE];
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let mut places = MetadataMap::default();
            let mut model = vec![Kinds::empty(); 64];
            for _ in 0..12 {
                let kind = kinds[rng.usize(..3)];
                match rng.u8(..8) {
                    0 => {
                        places.remove(kind);
                        model.iter_mut().for_each(|kinds| *kinds -= kind);
                    }
                    1 | 2 => {
                        let at = rng.u64(..64);
                        places.remove_at(at, kind);
                        model[at as usize] -= kind;
                    }
                    _ => {
                        let some: Vec<Range<u64>> = (0..rng.u8(1..4))
                            .map(|_| {
                                let start = rng.u64(..60);
                                start..start + rng.u64(..5)
                            })
                            .collect();
                        places.add(kind, some.iter().cloned());
                        some.into_iter().flatten().for_each(|at| model[at as usize] |= kind);
                    }
                }
                let found: Vec<Kinds> = (0..64).map(|at| places.at(at)).collect();
                assert_eq!(found, model);
            }
        }
    }

    #[test]
    fn the_length_of_a_table_costs_nothing() {
        let mut places = MetadataMap::default();
        let long = (0..60_000).map(|n| n..n + (1 << 40));
        places.add(Kinds::INACTIVE_L1, long);
        assert_eq!(places.ranges.len(), 1);
        assert_eq!(places.at(1 << 40), Kinds::INACTIVE_L1);
        assert_eq!(places.at(1 << 41), Kinds::empty());
    }
}
