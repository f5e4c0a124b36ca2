//! When a fast write may overwrite a cluster in place: the order in which it reads the L2 entry and
//! the permissions.
//!
//! A worker can be preempted between any two of its reads, for longer than a snapshot takes. The
//! rule: a permission that is withdrawn *before* entries change, and given back after, is read
//! before the entry; a permission that is withdrawn *because of* an entry, before that entry can be
//! seen, is read after it.
//!
//! * Before: the change waits for all writes that had the permission ([`withdraw`]), so that each of them
//!   finds the old entry true. A write that reads the entry first can find an entry of before the change and
//!   the permission of after it.
//! * After: a write that reads these first can miss the entry that has withdrawn them.
//!
//! | permission | read | it is withdrawn by | writes that had it |
//! |---|---|---|---|
//! | no snapshot is being made | before | making one | are waited for |
//! | the image is not at rest | before | closing it, handing it over, freezing it below an overlay, amending it, storing its bitmaps | are waited for |
//! | writes are not stopped for good | before | a repair | are waited for |
//! | no flush is needed before writes | before | a write of entries that failed | go on: they ran beside the change that failed, whose old and new clusters both stay allocated |
//! | no entry points at metadata | after | an entry that does, before it can be found in the cache | go on: the entries that they found point at data |
//! | the image is not corrupt | after | whoever finds that it is | go on, for the same reason |
//!
//! Where the entry leads is checked against the length of the file after all that. A file is made longer before an
//! entry can lead to the new part, so that a length that is read after the entry is never too short. It
//! is made shorter when no entry leads to what is cut off, and after all fast writes of before have ended
//! ([`Qcow2::cut_to_use`]). A device that gets shorter by itself has its users paused
//! ([`OwnLength`](crate::block::OwnLength)).

use super::Qcow2;
use super::write_state::Stop;
use crate::cow::{BadEntryOf, Piece, piece};
use crate::io::epoch::{self, Member};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What speaks against fast writes, of an image or of a model of one.
trait Permissions {
    /// A snapshot is being made.
    fn is_frozen(&self) -> bool;
    fn is_at_rest(&self) -> bool;
    fn stop(&self) -> Stop;
    /// An entry was seen that points at metadata.
    fn is_met(&self) -> bool;
    fn is_corrupt(&self) -> bool;
}

/// Reads an entry with `look` between the permissions. Returns what `look` has found, and whether all
/// were given.
fn look_permitted<T>(image: &impl Permissions, look: impl FnOnce() -> T) -> (T, bool) {
    look_between(
        || !image.is_frozen() && !image.is_at_rest() && image.stop() == Stop::Not,
        look,
        || !image.is_met() && !image.is_corrupt(),
    )
}

fn look_between<T>(
    before: impl FnOnce() -> bool,
    look: impl FnOnce() -> T,
    after: impl FnOnce() -> bool,
) -> (T, bool) {
    let may_change_nothing = before();
    let found = look();
    let is_allowed = may_change_nothing && after();
    (found, is_allowed)
}

/// Withdraws a permission that is read before entries. When it returns, no fast write that had it is
/// under way.
async fn withdraw(change: impl FnOnce(), members: impl FnOnce() -> Vec<Arc<Member>>) {
    change();
    // A queue that comes later sees that it is withdrawn.
    epoch::synchronize(&members()).await;
}

impl Permissions for Qcow2 {
    fn is_frozen(&self) -> bool {
        self.snapshots.is_frozen()
    }

    fn is_at_rest(&self) -> bool {
        self.is_at_rest.load(Ordering::Acquire)
    }

    fn stop(&self) -> Stop {
        self.stopped.get()
    }

    fn is_met(&self) -> bool {
        self.overlaps.is_met()
    }

    fn is_corrupt(&self) -> bool {
        self.corruption.is_fatal()
    }
}

impl Qcow2 {
    /// As [`piece`], and whether a fast write may go to the place that was found, if no other
    /// reference to it exists.
    pub(super) fn piece_to_overwrite(
        &self,
        at: u64,
        want: u64,
    ) -> (Option<Result<Piece, BadEntryOf<Qcow2>>>, bool) {
        look_permitted(self, || piece(self, at, want))
    }

    /// Fast writes are allowed: all is on the disk that has to be there before the first write.
    pub(super) fn end_rest(&self) {
        if self.is_at_rest.load(Ordering::Acquire) {
            self.is_at_rest.store(false, Ordering::SeqCst);
        }
    }

    /// No fast write begins until the image is prepared for writing again, and none is under way.
    pub(super) async fn begin_rest(&self) {
        self.without_fast_writes(|| self.is_at_rest.store(true, Ordering::SeqCst)).await;
    }

    /// Withdraws a permission that fast writes read before entries, and waits for those that had it.
    pub(super) async fn without_fast_writes(&self, withdrawn: impl FnOnce()) {
        withdraw(withdrawn, || self.data().members()).await;
    }
}

#[cfg(test)]
#[path = "in_place_tests.rs"]
mod tests;
