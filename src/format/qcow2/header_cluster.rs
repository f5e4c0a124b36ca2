//! Changes of what follows the header's fields: extensions, and with them the place of the backing
//! file's name.
//!
//! That may be more than the one sector that a crash leaves old or new. So what would make no sense
//! half-written is not looked at meanwhile: the autoclear bit, which says that the bitmaps extension
//! can be trusted, is taken back first and set by the last write, which is of the first sector. In
//! between, sectors are written from the last to the second, so that the end mark is there before
//! what it ends, and a name that has to move is copied before the header points to the copy.

use super::Qcow2;
use super::extensions::{BitmapsPointer, Extension};
use super::header::{Autoclear, Header};
use super::order::LockGuard;
use super::read::read_padded;
use super::standing::OnDisk;
use crate::block::{Error, WriteFlags};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::ops::Range;

const SECTOR: usize = 512;

impl Qcow2 {
    /// Names another bitmap directory in the header, durably, or none. What the new one needs is
    /// durable.
    pub(super) async fn name_bitmaps(&self, pointer: Option<BitmapsPointer>) -> Result<(), Error> {
        let mut header = self.header.lock().await;
        let mut new = header.clone();
        let old = new.extensions.iter().position(|one| matches!(one, Extension::Bitmaps(_)));
        match (pointer, old) {
            (Some(pointer), Some(old)) => new.extensions[old] = Extension::Bitmaps(pointer),
            (Some(pointer), None) => new.extensions.push(Extension::Bitmaps(pointer)),
            (None, Some(old)) => drop(new.extensions.remove(old)),
            (None, None) => {}
        }
        new.autoclear.set(Autoclear::BITMAPS, pointer.is_some());
        self.write_cluster(&mut header, new).await
    }

    /// Writes the first cluster as `new` has it.
    async fn write_cluster(
        &self,
        header: &mut LockGuard<'_, Header>,
        mut new: Header,
    ) -> Result<(), Error> {
        let failed = |errno| Error::os("Failed to update the header", errno);
        if self.header_state.get() == OnDisk::Lost {
            return Err(failed(Errno::EIO));
        }
        let size = self.geometry.cluster_size() as usize;
        let mut old = AlignedBuf::new(size, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
        read_padded(&self.file(), 0, &old.io_vec()).await.map_err(failed)?;
        let bytes = new.encode_keeping_name()?;
        let sectors = || (0..size).step_by(SECTOR).map(|at| at..at + SECTOR);
        let changed: Vec<_> = sectors().filter(|at| old[at.clone()] != bytes[at.clone()]).collect();
        if changed.len() > 1 {
            let tail = &changed[usize::from(changed[0].start == 0)..];
            self.write_tail(header, &new, &bytes, tail).await.map_err(failed)?;
        }
        // The first sector, or the only one that differs.
        if let Some(last) = changed.first() {
            let at = if changed.len() > 1 { 0..SECTOR } else { last.clone() };
            // If it fails, the fields are written again as they are now.
            let has_fields = at.start == 0;
            if has_fields {
                self.header_state.set(OnDisk::InDoubt);
            }
            self.write_part(&bytes, at).await.map_err(failed)?;
            if has_fields {
                self.header_state.set(OnDisk::Same);
            }
        }
        self.show_header(header, new);
        Ok(())
    }

    /// Writes the sectors behind the first, none of which the header relies on meanwhile.
    async fn write_tail(
        &self,
        header: &mut LockGuard<'_, Header>,
        new: &Header,
        bytes: &[u8],
        tail: &[Range<usize>],
    ) -> IoResult {
        if header.autoclear.contains(Autoclear::BITMAPS) {
            let mut distrusted = (**header).clone();
            distrusted.autoclear -= Autoclear::BITMAPS;
            self.write_header(header, distrusted).await?;
        }
        let name = new.name_range();
        if name != header.name_range() {
            // Nothing is there yet.
            self.write_part(bytes, name).await?;
            let mut moved = (**header).clone();
            moved.move_name(new);
            self.write_header(header, moved).await?;
        }
        for at in tail.iter().rev() {
            self.write_part(bytes, at.clone()).await?;
        }
        Ok(())
    }

    async fn write_part(&self, bytes: &[u8], at: Range<usize>) -> IoResult {
        let file = self.file();
        let start = at.start as u64;
        file.write(start, &IoVec::from_ref(&bytes[at]), WriteFlags::empty()).await?;
        file.flush().await
    }
}
