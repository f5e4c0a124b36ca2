//! Reading compressed clusters.

use super::{Qcow2, compressed, corrupt};
use crate::block::Event;
use crate::cow::{Compressed, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

impl Qcow2 {
    /// Reads guest bytes from `at` on out of a compressed cluster.
    pub(super) async fn unpack_range(
        &self,
        at: u64,
        place: Compressed,
        into: &IoVec<'_>,
    ) -> IoResult {
        let room = place.len + self.geometry.cluster_size();
        let _room = self.unpacking.take(room).await;
        let cluster = self.unpack(at, place).await?;
        into.copy_from(&cluster[self.geometry.offset_in_cluster(at) as usize..]);
        Ok(())
    }

    /// The whole cluster that a compressed entry names.
    async fn unpack(&self, at: u64, place: Compressed) -> IoResult<Vec<u8>> {
        let file = self.file();
        if place.host >= file.len() || self.geometry.external_data {
            return Err(corrupt::data_outside(self.metadata(), "Compressed cluster", place.host));
        }
        let mut stored = AlignedBuf::new(place.len as usize, 4096).ok_or(Errno::ENOMEM)?;
        self.event(Event::ReadCompressed).await;
        read_padded(&file, place.host, &stored.io_vec()).await?;
        let (kind, len) = (self.compression, self.geometry.cluster_size() as usize);
        // Unpacking takes longer than a worker may be kept from its other queues.
        let unpacked = self.blocking.compute(move || compressed::unpack(kind, &stored, len)).await;
        unpacked.inspect_err(|_| {
            // A guest can ask as often as it likes.
            log::debug!(
                "{}: the compressed cluster of guest offset {at:#x}, at {:#x}, cannot be unpacked",
                self.name,
                place.host
            );
        })
    }
}
