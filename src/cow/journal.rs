//! Entries that were answered, and wait until what they show is durable.
//!
//! An entry must not reach the disk before the bytes that were copied for it, and a guest must not wait for the disk
//! at every cluster that it writes to first. So where there is memory that outlives the process ([`Survivor`]), the
//! entry is kept there: the guest is answered, readers are shown the entry, and the table is written when the guest
//! flushes or the memory is full. A killed daemon loses nothing: the next one takes over what it finds. A host that
//! crashes loses what was not flushed, as it may. Entries without copied bytes wait, too: many are written at once then.
//!
//! * **Kept**: data and copied bytes are with the kernel, then the record is complete, then the entry is shown. Only
//!   entries that replace references to nothing wait, and those that show more of the cluster that the old entry refers
//!   to already ([`Journaling::shows_more`]).
//! * **Extended**: an entry that shows more of the cluster of one that waits takes its place and its record, as long as
//!   nobody settles that one: what the two show was copied at different times, and one flush is to cover both.
//! * **Settled**: if something was copied, the data is flushed; then the entries that waited by then are handed over,
//!   then their records are cleared.
//! * **Changed before that**: the data is flushed, the record is marked, the newer entry is handed over, the record is
//!   cleared, and only then the cluster that the entry referred to may be freed.
//! * A table that is written for other reasons gets the entries that the disk has, not those that wait.
//! * **Taken over**: each record fits what the disk says ([`super::take_over`]).

use super::batch::{Changes, settle_slice};
use super::format::data;
use super::lock::Lock;
use super::lookup::pin;
use super::record::{
    Left, RECORD, clear_record, extend_record, is_marked, mark_record, write_record,
};
use super::table_cache::{SliceNo, TableEntry};
use super::writable::{Writable, check_sound};
use crate::block::Survivor;
use crate::io::IoResult;
use crate::io::sync::Mutex;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// The upper half of the memory's last word: the image is being written, by the opening that the lower half tells.
const IN_USE: u64 = 0x696e_7573 << 32;

/// The entries of a mapping that wait.
pub struct Journal<E> {
    /// How many entries wait. Callers skip the lock when there are none.
    count: AtomicUsize,
    is_attached: AtomicBool,
    state: Mutex<State<E>>,
    settling: Lock<()>,
    /// Entries of a slice.
    per_slice: u64,
    /// The mark of use of this opening of the image.
    mark: u64,
}

struct State<E> {
    memory: Option<Arc<dyn Survivor>>,
    /// The memory that was let go of last: its mark of use goes when the image is closed.
    parted: Option<Arc<dyn Survivor>>,
    /// Nothing is kept for now.
    is_closed: bool,
    /// How many other users have memory. After a kill any of them may come back first, without the records in
    /// another user's memory, so nothing is kept while there are any.
    rivals: usize,
    /// Records that are free.
    free: Vec<usize>,
    records: usize,
    slices: BTreeMap<SliceNo, BTreeMap<usize, Waiting<E>>>,
    /// Of the next entry.
    next: u64,
    /// Entries with lower numbers are being settled.
    settling_to: u64,
}

#[derive(Clone, Copy)]
struct Waiting<E> {
    /// What the disk has.
    old: E,
    new: E,
    /// None: the memory is gone, and only this process knows the entry.
    record: Option<usize>,
    /// The bytes that it shows must be durable before the disk has it.
    is_copied: bool,
    /// Older entries have lower numbers.
    number: u64,
}

/// Whether entries wait now.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    No,
    Yes,
    /// And it is time to settle.
    HalfFull,
}

impl<E> Default for State<E> {
    fn default() -> State<E> {
        State {
            memory: None,
            parted: None,
            is_closed: false,
            rivals: 0,
            free: Vec::new(),
            records: 0,
            slices: BTreeMap::new(),
            next: 0,
            settling_to: 0,
        }
    }
}

