//! The rule for overwriting a cluster in place on the fast path.
//!
//! It fixes the order in which a fast write reads the table entry and the permissions.
//!
//! A worker can be preempted between any two of its reads, for longer than a snapshot takes. The rule: a permission
//! that is withdrawn *before* entries change, and given back after, is read before the entry; a permission that is
//! withdrawn *because of* an entry, before that entry can be seen, is read after it.
//!
//! * Before ([`Writer::may_overwrite`], and the permissions below): the change waits for all writes that had the
//!   permission ([`withdraw`]), so that each of them finds the old entry true. A write that reads the entry first can
//!   find the entry of before the change and the permission of after it.
//! * After ([`Writer::may_follow`]): a write that reads these first can miss the entry that has withdrawn them.
//!
//! | permission | read | it is withdrawn by | writes that had it |
//! |---|---|---|---|
//! | the image is not at rest | before | closing it, handing it over, freezing it, or storing what tells of all writes | are waited for |
//! | writes are not stopped for good | before | a change of the file by something else, such as a repair | are waited for |
//! | no flush is needed before writes | before | a write of entries that failed | go on: they ran beside the change that failed, whose old and new clusters both stay allocated |
//!
//! The place that the entry leads to is checked against the length of the file after all that. A file is made longer before an
//! entry can lead to the new part, so a length that is read after the entry is never too short. It is made shorter when no
//! entry leads to the part that is cut off, and after all earlier fast writes have ended. A device that gets shorter by itself has
//! its users paused ([`OwnLength`](crate::block::OwnLength)).

use super::format::data;
use super::lookup::{Found, Piece, piece};
use super::read::{fast_read_through, map_data};
use super::tables::Tables;
use super::write_state::Stop;
use super::writer::Writer;
use crate::block::{Access, Mapping};
use crate::io::InFlight;
use crate::io::epoch::{self, Member};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether an image is at rest: it was not written yet, or is being closed or handed over. Nothing is written to it on
/// the fast path.
pub struct AtRest(AtomicBool);

impl Default for AtRest {
    fn default() -> AtRest {
        AtRest(AtomicBool::new(true))
    }
}

impl AtRest {
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl<E> Tables<E> {
    /// Allows fast writes: everything is on the disk that has to be there before the first write.
    pub fn end_rest(&self) {
        if self.at_rest.get() {
            self.at_rest.0.store(false, Ordering::SeqCst);
        }
    }
}

/// Brings an image to rest: no fast write begins until it is prepared for writing again, and none is under way.
pub async fn begin_rest<F: Writer>(image: &F) {
    without_fast_writes(image, || image.tables().at_rest.0.store(true, Ordering::SeqCst)).await;
}

/// Withdraws a permission that fast writes read before entries, and waits for those that had it.
pub async fn without_fast_writes<F: Writer>(image: &F, withdrawn: impl FnOnce()) {
    withdraw(withdrawn, || data(image).members()).await;
}

/// Withdraws a permission that is read before entries. When it returns, no fast write that had it is under way.
async fn withdraw(change: impl FnOnce(), members: impl FnOnce() -> Vec<Arc<Member>>) {
    change();
    // A queue that comes later sees that it is withdrawn.
    epoch::synchronize(&members()).await;
}

/// Where a write on the fast path goes.
fn fast_write<'a, F: Writer>(
    image: &'a F,
    inflight: &'a InFlight,
    at: u64,
    want: u64,
) -> Mapping<'a> {
    let tables = image.tables();
    let found = look_between(
        || image.may_overwrite() && !tables.at_rest.get() && tables.stopped.get() == Stop::Not,
        || piece(image, at, want),
        || image.may_follow(),
    );
    match found {
        (Some(Ok(Piece { len, found: Found::Data { host, exclusive: true } })), true) => {
            map_data(image, inflight, host, len, Access::Write)
        }
        _ => Mapping::slow(want),
    }
}

/// The fast path of an image that is read and written through the layer, as
/// [`Driver::map`](crate::block::Driver::map) asks.
pub fn map<'a, F: Writer>(
    image: &'a F,
    inflight: &'a InFlight,
    at: u64,
    want: u64,
    access: Access,
) -> Mapping<'a> {
    match access {
        Access::Read => fast_read_through(image, inflight, at, want),
        Access::Write => fast_write(image, inflight, at, want),
        // The mapping of the bytes has to be durable, too.
        Access::DurableWrite => Mapping::slow(want),
    }
}

/// Reads an entry with `look` between the permissions. Returns what `look` has found, and whether all permissions were
/// given.
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

#[cfg(test)]
#[path = "in_place_tests.rs"]
mod tests;
