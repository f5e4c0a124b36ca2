//! Host clusters for what is new: the file's end, which moves on in steps.
//!
//! Nothing counts clusters: those that no table names are free. A step makes the file longer by several clusters,
//! which read as zeroes, and taking one of them is a matter of memory. Closing the image cuts off what was not used,
//! and so does the check of an image that was not closed.

use super::Qed;
use crate::cow::{Allocator, Lock, Run, Taken, cut, file, lengthen};
use crate::io::IoResult;
use crate::io::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Clusters of a step, and bytes that it has at most. Each step is twice as long as the one before.
const FIRST_STEP: u64 = 16;
const MOST_BYTES: u64 = 64 << 20;

/// The clusters of the file that no table names.
pub struct Space {
    pool: Mutex<Pool>,
    /// Where the file ends, as far as entries may lead, in bytes. It is moved on before an entry can lead behind it.
    file_len: AtomicU64,
    /// Held while the file grows.
    growing: Lock<()>,
}

struct Pool {
    /// Were taken, and given back.
    returned: Vec<Run>,
    /// The first cluster that was never taken, and how many the file has.
    next: u64,
    end: u64,
    /// Clusters from here on have never been written.
    fresh_from: u64,
    /// Of the next step, in clusters.
    step: u64,
}

impl Space {
    /// The space of a file of so many bytes, in clusters of `1 << cluster_bits`.
    pub fn new(file_len: u64, cluster_bits: u32) -> Space {
        let end = file_len >> cluster_bits;
        // What follows the last whole cluster may be anything.
        let fresh_from = file_len.div_ceil(1 << cluster_bits);
        let pool = Pool { returned: Vec::new(), next: end, end, fresh_from, step: FIRST_STEP };
        let file_len = AtomicU64::new(end << cluster_bits);
        Space { pool: Mutex::new(pool), file_len, growing: Lock::new(()) }
    }

    /// Bytes of the file's whole clusters: entries that lead behind them make no sense. No lock.
    pub fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    /// Forgets what was not used at the end, which the caller cuts off; returns how long the file is without it, in
    /// clusters.
    fn cut(&self) -> u64 {
        let mut pool = self.pool.lock();
        pool.returned.sort_by_key(|run| run.first);
        while let Some(&last) = pool.returned.last()
            && last.first + last.count == pool.next
        {
            pool.next = last.first;
            pool.returned.pop();
        }
        pool.end = pool.next;
        pool.fresh_from = pool.fresh_from.min(pool.end);
        pool.next
    }
}

impl Pool {
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
}

impl Qed {
    /// Takes clusters side by side, and makes the file longer if it has none.
    pub(super) async fn take_run(&self, least: u64, most: u64) -> IoResult<Taken<'_, Qed>> {
        let bits = self.geometry().cluster_bits;
        loop {
            if let Some(run) = self.space.pool.lock().take(least, most) {
                return Ok(Taken::new(self, run, bits));
            }
            let _turn = self.space.growing.lock().await;
            let (next, end, step) = {
                let pool = self.space.pool.lock();
                (pool.next, pool.end, pool.step)
            };
            if end - next >= least {
                continue;
            }
            let new = next.max(end) + step.max(least);
            lengthen(&file(self), new << bits).await?;
            self.space.file_len.store(new << bits, Ordering::Release);
            let mut pool = self.space.pool.lock();
            pool.end = new;
            pool.step = (2 * step).min((MOST_BYTES >> bits).max(1));
        }
    }

    /// Cuts off what was not used at the file's end.
    pub(super) async fn cut_file(&self) {
        let len = self.space.cut() << self.geometry().cluster_bits;
        self.space.file_len.store(len, Ordering::Release);
        cut(&file(self), len).await;
    }
}

impl Allocator for Qed {
    /// The image says already, durably, that it needs a check ([`Writable::prepare`](crate::cow::Writable::prepare)),
    /// which takes away entries that lead past the end of the file.
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Qed>> {
        self.take_run(1, most).await
    }

    fn put_back(&self, run: Run) {
        self.space.pool.lock().returned.push(run);
    }
}
