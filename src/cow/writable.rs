//! What the layer asks of a format whose tables it writes.

use super::format::{Format, file};
use super::suspects::write_suspects;
use super::write_state::Stop;
use crate::block::WriteFlags;
use crate::io::{AlignedBuf, Errno, IoResult};
use std::future::{Future, ready};

/// A mapping whose entries change.
pub trait Writable: Format + Sized {
    /// Puts an entry's bytes as they are on the disk into `bytes`, of which there are
    /// [`Shape::entry_bytes`](super::Shape).
    fn store(entry: Self::Entry, bytes: &mut [u8]);

    /// Brings to the disk what has to be there before anything is written for the first time: a mark that the image
    /// is in use, or that its metadata may be inconsistent. Is called before each request that writes.
    fn prepare(&self) -> impl Future<Output = IoResult>;

    /// Fails if the image was found to be corrupt. Is called before a table is written; when it succeeds, the disk has
    /// everything that tables rely on (a header that is in doubt has been written again).
    fn check_intact(&self) -> impl Future<Output = IoResult> {
        ready(Ok(()))
    }

    /// Hands a part of a mapping table to the kernel: bytes at `at`, of the table that maps guest offset `guest`. When
    /// it returns, the disk has what the order of the format wants it to have before readers are shown the entries.
    fn write_table(
        &self,
        _guest: u64,
        at: u64,
        bytes: &AlignedBuf,
    ) -> impl Future<Output = IoResult> {
        async move { file(self).write(at, &bytes.source(), WriteFlags::empty()).await }
    }

    /// Refuses to write a part of a mapping table over something else. The format reports it.
    fn check_table_write(&self, _offset: u64, _len: u64) -> IoResult {
        Ok(())
    }
}

/// Whether the mapping may be changed now; slices in doubt are written again first where too many are. What
/// [`Writable::prepare`] begins with.
///
/// # Errors
/// The image was found to be corrupt, or tables could not be written.
pub async fn check_ready<F: Writable>(image: &F) -> IoResult {
    if image.tables().stopped.get() == Stop::NeedsFlush {
        write_suspects(image).await?;
    }
    check_sound(image).await
}

/// Fails if the image was found to be corrupt, or tables could not be written.
pub async fn check_sound<F: Writable>(image: &F) -> IoResult {
    image.check_intact().await?;
    match image.tables().stopped.get() {
        Stop::Not => Ok(()),
        Stop::NeedsFlush | Stop::ForGood => Err(Errno::EIO),
    }
}
