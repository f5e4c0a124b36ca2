//! Block status: what a range is, by the same lookup that reading uses.

use super::format::{Format, backing};
use super::lookup::{Found, lookup};
use crate::block::extents::decided;
use crate::block::{Extent, Node, Place, Precision, Status};
use crate::io::{Errno, IoResult};

/// The status of the first bytes of a range, as [`Driver::status`](crate::block::Driver::status) asks.
pub async fn status<F: Format>(
    image: &F,
    at: u64,
    len: u64,
    precision: Precision,
) -> IoResult<Extent> {
    let _visit = image.tables().visits.enter();
    let piece = lookup(image, at, len).await?;
    let place = |offset: u64| Some(Place { child: Some(image.data_child().0), offset });
    let extent = |status, place| Ok(Extent { len: piece.len, status, place });
    match piece.found {
        Found::Data { host, .. } => {
            let (len, status) = image.data_status(host, piece.len, precision).await?;
            Ok(Extent { len, status, place: place(host) })
        }
        Found::Zero { host } => extent(Status::ZERO | Status::ALLOCATED, host.and_then(place)),
        Found::Compressed(_) => extent(Status::DATA | Status::ALLOCATED | Status::COMPRESSED, None),
        Found::Mixed { .. } => Err(Errno::EIO),
        Found::Unallocated { host } => {
            let below = status_of_backing(image, at, piece.len, precision).await?;
            Ok(Extent { place: host.and_then(place), ..below })
        }
    }
}

/// The status of the guest's data at a host offset, where holes of the file are told from data; and for how many
/// bytes.
pub async fn stored_status(
    data: &Node,
    host: u64,
    len: u64,
    precision: Precision,
) -> IoResult<(u64, Status)> {
    let stored = Status::DATA | Status::ALLOCATED;
    let there = data.len().saturating_sub(host);
    if there == 0 {
        return Ok((len, stored | Status::ZERO));
    }
    let Extent { len, status, .. } = data.status(host, len.min(there), precision).await?;
    Ok((len, stored | status & Status::ZERO))
}

async fn status_of_backing<F: Format>(
    image: &F,
    at: u64,
    len: u64,
    precision: Precision,
) -> IoResult<Extent> {
    let backing = backing(image);
    let at = image.backing_start() + at;
    let there = backing.as_ref().map_or(0, |backing| backing.len().saturating_sub(at));
    match backing {
        Some(backing) if there > 0 => {
            let len = len.min(there);
            let status = match precision {
                Precision::Allocation => Extent { len, status: Status::DATA, place: None },
                Precision::Zeroes => match decided(&backing, at, len).await? {
                    (Some(layer), len) => layer.status(at, len, precision).await?,
                    (None, len) => Extent { len, status: Status::ZERO, place: None },
                },
            };
            let kind = status.status & (Status::DATA | Status::ZERO);
            Ok(Extent { len: status.len, status: kind, place: None })
        }
        _ => Ok(Extent { len, status: Status::ZERO, place: None }),
    }
}
