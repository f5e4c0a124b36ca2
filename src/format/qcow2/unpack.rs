//! Reading compressed clusters.

use super::header::Compression;
use super::metadata::Metadata;
use super::{compressed, corrupt};
use crate::block::Event;
use crate::cow::{Compressed, read_padded};
use crate::io::{AlignedBuf, Blocking, Budget, Errno, IoResult, IoVec};
use std::sync::Arc;

/// Unpacks compressed clusters.
pub struct Unpacker {
    /// Unpacking takes longer than a worker may be kept from its other queues.
    blocking: Blocking,
    /// The memory for it. A request that has some waits for nothing but the file below and the processor.
    memory: Arc<Budget>,
    compression: Compression,
}

impl Unpacker {
    pub fn new(blocking: Blocking, compression: Compression) -> Unpacker {
        Unpacker { blocking, memory: Budget::of_disk(), compression }
    }

    /// Reads guest bytes from `at` on out of a compressed cluster.
    pub async fn read(
        &self,
        image: Metadata<'_>,
        at: u64,
        place: Compressed,
        into: &IoVec<'_>,
    ) -> IoResult {
        let room = place.len + image.geometry.cluster_size();
        let _room = self.memory.take(room).await;
        let cluster = self.unpack(image, at, place).await?;
        into.copy_from(&cluster[image.geometry.offset_in_cluster(at) as usize..]);
        Ok(())
    }

    /// The whole cluster that a compressed entry names.
    async fn unpack(&self, image: Metadata<'_>, at: u64, place: Compressed) -> IoResult<Vec<u8>> {
        let file = image.file();
        if place.host >= file.len() || image.geometry.external_data {
            return Err(corrupt::data_outside(image, "Compressed cluster", place.host));
        }
        let mut stored = AlignedBuf::new(place.len as usize, 4096).ok_or(Errno::ENOMEM)?;
        image.event(Event::ReadCompressed).await;
        read_padded(&file, place.host, &stored.io_vec()).await?;
        let (kind, len) = (self.compression, image.geometry.cluster_size() as usize);
        let unpacked = self.blocking.compute(move || compressed::unpack(kind, &stored, len)).await;
        unpacked.inspect_err(|_| {
            // A guest can ask as often as it likes.
            log::debug!(
                "{}: the compressed cluster of guest offset {at:#x}, at {:#x}, cannot be unpacked",
                image.corruption.name(),
                place.host
            );
        })
    }
}
