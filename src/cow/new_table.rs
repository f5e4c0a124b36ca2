//! Making a table of the lower level: for formats whose upper table is in memory.
//!
//! One task at a time makes a table, while it has the turn to change the upper table. The order: the new table is
//! durable, then the entry that names it is handed to the kernel, then readers are shown it.

use super::allocator::{Release, Taken};
use super::format::{announce, file};
use super::lookup::pin_empty;
use super::writer::Writer;
use crate::block::{Event, WriteFlags};
use crate::io::{IoResult, IoVec};
use std::future::Future;

/// A format with two levels of tables.
pub trait TwoLevels: Writer {
    /// The turn to change the upper table.
    type UpperLock<'a>
    where
        Self: 'a;

    /// What guards the clusters of a new table until readers are shown it.
    type Claim;

    /// Whether there is a table for a guest offset that may be changed where it is.
    fn has_own_table(&self, guest: u64) -> bool;

    /// Waits for the turn to change the upper table.
    fn lock_upper(&self) -> impl Future<Output = Self::UpperLock<'_>>;

    /// Writes a table, durably, to clusters of its own: empty, or as the one that others refer to, too.
    fn make_table(&self, guest: u64) -> impl Future<Output = IoResult<NewTable<'_, Self>>>;

    /// Shows readers the table at `host`, where the caller has written the entry.
    fn show_table(&self, lock: &Self::UpperLock<'_>, guest: u64, host: u64);
}

/// A table that nothing names yet.
pub struct NewTable<'a, F: TwoLevels> {
    /// Its clusters. It holds what it has to, durably.
    pub taken: Taken<'a, F>,
    pub claim: F::Claim,
    /// The entry of the upper table that names it, as it is stored, and where, in bytes of the file.
    pub entry: [u8; 8],
    pub place: u64,
    /// The table that it replaces.
    pub replaced: Option<Release>,
}

/// Sees to it that there is a table for a guest offset, and that it may be changed, as
/// [`Writer::ensure_table`] asks.
pub async fn ensure_table<F: TwoLevels>(image: &F, guest: u64) -> IoResult {
    if image.has_own_table(guest) {
        return Ok(());
    }
    let lock = image.lock_upper().await;
    // Another task may have made it.
    if image.has_own_table(guest) {
        return Ok(());
    }
    let is_first = !image.has_table(guest);
    let NewTable { taken, claim: _claim, entry, place, replaced } = image.make_table(guest).await?;
    let host = taken.host();
    announce(image, Event::L1Update).await;
    // Whether the write fails or not, the entry may be there.
    taken.keep();
    file(image).write(place, &IoVec::from_ref(&entry), WriteFlags::empty()).await?;
    // What a new table holds need not be read.
    let _first = match is_first {
        true => Some(pin_empty(image, guest).await?),
        false => None,
    };
    image.show_table(&lock, guest, host);
    drop(lock);
    if let Some(replaced) = replaced {
        image.release(&[replaced]).await;
    }
    Ok(())
}
