//! Reading: from the cluster, from the backing file, unpacked, or zeroes.

use super::compressed;
use super::layout::Compressed;
use super::lookup::{Found, Piece};
use super::{Qcow2, corrupt};
use crate::block::extents::decided;
use crate::block::{Decider, Event, Node};
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::sync::Arc;

impl Qcow2 {
    pub(super) async fn read_range(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let mut done = 0;
        while done < into.len() {
            let _visit = self.visits.enter();
            let piece = self.lookup(at + done, into.len() - done).await?;
            let part = into.slice(done, piece.len);
            self.read_piece(at + done, piece, &part).await?;
            done += piece.len;
        }
        Ok(())
    }

    /// Reads what a lookup has found, under the visit that it was made in.
    pub(super) async fn read_piece(&self, at: u64, piece: Piece, into: &IoVec<'_>) -> IoResult {
        match piece.found {
            Found::Data { host, .. } => {
                self.event(Event::ReadAio).await;
                read_padded(&self.data(), host, into).await
            }
            Found::Zero { .. } => {
                into.zero();
                Ok(())
            }
            Found::Unallocated { .. } => self.read_backing(at, into).await,
            Found::Compressed(place) => self.read_compressed(at, place, into).await,
        }
    }

    pub(super) async fn read_backing(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let Some(backing) = self.backing_at(at) else {
            into.zero();
            return Ok(());
        };
        self.event(Event::ReadBackingAio).await;
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

    /// The backing file, for what it decides: the guest's disk.
    fn backing_at(&self, at: u64) -> Option<Arc<Node>> {
        self.backing().filter(|_| at < self.state_start())
    }

    /// As [`Driver::decider`](crate::block::Driver::decider).
    pub(super) async fn decider_of(&self, at: u64, len: u64) -> IoResult<Decider> {
        let Some(backing) = self.backing_at(at) else { return Ok((None, len)) };
        let _visit = self.visits.enter();
        let piece = self.lookup(at, len).await?;
        if !matches!(piece.found, Found::Unallocated { .. }) {
            return Ok((None, piece.len));
        }
        self.event(Event::ReadBackingAio).await;
        Ok((Some(backing), piece.len))
    }

    async fn read_compressed(&self, at: u64, place: Compressed, into: &IoVec<'_>) -> IoResult {
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
            return Err(corrupt::data_outside(self, "Compressed cluster", place.host));
        }
        let mut stored = AlignedBuf::new(place.len as usize, 4096).ok_or(Errno::ENOMEM)?;
        self.event(Event::ReadCompressed).await;
        read_padded(&file, place.host, &stored.io_vec()).await?;
        let (kind, len) = (self.compression, self.geometry.cluster_size() as usize);
        // It takes longer than a worker may be kept from its other queues.
        let unpacked = self.blocking.run(move || compressed::unpack(kind, &stored, len)).await;
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
