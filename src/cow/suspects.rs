//! Slices in doubt: a write of theirs has failed, so the disk may have another state than readers were shown.
//!
//! They are written again before anything relies on them: by a flush, and by the next write if there are many. A
//! few of them are kept in the cache, and writing goes on; with more, writing stops until they are written.

use super::batch::rewrite_slice;
use super::lookup::pin;
use super::table_cache::{Pinned, SliceNo, TableEntry};
use super::tables::Tables;
use super::writable::Writable;
use super::write_state::Stop;
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// So many slices may be in doubt before writing stops: they take room in the cache.
const MOST: usize = 4;

/// How often slices are written again while other writes of them fail.
const ATTEMPTS: u32 = 8;

/// The slices of a mapping that are in doubt.
#[derive(Default)]
pub struct Suspects {
    list: Mutex<BTreeMap<SliceNo, Suspect>>,
    /// How many writes of slices have failed.
    failures: AtomicU64,
}

/// A slice that is in doubt.
#[derive(Clone, Copy)]
struct Suspect {
    /// An offset that it maps.
    guest: u64,
    /// It is kept in the cache.
    stays: bool,
    /// How many writes of it have failed.
    failures: u32,
}

impl<E: TableEntry> Tables<E> {
    /// Notes that a write of entries has failed, or was cancelled: the disk may have old ones or new ones.
    pub(super) fn suspect(&self, slice: SliceNo, guest: u64, pinned: &Pinned<'_, E>) {
        let mut suspects = self.suspects.list.lock();
        self.suspects.failures.fetch_add(1, Ordering::SeqCst);
        if let Some(known) = suspects.get_mut(&slice) {
            known.failures += 1;
            return;
        }
        let stays = suspects.len() < MOST;
        suspects.insert(slice, Suspect { guest, stays, failures: 1 });
        match stays {
            true => pinned.stay(),
            // A reader that loads it meanwhile finds what the disk has.
            false => self.stopped.stop(Stop::NeedsFlush),
        }
    }

    /// How many writes of entries have failed, unless the disk still may have another state than readers were shown.
    pub fn failures_settled(&self) -> Option<u64> {
        let suspects = self.suspects.list.lock();
        suspects.is_empty().then(|| self.suspects.failures.load(Ordering::SeqCst))
    }

    /// Ends the doubt about slices whose tables are gone: they are never written again.
    pub fn forget_suspects(&self, gone: Vec<(SliceNo, Pinned<'_, E>)>) {
        for (slice, pinned) in gone {
            let suspect = self.suspects.list.lock().remove(&slice);
            if suspect.is_some_and(|suspect| suspect.stays) {
                pinned.stay_no_longer();
            }
        }
    }

    /// Whether a suspect that was written again is none any more: another write of it may have failed meanwhile.
    fn is_settled(&self, slice: SliceNo, written: Suspect) -> bool {
        let mut suspects = self.suspects.list.lock();
        let is_same = suspects.get(&slice).is_some_and(|now| now.failures == written.failures);
        is_same && suspects.remove(&slice).is_some()
    }
}

/// Writes the slices in doubt again.
pub async fn write_suspects<F: Writable>(image: &F) -> IoResult {
    let tables = image.tables();
    for _ in 0..ATTEMPTS {
        let list: Vec<(SliceNo, Suspect)> = {
            let suspects = tables.suspects.list.lock();
            if suspects.is_empty() {
                tables.stopped.flushed();
                return Ok(());
            }
            suspects.iter().map(|(&slice, &suspect)| (slice, suspect)).collect()
        };
        for (slice, suspect) in list {
            let pinned = pin(image, suspect.guest).await?;
            // Changes that are under way would be overwritten, so this goes through the same turns.
            rewrite_slice(image, slice, suspect.guest, &pinned).await?;
            if tables.is_settled(slice, suspect) && suspect.stays {
                pinned.stay_no_longer();
            }
        }
    }
    Err(Errno::EIO)
}

/// The slices in doubt that `is_asked` chooses, kept in the cache.
pub async fn pin_suspects<F: Writable>(
    image: &F,
    is_asked: impl Fn(SliceNo) -> bool,
) -> IoResult<Vec<(SliceNo, Pinned<'_, F::Entry>)>> {
    let asked: Vec<(SliceNo, u64)> = {
        let suspects = image.tables().suspects.list.lock();
        let asked = suspects.iter().filter(|(slice, _)| is_asked(**slice));
        asked.map(|(&slice, suspect)| (slice, suspect.guest)).collect()
    };
    let mut pinned = Vec::new();
    for (slice, guest) in asked {
        pinned.push((slice, pin(image, guest).await?));
    }
    Ok(pinned)
}
