//! Flushing and closing.
//!
//! All metadata of what has been answered is with the kernel already, in an order that a crash may
//! cut anywhere ([`super::order`]), but for entries in the journal, which a flush hands over first; it
//! makes all of that and the data durable, and what was dropped by it becomes free.

use super::header::Incompatible;
use super::unclosed::set_mark;
use super::{Qcow2, open};
use crate::block::Error;
use crate::cow::{Release, Stop, begin_rest, check_sound, settle_journal, write_suspects};
use crate::io::{Errno, IoResult};

impl Qcow2 {
    pub(super) async fn flush_all(&self) -> IoResult {
        self.metadata().settle_header().await?;
        if !self.life.is_prepared() {
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
        let batch = self.space.begin_flush(self.metadata());
        let result = self.nodes.flush().await;
        self.space.end_flush(self.metadata(), batch, result).await
    }

    /// Notes that entries, handed to the kernel and shown to readers, no longer name these clusters.
    pub(super) async fn free(&self, releases: &[Release]) {
        if self.space.free(self.metadata(), releases).await {
            // Whether it succeeds matters to the guest's own flush alone.
            let _ = self.flush_all().await;
        }
    }

    /// Brings the image to a rest: nothing is in flight.
    pub(super) async fn close_image(&self) -> IoResult {
        let is_written = self.life.is_prepared() || self.bitmaps.is_touched();
        // Amending and repairing close the image before they change the file: nothing is left to write.
        let is_ours = self.mapping.tables().stopped.get() != Stop::ForGood;
        if self.settings.is_writable && is_written && is_ours {
            begin_rest(self).await;
            self.close_written().await?;
        }
        // Version 2 has no flag that would tell the next user to do it.
        if self.settings.is_writable && self.snapshots.needs_repair() && !self.corruption.is_fatal()
        {
            let repaired = open::repair(&self.settings.name, &self.file()).await;
            repaired.map_err(|error| error.errno().unwrap_or(Errno::EIO))?;
        }
        Ok(())
    }

    /// Stores the bitmaps. No request is in flight.
    pub(super) async fn store_bitmaps(&self) -> Result<(), Error> {
        if self.bitmaps.store(self.metadata(), &self.space).await? {
            // What is written from now on makes them out of date again.
            self.life.rest();
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
            Err(errno) if self.bitmaps.has_unstored().await => {
                Err(Error::os("Failed to flush the image", errno))
            }
            Err(_) => Ok(()),
        };
        if let Err(error) = stored {
            // The image says so itself: they are still marked as in use.
            log::error!(
                "Lost persistent bitmaps during inactivation of node '{}': {error}",
                self.settings.name
            );
        }
        ready?;
        self.space.close(self.metadata()).await?;
        let mut header = self.metadata().lock_header().await;
        if header.incompatible.contains(Incompatible::DIRTY) && !self.snapshots.needs_repair() {
            self.file().flush().await?;
            let mut new = header.clone();
            new.incompatible -= Incompatible::DIRTY;
            header.write(new).await?;
        }
        drop(header);
        let has_all = !self.space.has_to_take_back() && !self.unclosed.has_left();
        if has_all {
            self.metadata().change_header(|header| set_mark(header, None)).await?;
        }
        self.file().flush().await?;
        if has_all {
            self.mapping.tables().journal.mark_in_use(false);
        }
        Ok(())
    }
}
