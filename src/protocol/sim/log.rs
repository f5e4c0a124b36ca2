//! The log of writes to a simulated disk, and the states that a crash may leave.
//!
//! The rule: a change is durable when it was asked to be, or when a flush that began after it has
//! completed. Of the others, a crash keeps any subset, and of each write any 512-byte sectors.

use crate::block::SECTOR;
use fastrand::Rng;
use std::sync::atomic::{AtomicU64, Ordering};

/// One change, or a completed flush. Offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Write {
        offset: u64,
        data: Vec<u8>,
        /// It was durable when it completed.
        durable: bool,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    /// A flush has completed: the first `covers` entries of the log are durable.
    Flush {
        covers: usize,
    },
}

impl Change {
    /// The bytes touched: offset and length.
    fn range(&self) -> (u64, u64) {
        match self {
            Change::Write { offset, data, .. } => (*offset, data.len() as u64),
            Change::Zero { offset, len, .. } | Change::Discard { offset, len } => (*offset, *len),
            Change::Flush { .. } => (0, 0),
        }
    }

    fn apply(&self, image: &mut [u8], kept: impl Fn(u64) -> bool) {
        let (offset, len) = self.range();
        let mut at = offset;
        while at < offset + len {
            let end = (at / SECTOR * SECTOR + SECTOR).min(offset + len);
            if kept(at / SECTOR) {
                let target = &mut image[at as usize..end as usize];
                match self {
                    Change::Write { data, .. } => target
                        .copy_from_slice(&data[(at - offset) as usize..(end - offset) as usize]),
                    _ => target.fill(0),
                }
            }
            at = end;
        }
    }
}

/// The changes since the disk held `base`.
#[derive(Clone, Debug, Default)]
pub struct WriteLog {
    base: Vec<u8>,
    changes: Vec<Change>,
    /// When each happened, among the changes of all disks.
    moments: Vec<u64>,
}

/// Counts the changes of all disks.
static NOW: AtomicU64 = AtomicU64::new(0);

/// One way in which a crash can turn out.
#[derive(Clone, Debug)]
pub struct Crash {
    /// How many entries of the log had happened.
    pub prefix: usize,
    /// What was kept of the entries that were not durable, by index.
    kept: Vec<(usize, Kept)>,
}

#[derive(Clone, Copy, Debug)]
enum Kept {
    Whole,
    /// The sectors that this seed chooses.
    Torn(u64),
}

/// How many crashes are tried after each prefix of a log.
#[derive(Clone, Copy, Debug)]
pub struct Tries {
    /// Up to this number of pending changes, every subset is tried (2 to the power of the number).
    pub every: u32,
    /// If those are fewer, or there are more pending changes, this many random subsets (at least two).
    pub most: usize,
}

impl From<usize> for Tries {
    /// At most (and at least two) of each: at least half of them are at random.
    fn from(most: usize) -> Tries {
        Tries { every: (most / 2).checked_ilog2().unwrap_or(0), most }
    }
}

impl WriteLog {
    /// Of a disk that holds `base`.
    pub(super) fn new(base: Vec<u8>) -> WriteLog {
        WriteLog { base, ..WriteLog::default() }
    }

    pub(super) fn push(&mut self, change: Change) {
        self.changes.push(change);
        self.moments.push(NOW.fetch_add(1, Ordering::SeqCst));
    }

