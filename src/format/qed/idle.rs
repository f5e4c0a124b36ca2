//! The mark that an image needs a check: set before allocation, cleared when idle or closed.
//!
//! With it comes the mark that the image is being written ([`crate::cow::Unclosed`]).
//!
//! Writes to allocated clusters do without it. Clusters are allocated under the range of their guest clusters, and
//! the mark is looked at there; taking it back holds all ranges.

use super::Qed;
use super::header::Features;
use super::write::write_header;
use crate::block::{Idle, LocalFuture, Signal};
use crate::cow::{Mark, check_sound, file};
use crate::io::IoResult;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long nothing is allocated before the mark is taken back: as long as QEMU waits.
pub const AFTER: Duration = Duration::from_secs(5);

impl Qed {
    /// Marks the image, durably. The caller is about to allocate clusters.
    pub(super) async fn mark(&self) -> IoResult {
        if let Some(clock) = &self.clock {
            clock.touch();
        }
        if self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut header = self.header.lock().await;
        if !self.is_marked.load(Ordering::Acquire) {
            let mut new = header.clone();
            new.features |= Features::NEED_CHECK;
            let new = new.with_mark(Some(self.in_use()));
            write_header(&file(self), &new).await?;
            *header = new;
            self.is_marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The mark that the image is being written.
    pub(super) fn in_use(&self) -> Mark {
        self.unclosed.mark(self.mapping.journal.number())
    }

    /// Takes the mark back, durably, and cuts off what was not used at the file's end. All that was written is durable,
    /// and nothing is allocated meanwhile.
    pub(super) async fn unmark(&self) -> IoResult {
        if !self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        self.cut_file().await;
        let file = file(self);
        file.flush().await?;
        let mut header = self.header.lock().await;
        let mut new = header.clone().with_mark(None);
        new.features -= Features::NEED_CHECK;
        write_header(&file, &new).await?;
        *header = new;
        self.is_marked.store(false, Ordering::Release);
        Ok(())
    }

    /// Takes the mark back if nothing has been allocated for a while.
    async fn unmark_if_idle(&self) -> IoResult {
        if !self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _all = self.mapping.ranges.lock(0..u64::MAX).await;
        if let Some(clock) = self.clock.as_ref().filter(|clock| !clock.is_idle()) {
            clock.watch();
            return Ok(());
        }
        self.flush_all().await?;
        check_sound(self).await?;
        self.unmark().await
    }
}

impl Idle for Qed {
    fn signal(&self) -> Option<Arc<Signal>> {
        self.clock.as_ref().map(|clock| clock.signal())
    }

    fn rest(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.unmark_if_idle())
    }
}
