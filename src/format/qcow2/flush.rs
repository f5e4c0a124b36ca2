//! Flushing and closing.
//!
//! All metadata of what has been answered is with the kernel already, in an order that a crash may
//! cut anywhere ([`super::order`]), but for entries in the journal, which a flush hands over first; it
//! makes all of that and the data durable, and what was dropped by it becomes free.

use super::alloc::Run;
use super::header::Incompatible;
use super::layout::L2Entry;

use super::write_state::Stop;
use super::{Qcow2, open};

use crate::block::{Error, SECTOR};
use crate::cow::{Lock, Pinned, SliceNo, pin};
use crate::io::{Errno, IoResult};
use std::sync::atomic::Ordering;

/// So many slices may be in doubt before writing stops: they take room in the cache.
const SUSPECTS: usize = 4;

/// How often slices are written once more while writes of them fail beside that.
const ATTEMPTS: u32 = 8;

/// A slice that is in doubt.
#[derive(Clone, Copy)]
pub(super) struct Suspect {
    /// An offset that it maps.
    guest: u64,
    /// It is kept in the cache.
    stays: bool,
    /// How many writes of it have failed.
    failures: u32,
}

impl Qcow2 {
    pub(super) async fn flush_all(&self) -> IoResult {
        self.settle_header().await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        if self.corruption.is_fatal() {
            // What is in the cache may be wrong: a repair needs the file as it is.
            self.flush_children().await?;
            return Err(Errno::EIO);
        }
        self.write_suspects().await?;
        self.settle_journal().await?;
        let batch = self.begin_flush();
        let result = self.flush_children().await;
        self.end_flush(batch, result);
        result?;
        // Whoever has them now does it, or the next flush: this one waits for nobody.
        if self.has_freed()
            && let Some(mut refcounts) = self.counts.as_deref().and_then(Lock::try_lock)
        {
            self.reap(&mut refcounts).await;
        }
        Ok(())
    }

    async fn flush_children(&self) -> IoResult {
        if self.data != 0 {
            self.data().flush().await?;
        }
        self.file().flush().await
    }

    /// Books that a write of entries has failed: the disk may have old ones or new ones, until they
    /// are written once more.
    pub(super) fn suspect(&self, slice: SliceNo, guest: u64, pinned: Pinned<'_, L2Entry>) {
        let mut suspects = self.suspects.lock();
        if let Some(known) = suspects.get_mut(&slice) {
            known.failures += 1;
            return;
        }
        let stays = suspects.len() < SUSPECTS;
        suspects.insert(slice, Suspect { guest, stays, failures: 1 });
        match stays {
            true => pinned.stay(),
            // Whoever reads it anew meanwhile finds what the disk has.
            false => self.stopped.stop(Stop::NeedsFlush),
        }
    }

    /// Writes slices of which the disk may have another state than readers were shown.
    pub(super) async fn write_suspects(&self) -> IoResult {
        for _ in 0..ATTEMPTS {
            let list: Vec<(SliceNo, Suspect)> = {
                let suspects = self.suspects.lock();
                if suspects.is_empty() {
                    self.stopped.flushed();
                    return Ok(());
                }
                suspects.iter().map(|(&slice, &suspect)| (slice, suspect)).collect()
            };
            for (slice, suspect) in list {
                let pinned = pin(self, suspect.guest).await?;
                // What is being changed now would be written over: it goes through the same turns.
                self.rewrite_slice(slice, suspect.guest, &pinned).await?;
                if self.is_settled(slice, suspect) && suspect.stays {
                    pinned.stay_no_longer();
                }
            }
        }
        Err(Errno::EIO)
    }

    /// The slices in doubt, of those that are asked for, while they are kept in the cache.
    pub(super) async fn pin_suspects(
        &self,
        is_asked: impl Fn(SliceNo) -> bool,
    ) -> IoResult<Vec<(SliceNo, Pinned<'_, L2Entry>)>> {
        let asked: Vec<(SliceNo, u64)> = {
            let suspects = self.suspects.lock();
            let asked = suspects.iter().filter(|(slice, _)| is_asked(**slice));
            asked.map(|(&slice, suspect)| (slice, suspect.guest)).collect()
        };
        let mut pinned = Vec::new();
        for (slice, guest) in asked {
            pinned.push((slice, pin(self, guest).await?));
        }
        Ok(pinned)
    }

