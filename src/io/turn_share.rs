//! The limits on what one turn does for one source or for tasks, so that all get their share.
//!
//! Work that is left waits for the next turn.
//!
//! Copies are what takes long. Tasks count the bytes that they copy, or hand to a ring whose kernel may copy
//! them at once; sources count those of the requests that they take.

use std::cell::Cell;

/// Bytes that one source's requests, or tasks, may move in a turn. The last one may go beyond.
pub const BYTES: u64 = 4 << 20;

/// Tasks that are run in a turn.
pub const TASKS: usize = 256;

thread_local! {
    static MOVED: Cell<u64> = const { Cell::new(0) };
}

/// Counts bytes that this thread has moved.
pub(super) fn moved(bytes: u64) {
    MOVED.with(|moved| moved.set(moved.get().wrapping_add(bytes)));
}

/// What this thread has moved since it began, in bytes.
pub(super) fn moved_so_far() -> u64 {
    MOVED.with(Cell::get)
}
