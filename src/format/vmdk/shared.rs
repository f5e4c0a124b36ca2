//! The common state of a disk's extents: the children, the access mode, and the descriptor.
//!
//! The content ID in the descriptor identifies the contents of the disk.
//!
//! The content ID changes, durably, before the first write since the image was opened, so that an image that stands on this
//! one can tell. An image goes on naming its parent when that has changed below it as data was committed to it.

use super::descriptor::{self, Descriptor};
use super::edit::{self, Edit};
use super::open;
use crate::block::{Child, Error, Node, WriteFlags};
use crate::cow::Lock;
use crate::format::chunks::Chunks;
use crate::io::sync::Mutex;
use crate::io::{Blocking, Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// See the module's text.
pub struct Shared {
    /// The node's, for what is logged.
    pub name: String,
    /// `file`, then the extents in files of their own, then `backing` if there is one.
    pub children: Vec<Child>,
    pub backing: Option<usize>,
    pub is_writable: bool,
    /// The content ID has changed since the image was opened.
    pub is_marked: AtomicBool,
    /// Nothing is written until it is thawed ([`Driver::freeze`](crate::block::Driver::freeze)).
    pub is_frozen: AtomicBool,
    /// Something that makes no sense was reported.
    pub has_reported: AtomicBool,
    /// The content ID of the parent was that of the image it stands on.
    pub knows_parent: AtomicBool,
    pub text: Lock<Text>,
    /// What the text says.
    pub says: Mutex<Descriptor>,
    /// Unpacked grains.
    pub chunks: Chunks,
    pub blocking: Blocking,
}

/// The descriptor as it is on the disk.
#[derive(Clone, Debug)]
pub struct Text {
    pub bytes: Vec<u8>,
    /// Where it begins in the file, in bytes; none if it is not there.
    pub place: Option<u64>,
    /// What it may be long; none in a file of its own.
    pub room: Option<u64>,
    /// The file has it in UTF-16.
    pub is_utf16: bool,
}

impl Text {
    /// Most bytes that it may have.
    fn limit(&self) -> u64 {
        self.room.unwrap_or(descriptor::LIMIT)
    }
}

impl Shared {
    pub fn backing_child(&self) -> Option<&Child> {
        self.backing.map(|index| &self.children[index])
    }

    fn file(&self) -> Arc<Node> {
        self.children[0].node()
    }

    /// Where the descriptor lies in the file of a child, if it does.
    pub async fn text_in(&self, child: usize) -> Option<Range<u64>> {
        let text = self.text.lock().await;
        let place = text.place.filter(|_| child == 0)?;
        Some(place..place + (text.bytes.len() as u64).max(1))
    }

    /// # Errors
    /// EPERM: nothing may be written.
    pub fn check_writable(&self) -> IoResult {
        match self.is_writable && !self.is_frozen.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    }

    /// Gives the image another content ID, durably, unless that was done since it was opened.
    pub async fn mark_changed(&self) -> IoResult {
        if self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut text = self.text.lock().await;
        if self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let id = new_id(self.says.lock().cid, edit::id_digits(&text.bytes));
        let edit = edit::set_id(&text.bytes, id);
        self.change(&mut text, edit.as_slice()).await?;
        self.says.lock().cid = id;
        self.is_marked.store(true, Ordering::Release);
        Ok(())
    }

    /// Changes the descriptor, durably, one change after the other.
    async fn change(&self, text: &mut Text, edits: &[Edit]) -> IoResult {
        let Some(place) = text.place else { return Ok(()) };
        let file = self.file();
        for edit in edits {
            if edit.end() as u64 > text.limit() {
                return Err(Errno::ENOSPC);
            }
            let at = place + edit.at as u64;
            file.write(at, &IoVec::from_ref(&edit.bytes), WriteFlags::empty()).await?;
            file.flush().await?;
            edit.apply(&mut text.bytes);
        }
        Ok(())
    }

    /// Follows the parent, if that has changed below this image.
    pub async fn keep_parent(&self) -> IoResult {
        let Some(backing) = self.backing_child() else {
            return Ok(());
        };
        if self.check_writable().is_err() || !self.knows_parent.load(Ordering::Acquire) {
            return Ok(());
        }
        let found = content_id(&backing.node()).await;
        let found = found.map_err(|error| error.errno().unwrap_or(Errno::EIO))?;
        match found {
            Some(id) if id != self.says.lock().parent_cid => self.set_parent_id(id).await,
            _ => Ok(()),
        }
    }

    async fn set_parent_id(&self, id: u32) -> IoResult {
        let mut text = self.text.lock().await;
        let Some(at) = text.place else { return Ok(()) };
        let edits = edit::set_parent_id(&text.bytes, at, text.limit(), id).ok_or(Errno::ENOSPC)?;
        self.change(&mut text, &edits).await?;
        self.says.lock().parent_cid = id;
        Ok(())
    }

    /// Records another parent, by its name, and by the content ID that the file of that name has now.
    pub async fn change_parent(&self, name: Option<&str>, id: u32) -> Result<(), Error> {
        let failed = |errno| Error::os("Could not change the backing file", errno);
        self.check_writable().map_err(failed)?;
        if name.is_some_and(|name| name.contains(['"', '\n', '\r', '\0'])) {
            return Err(Error::new("A VMDK descriptor cannot hold the name of the backing file"));
        }
        let mut text = self.text.lock().await;
        let Some(at) = text.place else {
            return Err(Error::new("A VMDK image without a descriptor has no backing file"));
        };
        let edits = edit::set_parent(&text.bytes, at, text.limit(), name, id);
        let edits = edits.ok_or(Errno::ENOSPC).map_err(failed)?;
        self.change(&mut text, &edits).await.map_err(failed)?;
        // It is not the one below any more.
        self.knows_parent.store(false, Ordering::Release);
        let mut says = self.says.lock();
        says.parent_cid = id;
        says.parent = name.map(str::to_owned);
        Ok(())
    }

    /// Logs the first thing in the image that makes no sense: a guest must not fill the log.
    pub fn report(&self, what: std::fmt::Arguments<'_>) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            log::info!("{}: vmdk: {what}", self.name);
        }
    }
}

/// A content ID that differs from this one and has no more digits, unless these are too few to tell images apart.
pub fn new_id(old: u32, digits: usize) -> u32 {
    let mask = if (4..8).contains(&digits) { (1 << (4 * digits)) - 1 } else { u32::MAX };
    loop {
        let [a, b, c, d, ..] = Uuid::new_v4().into_bytes();
        let id = u32::from_le_bytes([a, b, c, d]) & mask;
        // The last two have a meaning of their own.
        if id != old && id < descriptor::NO_PARENT - 1 {
            return id;
        }
    }
}

/// The content ID of a disk, if its node is an image of this format.
pub async fn content_id(disk: &Arc<Node>) -> Result<Option<u32>, Error> {
    let image = disk.below_filters();
    if !std::ptr::eq(image.driver().entry(), &super::ENTRY) {
        return Ok(None);
    }
    let Some(file) = image.driver().children().first().map(Child::node) else { return Ok(None) };
    let (kind, text) = open::read(&file).await?;
    Ok(text.place.is_some().then_some(open::said(&kind, &text)?.cid))
}
