//! Dirty bitmaps, which record the pieces of a node that were written.
//!
//! The rules held here:
//!
//! * A bit is set before a fast write is handed to the storage, and before and after a slow one; so
//!   when a change of the bitmaps (a new one, a cleared one) has been waited for, every write that
//!   is not in it had landed by then ([`change`]).
//! * Marking takes no lock and no memory, and pushes no write off the fast path ([`recorders`]).
//! * What an image keeps of its bitmaps says so before anything differs from it
//!   ([`BitmapStore::begin_change`]).

pub mod bits;
pub mod change;
mod recorders;

pub use bits::{Bits, MOST_BITS};
pub use change::NewBitmap;

use super::{Error, LocalFuture};
use crate::io::InFlight;
use crate::io::epoch::Member;
use crate::io::sync::Mutex;
use recorders::Recorders;
use std::sync::Arc;

/// The most bitmaps of a node, as many as a qcow2 image takes.
const MOST_BITMAPS: usize = 65535;
/// The most bits of all bitmaps of a node: 1 GiB of memory.
const MOST_BITS_TOGETHER: u64 = 1 << 33;

/// A bitmap of a node. What it has recorded is in its [`Bits`].
#[derive(Debug)]
pub struct Bitmap {
    name: String,
    state: Mutex<State>,
}

/// What a bitmap is, and may be used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitmapFlags {
    /// Writes are recorded in it.
    pub recording: bool,
    /// The image keeps it.
    pub persistent: bool,
    /// The image keeps it, but was not closed properly with it: it can only be removed.
    pub inconsistent: bool,
    /// The image keeps it, and is only read.
    pub read_only: bool,
    /// An operation uses it.
    pub busy: bool,
}

#[derive(Debug)]
struct State {
    flags: BitmapFlags,
    bits: Arc<Bits>,
    /// From before the disk grew: as long as others have them, they may mark them.
    older: Vec<Arc<Bits>>,
}

/// The listing of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    pub name: String,
    pub flags: BitmapFlags,
    /// Bytes.
    pub granularity: u64,
    /// What is dirty, in bytes, in whole pieces.
    pub count: u64,
}

/// The bitmaps of a node.
#[derive(Default)]
pub struct Bitmaps {
    /// Oldest first. Locked by code that changes them or records in them.
    list: Mutex<Vec<Arc<Bitmap>>>,
    recorders: Recorders,
}

/// How a driver keeps bitmaps in its image.
pub trait BitmapStore: Send + Sync {
    /// The node's bitmaps: those of the image have been put there, and those that are persistent
    /// when it is closed are stored.
    fn bitmaps(&self) -> &Arc<Bitmaps>;

    /// Whether the image can have bitmaps, which it says by its version.
    fn is_available(&self) -> bool;

    /// Whether a bitmap of this name could be kept.
    ///
    /// # Errors
    /// In QEMU's words.
    fn can_store(&self, name: &str, granularity: u64) -> Result<(), Error>;

    /// Makes it known in the image, durably, that its bitmaps may be out of date from now on, until
    /// it is closed.
    fn begin_change(&self) -> LocalFuture<'_, Result<(), Error>>;

    /// Takes the bitmap of this name out of the image, durably.
    fn remove<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<(), Error>>;

    /// Stores all persistent bitmaps: the image may be read by others, until the next change.
    fn store(&self) -> LocalFuture<'_, Result<(), Error>>;
}

