//! L2 entries that were answered, and wait until what they show is durable.
//!
//! An entry must not reach the disk before what was copied for it (see [`super::order`]), and a guest
//! must not wait for the disk at every cluster that it writes to first. So, where there is memory that
//! outlives the process ([`Survivor`]), the entry is kept there: the guest is answered, readers are
//! shown it, and the table is written when the guest flushes, or when there is no more room. A daemon that
//! is killed loses nothing, for the next one takes up what it finds; a host that crashes loses what was
//! not flushed, as it may. Entries of which nothing was copied wait, too: many are written at once then.
//!
//! * **Kept**: data and copied bytes are with the kernel, then the record is complete, then the entry
//!   is shown. Only entries that take nothing from anybody wait: what they replace refers to no
//!   cluster.
//! * **Settled**: if something was copied, the data is flushed; then entries that waited by then are
//!   handed over, then their records are cleared.
//! * **Changed before that**: the data is flushed, the record is marked, the newer entry is handed over,
//!   the record is cleared, and only then whatever the entry referred to may be freed.
//! * While a table is written for other reasons, what waits in it is written as the disk has it.
//! * **Taken up**: each record fits what the disk says: the entry is still the one that it replaces (or
//!   already the new one; or, if it is marked, a newer one), and its cluster is counted once and referred to by
//!   nobody. What somebody else did to the image meanwhile, or to the memory, is refused.

use super::batch::Changes;
use super::layout::{Cluster, L2Entry};
use super::{Qcow2, check};
use crate::block::{Error, Journaled, LocalFuture, Survivor};
use crate::cow::{Lock, SliceNo, pin};
use crate::io::IoResult;
use crate::io::sync::Mutex;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Words of a record: the guest cluster plus one (0: there is none), then the old entry and the new.
const RECORD: usize = 5;
/// In a record's first word: something newer may be on the disk.
const MARK: u64 = 1 << 63;

pub struct Journal {
    /// How many entries wait. Who finds none takes no lock.
    count: AtomicUsize,
    is_attached: AtomicBool,
    state: Mutex<State>,
    settling: Lock<()>,
    /// Entries of a slice.
    per_slice: u64,
}

#[derive(Default)]
struct State {
    memory: Option<Arc<dyn Survivor>>,
    /// Nothing is kept for now.
    is_closed: bool,
    /// How many others have memory. Who of them comes back after a kill is not known, and might not find
    /// what was answered to him: as long as there are such, nothing is kept.
    rivals: usize,
    /// Records that are free.
    free: Vec<usize>,
    records: usize,
    slices: BTreeMap<SliceNo, BTreeMap<usize, Waiting>>,
    /// Of the next entry.
    next: u64,
}

#[derive(Clone, Copy)]
struct Waiting {
    /// What the disk has.
    old: L2Entry,
    new: L2Entry,
    /// None: the memory is gone, and the process alone knows of it.
    record: Option<usize>,
    /// What it shows must be durable before the disk has it.
    is_copied: bool,
    /// Those that came before have lower numbers.
    number: u64,
}

/// What a record says.
#[derive(Clone, Copy)]
struct Left {
    /// The guest's cluster.
    cluster: u64,
    is_marked: bool,
    old: L2Entry,
    new: L2Entry,
    record: usize,
}

/// Whether entries wait now.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    No,
    Yes,
    /// And it is time to settle.
    HalfFull,
}

