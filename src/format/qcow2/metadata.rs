//! The parts of an image that say where its metadata is, and whether it is sound. A change of one of them, or of the
//! [space](super::space), looks at the others.

use super::corrupt::Corruption;
use super::image_header::ImageHeader;
use super::layout::Geometry;
use super::mapping::ImageMapping;
use super::nodes::Nodes;
use super::overlap::Overlaps;
use super::snapshots;
use crate::block::{Event, Node};
use crate::io::IoResult;
use std::sync::Arc;

/// See the module's text. The image lends them for one call.
#[derive(Clone, Copy)]
pub struct Metadata<'a> {
    pub geometry: &'a Geometry,
    pub nodes: &'a Nodes,
    pub header: &'a ImageHeader,
    pub mapping: &'a ImageMapping,
    pub snapshots: &'a snapshots::State,
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

    /// Makes the file at least so long; it reads as zeroes there.
    pub async fn grow_file(self, len: u64) -> IoResult {
        self.nodes.grow_file(len).await
    }
}
