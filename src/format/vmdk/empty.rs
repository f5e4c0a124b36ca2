//! Emptying an image, so that its parent shows, when all that it has was committed.

use super::Vmdk;
use super::check::for_each_fixed_place;
use super::space::after_emptying;
use super::sparse::Sparse;
use crate::block::{Error, Event, Node, ZeroFlags};
use crate::cow::{Writable, announce, begin_rest, cut, file};
use crate::io::{Errno, IoResult};
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Vmdk {
    /// Gives up all grains. Nothing is in flight, and the parent has the same contents, durably.
    ///
    /// # Errors
    /// ENOTSUP where there is no parent, or what is no sparse extent.
    pub(super) async fn empty(&self) -> Result<(), Error> {
        if self.shared.backing.is_none() || self.sparse().count() < self.parts.len() {
            return Err(Error::new("Operation not supported").with_errno(Errno::ENOTSUP));
        }
        for sparse in self.sparse() {
            let emptied = sparse.empty().await;
            emptied.map_err(|errno| Error::os("Could not empty the image", errno))?;
        }
        Ok(())
    }
}

impl Sparse {
    /// The tables stay where they are, and have no grains. Until they are durable, the file has all that they had.
    async fn empty(&self) -> IoResult {
        self.prepare().await?;
        begin_rest(self).await;
        self.write_doubtful().await?;
        let _lock = self.lock.lock().await;
        let file = file(self);
        let file_len = file.driver().len();
        announce(self, Event::EmptyImagePrepare).await;
        let mut run = 0..0;
        for table in self.places_of_tables().filter(|table| table.end <= file_len) {
            if table.start == run.end {
                run.end = table.end;
                continue;
            }
            zero(&file, &run).await?;
            run = table;
        }
        zero(&file, &run).await?;
        file.flush().await?;
        self.mapping.cache.forget(|_| true);
        let mut used = 0;
        for_each_fixed_place(self, |place| used = used.max(place.end)).await;
        let is_cut = cut(&file, self.rounded(used)).await;
        self.space.replace(after_emptying(&self.layout, used, is_cut));
        // Nothing is left of what another process had.
        self.end_at_opening.store(0, Ordering::Release);
        self.note_end(self.space.end()).await?;
        file.flush().await
    }
}

async fn zero(file: &Node, run: &Range<u64>) -> IoResult {
    match run.is_empty() {
        true => Ok(()),
        false => file.zero(run.start, run.end - run.start, ZeroFlags::empty()).await,
    }
}