impl Journal {
    /// `per_slice`: entries of a slice.
    pub fn new(per_slice: usize) -> Journal {
        Journal {
            count: AtomicUsize::new(0),
            is_attached: AtomicBool::new(false),
            state: Mutex::default(),
            settling: Lock::new(()),
            per_slice: per_slice as u64,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    fn is_attached(&self) -> bool {
        self.is_attached.load(Ordering::Acquire)
    }

    /// Keeps entries of one slice, with what they replace, if there is room. The caller has the slice
    /// pinned, and shows them afterwards.
    fn keep(&self, slice: SliceNo, entries: &[(usize, L2Entry, L2Entry)], is_copied: bool) -> Kept {
        let mut state = self.state.lock();
        let State { memory, is_closed, rivals, free, records, slices, next } = &mut *state;
        let has_room = free.len() >= entries.len() && !*is_closed && *rivals == 0;
        let Some(memory) = memory.as_ref().filter(|_| has_room) else {
            return Kept::No;
        };
        let waiting = slices.entry(slice).or_default();
        if entries.iter().any(|(index, ..)| waiting.contains_key(index)) {
            return Kept::No;
        }
        let was_half = free.len() * 2 <= *records;
        for &(index, old, new) in entries {
            let Some(record) = free.pop() else { continue };
            write_record(memory.words(), record, slice.0 * self.per_slice + index as u64, old, new);
            let record = Some(record);
            waiting.insert(index, Waiting { old, new, record, is_copied, number: *next });
            *next += 1;
            self.count.fetch_add(1, Ordering::AcqRel);
        }
        match !was_half && free.len() * 2 <= *records {
            true => Kept::HalfFull,
            false => Kept::Yes,
        }
    }

    /// Keeps nothing more, or goes on doing so.
    pub fn close(&self, is_closed: bool) {
        self.state.lock().is_closed = is_closed;
    }

    /// Changes what was read of a slice to what readers are to see.
    pub fn show(&self, slice: SliceNo, entries: &mut [L2Entry]) {
        if self.is_empty() {
            return;
        }
        let state = self.state.lock();
        for (&index, waiting) in state.slices.get(&slice).into_iter().flatten() {
            entries[index] = waiting.new;
        }
    }

    /// What the disk has of the entries of a range that wait, but for those that `changes` tells of.
    pub fn on_disk(&self, slice: SliceNo, range: Range<usize>, changes: &Changes) -> Changes {
        if self.is_empty() {
            return Changes::new();
        }
        let changed: BTreeSet<usize> = changes.iter().map(|&(index, _)| index).collect();
        let state = self.state.lock();
        let Some(waiting) = state.slices.get(&slice) else { return Changes::new() };
        let waiting = waiting.range(range).filter(|(index, _)| !changed.contains(index));
        waiting.map(|(&index, waiting)| (index, waiting.old)).collect()
    }

    /// The disk is about to have something newer than what waits.
    pub fn mark(&self, slice: SliceNo, changes: &Changes) {
        let state = self.state.lock();
        let (Some(memory), Some(waiting)) = (&state.memory, state.slices.get(&slice)) else {
            return;
        };
        for waiting in changes.iter().filter_map(|(index, _)| waiting.get(index)) {
            if let Some(record) = waiting.record {
                memory.words()[record * RECORD].fetch_or(MARK, Ordering::Release);
            }
        }
    }

    /// Whether one of these entries waits.
    pub fn has_one_of(&self, slice: SliceNo, changes: &Changes) -> bool {
        if self.is_empty() {
            return false;
        }
        let state = self.state.lock();
        let waiting = state.slices.get(&slice);
        waiting.is_some_and(|waiting| changes.iter().any(|(index, _)| waiting.contains_key(index)))
    }

    /// The disk has these entries as they are to be. Before they are shown.
    pub fn handed_over(&self, slice: SliceNo, changes: &Changes) {
        if self.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        let State { memory, free, slices, .. } = &mut *state;
        let Some(waiting) = slices.get_mut(&slice) else { return };
        for (index, _) in changes {
            let Some(gone) = waiting.remove(index) else { continue };
            self.count.fetch_sub(1, Ordering::AcqRel);
            if let (Some(record), Some(memory)) = (gone.record, memory.as_ref()) {
                clear_record(memory.words(), record);
                free.push(record);
            }
        }
        if waiting.is_empty() {
            slices.remove(&slice);
        }
    }

    /// The number that the next entry gets.
    fn moment(&self) -> u64 {
        self.state.lock().next
    }

    /// Slices in which entries wait that came before a moment, and whether what one of these shows was
    /// copied.
    fn slices_before(&self, moment: u64) -> (Vec<SliceNo>, bool) {
        let state = self.state.lock();
        let (mut slices, mut is_copied) = (Vec::new(), false);
        for (&slice, waiting) in &state.slices {
            let mut due = waiting.values().filter(|waiting| waiting.number < moment).peekable();
            if due.peek().is_some() {
                slices.push(slice);
                is_copied |= due.any(|waiting| waiting.is_copied);
            }
        }
        (slices, is_copied)
    }

    /// The entries of a slice that wait and came before a moment.
    fn due(&self, slice: SliceNo, moment: u64) -> Changes {
        let state = self.state.lock();
        let waiting = state.slices.get(&slice).into_iter().flatten();
        let due = waiting.filter(|(_, waiting)| waiting.number < moment);
        due.map(|(&index, waiting)| (index, waiting.new)).collect()
    }

    /// What another process has left waits from now on.
    fn take_over(&self, left: &[Left]) {
        let mut state = self.state.lock();
        for &Left { cluster, old, new, .. } in left {
            let (slice, index) = (cluster / self.per_slice, (cluster % self.per_slice) as usize);
            let waiting = Waiting { old, new, record: None, is_copied: true, number: state.next };
            state.next += 1;
            if state.slices.entry(SliceNo(slice)).or_default().insert(index, waiting).is_none() {
                self.count.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// Keeps entries in `memory` from now on, which holds none.
    fn keep_in(&self, memory: Arc<dyn Survivor>) {
        let mut state = self.state.lock();
        if state.memory.is_some() {
            state.rivals += 1;
            return;
        }
        state.records = memory.words().len() / RECORD;
        state.free = (0..state.records).rev().collect();
        state.memory = Some(memory);
        self.is_attached.store(true, Ordering::Release);
    }

    /// Uses the memory no more.
    fn let_go(&self, memory: &Arc<dyn Survivor>) {
        let mut state = self.state.lock();
        if !state.memory.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, memory)) {
            state.rivals = state.rivals.saturating_sub(1);
            return;
        }
        for waiting in state.slices.values_mut().flat_map(BTreeMap::values_mut) {
            waiting.record = None;
        }
        state.memory = None;
        state.free.clear();
        self.is_attached.store(false, Ordering::Release);
    }
}

/// A record counts when its first word is there, which is written last.
fn write_record(words: &[AtomicU64], record: usize, cluster: u64, old: L2Entry, new: L2Entry) {
    let words = &words[record * RECORD..][..RECORD];
    let content = [old.word, old.bitmap, new.word, new.bitmap];
    for (word, value) in words[1..].iter().zip(content) {
        word.store(value, Ordering::Release);
    }
    words[0].store(cluster + 1, Ordering::Release);
}

fn clear_record(words: &[AtomicU64], record: usize) {
    words[record * RECORD].store(0, Ordering::Release);
}

/// What an earlier process has left.
fn read_records(words: &[AtomicU64]) -> Vec<Left> {
    let read = |(record, words): (usize, &[AtomicU64])| {
        let mut content = [0; RECORD];
        content.iter_mut().zip(words).for_each(|(to, word)| *to = word.load(Ordering::Acquire));
        let [cluster, old, old_bitmap, new, new_bitmap] = content;
        Some(Left {
            cluster: (cluster & !MARK).checked_sub(1)?,
            is_marked: cluster & MARK != 0,
            old: L2Entry { word: old, bitmap: old_bitmap },
            new: L2Entry { word: new, bitmap: new_bitmap },
            record,
        })
    };
    words.chunks_exact(RECORD).enumerate().filter_map(read).collect()
}

impl Qcow2 {
    /// Keeps the new entries of clusters from `guest` on, all of one slice, and shows them, if that can be;
    /// if not, or if it fails, nothing has changed. The caller holds their range, and what they show is with
    /// the kernel; `is_copied`: some of it must be durable before the disk has them.
    pub(super) async fn keep_entries(
        &self,
        guest: u64,
        old: &[L2Entry],
        new: &[L2Entry],
        is_copied: bool,
    ) -> IoResult<Kept> {
        if !self.journal.is_attached() {
            return Ok(Kept::No);
        }
        // Who opens an image that says of its refcounts that they may be wrong counts them anew, and
        // finds no reference to what only records name. (While they are counted, the journal is closed.)
        let may_repair = self.has_lazy_refcounts || self.snapshots.needs_repair();
        if may_repair || !old.iter().all(|&old| self.refers_to_nothing(old)) {
            return Ok(Kept::No);
        }
        self.check_sound().await?;
        let pinned = pin(self, guest).await?;
        let (slice, first) = self.mapping.slice_of(guest);
        let all = old.iter().zip(new).enumerate();
        let all: SmallVec<[_; 2]> = all.map(|(n, (&old, &new))| (first + n, old, new)).collect();
        let kept = self.journal.keep(slice, &all, is_copied);
        if kept != Kept::No {
            let shown: SmallVec<[_; 2]> = all.iter().map(|&(index, _, new)| (index, new)).collect();
            pinned.publish(&shown);
        }
        Ok(kept)
    }

    fn refers_to_nothing(&self, entry: L2Entry) -> bool {
        matches!(
            self.geometry.decode(entry),
            Ok(Cluster::Unallocated
                | Cluster::Zero { host: None }
                | Cluster::Subclusters { host: None, .. })
        )
    }

    /// Makes what the entries that wait now show durable, and hands them over.
    pub(super) async fn settle_journal(&self) -> IoResult {
        if self.journal.is_empty() {
            return Ok(());
        }
        let _turn = self.journal.settling.lock().await;
        let moment = self.journal.moment();
        let (slices, is_copied) = self.journal.slices_before(moment);
        if is_copied {
            self.data().flush().await?;
        }
        for slice in slices {
            let guest = self.mapping.start_of(slice);
            self.settle_slice(slice, guest, || self.journal.due(slice, moment)).await?;
        }
        Ok(())
    }

    /// Whether what a process has left can be what it says, and nobody has changed the image since.
    /// What there is to hand over; the disk has the others already, or something newer.
    async fn check_left(&self, mut left: Vec<Left>) -> Result<Vec<Left>, Error> {
        let wrong = |left: &Left, why: &str| {
            let guest = u128::from(left.cluster) << self.geometry.cluster_bits;
            Err(Error::new(format!(
                "what was written at {guest:#x} before the daemon was killed cannot be taken up: {why}"
            )))
        };
        let mut hosts = BTreeSet::new();
        let mut is_due = Vec::with_capacity(left.len());
        for left in &left {
            if left.cluster >= self.geometry.clusters(self.size()) {
                return wrong(left, "the disk ends before that");
            }
            let guest = left.cluster << self.geometry.cluster_bits;
            let host = self.own_host(guest, left.new).filter(|_| self.refers_to_nothing(left.old));
            let Some(host) = host else {
                return wrong(left, "the record makes no sense");
            };
            // A table of its own: a snapshot may have been made.
            let table = self.l1.get(self.geometry.l1_index(guest));
            if table.l2_table() == 0 || !table.is_copied() {
                return wrong(left, "the image has changed since");
            }
            let failed = |errno| Error::os("Could not read an L2 table", errno);
            let pinned = pin(self, guest).await.map_err(failed)?;
            let entry = pinned.get(self.mapping.slice_of(guest).1);
            is_due.push(entry == left.old);
            if entry == left.old && !self.geometry.external_data && !hosts.insert(host) {
                return wrong(left, "two records name one cluster");
            }
            if entry != left.old && entry != left.new && !left.is_marked {
                return wrong(left, "the image has changed since");
            }
        }
        let reserved = self.pool.lock().reserves(&mut hosts.iter().copied().collect::<Vec<_>>());
        let leaked = check::are_leaked(&self.file(), &hosts).await?;
        match reserved || !leaked {
            true => Err(Error::new(
                "what was written before the daemon was killed cannot be taken up: its clusters have \
                 been given to others since",
            )),
            false => {
                let mut is_due = is_due.into_iter();
                left.retain(|_| is_due.next() == Some(true));
                Ok(left)
            }
        }
    }

    /// The number of the host cluster of an entry that shows data, if no other can have it.
    fn own_host(&self, guest: u64, entry: L2Entry) -> Option<u64> {
        let host = match self.geometry.decode(entry) {
            Ok(Cluster::Normal { host } | Cluster::Subclusters { host: Some(host), .. }) => host,
            _ => return None,
        };
        // In an external data file each has its place.
        let is_own = if self.geometry.external_data { host == guest } else { entry.is_copied() };
        is_own.then_some(host >> self.geometry.cluster_bits)
    }

    async fn take_up(&self, memory: Arc<dyn Survivor>) -> Result<(), Error> {
        let failed = |errno| Error::os("what was written before the daemon was killed", errno);
        // From here on what readers see is what the disk has, but for what begins to wait meanwhile in
        // somebody else's memory.
        self.settle_journal().await.map_err(failed)?;
        let left = read_records(memory.words());
        if !left.is_empty() {
            if !self.is_writable {
                return Err(Error::new(
                    "what was written before the daemon was killed cannot be taken up: the image was \
                     opened read-only",
                ));
            }
            self.prepare_writing().await.map_err(failed)?;
            let records: Vec<usize> = left.iter().map(|left| left.record).collect();
            let taken = self.hand_over_left(left).await?;
            // Only now: who is killed before begins again.
            records.into_iter().for_each(|record| clear_record(memory.words(), record));
            log::info!(
                "node '{}': {taken} clusters that were written before the daemon was killed are taken up",
                self.name
            );
        }
        self.journal.keep_in(memory);
        // If somebody has memory already, nothing is kept from now on.
        self.settle_journal().await.map_err(failed)
    }

    /// Hands over what another process has left; how many entries there were.
    async fn hand_over_left(&self, left: Vec<Left>) -> Result<usize, Error> {
        let failed = |errno| Error::os("what was written before the daemon was killed", errno);
        // Nobody allocates anything meanwhile.
        let _all = self.mapping.ranges.lock(0..u64::MAX).await;
        let count = left.len();
        let left = self.check_left(left).await?;
        self.journal.take_over(&left);
        for left in &left {
            let guest = left.cluster << self.geometry.cluster_bits;
            let pinned = pin(self, guest).await.map_err(failed)?;
            pinned.publish(&[(self.mapping.slice_of(guest).1, left.new)]);
        }
        self.settle_journal().await.map_err(failed)?;
        Ok(count)
    }
}

impl Journaled for Qcow2 {
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.take_up(memory))
    }

    fn detach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            let settled = self.settle_journal().await;
            self.journal.let_go(&memory);
            settled
        })
    }
}
