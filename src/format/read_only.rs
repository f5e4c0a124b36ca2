//! What formats share whose images are only read so far.

use crate::block::{Child, Error, LocalFuture, Opening};
use crate::io::{Errno, IoResult};

/// Whether an image may be opened: for reading.
///
/// # Errors
/// One line with the cure, where it is to be written.
pub fn check(opening: &Opening, format: &str) -> Result<(), Error> {
    match opening.options().read_only || opening.auto_read_only() {
        true => Ok(()),
        false => Err(cannot_write(format)),
    }
}

/// Why an operation is refused that writes.
pub fn cannot_write(format: &str) -> Error {
    Error::new(format!("{format} images cannot be written yet: open it with read-only=on"))
}

/// Bytes that an image takes on its storage: those of its file.
pub fn allocated(file: &Child) -> LocalFuture<'_, IoResult<u64>> {
    Box::pin(async move {
        let file = file.node();
        file.driver().image().ok_or(Errno::ENOTSUP)?.allocated().await
    })
}
