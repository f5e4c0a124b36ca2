//! Flushing and closing.
//!
//! All metadata of what has been answered is with the kernel already, in an order that a crash may
//! cut anywhere ([`super::order`]), but for entries in the journal, which a flush hands over first; it
//! makes all of that and the data durable, and what was dropped by it becomes free.

use super::header::Incompatible;
use super::{Qcow2, open};
use crate::block::{Error, SECTOR};
use crate::cow::{Lock, Run, Stop, begin_rest, check_sound, cut, settle_journal, write_suspects};
use crate::io::{Errno, IoResult};
use std::sync::atomic::Ordering;

impl Qcow2 {
    pub(super) async fn flush_all(&self) -> IoResult {
        self.metadata().settle_header().await?;
        if !self.is_prepared.load(Ordering::Acquire) {
            // Nothing has been written.
            return Ok(());
        }
        if self.corruption.is_fatal() {
            // What is in the cache may be wrong: a repair needs the file as it is.
            self.nodes.flush().await?;
            return Err(Errno::EIO);
        }
        write_suspects(self).await?;
        settle_journal(self).await?;
        let batch = self.space.freed.begin_flush(&self.mapping.tables().visits);
        let result = self.nodes.flush().await;
        self.space.freed.end_flush(batch, result);
        result?;
        // Whoever has them now does it, or the next flush: this one waits for nobody.
        if self.space.freed.has_durable()
            && let Some(mut refcounts) = self.space.counts.as_deref().and_then(Lock::try_lock)
        {
            self.reap(&mut refcounts).await;
        }
        self.take_back_if_idle().await;
        Ok(())
    }

    /// Brings the image to a rest: nothing is in flight.
    pub(super) async fn close_image(&self) -> IoResult {
        let is_written = self.is_prepared.load(Ordering::Acquire) || self.has_touched_bitmaps();
        // Amending and repairing close the image before they change the file: nothing is left to write.
        let is_ours = self.mapping.tables().stopped.get() != Stop::ForGood;
        if self.is_writable && is_written && is_ours {
            begin_rest(self).await;
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
            Ok(()) => check_sound(self).await,
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
            let mut packing = self.space.packing.lock().await;
            (packing.filled_to(), packing.drain())
        };
        let mut refcounts = self.refcounts().await?;
        self.reap(&mut refcounts).await;
        let free = refcounts.unreserve(self, &packing).await?;
        let mut unused = self.space.pool.lock().drain();
        refcounts.unreserve(self, &unused).await?;
        unused.extend(free.iter().map(|&first| Run { first, count: 1, is_fresh: true }));
        let used = match self.take_back_all(&mut refcounts).await {
            true => {
                let end = self.geometry.clusters(self.file().len());
                refcounts.end_of_use(self, end).await.ok()
            }
            false => None,
        };
        self.cut_file(&unused, packed_end, used).await;
        drop(refcounts);
        let mut header = self.metadata().lock_header().await;
        if header.incompatible.contains(Incompatible::DIRTY) && !self.snapshots.needs_repair() {
            self.file().flush().await?;
            let mut new = header.clone();
            new.incompatible -= Incompatible::DIRTY;
            header.write(new).await?;
        }
        drop(header);
        self.file().flush().await?;
        if !self.has_to_take_back() {
            self.mapping.tables().journal.mark_in_use(false);
        }
        Ok(())
    }

    /// Takes off the end of the file what was reserved there and is free again, and what lies behind the cluster `used`;
    /// of a last cluster that holds compressed ones only what lies behind `packed_end`.
    async fn cut_file(&self, unused: &[Run], packed_end: u64, used: Option<u64>) {
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
        end = end.min(used.unwrap_or(end));
        let packed_end = packed_end.next_multiple_of(SECTOR);
        let new = match packed_end.div_ceil(1 << bits) == end {
            true => packed_end,
            false => end << bits,
        };
        cut(&file, new).await;
    }
}
