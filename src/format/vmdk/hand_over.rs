//! An image that goes to another process, as its guest is migrated, and comes from one.
//!
//! Giving it up is what closing does. Nothing that was known of it holds when it comes: the descriptor and the directories
//! are read again, and what can only be the same is compared.

use super::Vmdk;
use super::descriptor;
use super::open::{self, File, layout_of, read_directory};
use super::shared::content_id;
use super::sparse::Sparse;
use crate::block::{Error, HandOver, LocalFuture};
use crate::cow::file;
use crate::io::IoResult;
use std::sync::atomic::Ordering;

impl HandOver for Vmdk {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.close_image())
    }
}

fn other_layout() -> Error {
    Error::new("the image has another layout than when it was opened")
}

impl Vmdk {
    /// Reads again what another process may have changed.
    async fn reload(&self) -> Result<(), Error> {
        let shared = &self.shared;
        let (kind, text) = open::read(&shared.children[0].node()).await?;
        let says = open::said(&kind, &text)?;
        let mut old = shared.text.lock().await;
        let is_same = match kind {
            File::Descriptor => {
                descriptor::extents(&text.bytes)? == descriptor::extents(&old.bytes)?
            }
            File::Hosted(_) | File::Cowd(_) => true,
        };
        let known = shared.says.lock().clone();
        if !is_same || says.parent != known.parent || says.create_type != known.create_type {
            return Err(other_layout());
        }
        for part in &self.parts {
            if let super::Extent::Sparse(sparse) = &part.extent {
                sparse.reload(part.kind).await?;
            }
        }
        let parent = match shared.backing_child() {
            Some(backing) => content_id(&backing.node()).await?,
            None => None,
        };
        shared.knows_parent.store(parent == Some(says.parent_cid), Ordering::Release);
        *old = text;
        *shared.says.lock() = says;
        shared.is_marked.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl Sparse {
    async fn reload(&self, kind: descriptor::Kind) -> Result<(), Error> {
        let file = file(self);
        if layout_of(&file, kind).await?.as_ref() != Some(&self.layout) {
            return Err(other_layout());
        }
        let failed = |errno| Error::os("Could not read the grain directory", errno);
        let read = async |at| read_directory(&file, at, &self.layout).await.map_err(failed);
        self.directory.replace(&read(self.layout.directory).await?);
        if let (Some(copies), Some(at)) = (&self.copies, self.layout.copy) {
            copies.replace(&read(at).await?);
        }
        self.mapping.cache.forget(|_| true);
        self.renew_space(file.driver().len());
        self.is_ready.store(false, Ordering::SeqCst);
        Ok(())
    }
}