    /// Ends the doubt about slices whose tables are gone: they are never written again.
    pub(super) fn forget_suspects(&self, gone: Vec<(SliceNo, Pinned<'_, L2Entry>)>) {
        for (slice, pinned) in gone {
            let suspect = self.suspects.lock().remove(&slice);
            if suspect.is_some_and(|suspect| suspect.stays) {
                pinned.stay_no_longer();
            }
        }
    }

    /// Whether a suspect that was written once more is none any more: another write of it may have failed
    /// meanwhile.
    fn is_settled(&self, slice: SliceNo, written: Suspect) -> bool {
        let mut suspects = self.suspects.lock();
        let is_same = suspects.get(&slice).is_some_and(|now| now.failures == written.failures);
        is_same && suspects.remove(&slice).is_some()
    }

    /// Brings the image to a rest: nothing is in flight.
    pub(super) async fn close_image(&self) -> IoResult {
        let is_written = self.is_prepared.load(Ordering::Acquire) || self.has_touched_bitmaps();
        // Amending and repairing close the image before they change the file: nothing is left to write.
        let is_ours = self.stopped.get() != Stop::ForGood;
        if self.is_writable && is_written && is_ours {
            self.begin_rest().await;
            self.close_written().await?;
        }
        // Version 2 cannot tell whoever opens it next to do it.
        if self.is_writable && self.snapshots.needs_repair() && !self.corruption.is_fatal() {
            let repaired = open::repair(&self.name, &self.file()).await;
            repaired.map_err(|error| error.errno().unwrap_or(Errno::EIO))?;
        }
        Ok(())
    }

    async fn close_written(&self) -> IoResult {
        let ready = match self.flush_all().await {
            Ok(()) => self.check_sound().await,
            failed => failed,
        };
        let stored = match ready {
            Ok(()) => self.store_bitmaps().await,
            Err(errno) if self.has_unstored_bitmaps().await => {
                Err(Error::os("Failed to flush the image", errno))
            }
            Err(_) => Ok(()),
        };
        if let Err(error) = stored {
            // The image says so itself: they are still marked as in use.
            log::error!(
                "Lost persistent bitmaps during inactivation of node '{}': {error}",
                self.name
            );
        }
        ready?;
        let (packed_end, packing) = {
            let mut packing = self.packing.lock().await;
            (packing.filled_to(), packing.drain())
        };
        let mut refcounts = self.refcounts().await?;
        self.reap(&mut refcounts).await;
        let free = refcounts.unreserve(self, &packing).await?;
        let mut unused = self.pool.lock().drain();
        refcounts.unreserve(self, &unused).await?;
        unused.extend(free.iter().map(|&first| Run { first, count: 1, is_fresh: true }));
        self.cut_file(&unused, packed_end).await;
        drop(refcounts);
        let mut header = self.header.lock().await;
        if header.incompatible.contains(Incompatible::DIRTY) && !self.snapshots.needs_repair() {
            self.file().flush().await?;
            let mut new = header.clone();
            new.incompatible -= Incompatible::DIRTY;
            self.write_header(&mut header, new).await?;
        }
        drop(header);
        self.file().flush().await
    }

    /// Takes off the end of the file what was reserved there and is free again, and of a last cluster that
    /// holds compressed ones only what lies behind `packed_end`.
    async fn cut_file(&self, unused: &[Run], packed_end: u64) {
        let bits = self.geometry.cluster_bits;
        let file = self.file();
        let len = file.driver().len();
        let mut end = self.geometry.clusters(len);
        let mut unused = unused.to_vec();
        unused.sort_by_key(|run| std::cmp::Reverse(run.first));
        for run in unused {
            if run.is_fresh && run.first + run.count == end {
                end = run.first;
            }
        }
        let packed_end = packed_end.next_multiple_of(SECTOR);
        let new = match packed_end.div_ceil(1 << bits) == end {
            true => packed_end,
            false => end << bits,
        };
        if new < len
            && let Some(image) = file.driver().image()
        {
            // A longer file does no harm.
            let _ = image.resize(new, true).await;
        }
    }
}
