//! The nodes below an image: its file, its data file, and its backing file.

use crate::block::{Child, Event, Node, event};
use crate::cow::{Lock, lengthen};
use crate::io::IoResult;
use std::sync::Arc;

/// The children of an open image.
pub struct Nodes {
    /// The image's file, then the backing file and the external data file if there are such.
    children: Vec<Child>,
    backing: Option<usize>,
    /// The child with the guest's data.
    data: usize,
    /// Held while a child grows.
    growing: Lock<()>,
}

impl Nodes {
    pub fn new(file: Child, backing: Option<Child>, data: Option<Child>) -> Nodes {
        let mut children = vec![file];
        let mut add = |child: Child| {
            children.push(child);
            children.len() - 1
        };
        let backing = backing.map(&mut add);
        let data = data.map_or(0, &mut add);
        Nodes { children, backing, data, growing: Lock::new(()) }
    }

    pub fn children(&self) -> &[Child] {
        &self.children
    }

    pub fn file_child(&self) -> &Child {
        &self.children[0]
    }

    /// The child with the guest's data, and its index.
    pub fn data_child(&self) -> (usize, &Child) {
        (self.data, &self.children[self.data])
    }

    pub fn backing_child(&self) -> Option<&Child> {
        self.backing.map(|index| &self.children[index])
    }

    /// Whether the child of this index is the backing file.
    pub fn is_backing(&self, child: usize) -> bool {
        Some(child) == self.backing
    }

    /// Whether the child of this index is the external data file.
    pub fn is_data_file(&self, child: usize) -> bool {
        child != 0 && child == self.data
    }

    /// The node with the metadata.
    pub fn file(&self) -> Arc<Node> {
        self.file_child().node()
    }

    /// The node with the guest's data.
    pub fn data(&self) -> Arc<Node> {
        self.data_child().1.node()
    }

    /// Tells debugging filters below what is about to be done to the image.
    pub async fn event(&self, event: Event) {
        if event::has_listeners() {
            self.file().event(event).await;
        }
    }

    /// Makes the file at least so long; it reads as zeroes there.
    pub async fn grow_file(&self, len: u64) -> IoResult {
        self.grow(&self.file(), len).await
    }

    /// Makes a child's storage at least so long.
    pub async fn grow(&self, node: &Node, len: u64) -> IoResult {
        // One at a time: a shorter length that comes later must not cut it off again.
        let _lock = self.growing.lock().await;
        if len <= node.driver().len() {
            return Ok(());
        }
        lengthen(node, len).await
    }

    /// Makes what was written to the file and the data durable.
    pub async fn flush(&self) -> IoResult {
        if self.data != 0 {
            self.data().flush().await?;
        }
        self.file().flush().await
    }
}
