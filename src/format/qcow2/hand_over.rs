//! Handing an image over to another process when its guest migrates, and taking it back.
//!
//! Giving it up is what closing does: everything is written, nothing is reserved any more, and the
//! image says so. Nothing that was known of it holds when it comes: header, tables and refcounts are
//! read again, and what can only be the same is compared.

use super::extensions::Extension;
use super::header::{Header, Incompatible};
use super::unclosed::mark_of;
use super::{Qcow2, open, snapshots};
use crate::block::{Error, HandOver, LocalFuture};
use crate::cow::begin_rest;
use crate::io::{IoResult, epoch};
use std::sync::atomic::Ordering;

/// Whether the image names dirty bitmaps.
pub(super) fn has_bitmaps(header: &Header) -> bool {
    header.extensions.iter().any(|extension| matches!(extension, Extension::Bitmaps(_)))
}

impl HandOver for Qcow2 {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.bring_to_rest())
    }
}

impl Qcow2 {
    /// Does what closing does, of an image that stays open.
    pub(super) async fn bring_to_rest(&self) -> IoResult {
        begin_rest(self).await;
        // So that all that was freed is given back.
        self.flush_all().await?;
        epoch::synchronize(&self.data().members()).await;
        self.close_image().await?;
        self.life.rest();
        Ok(())
    }

    async fn reload(&self) -> Result<(), Error> {
        let file = self.file();
        let mut header = open::read_header(&file).await?;
        open::check_counted(&header)?;
        let bad = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.settings.is_writable && header.incompatible & bad == Incompatible::DIRTY {
            header = open::repair(&self.settings.name, &file).await?;
        }
        if self.settings.is_writable {
            open::check_writable(&header)?;
        }
        if has_bitmaps(&header) {
            return Err(Error::new("an image with dirty bitmaps cannot be handed over"));
        }
        let mut current = self.metadata().lock_header().await;
        let same = header.geometry() == self.geometry
            && header.compression == self.settings.compression
            && header.backing_file == current.backing_file;
        if !same {
            return Err(Error::new(
                "the image has another layout or backing file than when it was opened",
            ));
        }
        if self.settings.is_writable {
            open::clear_unknown(&self.settings.name, &file, &mut header).await?;
            self.unclosed.note(mark_of(&header));
        }
        self.mapping.replace_l1(&open::load_l1(&file, &header).await?);
        let table = (header.refcount_table_offset, header.refcount_table_clusters);
        self.space.reread(&file, table).await.map_err(open::no_refcounts)?;
        self.snapshots.replace(snapshots::Table::read(&file, &header).await);
        self.mapping.tables().journal.close(false);
        self.size.store(header.size, Ordering::SeqCst);
        current.replace(header);
        drop(current);
        self.note_metadata().await;
        self.space.forget();
        self.life.rest();
        Ok(())
    }
}
