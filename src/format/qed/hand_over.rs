//! Handing an image over to another process when its guest migrates, and taking it back.
//!
//! Giving it up is what closing does. Nothing that was known of it holds when it comes: header and tables are read again,
//! and what can only be the same is compared.

use super::Qed;
use super::header::Features;
use super::open::{backing_name, read_header, read_l1, repair};
use super::space::extent;
use crate::block::{Error, HandOver, LocalFuture};
use crate::cow::file;
use crate::io::IoResult;
use std::sync::atomic::Ordering;

impl HandOver for Qed {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.close_image())
    }
}

impl Qed {
    async fn reload(&self) -> Result<(), Error> {
        let file = file(self);
        let mut new = read_header(&file).await?;
        let mark = new.mark();
        let needs_check = new.features.contains(Features::NEED_CHECK) || mark.is_some();
        let mut unnamed = None;
        if self.is_writable && needs_check {
            let (repaired, runs) = repair(&self.name, &file).await?;
            (new, unnamed) = (repaired, Some(runs));
        }
        let name = backing_name(&file, &new).await?;
        let mut header = self.header.lock().await;
        let is_same = new.layout() == self.layout
            && new.l1_offset == self.l1_offset
            && name == self.backing.lock().name;
        if !is_same {
            return Err(Error::new(
                "the image has another layout or backing file than when it was opened",
            ));
        }
        let failed = |errno| Error::os("Could not read L1 table", errno);
        let entries = 0..self.geometry().l1_entries(new.size);
        self.l1.replace(&read_l1(&file, new.l1_offset, entries).await.map_err(failed)?);
        self.mapping.cache.forget(|_| true);
        self.space.replace(extent(file.driver().len(), self.geometry()));
        self.size.store(new.size, Ordering::SeqCst);
        *header = new;
        self.unclosed.note(mark);
        self.unnamed.replace(unnamed);
        self.is_marked.store(false, Ordering::Release);
        self.is_prepared.store(false, Ordering::SeqCst);
        Ok(())
    }
}
