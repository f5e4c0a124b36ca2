//! Takes over the entries that a killed process has left in memory that outlives it.
//!
//! Each record must fit what the disk says: its entry is still the one that it replaces (or already the new one; or,
//! if the record is marked, a newer one), and its cluster is in use and referred to by no entry, or by the entry that it
//! replaces alone. Where something else has changed the image meanwhile, or the memory, taking over is refused.

use super::journal::{Journaling, settle_journal};
use super::lookup::pin;
use super::record::{Left, clear_record, read_records};
use crate::block::{Error, Survivor};
use crate::io::Errno;
use std::collections::BTreeSet;
use std::future::{Future, ready};
use std::sync::Arc;

/// Which entries may refer to the host cluster of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owned {
    /// This host cluster, by number: no other entry refers to it.
    Cluster(u64),
    /// A place that belongs to the guest cluster for ever.
    Fixed,
}

/// What records name.
pub struct Claimed {
    /// Host clusters, by number, that become the guest's.
    pub hosts: BTreeSet<u64>,
    /// The guest clusters, by offset.
    pub guests: Vec<u64>,
    /// The opening of the image that has left the records ([`Journal::number`](super::Journal::number)).
    pub opening: u32,
}

/// What taking over asks of a format.
pub trait Recovering: Journaling {
    /// The node's name, for the log.
    fn name(&self) -> &str;

    fn is_writable(&self) -> bool;

    /// How many clusters the guest's disk has.
    fn guest_clusters(&self) -> u64;

    /// Whether the table of a guest offset exists and may be changed where it is.
    fn has_own_table(&self, guest: u64) -> bool;

    /// The host cluster of an entry that shows data and that no other entry can refer to.
    fn owned(&self, guest: u64, entry: Self::Entry) -> Option<Owned>;

    /// Whether all of these host clusters are in use and not reserved for others, and no entry refers to them.
    fn are_leaked(&self, claimed: &Claimed) -> impl Future<Output = Result<bool, Error>>;

    /// Memory with entries has come: the image must not be marked as one without such entries.
    fn expect_entries(&self) {}

    /// Entries are going to be kept, and those that an earlier process has left are handed over. Begins to take back what
    /// that process had taken for itself, or not yet given back; `was_in_use`: it was writing the image when it was killed.
    fn begin_keeping(&self, _was_in_use: bool) -> impl Future<Output = ()> {
        ready(())
    }
}

fn failed(errno: Errno) -> Error {
    Error::os("what was written before the daemon was killed", errno)
}

/// Takes over what `memory` has, and keeps entries there from now on.
pub async fn take_over<F: Recovering>(image: &F, memory: Arc<dyn Survivor>) -> Result<(), Error> {
    let journal = &image.tables().journal;
    // From here on readers see what the disk has, except entries that begin to wait in another user's memory.
    settle_journal(image).await.map_err(failed)?;
    let left = read_records(memory.words());
    let user = journal.user_before(memory.words());
    if !left.is_empty() {
        if !image.is_writable() {
            return Err(Error::new(
                "what was written before the daemon was killed cannot be taken up: the image was \
                 opened read-only",
            ));
        }
        image.expect_entries();
        image.prepare().await.map_err(failed)?;
        let records: Vec<usize> = left.iter().map(|left| left.record).collect();
        let taken = hand_over_left(image, left, user.unwrap_or(0)).await?;
        // Only now: a process that is killed before begins again.
        records.into_iter().for_each(|record| clear_record(memory.words(), record));
        log::info!(
            "node '{}': {taken} clusters that were written before the daemon was killed are taken up",
            image.name()
        );
    }
    if image.is_writable() {
        image.begin_keeping(user.is_some()).await;
    }
    journal.keep_in(memory);
    // If another user has memory already, nothing is kept from now on.
    settle_journal(image).await.map_err(failed)
}

/// Hands over what another process has left; how many entries there were.
async fn hand_over_left<F: Recovering>(
    image: &F,
    left: Vec<Left<F::Entry>>,
    opening: u32,
) -> Result<usize, Error> {
    let tables = image.tables();
    // Nothing is allocated meanwhile.
    let _all = tables.ranges.lock(0..u64::MAX).await;
    let count = left.len();
    let left = check_left(image, left, opening).await?;
    tables.journal.take_over(&left);
    for left in &left {
        let guest = left.cluster << tables.shape.cluster_bits;
        let pinned = pin(image, guest).await.map_err(failed)?;
        pinned.publish(&[(tables.slice_of(guest).1, left.new)]);
    }
    settle_journal(image).await.map_err(failed)?;
    Ok(count)
}

/// Checks that the records can be what they say, and that nothing has changed the image since. Returns what has to
/// be handed over; of the others the disk has the new entry already, or something newer.
async fn check_left<F: Recovering>(
    image: &F,
    mut left: Vec<Left<F::Entry>>,
    opening: u32,
) -> Result<Vec<Left<F::Entry>>, Error> {
    let bits = image.tables().shape.cluster_bits;
    let wrong = |left: &Left<F::Entry>, why: &str| {
        let guest = u128::from(left.cluster) << bits;
        Err(Error::new(format!(
            "what was written at {guest:#x} before the daemon was killed cannot be taken up: {why}"
        )))
    };
    let (mut hosts, mut guests) = (BTreeSet::new(), Vec::with_capacity(left.len()));
    let mut is_due = Vec::with_capacity(left.len());
    for left in &left {
        if left.cluster >= image.guest_clusters() {
            return wrong(left, "the disk ends before that");
        }
        let guest = left.cluster << bits;
        let shows_more = image.shows_more(left.old, left.new);
        let is_possible = shows_more || image.refers_to_nothing(left.old);
        let owned = image.owned(guest, left.new).filter(|_| is_possible);
        let Some(owned) = owned else {
            return wrong(left, "the record makes no sense");
        };
        // A table that is shared: a snapshot may have been made.
        if !image.has_own_table(guest) {
            return wrong(left, "the image has changed since");
        }
        let failed = |errno| Error::os("Could not read an L2 table", errno);
        guests.push(guest);
        let pinned = pin(image, guest).await.map_err(failed)?;
        let entry = pinned.get(image.tables().slice_of(guest).1);
        is_due.push(entry == left.old);
        // What shows more of a cluster than the disk's entry does has it already.
        if let Owned::Cluster(host) = owned
            && entry == left.old
            && !shows_more
            && !hosts.insert(host)
        {
            return wrong(left, "two records name one cluster");
        }
        if entry != left.old && entry != left.new && !left.is_marked {
            return wrong(left, "the image has changed since");
        }
    }
    if !image.are_leaked(&Claimed { hosts, guests, opening }).await? {
        return Err(Error::new(
            "what was written before the daemon was killed cannot be taken up: its clusters have \
             been given to others since",
        ));
    }
    let mut is_due = is_due.into_iter();
    left.retain(|_| is_due.next() == Some(true));
    Ok(left)
}
