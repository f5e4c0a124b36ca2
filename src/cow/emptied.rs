//! Emptying clusters where they are, in formats that keep the clusters that they have allocated.
//!
//! No entry changes: the storage makes zeroes or holes of what is there, and what is not allocated stays so.

use super::format::{Format, data};
use super::lookup::{Found, lookup};
use crate::block::ZeroFlags;
use crate::io::IoResult;
use std::ops::Range;

/// Makes the allocated clusters of a range read as zeroes.
pub async fn zero_in_place<F: Format>(image: &F, guest: Range<u64>, flags: ZeroFlags) -> IoResult {
    let zero = async |host, len| data(image).zero(host, len, flags).await;
    for_each_place(image, guest, zero).await
}

/// Tells the storage that the contents of the allocated clusters of a range do not matter any more.
pub async fn discard_in_place<F: Format>(image: &F, guest: Range<u64>) -> IoResult {
    let discard = async |host, len| data(image).discard(host, len).await;
    for_each_place(image, guest, discard).await
}

/// Works on each allocated piece of a range: an offset of the file, and bytes.
async fn for_each_place<F: Format>(
    image: &F,
    guest: Range<u64>,
    work: impl AsyncFn(u64, u64) -> IoResult,
) -> IoResult {
    let mut at = guest.start;
    while at < guest.end {
        let _visit = image.tables().visits.enter();
        let piece = lookup(image, at, guest.end - at).await?;
        if let Found::Data { host, .. } = piece.found {
            // What lies past the end of the file reads as zeroes.
            let there = data(image).len().saturating_sub(host).min(piece.len);
            if there > 0 {
                work(host, there).await?;
            }
        }
        at += piece.len;
    }
    Ok(())
}