    /// Everything that happened, oldest first.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// The crashes after every prefix of the log: nothing volatile kept, everything kept, then every
    /// subset, or as many of them at random as are wanted, some of them torn.
    pub fn crashes(&self, seed: u64, tries: impl Into<Tries>) -> impl Iterator<Item = Crash> + '_ {
        let (mut rng, tries) = (Rng::with_seed(seed), tries.into());
        (0..=self.changes.len()).flat_map(move |prefix| self.crashes_at(prefix, &mut rng, tries))
    }

    /// As [`WriteLog::crashes`], of a machine with two disks: what is kept of one says nothing of what is kept
    /// of the other, but both have come equally far. Every subset is tried of what is pending on both
    /// together.
    pub fn crashes_of_two<'a>(
        disks: [&'a WriteLog; 2],
        seed: u64,
        tries: impl Into<Tries>,
    ) -> impl Iterator<Item = [Crash; 2]> + 'a {
        let (mut rng, tries) = (Rng::with_seed(seed), tries.into());
        let mut moments: Vec<u64> = disks.iter().flat_map(|log| log.moments.clone()).collect();
        moments.sort_unstable();
        let ends = std::iter::once(0).chain(moments.into_iter().map(|moment| moment + 1));
        ends.flat_map(move |end| {
            let happened =
                disks.map(|log| (log, log.moments.partition_point(|&moment| moment < end)));
            let pending = happened.map(|(log, prefix)| log.volatile(prefix).len());
            let [first, second] =
                happened.map(|(log, prefix)| log.crashes_at(prefix, &mut rng, tries));
            if pending[0] + pending[1] <= tries.every as usize {
                let with = |a| second.iter().map(move |b: &Crash| [Crash::clone(a), b.clone()]);
                return first.iter().flat_map(with).collect::<Vec<_>>();
            }
            // Nothing of one and everything of the other come first in both lists.
            let corners = [(0, 0), (1, 1), (0, 1), (1, 0)];
            let more = first.len().max(second.len());
            let pairs: Vec<_> = (0..more.max(if second.len() > 1 { corners.len() } else { 0 }))
                .map(|n| {
                    let (a, b) = match corners.get(n) {
                        Some(&corner) if first.len() > 1 && second.len() > 1 => corner,
                        _ => (n, rng.usize(..second.len())),
                    };
                    [first[a % first.len()].clone(), second[b % second.len()].clone()]
                })
                .collect();
            pairs
        })
    }

    fn crashes_at(&self, prefix: usize, rng: &mut Rng, tries: Tries) -> Vec<Crash> {
        let volatile = self.volatile(prefix);
        let whole = |keep: &dyn Fn(usize) -> bool| {
            let kept = volatile.iter().enumerate().filter(|&(n, _)| keep(n));
            Crash { prefix, kept: kept.map(|(_, &index)| (index, Kept::Whole)).collect() }
        };
        let mut crashes = vec![whole(&|_| false)];
        if volatile.is_empty() {
            return crashes;
        }
        crashes.push(whole(&|_| true));
        if volatile.len() <= tries.every as usize {
            crashes.extend(
                (1..(1usize << volatile.len()) - 1).map(|set| whole(&|n| set >> n & 1 == 1)),
            );
        }
        while crashes.len() < tries.most {
            let mut kept = Vec::new();
            for &index in &volatile {
                match rng.u8(0..3) {
                    0 => {}
                    1 => kept.push((index, Kept::Whole)),
                    _ => kept.push((index, Kept::Torn(rng.u64(..)))),
                }
            }
            crashes.push(Crash { prefix, kept });
        }
        crashes
    }

    /// The entries among the first `prefix` that a crash may lose.
    fn volatile(&self, prefix: usize) -> Vec<usize> {
        let happened = &self.changes[..prefix];
        let covered = happened.iter().map(|change| match change {
            Change::Flush { covers } => *covers,
            _ => 0,
        });
        let covered = covered.max().unwrap_or(0);
        (covered..prefix)
            .filter(|&n| match &happened[n] {
                Change::Write { durable, .. } => !durable,
                Change::Flush { .. } => false,
                _ => true,
            })
            .collect()
    }

    /// The bytes that are found after `crash`.
    pub fn image(&self, crash: &Crash) -> Vec<u8> {
        let mut image = self.base.clone();
        let volatile = self.volatile(crash.prefix);
        for (index, change) in self.changes[..crash.prefix].iter().enumerate() {
            if volatile.binary_search(&index).is_err() {
                change.apply(&mut image, |_| true);
                continue;
            }
            match crash.kept.iter().find(|(kept, _)| *kept == index) {
                Some((_, Kept::Whole)) => change.apply(&mut image, |_| true),
                Some((_, Kept::Torn(seed))) => change
                    .apply(&mut image, |sector| Rng::with_seed(seed.wrapping_add(sector)).bool()),
                None => {}
            }
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn write(offset: u64, byte: u8, len: usize) -> Change {
        Change::Write { offset, data: vec![byte; len], durable: false }
    }

    #[test]
    fn a_crash_keeps_what_was_flushed_and_any_part_of_the_rest() {
        let log = WriteLog {
            base: vec![0; 1024],
            changes: vec![
                write(0, 1, 1024),
                write(0, 2, 512),
                // It began before the second write, so it covers only the first.
                Change::Flush { covers: 1 },
                Change::Zero { offset: 512, len: 512, unmap: false },
            ],
            ..WriteLog::default()
        };
        let mut found = BTreeSet::new();
        for crash in log.crashes(1, 64) {
            let image = log.image(&crash);
            found.insert((crash.prefix, image[0], image[512]));
        }
        let all: BTreeSet<_> = [
            // Before anything; any sector of the first write; it and any part of the second.
            vec![(0, 0, 0)],
            vec![(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)],
            vec![(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1), (2, 2, 0), (2, 2, 1)],
            // The first is durable.
            vec![(3, 1, 1), (3, 2, 1)],
            vec![(4, 1, 1), (4, 2, 1), (4, 1, 0), (4, 2, 0)],
        ]
        .concat()
        .into_iter()
        .collect();
        assert_eq!(found, all);
    }

    #[test]
    fn a_crash_of_two_disks_comes_at_one_moment_and_keeps_anything_of_either() {
        let mut logs = [(); 2].map(|()| WriteLog { base: vec![0; 512], ..WriteLog::default() });
        logs[0].push(write(0, 1, 512));
        logs[1].push(write(0, 2, 512));
        logs[1].push(Change::Flush { covers: 1 });
        logs[0].push(write(0, 3, 512));
        let [a, b] = &logs;
        let found: BTreeSet<_> = WriteLog::crashes_of_two([a, b], 1, 16)
            .map(|[x, y]| (x.prefix + y.prefix, a.image(&x)[0], b.image(&y)[0]))
            .collect();
        let all: BTreeSet<_> = [
            vec![(0, 0, 0)],
            vec![(1, 0, 0), (1, 1, 0)],
            vec![(2, 0, 0), (2, 1, 0), (2, 0, 2), (2, 1, 2)],
            vec![(3, 0, 2), (3, 1, 2)],
            vec![(4, 0, 2), (4, 1, 2), (4, 3, 2)],
        ]
        .concat()
        .into_iter()
        .collect();
        assert_eq!(found, all);
    }

    #[test]
    fn every_subset_of_what_is_pending_on_two_disks_is_tried() {
        let mut logs = [(); 2].map(|()| WriteLog { base: vec![0; 4096], ..WriteLog::default() });
        for n in 0..7 {
            logs[n % 2].push(write(n as u64 * 512, 1, 512));
        }
        let [a, b] = &logs;
        let mut found = vec![BTreeSet::new(); 8];
        for [x, y] in WriteLog::crashes_of_two([a, b], 1, Tries { every: 6, most: 4 }) {
            found[x.prefix + y.prefix].insert((a.image(&x), b.image(&y)));
        }
        for (pending, images) in found.iter().enumerate().take(7) {
            assert_eq!(images.len(), 1 << pending, "{pending} pending");
        }
        assert!(found[7].len() < 1 << 7);
    }

    #[test]
    fn every_subset_of_so_many_pending_writes_is_tried_and_a_few_of_more() {
        let mut log = WriteLog { base: vec![0; 11 * 512], ..WriteLog::default() };
        (0..11).for_each(|n| log.push(write(n * 512, 1, 512)));
        let mut found = vec![BTreeSet::new(); 12];
        for crash in log.crashes(1, Tries { every: 10, most: 4 }) {
            found[crash.prefix].insert(log.image(&crash));
        }
        for (pending, images) in found.iter().enumerate().take(11) {
            assert_eq!(images.len(), 1 << pending, "{pending} pending");
        }
        assert!(found[11].len() <= 4);
    }

    #[test]
    fn durable_writes_need_no_flush() {
        let durable = Change::Write { offset: 0, data: vec![1; 512], durable: true };
        let log = WriteLog { base: vec![0; 512], changes: vec![durable], ..WriteLog::default() };
        let images: Vec<_> = log.crashes(1, 8).map(|crash| log.image(&crash)[0]).collect();
        assert_eq!(images, [0, 1], "once before and once after");
    }
}
