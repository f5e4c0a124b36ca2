//! Host clusters of formats that count none: they come from the end of the file, which moves on in steps.
//!
//! Clusters that no entry names are free. A step makes the file longer by several clusters, which read as zeroes, and
//! taking one of them is a matter of memory. The task that takes the first cluster of a step's second half makes the next
//! step before it goes on, while the others have what is left. Closing the image cuts off what was not used.

use super::allocator::{Allocator, Run, Taken};
use super::lock::Lock;
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};

/// Clusters of the first step. Each step is twice as long as the one before.
const FIRST_STEP: u64 = 16;
/// Bytes that a step has at most, unless one cluster has more.
const MOST_BYTES: u64 = 64 << 20;

/// A format whose new clusters come from the end of the file.
pub trait Appending: Allocator {
    fn file_end(&self) -> &FileEnd;

    /// The offset of a cluster in the file, in bytes.
    fn place_of(&self, cluster: u64) -> u64;

    /// Makes the file long enough for the clusters before `end`, and says on the disk whatever has to be there before an
    /// entry can name one of them. One call at a time.
    fn extend(&self, end: u64) -> impl Future<Output = IoResult>;
}

/// The clusters of a file that no entry names.
pub struct FileEnd {
    pool: Mutex<Pool>,
    /// How many clusters entries may name. It is moved on before an entry can name one behind it.
    end: AtomicU64,
    /// Clusters that a step has at most.
    most: u64,
    /// Clusters that the format can name.
    limit: u64,
    /// Held while the file grows.
    growing: Lock<()>,
}

/// What a file has when its image is opened, in clusters.
#[derive(Clone, Copy, Debug)]
pub struct FileExtent {
    /// Clusters that may be named, or were: new ones come from behind them.
    pub used: u64,
    /// Clusters from here on have never been written.
    pub fresh_from: u64,
    /// Clusters that the format can name.
    pub limit: u64,
}

struct Pool {
    /// Were taken, and given back.
    returned: Vec<Run>,
    /// The first cluster that was never taken, and how many the file has.
    next: u64,
    end: u64,
    fresh_from: u64,
    /// Of the next step, in clusters.
    step: u64,
    /// When `next` comes here, half of the last step is used.
    half_at: Option<u64>,
}

impl FileEnd {
    /// The end of a file that has clusters of `cluster_size` bytes.
    pub fn new(extent: FileExtent, cluster_size: u64) -> FileEnd {
        let most = (MOST_BYTES / cluster_size).max(1);
        FileEnd {
            pool: Mutex::new(Pool::new(extent, most)),
            end: AtomicU64::new(extent.used),
            most,
            limit: extent.limit,
            growing: Lock::new(()),
        }
    }

    /// How many clusters entries may name. No lock.
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Forgets everything: the file has changed, and nobody takes clusters meanwhile.
    pub fn replace(&self, extent: FileExtent) {
        *self.pool.lock() = Pool::new(extent, self.most);
        self.end.store(extent.used, Ordering::Release);
    }

    /// Takes back a run that no entry names.
    pub fn put_back(&self, run: Run) {
        self.pool.lock().returned.push(run);
    }

    /// Whether one of these clusters is free to be taken, or does not exist.
    pub fn has_free(&self, clusters: impl IntoIterator<Item = u64>) -> bool {
        let pool = self.pool.lock();
        let is_free = |cluster: u64| {
            let mut returned = pool.returned.iter();
            cluster >= pool.next
                || returned.any(|run| (run.first..run.first + run.count).contains(&cluster))
        };
        clusters.into_iter().any(is_free)
    }

    /// Forgets what was not used at the end, which the caller cuts off; returns how many clusters the file has without
    /// it.
    pub fn cut(&self) -> u64 {
        let next = self.pool.lock().cut();
        self.end.store(next, Ordering::Release);
        next
    }
}

impl Pool {
    fn new(FileExtent { used, fresh_from, .. }: FileExtent, most: u64) -> Pool {
        let step = FIRST_STEP.min(most);
        Pool { returned: Vec::new(), next: used, end: used, fresh_from, step, half_at: None }
    }

    /// Up to `most` clusters side by side, at least `least`, if the file has them.
    fn take(&mut self, least: u64, most: u64) -> Option<Run> {
        if let Some(at) = self.returned.iter().position(|run| run.count >= least) {
            let run = &mut self.returned[at];
            let taken = Run { count: run.count.min(most), ..*run };
            run.first += taken.count;
            run.count -= taken.count;
            if run.count == 0 {
                self.returned.swap_remove(at);
            }
            return Some(taken);
        }
        let first = self.next;
        let is_fresh = first >= self.fresh_from;
        let limit = if is_fresh || least > 1 { self.end } else { self.fresh_from.min(self.end) };
        let count = most.min(limit.saturating_sub(first));
        if count < least {
            return None;
        }
        self.next += count;
        Some(Run { first, count, is_fresh })
    }

    /// The file has become longer.
    fn grow(&mut self, end: u64, most: u64) {
        self.end = end;
        self.step = (2 * self.step).min(most);
        self.half_at = Some(self.next + (end - self.next) / 2);
    }