impl<E: TableEntry> Journal<E> {
    /// `per_slice`: entries of a slice.
    pub fn new(per_slice: usize) -> Journal<E> {
        Journal {
            count: AtomicUsize::new(0),
            is_attached: AtomicBool::new(false),
            state: Mutex::default(),
            settling: Lock::new(()),
            per_slice: per_slice as u64,
            mark: IN_USE | u64::from((RandomState::new().build_hasher().finish() as u32).max(1)),
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
    fn keep(&self, slice: SliceNo, entries: &[(usize, E, E)], is_copied: bool) -> Kept {
        let mut state = self.state.lock();
        let State { memory, is_closed, rivals, free, records, slices, next, settling_to, .. } =
            &mut *state;
        let has_room = free.len() >= entries.len() && !*is_closed && *rivals == 0;
        let Some(memory) = memory.as_ref().filter(|_| has_room) else {
            return Kept::No;
        };
        let waiting = slices.entry(slice).or_default();
        let can_wait = |&(index, old, new): &(usize, E, E)| {
            let before = waiting.get(&index);
            before.is_none_or(|before| before.extends_to(memory.words(), old, new, *settling_to))
        };
        if !entries.iter().all(can_wait) {
            return Kept::No;
        }
        let was_half = free.len() * 2 <= *records;
        for &(index, old, new) in entries {
            if let Some(before) = waiting.get_mut(&index) {
                before.extend(memory.words(), new, is_copied, *next);
            } else if let Some(record) = free.pop() {
                let cluster = slice.0 * self.per_slice + index as u64;
                write_record(memory.words(), record, cluster, old, new);
                let record = Some(record);
                waiting.insert(index, Waiting { old, new, record, is_copied, number: *next });
                self.count.fetch_add(1, Ordering::AcqRel);
            }
            *next += 1;
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
    pub fn show(&self, slice: SliceNo, entries: &mut [E]) {
        if self.is_empty() {
            return;
        }
        let state = self.state.lock();
        for (&index, waiting) in state.slices.get(&slice).into_iter().flatten() {
            entries[index] = waiting.new;
        }
    }

    /// What the disk has of the entries of a range that wait, except those that `changes` has.
    pub fn on_disk(&self, slice: SliceNo, range: Range<usize>, changes: &Changes<E>) -> Changes<E> {
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
    pub fn mark(&self, slice: SliceNo, changes: &Changes<E>) {
        let state = self.state.lock();
        let (Some(memory), Some(waiting)) = (&state.memory, state.slices.get(&slice)) else {
            return;
        };
        for waiting in changes.iter().filter_map(|(index, _)| waiting.get(index)) {
            if let Some(record) = waiting.record {
                mark_record(memory.words(), record);
            }
        }
    }

    /// Whether one of these entries waits.
    pub fn has_one_of(&self, slice: SliceNo, changes: &Changes<E>) -> bool {
        if self.is_empty() {
            return false;
        }
        let state = self.state.lock();
        let waiting = state.slices.get(&slice);
        waiting.is_some_and(|waiting| changes.iter().any(|(index, _)| waiting.contains_key(index)))
    }

    /// The disk has these entries as they are to be. Before they are shown.
    pub fn handed_over(&self, slice: SliceNo, changes: &Changes<E>) {
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

    /// Begins to settle the entries that wait now: they come before the moment that is returned, and none of them is
    /// extended until [`Settling`] is dropped.
    fn begin_settling(&self) -> (u64, Settling<'_, E>) {
        let mut state = self.state.lock();
        state.settling_to = state.next;
        (state.next, Settling(self))
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
    fn due(&self, slice: SliceNo, moment: u64) -> Changes<E> {
        let state = self.state.lock();
        let waiting = state.slices.get(&slice).into_iter().flatten();
        let due = waiting.filter(|(_, waiting)| waiting.number < moment);
        due.map(|(&index, waiting)| (index, waiting.new)).collect()
    }

    /// Lets the entries wait that another process has left.
    pub(super) fn take_over(&self, left: &[Left<E>]) {
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

    /// Keeps entries in `memory` from now on, which has no records.
    pub(super) fn keep_in(&self, memory: Arc<dyn Survivor>) {
        let mut state = self.state.lock();
        // Memory that did not see what happens from now on must not say later that it knows all that was kept.
        if let Some(parted) = state.parted.take() {
            set_mark(parted.words(), 0);
        }
        set_mark(memory.words(), self.mark);
        if state.memory.is_some() {
            state.rivals += 1;
            return;
        }
        // The last word is the mark of use.
        state.records = memory.words().len().saturating_sub(1) / RECORD;
        state.free = (0..state.records).rev().collect();
        state.memory = Some(memory);
        self.is_attached.store(true, Ordering::Release);
    }

    /// Uses the memory no more.
    pub fn let_go(&self, memory: &Arc<dyn Survivor>) {
        let mut state = self.state.lock();
        if !state.memory.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, memory)) {
            state.rivals = state.rivals.saturating_sub(1);
            set_mark(memory.words(), 0);
            return;
        }
        for waiting in state.slices.values_mut().flat_map(BTreeMap::values_mut) {
            waiting.record = None;
        }
        state.parted = state.memory.take();
        state.free.clear();
        self.is_attached.store(false, Ordering::Release);
    }

    /// Notes in the memory that the image is being written, or that it was closed properly, so that a process that takes
    /// over has nothing to look for.
    pub fn mark_in_use(&self, is_in_use: bool) {
        let state = self.state.lock();
        for memory in state.memory.iter().chain(&state.parted) {
            set_mark(memory.words(), if is_in_use { self.mark } else { 0 });
        }
    }

    /// The number of this opening of the image, which is in the mark of use. It is not 0.
    pub fn number(&self) -> u32 {
        self.mark as u32
    }

    /// The number of another opening that was writing the image and did not close it, if there was one.
    pub(super) fn user_before(&self, words: &[AtomicU64]) -> Option<u32> {
        let mark = words.last().map_or(0, |mark| mark.load(Ordering::Acquire));
        (mark >> 32 == IN_USE >> 32 && mark != self.mark).then_some(mark as u32)
    }
}

/// Entries are being settled, until this is dropped.
struct Settling<'a, E>(&'a Journal<E>);

impl<E> Drop for Settling<'_, E> {
    fn drop(&mut self) {
        self.0.state.lock().settling_to = 0;
    }
}

impl<E: TableEntry> Waiting<E> {
    /// Whether an entry that replaces this one can wait in its place. The two differ in their second words, so that the
    /// record changes by one store.
    fn extends_to(&self, words: &[AtomicU64], old: E, new: E, settling_to: u64) -> bool {
        let [first, _] = self.new.words();
        let has_record = self.record.is_some_and(|record| !is_marked(words, record));
        let is_settling = self.number < settling_to;
        self.new == old && new.words()[0] == first && has_record && !is_settling
    }

    fn extend(&mut self, words: &[AtomicU64], new: E, is_copied: bool, number: u64) {
        if let Some(record) = self.record {
            extend_record(words, record, new);
        }
        self.new = new;
        self.is_copied |= is_copied;
        self.number = number;
    }
}

/// Sets or clears the mark of use.
fn set_mark(words: &[AtomicU64], mark: u64) {
    if let Some(last) = words.last() {
        last.store(mark, Ordering::Release);
    }
}

/// Clears the records that an earlier process has left; how many there were.
pub fn forget_records(memory: &dyn Survivor) -> usize {
    let is_there = |words: &&[AtomicU64]| words[0].swap(0, Ordering::AcqRel) != 0;
    memory.words().chunks_exact(RECORD).filter(is_there).count()
}

/// What the journal asks of a format.
pub trait Journaling: Writable {
    /// Whether entries may wait at all. They may not where the next opening after a crash counts all references again:
    /// it would find none to clusters that only records name.
    fn may_keep(&self) -> bool {
        true
    }

    /// Whether an entry refers to no cluster, so that replacing it frees none.
    fn refers_to_nothing(&self, entry: Self::Entry) -> bool;

    /// Whether `new` shows what `old` does and more of the same cluster, which both have for themselves.
    fn shows_more(&self, _old: Self::Entry, _new: Self::Entry) -> bool {
        false
    }
}

/// Keeps the new entries of clusters from `guest` on, all of one slice, and shows them, if that is possible; if not, or
/// if it fails, nothing has changed. The caller holds their range, and has handed what they show to the kernel;
/// `is_copied`: some of it must be durable before the disk has the entries.
pub async fn keep_entries<F: Journaling>(
    image: &F,
    guest: u64,
    old: &[F::Entry],
    new: &[F::Entry],
    is_copied: bool,
) -> IoResult<Kept> {
    let tables = image.tables();
    if !tables.journal.is_attached() || !image.may_keep() {
        return Ok(Kept::No);
    }
    let frees_nothing = |(&old, &new)| image.refers_to_nothing(old) || image.shows_more(old, new);
    if !old.iter().zip(new).all(frees_nothing) {
        return Ok(Kept::No);
    }
    check_sound(image).await?;
    let pinned = pin(image, guest).await?;
    let (slice, first) = tables.slice_of(guest);
    let all = old.iter().zip(new).enumerate();
    let all: SmallVec<[_; 2]> = all.map(|(n, (&old, &new))| (first + n, old, new)).collect();
    let kept = tables.journal.keep(slice, &all, is_copied);
    if kept != Kept::No {
        let shown: SmallVec<[_; 2]> = all.iter().map(|&(index, _, new)| (index, new)).collect();
        pinned.publish(&shown);
    }
    Ok(kept)
}

/// Makes what the entries that wait now show durable, and hands them over.
pub async fn settle_journal<F: Writable>(image: &F) -> IoResult {
    let tables = image.tables();
    if tables.journal.is_empty() {
        return Ok(());
    }
    let _lock = tables.journal.settling.lock().await;
    let (moment, _settling) = tables.journal.begin_settling();
    let (slices, is_copied) = tables.journal.slices_before(moment);
    if is_copied {
        data(image).flush().await?;
    }
    for slice in slices {
        let due = || tables.journal.due(slice, moment);
        settle_slice(image, slice, tables.start_of(slice), due).await?;
    }
    Ok(())
}
