//! Detection of overlapping writes to a node, and the order in which they wait.
//!
//! Most writes may run side by side. A *serialising* one (a read-modify-write, whose read and write
//! must not have another write between them) waits for every older overlapping write, and younger
//! overlapping writes wait for it. Ranges are rounded out to the request alignment by the caller.
//!
//! Writes on the slow path are listed here. Those on the fast path are not: they look at
//! [`Overlap::has_barrier`] after their worker has announced itself ([`crate::io::epoch`]), and a
//! serialising write first raises the barrier, then waits until everything announced before has
//! ended. Waiting only for older requests is what makes a deadlock impossible.

use crate::io::epoch;
use crate::io::sync::{Mutex, Waiters};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Default)]
pub struct Overlap {
    list: Mutex<List>,
    barriers: AtomicUsize,
}

#[derive(Default)]
struct List {
    next_id: u64,
    writes: Vec<Write>,
}

struct Write {
    id: u64,
    range: Range<u64>,
    serialising: bool,
    waiters: Waiters,
}

/// A write's place in the list, until it is dropped.
pub struct Listed<'a> {
    overlap: &'a Overlap,
    id: u64,
    serialising: bool,
}

impl Overlap {
    /// Whether a serialising write is in flight, so that fast writes must take the slow path.
    pub fn has_barrier(&self) -> bool {
        self.barriers.load(Ordering::SeqCst) != 0
    }

    /// Lists an ordinary write, after the older serialising ones that it overlaps.
    pub async fn write(&self, range: Range<u64>) -> Listed<'_> {
        let listed = self.list(range, false);
        listed.wait_for_older().await;
        listed
    }

    /// Lists a serialising write and waits until nothing older that overlaps is in flight. `members` returns the
    /// queues that may have fast writes on this node. It is called once the barrier is up: queues that join later see
    /// the barrier, and those that joined before are waited for.
    pub async fn serialise(
        &self,
        range: Range<u64>,
        members: impl FnOnce() -> Vec<Arc<epoch::Member>>,
    ) -> Listed<'_> {
        self.barriers.fetch_add(1, Ordering::SeqCst);
        let listed = self.list(range, true);
        epoch::synchronize(&members()).await;
        listed.wait_for_older().await;
        listed
    }

    fn list(&self, range: Range<u64>, serialising: bool) -> Listed<'_> {
        let mut list = self.list.lock();
        let id = list.next_id;
        list.next_id += 1;
        list.writes.push(Write { id, range, serialising, waiters: Waiters::new() });
        Listed { overlap: self, id, serialising }
    }
}

impl Listed<'_> {
    async fn wait_for_older(&self) {
        self.overlap
            .list
            .wait_for(|list| {
                let Some(mine) = list.writes.iter().position(|w| w.id == self.id) else {
                    return Ok(());
                };
                let range = list.writes[mine].range.clone();
                let blocker = list.writes.iter_mut().find(|other| {
                    other.id < self.id
                        && (self.serialising || other.serialising)
                        && other.range.start < range.end
                        && range.start < other.range.end
                });
                blocker.map_or(Ok(()), |other| Err(&mut other.waiters))
            })
            .await
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        let mut list = self.overlap.list.lock();
        let Some(at) = list.writes.iter().position(|w| w.id == self.id) else { return };
        let waiters = list.writes.swap_remove(at).waiters;
        drop(list);
        if self.serialising {
            self.overlap.barriers.fetch_sub(1, Ordering::SeqCst);
        }
        waiters.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    #[test]
    fn who_joins_while_a_barrier_goes_up_is_waited_for_or_sees_it() {
        let overlap = Overlap::default();
        let joined = epoch::Announcer::default();
        let guard = joined.enter();
        let mut serialising = pin!(overlap.serialise(0..512, || {
            assert!(overlap.has_barrier(), "a member that joins now would go past it");
            vec![joined.member().clone()]
        }));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(serialising.as_mut().poll(&mut cx).is_pending());
        drop(guard);
        assert!(serialising.as_mut().poll(&mut cx).is_ready());
    }
}