    /// Whether somebody should make the file longer although it has clusters left: it is said once.
    fn is_half_used(&mut self) -> bool {
        self.half_at.take_if(|at| self.next >= *at).is_some()
    }

    /// A file that could not be cut still has what was written there: no cluster that was taken becomes fresh.
    fn cut(&mut self) -> u64 {
        self.half_at = None;
        self.fresh_from = self.fresh_from.max(self.next);
        self.returned.sort_by_key(|run| run.first);
        while let Some(&last) = self.returned.last()
            && last.first + last.count == self.next
        {
            self.next = last.first;
            self.returned.pop();
        }
        self.end = self.next;
        self.next
    }
}

/// Takes clusters side by side, and makes the file longer if it has none.
///
/// # Errors
/// ENOSPC where the format can name no more, or those of the storage.
pub async fn take_at_end<F: Appending>(image: &F, least: u64, most: u64) -> IoResult<Taken<'_, F>> {
    let space = image.file_end();
    loop {
        let (taken, is_half_used) = {
            let mut pool = space.pool.lock();
            (pool.take(least, most), pool.is_half_used())
        };
        if let Some(run) = taken {
            let taken = Taken::new(image, run, image.place_of(run.first));
            if is_half_used && let Some(_lock) = space.growing.try_lock() {
                // If it fails there is something left, and the task that finds nothing is told.
                let _ = grow(image, 1).await;
            }
            return Ok(taken);
        }
        let _lock = space.growing.lock().await;
        let (next, end) = {
            let pool = space.pool.lock();
            (pool.next, pool.end)
        };
        if end - next < least {
            grow(image, least).await?;
        }
    }
}

/// Makes the file longer by a step, and by so much that it has `least` clusters that were never taken. The caller has the
/// turn.
async fn grow<F: Appending>(image: &F, least: u64) -> IoResult {
    let space = image.file_end();
    let (next, end, step) = {
        let pool = space.pool.lock();
        (pool.next, pool.end, pool.step)
    };
    let new = (end + step.max(least)).min(space.limit);
    if new <= end || new < next + least {
        return Err(Errno::ENOSPC);
    }
    image.extend(new).await?;
    space.end.store(new, Ordering::Release);
    space.pool.lock().grow(new, space.most);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(used: u64, fresh_from: u64) -> Pool {
        Pool::new(FileExtent { used, fresh_from, limit: u64::MAX }, 64)
    }

    #[test]
    fn clusters_come_from_what_was_given_back_and_then_from_the_end() {
        let mut pool = pool(10, 11);
        assert_eq!(pool.take(1, 4), None, "the file has to grow first");
        pool.end = 20;
        assert_eq!(pool.take(1, 4), Some(Run { first: 10, count: 1, is_fresh: false }));
        assert_eq!(pool.take(1, 4), Some(Run { first: 11, count: 4, is_fresh: true }));
        pool.returned.push(Run { first: 11, count: 2, is_fresh: false });
        assert_eq!(pool.take(3, 3), Some(Run { first: 15, count: 3, is_fresh: true }));
        assert_eq!(pool.take(1, 1), Some(Run { first: 11, count: 1, is_fresh: false }));
    }

    #[test]
    fn it_is_reported_once_when_half_of_a_step_is_used() {
        let mut pool = pool(10, 10);
        assert!(!pool.is_half_used());
        pool.grow(26, 64);
        pool.take(1, 7);
        assert!(!pool.is_half_used());
        pool.take(1, 1);
        assert!(pool.is_half_used() && !pool.is_half_used());
        pool.grow(58, 64);
        assert_eq!(pool.step, 64);
        pool.take(1, 19);
        assert!(!pool.is_half_used());
        pool.take(1, 1);
        assert!(pool.is_half_used());
    }

    #[test]
    fn what_was_given_back_at_the_end_is_cut_off() {
        let mut pool = pool(10, 10);
        pool.end = 26;
        pool.take(1, 6);
        for first in [15, 12, 14] {
            pool.returned.push(Run { first, count: 1, is_fresh: false });
        }
        assert_eq!(pool.cut(), 14);
        assert_eq!((pool.end, pool.returned.len()), (14, 1));
    }

    #[test]
    fn what_was_cut_off_is_not_fresh_when_it_is_taken_again() {
        let mut pool = pool(10, 10);
        pool.end = 26;
        pool.take(1, 6);
        pool.returned.push(Run { first: 14, count: 2, is_fresh: false });
        assert_eq!(pool.cut(), 14);
        pool.grow(30, 64);
        assert_eq!(pool.take(1, 8), Some(Run { first: 14, count: 2, is_fresh: false }));
        assert_eq!(pool.take(1, 8), Some(Run { first: 16, count: 8, is_fresh: true }));
        // Nor is what a file had when it was opened.
        let mut pool = self::pool(10, 12);
        assert_eq!(pool.cut(), 10);
        pool.grow(30, 64);
        assert_eq!(pool.take(1, 8), Some(Run { first: 10, count: 2, is_fresh: false }));
    }
}
