//! Reading: from the host cluster, from the backing file, unpacked, or zeroes.

use super::format::{Format, announce, backing, data};
use super::lookup::{Found, Piece, lookup, piece};
use super::read_padded;
use crate::block::extents::decided;
use crate::block::{Access, Child, Decider, Event, Mapping, Node, ReadMapping, Target};
use crate::io::{Errno, InFlight, IoResult, IoVec};
use std::sync::Arc;

/// Reads guest bytes from `at` on.
pub async fn read_range<F: Format>(image: &F, at: u64, into: &IoVec<'_>) -> IoResult {
    let mut done = 0;
    while done < into.len() {
        let _visit = image.tables().visits.enter();
        let piece = lookup(image, at + done, into.len() - done).await?;
        let part = into.slice(done, piece.len);
        read_piece(image, at + done, piece, &part).await?;
        done += piece.len;
    }
    Ok(())
}

/// Reads what a lookup has found, under the visit that it was made in.
async fn read_piece<F: Format>(image: &F, at: u64, piece: Piece, into: &IoVec<'_>) -> IoResult {
    match piece.found {
        Found::Data { host, .. } => {
            announce(image, Event::ReadAio).await;
            read_padded(&data(image), host, into).await
        }
        Found::Zero { .. } => {
            into.zero();
            Ok(())
        }
        Found::Unallocated { .. } => read_backing(image, at, into).await,
        Found::Compressed(place) => image.read_compressed(at, place, into).await,
        Found::Mixed { .. } => Err(Errno::EIO),
    }
}

async fn read_backing<F: Format>(image: &F, at: u64, into: &IoVec<'_>) -> IoResult {
    let Some(backing) = backing_at(image, at) else {
        into.zero();
        return Ok(());
    };
    announce(image, Event::ReadBackingAio).await;
    let at = image.backing_start() + at;
    let mut done = 0;
    while done < into.len() {
        let (layer, len) = decided(&backing, at + done, into.len() - done).await?;
        let part = into.slice(done, len);
        match layer {
            Some(layer) => layer.read(at + done, &part).await?,
            None => part.zero(),
        }
        done += len;
    }
    Ok(())
}

/// The backing file, if unallocated bytes at `at` come from it.
fn backing_at<F: Format>(image: &F, at: u64) -> Option<Arc<Node>> {
    backing(image).filter(|_| at < image.backing_end())
}

/// Which image of the chain decides the first bytes of a range, as
/// [`Driver::decider`](crate::block::Driver::decider) asks.
pub async fn decider<F: Format>(image: &F, at: u64, len: u64) -> IoResult<Decider> {
    let Some(backing) = backing_at(image, at) else { return Ok((None, len)) };
    let _visit = image.tables().visits.enter();
    let piece = lookup(image, at, len).await?;
    if !matches!(piece.found, Found::Unallocated { .. }) {
        return Ok((None, piece.len));
    }
    announce(image, Event::ReadBackingAio).await;
    Ok((Some(backing), piece.len))
}

// ---- The fast path

/// Maps a read on the fast path, for [`Driver::map_read`](crate::block::Driver::map_read).
pub fn fast_read<'a, F: Format>(
    image: &'a F,
    inflight: &'a InFlight,
    at: u64,
    want: u64,
) -> ReadMapping<'a> {
    let Some(Ok(Piece { len, found })) = piece(image, at, want) else {
        return ReadMapping::Here(Mapping::slow(want));
    };
    ReadMapping::Here(match (found, image.backing_child()) {
        (Found::Data { host, .. }, _) => map_data(image, inflight, host, len, Access::Read),
        (Found::Unallocated { .. }, Some(backing)) => {
            return ReadMapping::Below(Child::fast(backing, inflight), len);
        }
        (Found::Zero { .. } | Found::Unallocated { .. }, _) => {
            Mapping { len, target: Target::Zero }
        }
        (Found::Compressed(_) | Found::Mixed { .. }, _) => Mapping::slow(want),
    })
}

/// Where a read on the fast path ends, down the chain of backing files.
pub fn fast_read_through<'a, F: Format>(
    image: &'a F,
    inflight: &'a InFlight,
    at: u64,
    want: u64,
) -> Mapping<'a> {
    match fast_read(image, inflight, at, want) {
        ReadMapping::Here(mapping) => mapping,
        ReadMapping::Below(backing, len) => backing.map_chain(inflight, at, len),
    }
}

/// The fast path to a piece that is in the file that holds the guest's data.
pub fn map_data<'a, F: Format>(
    image: &'a F,
    inflight: &'a InFlight,
    host: u64,
    len: u64,
    access: Access,
) -> Mapping<'a> {
    let data = image.data_child().1.fast(inflight);
    if host + len > data.len() {
        return Mapping::slow(len);
    }
    data.map(inflight, host, len, access)
}
