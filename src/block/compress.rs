//! Storing data compressed, in two steps: packing and writing.
//!
//! Packing is work for the processor and can run on any thread; the caller chooses the order of the writes.
//!
//! Callers use [`Node::write_compressed`], or, to pack many units at once and store them in order,
//! [`Node::pack`] and [`Node::store_packed`].

use super::{LocalFuture, Node, SECTOR, WriteFlags};
use crate::io::{Errno, IoResult, IoVec};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

/// What a driver does that can store data compressed.
pub trait Compress: Send + Sync {
    /// What is packed and stored as one, in bytes: offset and length of each but the disk's last.
    fn unit(&self) -> u64;

    /// What packs: pure work, for any thread.
    fn packer(&self) -> Packer;

    /// Stores units side by side from `at` on, a multiple of [`Compress::unit`]. The node has
    /// checked range and permission, and keeps other writes away.
    ///
    /// # Errors
    /// EIO where something is stored already: what is compressed is written once. ENOTSUP if this
    /// image keeps nothing compressed.
    fn store<'a>(&'a self, at: u64, units: &'a [&'a [u8]]) -> LocalFuture<'a, IoResult>;

    /// Whether the image stores nothing in any other way, so that all writes have to be whole units.
    fn is_only_way(&self) -> bool {
        false
    }
}

/// Packs one whole unit; none if that does not make it smaller.
pub type Packer = Arc<dyn Fn(&[u8]) -> Option<Vec<u8>> + Send + Sync>;

/// Units that are packed at the same time for one request at most,
const TOGETHER: u64 = 16;
/// and bytes, unless one unit is more.
const TOGETHER_BYTES: u64 = 4 << 20;

/// The bytes of units of `unit` bytes that are packed at the same time for one request.
pub fn together(unit: u64) -> u64 {
    unit * (TOGETHER_BYTES / unit).clamp(1, TOGETHER)
}

/// A unit of the disk, ready to be stored.
pub struct Packed {
    /// In the disk, in bytes.
    pub range: Range<u64>,
    /// None if it is to be stored as it is.
    bytes: Option<Vec<u8>>,
}

impl Node {
    /// What is stored compressed as one, in bytes; none where nothing is.
    pub fn compression_unit(&self) -> Option<u64> {
        self.driver().compress().map(|compress| compress.unit())
    }

    /// Whether the image stores all that is written compressed, in whole units.
    pub fn stores_only_compressed(&self) -> bool {
        self.driver().compress().is_some_and(Compress::is_only_way)
    }

    /// Writes whole units, and the rest of the disk's last one, compressed; what does not become
    /// smaller as it is.
    ///
    /// # Errors
    /// ENOTSUP if the driver cannot, EINVAL for a part of a unit, EIO where something is stored.
    pub async fn write_compressed(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        self.check_range(at, from.len())?;
        let unit = self.compression_unit().ok_or(Errno::ENOTSUP)?;
        if from.is_empty() {
            return Ok(());
        }
        if !at.is_multiple_of(unit) || self.cuts_unit(at + from.len(), unit) {
            return Err(Errno::EINVAL);
        }
        let mut done = 0;
        while done < from.len() {
            let n = (from.len() - done).min(together(unit));
            let part = from.slice(done, n);
            let packed = self.pack(at + done, &part).await?;
            self.store_packed(&packed, &part).await?;
            done += n;
        }
        if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    /// Packs what is to be stored at `at`, a multiple of the unit: many units at the same time.
    pub async fn pack(&self, at: u64, from: &IoVec<'_>) -> IoResult<Vec<Packed>> {
        let compress = self.driver().compress().ok_or(Errno::ENOTSUP)?;
        let (unit, packer) = (compress.unit(), compress.packer());
        let mut begun = Vec::new();
        let mut done = 0;
        while done < from.len() {
            let n = (from.len() - done).min(unit);
            let mut bytes = vec![0; unit as usize];
            from.slice(done, n).copy_to(&mut bytes);
            let packer = packer.clone();
            let range = at + done..at + done + n;
            let work = move || Packed { range, bytes: packer(&bytes) };
            begun.push(Box::pin(self.blocking().compute(work)));
            done += n;
        }
        Ok(all(begun).await)
    }

    /// Whether what ends at `end` leaves a part of a unit out. The last sector may reach beyond what
    /// the disk has.
    fn cuts_unit(&self, end: u64, unit: u64) -> bool {
        !end.is_multiple_of(unit) && end + SECTOR <= self.len()
    }

    /// Stores what was packed from `plain`.
    ///
    /// # Errors
    /// As [`Node::write_compressed`].
    pub async fn store_packed(&self, packed: &[Packed], plain: &IoVec<'_>) -> IoResult {
        self.check_writable()?;
        let Some(first) = packed.first().map(|unit| unit.range.start) else { return Ok(()) };
        self.check_range(first, plain.len())?;
        let compress = self.driver().compress().ok_or(Errno::ENOTSUP)?;
        if packed.iter().any(|packed| self.cuts_unit(packed.range.end, compress.unit())) {
            return Err(Errno::EINVAL);
        }
        for alike in packed.chunk_by(|a, b| a.bytes.is_some() == b.bytes.is_some()) {
            let (start, end) = (alike[0].range.start, alike[alike.len() - 1].range.end);
            let units: Vec<&[u8]> = alike.iter().filter_map(|unit| unit.bytes.as_deref()).collect();
            if units.is_empty() {
                let plain = plain.slice(start - first, end - start);
                self.write(start, &plain, WriteFlags::empty()).await?;
                continue;
            }
            let (_writing, _recorded) = (self.writing(), self.record(start, end - start));
            let _listed = self.list_write(start..end).await;
            compress.store(start, &units).await?;
        }
        Ok(())
    }
}

/// Waits for all of them, side by side.
async fn all<T>(mut futures: Vec<Pin<Box<impl Future<Output = T>>>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}
