//! The list of bitmaps that record a node's writes, as the fast path reads it.
//!
//! Reading it takes no lock. A node without bitmaps costs the fast path one load of a pointer.
//!
//! The list is replaced whole. An old one is kept until all fast requests that may have seen it have
//! ended ([`crate::io::epoch`]).

use super::Bits;
use crate::io::InFlight;
use crate::io::epoch::{Grace, Member};
use crate::io::sync::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

#[derive(Default)]
pub struct Recorders {
    /// What `owner` holds as `now`, for readers that do not lock; null if it has none.
    now: AtomicPtr<List>,
    owner: Mutex<Owner>,
}

struct List(Vec<Arc<Bits>>);

#[derive(Default)]
struct Owner {
    now: Option<Arc<List>>,
    retired: Vec<(Grace, Arc<List>)>,
}

impl Recorders {
    /// Whether nothing is recorded.
    pub fn is_idle(&self) -> bool {
        self.now.load(Ordering::Acquire).is_null()
    }

    /// The bits to mark, for the fast path.
    #[inline]
    pub fn fast<'a>(&'a self, _inflight: &'a InFlight) -> &'a [Arc<Bits>] {
        // SAFETY: the pointer is null or what `owner` held when it was stored. A replaced list is dropped only after
        // every in-flight record older than the replacement has ended, and `_inflight` is this record or a younger
        // one, which sees the new pointer.
        let list = unsafe { self.now.load(Ordering::Acquire).as_ref() };
        list.map_or(&[], |list| &list.0)
    }

    /// The bits to mark, for the slow path and the control plane.
    pub fn all(&self) -> Vec<Arc<Bits>> {
        if self.is_idle() {
            return Vec::new();
        }
        self.owner.lock().now.as_ref().map_or(Vec::new(), |list| list.0.clone())
    }

    /// Replaces the bitmaps that record. `members` are the queues that may be on the fast path now.
    pub fn replace(&self, bits: Vec<Arc<Bits>>, members: &[Arc<Member>]) {
        let new = (!bits.is_empty()).then(|| Arc::new(List(bits)));
        let mut owner = self.owner.lock();
        let pointer =
            new.as_ref().map_or(std::ptr::null_mut(), |list| Arc::as_ptr(list).cast_mut());
        self.now.store(pointer, Ordering::Release);
        let old = std::mem::replace(&mut owner.now, new);
        owner.retired.extend(old.map(|list| (Grace::begin(), list)));
        owner.retired.retain(|(grace, _)| !grace.has_passed(members));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::epoch::Announcer;

    #[test]
    fn a_list_stays_while_a_request_may_still_see_it() {
        let recorders = Recorders::default();
        assert!(recorders.is_idle());
        let bits = Arc::new(Bits::new(1 << 20, 16).unwrap());
        let announcer = Announcer::default();
        let members = [announcer.member().clone()];
        recorders.replace(vec![bits.clone()], &members);
        let guard = announcer.enter();
        let seen = recorders.fast(guard.in_flight());
        recorders.replace(Vec::new(), &members);
        seen[0].mark(0, 1);
        assert!(Arc::strong_count(&bits) > 1, "it is in the retired list");
        assert!(recorders.is_idle() && recorders.all().is_empty());
        drop(guard);
        recorders.replace(Vec::new(), &members);
        assert_eq!((bits.count(), Arc::strong_count(&bits)), (1, 1));
    }
}
