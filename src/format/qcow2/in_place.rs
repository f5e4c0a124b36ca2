//! When a fast write may overwrite a cluster in place: the order in which it reads the L2 entry and
//! the permissions.
//!
//! A worker can be preempted between any two of its reads, for longer than a snapshot takes. The
//! rule: a permission that is withdrawn *before* entries change, and given back after, is read
//! before the entry; a permission that is withdrawn *because of* an entry, before that entry can be
//! seen, is read after it.
//!
//! * Before: no snapshot is being made, the image is open for writes, writes are not stopped. The
//!   change waits for all writes that were announced before ([`crate::io::epoch`]), so that a write
//!   which had the permission still finds the old entry true. A write that reads the entry first can
//!   find an entry of before the change and the permission of after it.
//! * After: no entry was seen that points at metadata, and the image is not marked corrupt. A write
//!   that reads these first can miss the entry that has withdrawn them.

use super::Qcow2;
use super::lookup::{Bad, Piece};
use super::standing::Stop;
use std::sync::atomic::Ordering;

/// Reads an entry with `look` between two permissions. Returns what `look` has found, and whether
/// both were given.
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

impl Qcow2 {
    /// As [`Qcow2::piece`]; and whether a fast write may go to the place that was found, if no other
    /// reference to it exists.
    pub(super) fn piece_to_overwrite(
        &self,
        at: u64,
        want: u64,
    ) -> (Option<Result<Piece, Bad>>, bool) {
        look_between(
            || {
                !self.snapshots.is_frozen()
                    && self.is_prepared.load(Ordering::Acquire)
                    && self.stopped.get() == Stop::Not
            },
            || self.piece(at, want),
            || !self.overlaps.is_met() && !self.corruption.is_fatal(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_write_that_is_preempted_until_a_snapshot_is_made_does_not_go_into_its_clusters() {
        let (is_frozen, is_copied) = (Cell::new(true), Cell::new(true));
        let look = || {
            let seen = is_copied.get();
            // The worker is preempted here: the snapshot takes the cluster, and writes go on.
            is_copied.set(false);
            is_frozen.set(false);
            seen
        };
        let (copied, is_allowed) = look_between(|| !is_frozen.get(), look, || true);
        assert!(copied && !is_allowed);
        let look = || is_copied.get();
        assert_eq!(look_between(|| !is_frozen.get(), look, || true), (false, true));
    }

    #[test]
    fn an_entry_that_withdraws_the_permission_is_not_followed() {
        let is_met = Cell::new(false);
        // The slice is loaded by another worker, which sees where the entry points.
        let look = || is_met.set(true);
        assert_eq!(look_between(|| true, look, || !is_met.get()), ((), false));
    }
}
