//! Writing an image's header cluster.
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

use super::extensions::{BitmapsPointer, Extension};
use super::header::{Autoclear, Header};
use super::header_steps::{Sector, Step, steps};
use crate::block::{Error, Node, WriteFlags};
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

pub(super) fn failed(errno: Errno) -> Error {
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

pub(super) async fn read_cluster(file: &Node, header: &Header) -> IoResult<AlignedBuf> {
    let mut cluster = AlignedBuf::new(1 << header.cluster_bits, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, 0, &cluster.io_vec()).await?;
    Ok(cluster)
}

/// Writes sectors side by side, and makes them durable.
pub(super) async fn write_durably(file: &Node, sectors: &[Sector]) -> IoResult {
    if sectors.is_empty() {
        return Ok(());
    }
    for (at, bytes) in sectors {
        file.write(*at, &IoVec::from_ref(bytes), WriteFlags::empty()).await?;
    }
    file.flush().await
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
