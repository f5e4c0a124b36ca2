//! The parts of an image that record where its metadata is and whether it is sound.
//!
//! A change of one of them, or of the [space](super::space), looks at the others.

use super::corrupt::{self, Corruption};
use super::image_header::ImageHeader;
use super::layout::{Geometry, L1Entry, L2Entry};
use super::mapping::ImageMapping;
use super::nodes::Nodes;
use super::overlap::Overlaps;
use super::snapshots::ImageSnapshots;
use crate::block::{Event, Node, WriteFlags};
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use std::sync::Arc;

/// See the module's text. The image lends them for one call.
#[derive(Clone, Copy)]
pub struct Metadata<'a> {
    pub geometry: &'a Geometry,
    pub nodes: &'a Nodes,
    pub header: &'a ImageHeader,
    pub mapping: &'a ImageMapping,
    pub snapshots: &'a ImageSnapshots,
    pub overlaps: &'a Overlaps,
    pub corruption: &'a Corruption,
}

impl Metadata<'_> {
    /// The node that the metadata is in.
    pub fn file(self) -> Arc<Node> {
        self.nodes.file()
    }

    /// Tells debugging filters below what is about to be done to the image.
    pub async fn event(self, event: Event) {
        self.nodes.event(event).await;
    }

    /// Writes a table, durably; what had been written before is durable then, too.
    pub async fn write_durably(self, at: u64, bytes: &[u8]) -> IoResult {
        let file = self.file();
        if !bytes.is_empty() {
            file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await?;
        }
        file.flush().await
    }

    /// The disk's L1 table.
    pub fn active_l1(self) -> Vec<L1Entry> {
        let entries = u64::from(self.header.now().l1_size);
        (0..entries).map(|index| self.mapping.l1_at(index)).collect()
    }

    /// The L2 table that an entry of an L1 table names, as the file has it.
    ///
    /// # Errors
    /// There can be no table, or it cannot be read.
    pub async fn stored_l2(self, index: u64, entry: L1Entry) -> IoResult<Vec<L2Entry>> {
        let table = entry.l2_table();
        let is_sane = !entry.has_reserved_bits() && self.geometry.is_cluster_start(table);
        if !is_sane || table >= self.file().len() {
            let guest = index * self.geometry.l2_coverage();
            return Err(corrupt::bad_l1(self, guest, entry));
        }
        let size = self.geometry.cluster_size() as usize;
        let mut bytes = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
        self.event(Event::L2Load).await;
        read_padded(&self.file(), table, &bytes.io_vec()).await?;
        let word = |bytes: &[u8]| bytes.iter().fold(0u64, |w, &b| w << 8 | u64::from(b));
        let entries = bytes[..size].chunks_exact(self.geometry.l2_entry_size() as usize);
        let read = |bytes: &[u8]| L2Entry { word: word(&bytes[..8]), bitmap: word(&bytes[8..]) };
        Ok(entries.map(read).collect())
    }

    /// Makes the file at least so long; it reads as zeroes there.
    pub async fn grow_file(self, len: u64) -> IoResult {
        self.nodes.grow_file(len).await
    }
}
