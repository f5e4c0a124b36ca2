//! What formats stand on that map a disk's clusters through tables: qcow2 and its relatives.
//!
//! A guest's range leads to a table entry, and the format decodes the entry to one [`Found`]: data at a host offset
//! (exclusively its own, or not), zeroes, unallocated (the backing file decides), or compressed. From that the layer
//! reads, tells block status, writes, and changes entries. It knows no headers, reference counts or snapshots, and
//! names no format. Everything is generic over the format, so every call is static.
//!
//! # What a format writes
//!
//! | trait | what it says | it gets |
//! |---|---|---|
//! | [`Format`] | where tables are, how an entry is parsed and decoded, its words for damage | [`lookup`], [`read_range`], [`fast_read`], [`status`], [`decider`] |
//! | [`Writable`] | how an entry is stored, what has to be on disk before the first write | [`change_entries`], [`write_suspects`] |
//! | [`Journaling`] | which entries may wait in memory that outlives the process | [`keep_entries`], [`settle_journal`] |
//! | [`Recovering`] | what proves that entries a killed process left are still right | [`take_over`] |
//! | [`Allocator`] | where clusters come from and go to | [`Taken`], [`Freed`] |
//! | [`Appending`] | what has to be done before the file's end holds clusters | [`take_at_end`] |
//! | [`Writer`] | which clusters may be overwritten, the entry after a write, new tables | [`write_range`], [`map`] |
//! | [`TwoLevels`] | how a new table of the lower level is made and named | [`ensure_table`] |
//! | [`Zeroing`] | what an entry becomes when its cluster is emptied | [`zero_range`], [`discard_range`] |
//! | [`Packing`] | where packed clusters go, and their entries | [`store_packed`] |
//!
//! A format that is only read implements the first. Its tables may have one level or two; a flat table counts as tables
//! that lie side by side ([`Shape`]). Entries have any width on the disk, and one or two words in memory.
//!
//! # Parts, and what each of them owns
//!
//! | part | it owns |
//! |---|---|
//! | [`Tables`] | all that is in memory of one mapping; the parts up to [`Stopped`] are its fields |
//! | [`TableCache`] | slices of tables, read without a lock |
//! | [`Visits`], [`Ranges`] | requests that use what they looked up; guest clusters whose mapping changes |
//! | `Batches` | changes of entries on their way to the kernel, and the turns to write a slice |
//! | [`Journal`] | entries that were answered and wait until what they show is durable |
//! | `Suspects`, [`Stopped`] | slices whose write failed; whether the mapping may be changed |
//! | [`TopTable`] | the upper of two levels, read without a lock; the format's own |
//! | [`Unclosed`] | what is known of a process that did not close the image; the format's own |
//! | [`Freed`] | clusters on their way to being free; the format's own |
//! | [`FileEnd`] | clusters at the end of a file, for formats that count none; the format's own |
//!
//! # The order in which things reach the disk
//!
//! The layer keeps three orders for every format; each format states the rest, once.
//!
//! * New data, and bytes that were copied or zeroed around it, are written before the entry that shows them; what was
//!   copied is durable before that entry is on the disk. Then readers are shown the entry, then the guest is answered.
//! * Clusters are safe from other owners before they are used ([`Allocator::take`]): a format with reference counts makes
//!   its reservation durable, one that appends relies on a mark that the image is in use ([`Writable::prepare`]).
//! * A table is durable before what names it ([`Writer::ensure_table`]); a cluster is reused only when the entry that
//!   dropped it is durable and no older request can use it ([`Freed`]).
//!
//! # The order of locks
//!
//! Held across waits, each taken only after those before it:
//!
//! 1. a range of guest clusters ([`Ranges`]); a task has one at a time;
//! 2. the format's lock on its upper table;
//! 3. the turn to settle the journal, then the turn to write a slice;
//! 4. the format's locks on its space (packing, then counts), then on its file's length, then on its header.
//!
//! A [`Visit`] and a pinned slice are no locks: a task that has them may wait for the others, but nothing that holds a
//! lock of the third or fourth rank waits for visits to end. Mutexes inside the parts are never held across a wait; under
//! them, [`Freed`] asks [`Visits`], and `Suspects` pins slices of the cache.

mod allocator;
mod appending;
mod batch;
mod emptied;
mod file_len;
mod format;
mod freed;
mod in_place;
mod journal;
mod lock;
mod lookup;
mod new_table;
mod packed;
mod padded;
mod ranges;
mod read;
mod record;
mod references;
mod status;
mod suspects;
mod table_cache;
mod tables;
mod take_over;
mod top_table;
mod traits;
mod unclosed;
mod visits;
mod writable;
mod write;
mod write_state;
mod writer;
mod zero;
mod zeroing;

pub use allocator::{Allocator, Release, Run, Taken};
pub use appending::{Appending, FileEnd, FileExtent, take_at_end};
pub use batch::change_entries;
pub use emptied::{discard_in_place, zero_in_place};
pub use file_len::{cut, lengthen};
pub use format::{Format, announce, backing, data, file};
pub use freed::{Freed, FreedBatch};
pub use in_place::{AtRest, begin_rest, map, without_fast_writes};
pub use journal::{Journal, Journaling, Kept, forget_records, keep_entries, settle_journal};
pub use lock::{Lock, LockGuard};
pub use lookup::{BadEntryOf, Compressed, Found, Piece, find, lookup, piece, pin, pin_empty};
pub use new_table::{NewTable, TwoLevels, ensure_table};
pub use packed::{Packing, Unpacking, read_packed, store_packed};
pub use padded::read_padded;
pub use ranges::{RangeGuard, Ranges};
pub use read::{decider, fast_read, fast_read_through, map_data, read_range};
pub use references::References;
pub use status::{status, stored_status};
pub use suspects::{pin_suspects, write_suspects};
pub use table_cache::{Pinned, SliceNo, TableCache, TableEntry};
pub use tables::{Shape, Tables};
pub use take_over::{Claimed, Owned, Recovering, take_over};
pub use top_table::{TopEntry, TopTable};
pub use traits::traits_over;
pub use unclosed::{Mark, Unclosed};
pub use visits::{Visit, Visits};
pub use writable::{Writable, check_ready, check_sound};
pub use write::{reads_zero, write_range};
pub use write_state::{Stop, Stopped};
pub use writer::{Need, Writer};
pub use zero::{discard_range, empty_clusters, write_zeroes, zero_range};
pub use zeroing::{Empty, Zeroing};

/// The result of a future that is ready.
#[cfg(test)]
fn poll_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}
