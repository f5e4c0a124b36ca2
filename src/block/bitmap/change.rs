//! Adding, removing and changing a node's bitmaps, as QMP and the tools do.
//!
//! What begins to record here, or is cleared, is complete once [`Node::settle_bitmaps`] has passed:
//! fast writes that began before it have ended by then, and slow ones record their end. While a node
//! may be closed by others, changes go through [`crate::block::Graph::change_bitmaps`].

use super::{Allowed, Bitmap, BitmapFlags, Bits, already_exists, shown};
use crate::block::{Error, Node};
use crate::io::{Errno, epoch};
use std::sync::Arc;

/// Longest name, in bytes.
pub const NAME_LIMIT: usize = 1023;
/// Least granularity, in bytes.
pub const LEAST_GRANULARITY: u64 = 512;

/// A bitmap to be.
#[derive(Clone, Debug, Default)]
pub struct NewBitmap {
    pub name: String,
    /// Bytes; none for the image's clusters, within bounds.
    pub granularity: Option<u64>,
    pub persistent: bool,
    pub disabled: bool,
}

impl Node {
    /// Adds a bitmap that has nothing recorded.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn add_bitmap(&self, new: NewBitmap) -> Result<(), Error> {
        let NewBitmap { name, granularity, persistent, disabled } = new;
        if name.is_empty() {
            return Err(Error::new("Bitmap name cannot be empty"));
        }
        let granularity = granularity.unwrap_or_else(|| self.default_granularity());
        if granularity < LEAST_GRANULARITY || !granularity.is_power_of_two() {
            let text = format!("Granularity must be power of 2 and at least {LEAST_GRANULARITY}");
            return Err(Error::new(text));
        }
        if self.bitmaps().find(&name).is_ok() {
            return Err(already_exists(&name));
        }
        if persistent {
            self.check_persistent(&name, granularity)?;
        }
        if name.len() > NAME_LIMIT {
            return Err(Error::new(format!("Bitmap name too long: {}", shown(&name))));
        }
        let bits = Bits::new(self.len(), granularity.trailing_zeros())?;
        self.begin_change(persistent).await?;
        let flags = BitmapFlags { recording: !disabled, persistent, ..BitmapFlags::default() };
        self.bitmaps().add(Bitmap::new(name, bits, flags), &self.members())
    }

    fn default_granularity(&self) -> u64 {
        let cluster = self.driver().image().and_then(|image| image.info().cluster_size);
        cluster.unwrap_or(1 << 16).clamp(1 << 12, 1 << 16)
    }

    fn check_persistent(&self, name: &str, granularity: u64) -> Result<(), Error> {
        let node = self.name();
        let Some(store) = self.driver().bitmap_store() else {
            let what = format!("Can't store persistent bitmaps to {node}");
            return Err(Error::os(what, Errno::ENOTSUP));
        };
        let at = format!("Can't make bitmap '{}' persistent in '{node}'", shown(name));
        if self.is_frozen() {
            return Err(Error::new("its image is written no more, below an overlay").at(at));
        }
        store.can_store(name, granularity).map_err(|error| error.at(at))
    }

    /// The bitmap of this name, as long as the disk is.
    fn bitmap(&self, name: &str) -> Result<Arc<Bitmap>, Error> {
        self.bitmaps().resize(self.len(), &self.members());
        self.bitmaps().find(name)
    }

    /// What the image keeps of a bitmap is out of date from now on, as far as the image keeps it. Changes of it
    /// wait for no storage then.
    ///
    /// # Errors
    /// The image cannot be written to.
    pub async fn begin_bitmap_change(&self, name: &str) -> Result<(), Error> {
        match self.bitmaps().find(name) {
            Ok(bitmap) => {
                let flags = bitmap.flags();
                self.begin_change(flags.persistent && !flags.read_only).await
            }
            // The change itself says so.
            Err(_) => Ok(()),
        }
    }

    /// What the image keeps is out of date from now on.
    async fn begin_change(&self, persistent: bool) -> Result<(), Error> {
        match self.driver().bitmap_store() {
            Some(store) if persistent => store.begin_change().await,
            _ => Ok(()),
        }
    }

    /// Waits until no request on the fast path still uses an older list of bitmaps.
    pub async fn settle_bitmaps(&self) {
        epoch::synchronize(&self.members()).await;
    }

    /// Removes a bitmap, also from the image.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn remove_bitmap(&self, name: &str) -> Result<(), Error> {
        let bitmap = self.check_bitmap_removal(name)?;
        if let Some(store) = self.driver().bitmap_store()
            && bitmap.flags().persistent
        {
            store.remove(name).await?;
        }
        self.bitmaps().remove(&bitmap, &self.members());
        Ok(())
    }

    /// The bitmap of this name, if it may be removed.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_bitmap_removal(&self, name: &str) -> Result<Arc<Bitmap>, Error> {
        let bitmap = self.bitmaps().find(name)?;
        bitmap.check(Allowed { inconsistent: true, ..Allowed::default() })?;
        Ok(bitmap)
    }

    /// Forgets what a bitmap has recorded.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn clear_bitmap(&self, name: &str) -> Result<(), Error> {
        let bitmap = self.bitmap(name)?;
        bitmap.check(Allowed::default())?;
        self.begin_change(bitmap.flags().persistent).await?;
        bitmap.bits().clear();
        Ok(())
    }

    /// Lets a bitmap record, or record no more.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn enable_bitmap(&self, name: &str, enable: bool) -> Result<(), Error> {
        let bitmap = self.bitmap(name)?;
        bitmap.check(Allowed { read_only: true, ..Allowed::default() })?;
        let flags = bitmap.flags();
        self.begin_change(flags.persistent && !flags.read_only).await?;
        self.bitmaps().change(&bitmap, &self.members(), |flags| flags.recording = enable);
        Ok(())
    }

    /// Adds to a bitmap what others, of this node or another one, have recorded: of all or, if it
    /// fails, of none.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn merge_bitmaps(
        &self,
        target: &str,
        sources: &[(Arc<Node>, String)],
    ) -> Result<(), Error> {
        let target = self.bitmap(target)?;
        target.check(Allowed::default())?;
        let mut all = Vec::with_capacity(sources.len());
        let into = target.bits();
        for (node, name) in sources {
            let source = node.bitmap(name)?;
            source.check(Allowed { read_only: true, ..Allowed::default() })?;
            let bits = source.bits();
            if bits.len() != into.len() {
                return Err(Error::new(format!(
                    "Bitmaps are of different sizes (destination size is {}, source size is {}) \
                     and can't be merged",
                    into.len(),
                    bits.len()
                )));
            }
            all.push(bits);
        }
        self.begin_change(target.flags().persistent).await?;
        all.iter().for_each(|bits| into.merge(bits));
        Ok(())
    }

    /// Refuses to change the length of a disk with a bitmap that would not be right afterwards.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_bitmaps_for_resize(&self) -> Result<(), Error> {
        let all = self.bitmaps().all();
        all.iter().try_for_each(|bitmap| bitmap.check(Allowed::default()))
    }
}
