//! What an image says of its parent, and how that changes: when the parent does, and when it gets another one.
//!
//! Both go through the log. A new locator is written beside the old one, and one entry of the metadata table then leads there,
//! so that a crash leaves either.

use super::metadata::Metadata;
use super::parent::{self, Locator};
use super::{Vhdx, parent::guid_text};
use crate::block::{Error, Node};
use crate::cow::{Writable, backing, file};
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult};
use std::sync::Arc;
use uuid::Uuid;

/// What a differencing image says of its parent.
pub struct Parent(pub Mutex<Said>);

/// See [`Parent`].
pub struct Said {
    /// A file name as a user would give it, if the one that is stored can be followed.
    pub name: Option<String>,
    /// The GUID of the parent that the image names.
    pub linkage: Uuid,
    /// Where that is in the file, if it is known to be that of the parent that is open.
    pub linkage_place: Option<u64>,
}

impl Vhdx {
    /// The image goes on naming its parent when that has changed below it, as it does when data is committed to it.
    pub(super) async fn keep_linkage(&self) -> IoResult {
        let (Some(Parent(said)), Some(below)) = (&self.parent, backing(self)) else {
            return Ok(());
        };
        let (place, linkage) = {
            let said = said.lock();
            (said.linkage_place, said.linkage)
        };
        let Some(place) = place else { return Ok(()) };
        let now = parent::data_write(&below).await;
        let now = now.map_err(|error| error.errno().unwrap_or(Errno::EIO))?;
        let Some(now) = now.filter(|&now| now != linkage) else { return Ok(()) };
        self.prepare().await?;
        self.write_logged(place, &guid_text(now)).await?;
        said.lock().linkage = now;
        Ok(())
    }

    /// Names another parent, durably. Without its node it is taken for the one that was meant before, under another name.
    ///
    /// # Errors
    /// The image is no differencing image, the parent is no VHDX image, or its name is not one that would be followed.
    pub(super) async fn change_parent(
        &self,
        name: Option<&str>,
        node: Option<&Arc<Node>>,
    ) -> Result<(), Error> {
        let Some(Parent(said)) = &self.parent else {
            let error = Error::new("The VHDX image has no parent, and takes no backing file");
            return Err(error.with_errno(Errno::ENOTSUP));
        };
        let name = name.ok_or_else(|| {
            Error::new("A differencing VHDX image needs a parent; convert makes an image without")
        })?;
        let linkage = match node {
            Some(node) => parent::data_write(node).await?.ok_or_else(parent::is_no_vhdx)?,
            None => said.lock().linkage,
        };
        let bytes = parent::encode(name, linkage)?;
        let name = Locator::parse(&bytes)?.name()?;
        let place = Metadata::room(&file(self), self.regions.metadata, bytes.len() as u64).await?;
        let change = async || -> IoResult {
            self.prepare().await?;
            // What the image shows instead of the old parent's data comes first.
            self.flush_all().await?;
            self.write_logged(self.regions.metadata.offset + place.item, &bytes).await?;
            let field = [place.item as u32, bytes.len() as u32].map(u32::to_le_bytes).concat();
            self.write_logged(self.regions.metadata.offset + place.field, &field).await
        };
        let changed = change().await;
        changed.map_err(|errno| Error::os("Could not change the VHDX parent locator", errno))?;
        // The parent that is open is not the one that is named.
        *said.lock() = Said { name: Some(name), linkage, linkage_place: None };
        Ok(())
    }
}
