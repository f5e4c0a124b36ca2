//! The one writer of an image's header.
//!
//! A crash keeps any of the sectors that were written since the last flush. So the header changes in
//! [steps](super::header_steps), and the rule for each is:
//!
//! * First the sectors behind the first are written, but nothing that the header on disk relies on: its
//!   extensions and the backing file's name stay as they are, where they are.
//! * When these are durable, one sector is written, which makes the new header the one that holds:
//!   the first, or the only one in which the two differ. It is durable before anything else happens.
//! * So after a crash there is one of the two, whole. A header between the wanted one and the one that
//!   was there has the backing file and the extensions of either, but may lack the feature names.
//! * What cannot change by such steps, because the cluster has no room for them, is refused before
//!   anything is written.
//!
//! Fields that change alone are in the first sector, and are one write.

use super::Qcow2;
use super::extensions::{BitmapsPointer, Extension};
use super::header::{Autoclear, Header};
use super::header_state::OnDisk;
use super::header_steps::{Sector, Step, steps};
use crate::block::{Error, Node, WriteFlags};
use crate::cow::LockGuard;
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

fn failed(errno: Errno) -> Error {
    Error::os("Failed to update the header", errno)
}

/// Changes the header in `file` from `old` to `new`, durably; gives it with all in its place. Nobody has
/// the image open for writing, or it is not written any more.
///
/// # Errors
/// There is no room for the change, or I/O failed. The header is sound then.
pub(super) async fn rewrite(file: &Node, old: &Header, new: Header) -> Result<Header, Error> {
    let disk = read_cluster(file, old).await.map_err(failed)?;
    let mut reached = old.clone();
    for Step { header, rest, switch } in steps(old, &disk, new)? {
        write_durably(file, &rest).await.map_err(failed)?;
        write_durably(file, &[switch]).await.map_err(failed)?;
        reached = header;
    }
    Ok(reached)
}

/// Writes the fields of a header of which nothing else has changed, durably.
pub(super) async fn write_fields(file: &Node, header: &Header) -> IoResult {
    write_durably(file, &[(0, header.fields())]).await
}

async fn read_cluster(file: &Node, header: &Header) -> IoResult<AlignedBuf> {
    let mut cluster = AlignedBuf::new(1 << header.cluster_bits, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, 0, &cluster.io_vec()).await?;
    Ok(cluster)
}

/// Writes sectors side by side, and sees to it that they are durable.
async fn write_durably(file: &Node, sectors: &[Sector]) -> IoResult {
    if sectors.is_empty() {
        return Ok(());
    }
    for (at, bytes) in sectors {
        file.write(*at, &IoVec::from_ref(bytes), WriteFlags::empty()).await?;
    }
    file.flush().await
}

impl Qcow2 {
    /// Names another bitmap directory in the header, durably, or none. What the new one needs is
    /// durable.
    pub(super) async fn name_bitmaps(&self, pointer: Option<BitmapsPointer>) -> Result<(), Error> {
        let mut header = self.header.current.lock().await;
        let new = with_bitmaps(&header, pointer);
        self.change_cluster(&mut header, new).await
    }

    /// Changes the header, durably, also what follows its fields. `current` is what the lock guards.
    ///
    /// # Errors
    /// There is no room for the change, or I/O failed: then a header between the two may hold, in
    /// memory as on the disk.
    pub(super) async fn change_cluster(
        &self,
        current: &mut LockGuard<'_, Header>,
        new: Header,
    ) -> Result<(), Error> {
        if self.header.state.get() == OnDisk::InDoubt {
            let same = current.clone();
            self.write_header(current, same).await.map_err(failed)?;
        }
        let file = self.file();
        let disk = read_cluster(&file, current).await.map_err(failed)?;
        for Step { header, rest, switch } in steps(current, &disk, new)? {
            write_durably(&file, &rest).await.map_err(failed)?;
            *self.header.switch.lock() = Some(switch);
            self.write_header(current, header).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Writes changed fields of the header, durably. `current` is what the lock guards.
    ///
    /// When it fails the disk may have it or not: it holds in memory, and [`Self::settle_header`]
    /// writes it again.
    pub(super) async fn write_header(&self, current: &mut Header, new: Header) -> IoResult {
        let mut fields = new.fields();
        self.header.state.set(OnDisk::InDoubt);
        self.show_header(current, new);
        let file = self.file();
        let switch = self.header.switch.lock().clone();
        match switch {
            Some((0, mut sector)) => {
                sector[..fields.len()].copy_from_slice(&fields);
                fields = sector;
            }
            // It is the only one that changes, so the fields are right with it and without it.
            Some(other) => write_durably(&file, &[other]).await?,
            None => {}
        }
        write_durably(&file, &[(0, fields)]).await?;
        *self.header.switch.lock() = None;
        self.header.state.set(OnDisk::Same);
        Ok(())
    }

    /// Sees to it that the disk has the header that is in memory.
    pub(super) async fn settle_header(&self) -> IoResult {
        if self.header.state.get() != OnDisk::InDoubt {
            return Ok(());
        }
        let mut header = self.header.current.lock().await;
        // The task that held the lock may have written it.
        if self.header.state.get() != OnDisk::InDoubt {
            return Ok(());
        }
        let same = header.clone();
        self.write_header(&mut header, same).await
    }

    pub(super) fn show_header(&self, current: &mut Header, new: Header) {
        // Readers of a noted place ask the copy whether it still holds.
        *self.header.shown.lock() = new.clone();
        self.note_header(&new);
        *current = new;
    }

    /// The header as it is on disk, but for what is being written.
    pub(super) fn header_now(&self) -> Header {
        self.header.shown.lock().clone()
    }
}

/// The header with another pointer to bitmaps, or without.
pub(super) fn with_bitmaps(header: &Header, pointer: Option<BitmapsPointer>) -> Header {
    let mut new = header.clone();
    let old = new.extensions.iter().position(|one| matches!(one, Extension::Bitmaps(_)));
    match (pointer, old) {
        (Some(pointer), Some(old)) => new.extensions[old] = Extension::Bitmaps(pointer),
        (Some(pointer), None) => new.extensions.push(Extension::Bitmaps(pointer)),
        (None, Some(old)) => drop(new.extensions.remove(old)),
        (None, None) => {}
    }
    new.autoclear.set(Autoclear::BITMAPS, pointer.is_some());
    new
}
