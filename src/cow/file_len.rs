//! The length of the file that an image is in.

use crate::block::{Error, Node, Preallocation};
use crate::io::{Errno, IoResult};

/// Makes a file at least so long, in bytes. One task at a time: a shorter length that comes later must not cut it off
/// again.
///
/// # Errors
/// EFBIG, ENOSPC where the storage has a length of its own, or those of the storage.
pub async fn lengthen(file: &Node, len: u64) -> IoResult {
    if i64::try_from(len).is_err() {
        return Err(Errno(libc::EFBIG));
    }
    let image = file.driver().image().ok_or(Errno::ENOSPC)?;
    let refused = |error: Error| error.errno().unwrap_or(Errno::ENOSPC);
    image.grow(len, Preallocation::Off).await.map_err(refused)
}

/// Cuts off what a file has behind `len` bytes. Returns whether it did: a file that stays longer does no harm.
pub async fn cut(file: &Node, len: u64) -> bool {
    match file.driver().image() {
        Some(image) if len < file.driver().len() => image.resize(len, true).await.is_ok(),
        _ => false,
    }
}