impl Bitmap {
    pub fn new(name: String, bits: Bits, flags: BitmapFlags) -> Bitmap {
        let state = State { flags, bits: Arc::new(bits), older: Vec::new() };
        Bitmap { name, state: Mutex::new(state) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn flags(&self) -> BitmapFlags {
        self.state.lock().flags
    }

    /// Says that an operation uses it, or no more; until then nobody may change or remove it.
    pub fn set_busy(&self, busy: bool) {
        self.state.lock().flags.busy = busy;
    }

    /// What it has recorded.
    pub fn bits(&self) -> Arc<Bits> {
        let mut state = self.state.lock();
        let State { bits, older, .. } = &mut *state;
        older.retain(|old| {
            // Asked first: a user that has released it since has marked it before.
            let is_shared = Arc::strong_count(old) > 1;
            bits.merge(old);
            is_shared
        });
        bits.clone()
    }

    /// Bytes.
    pub fn granularity(&self) -> u64 {
        1 << self.state.lock().bits.granularity_bits()
    }

    pub fn info(&self) -> BitmapInfo {
        let bits = self.bits();
        let granularity = 1 << bits.granularity_bits();
        let (name, flags) = (self.name.clone(), self.flags());
        BitmapInfo { name, flags, granularity, count: bits.count() * granularity }
    }

    /// Refuses what is in use, is only read, or makes no sense.
    ///
    /// # Errors
    /// In QEMU's words.
    fn check(&self, allowed: Allowed) -> Result<(), Error> {
        let (name, flags) = (shown(&self.name), self.flags());
        if flags.busy {
            let text = format!(
                "Bitmap '{name}' is currently in use by another operation and cannot be used"
            );
            return Err(Error::new(text));
        }
        if flags.read_only && !allowed.read_only {
            return Err(Error::new(format!("Bitmap '{name}' is readonly and cannot be modified")));
        }
        if flags.inconsistent && !allowed.inconsistent {
            return Err(inconsistent(&self.name));
        }
        Ok(())
    }

    fn resize(&self, len: u64) -> Result<(), Error> {
        let mut state = self.state.lock();
        if state.bits.len() == len || state.bits.resize_in_place(len) {
            return Ok(());
        }
        let grown = Arc::new(state.bits.grown(len)?);
        let old = std::mem::replace(&mut state.bits, grown);
        state.older.push(old);
        Ok(())
    }
}

/// What a use of a bitmap does not mind.
#[derive(Clone, Copy, Default)]
struct Allowed {
    read_only: bool,
    inconsistent: bool,
}

/// A name as errors have it: on one line.
fn shown(name: &str) -> String {
    let plain = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    name.chars().map(plain).collect()
}

fn already_exists(name: &str) -> Error {
    Error::new(format!("Bitmap already exists: {}", shown(name)))
}

/// The error for a use of a bitmap that the image does not vouch for.
pub fn inconsistent(name: &str) -> Error {
    let name = shown(name);
    Error::new(format!("Bitmap '{name}' is inconsistent and cannot be used"))
        .with_hint("Try block-dirty-bitmap-remove to delete this bitmap from disk")
}

impl Bitmaps {
    /// All of them, oldest first.
    pub fn all(&self) -> Vec<Arc<Bitmap>> {
        self.list.lock().clone()
    }

    /// The bitmap of this name.
    ///
    /// # Errors
    /// In QEMU's words, if there is none.
    pub fn find(&self, name: &str) -> Result<Arc<Bitmap>, Error> {
        let list = self.list.lock();
        let found = list.iter().find(|bitmap| bitmap.name == name).cloned();
        found.ok_or_else(|| Error::new(format!("Dirty bitmap '{}' not found", shown(name))))
    }

    /// Adds a bitmap. `members` are the queues that may be on the node's fast path.
    ///
    /// # Errors
    /// There is one of this name, or there are too many.
    pub fn add(&self, bitmap: Bitmap, members: &[Arc<Member>]) -> Result<(), Error> {
        let mut list = self.list.lock();
        if list.iter().any(|other| other.name == bitmap.name) {
            return Err(already_exists(&bitmap.name));
        }
        let bits = |bitmap: &Bitmap| bitmap.bits().words().len() as u64 * 64;
        let together = list.iter().map(|bitmap| bits(bitmap)).sum::<u64>() + bits(&bitmap);
        if list.len() >= MOST_BITMAPS || together > MOST_BITS_TOGETHER {
            return Err(Error::new(format!(
                "{} bitmaps with {together} bits are too many: at most {MOST_BITMAPS} with \
                 {MOST_BITS_TOGETHER} bits",
                list.len() + 1
            )));
        }
        list.push(Arc::new(bitmap));
        self.record_in(&list, members);
        Ok(())
    }

    /// Forgets a bitmap.
    pub fn remove(&self, bitmap: &Arc<Bitmap>, members: &[Arc<Member>]) {
        let mut list = self.list.lock();
        list.retain(|other| !Arc::ptr_eq(other, bitmap));
        self.record_in(&list, members);
    }

    /// Changes what a bitmap is.
    pub fn change(
        &self,
        bitmap: &Bitmap,
        members: &[Arc<Member>],
        change: impl FnOnce(&mut BitmapFlags),
    ) {
        let list = self.list.lock();
        change(&mut bitmap.state.lock().flags);
        self.record_in(&list, members);
    }

    /// Nothing is written to the image any more: those that it keeps may not change.
    pub(super) fn keep_stored(&self, members: &[Arc<Member>]) {
        for bitmap in self.all() {
            self.change(&bitmap, members, |flags| flags.read_only |= flags.persistent);
        }
    }

    /// Takes over those of a node whose place another takes, but for what its image keeps, which was read again.
    pub(super) fn continue_from(&self, old: &Bitmaps, members: &[Arc<Member>]) {
        let mut list = self.list.lock();
        list.extend(old.all().into_iter().filter(|bitmap| !bitmap.flags().persistent));
        self.record_in(&list, members);
    }

    /// Makes all of them as long as the disk is now, in bytes. What grows has nothing set there.
    pub fn resize(&self, len: u64, members: &[Arc<Member>]) {
        let list = self.list.lock();
        let is_fit = |bitmap: &Arc<Bitmap>| bitmap.state.lock().bits.len() == len;
        if list.iter().all(is_fit) {
            return;
        }
        for bitmap in list.iter() {
            if let Err(error) = bitmap.resize(len) {
                log::error!("bitmap '{}' records no more: {error}", bitmap.name);
                let mut state = bitmap.state.lock();
                state.flags.recording = false;
                // What it lacks nobody may rely on.
                state.flags.inconsistent = true;
            }
        }
        self.record_in(&list, members);
    }

    fn record_in(&self, list: &[Arc<Bitmap>], members: &[Arc<Member>]) {
        let recording = list.iter().filter(|bitmap| {
            let flags = bitmap.flags();
            flags.recording && !flags.inconsistent
        });
        let bits = recording.map(|bitmap| bitmap.state.lock().bits.clone()).collect();
        self.recorders.replace(bits, members);
    }

    /// Whether no write is recorded.
    pub(super) fn is_idle(&self) -> bool {
        self.recorders.is_idle()
    }

    /// Records a fast write that is about to begin. False if a bitmap is too short for it: the slow
    /// path makes it longer.
    #[inline]
    pub(super) fn record_fast(&self, inflight: &InFlight, at: u64, len: u64) -> bool {
        self.recorders.fast(inflight).iter().all(|bits| {
            let fits = at + len <= bits.len();
            bits.mark(at, len);
            fits
        })
    }

    /// Records a slow write to a disk that is `disk_len` bytes long.
    pub(super) fn record(
        &self,
        at: u64,
        len: u64,
        disk_len: u64,
        members: impl FnOnce() -> Vec<Arc<Member>>,
    ) {
        let mut all = self.recorders.all();
        if all.iter().any(|bits| bits.len() != disk_len) {
            self.resize(disk_len, &members());
            all = self.recorders.all();
        }
        all.iter().for_each(|bits| bits.mark(at, len));
    }
}
