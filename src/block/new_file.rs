//! New files of an unfinished creation, and images that consist of one file.
//!
//! If the creation fails, the files are removed, so that the space they took is free again.

use super::create::Creation;
use super::{DriverEntry, Error, Graph, Node};
use crate::options::{Map, NodeRef, Value};
use std::path::PathBuf;
use std::sync::Arc;

/// A file that is about to be made.
pub struct NewFile {
    /// Where the name stands for a file in a folder.
    path: Option<PathBuf>,
    existed: bool,
}

impl NewFile {
    /// The file of this name, before it is made.
    pub fn before(creation: &Creation, name: &str) -> NewFile {
        let path = creation.registry().new_file(name).ok().and_then(|mut options| {
            let driver = options.take_required_str("driver").ok()?;
            let path = options.take_required_str("filename").ok()?;
            let is_path = creation.registry().get(&driver).is_some_and(DriverEntry::takes_paths);
            is_path.then(|| PathBuf::from(path))
        });
        let existed = path.as_ref().is_some_and(|path| path.symlink_metadata().is_ok());
        NewFile { path, existed }
    }

    /// Removes the file if making it has failed, unless it was there before: then it may never have been touched.
    pub fn remove_unmade<T>(&self, made: Result<T, Error>) -> Result<T, Error> {
        if made.is_err() && !self.existed {
            self.remove();
        }
        made
    }

    /// Removes the file, if it is one: a device stays, and so does a link.
    pub fn remove(&self) {
        let Some(path) = &self.path else { return };
        if path.symlink_metadata().is_ok_and(|found| found.is_file()) {
            // What cannot be removed stays, and the caller's error says why there is no image.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes an image in a new file of this many bytes, which `write` fills; its argument says whether the file reads as
/// zeroes: one that was there before, or a disk, may have anything.
///
/// # Errors
/// The file cannot be made, or those of `write`; then there is no new file.
pub async fn make_in_file(
    creation: &Creation,
    mut options: Map,
    len: u64,
    write: impl AsyncFnOnce(&Node, bool) -> Result<(), Error>,
) -> Result<(), Error> {
    options.insert("size", Value::from(len));
    let new = NewFile::before(creation, creation.filename());
    let file = new.remove_unmade(creation.create_file(options).await)?;
    let write = async |node: &Arc<Node>| write(node, file.reads_zeroes).await;
    let written = creation.with_file(write).await;
    if written.is_err() {
        new.remove();
    }
    written
}

/// Makes another file of the image, of `len` bytes and by its name, as [`make_in_file`] makes the image's own.
///
/// # Errors
/// The file cannot be made, or those of `write`; then there is no new file.
pub async fn make_in_other(
    creation: &Creation,
    name: &str,
    mut options: Map,
    len: u64,
    write: impl AsyncFnOnce(&Node, bool) -> Result<(), Error>,
) -> Result<(), Error> {
    options.insert("size", Value::from(len));
    let new = NewFile::before(creation, name);
    let file = new.remove_unmade(creation.create_other(name, &options).await)?;
    let write = async |node: &Arc<Node>| write(node, file.reads_zeroes).await;
    new.remove_unmade(creation.with_other(name, write).await)
}

/// Makes an image of this many bytes on a node, as `blockdev-create` does, which `write` fills.
///
/// # Errors
/// The node cannot be had, or made long enough, or those of `write`.
pub async fn make_on_node(
    graph: &Graph,
    file: NodeRef,
    len: u64,
    write: impl AsyncFnOnce(&Node) -> Result<(), Error>,
) -> Result<(), Error> {
    let hold = graph.borrow_for_image(file, "options.file").await?;
    let make = async |node: &Arc<Node>| {
        if node.len() < len {
            graph.resize(node, len).await?;
        }
        graph.undisturbed(node, &[], async || write(node).await).await?
    };
    let made = make(hold.node()).await;
    hold.detach().await;
    graph.tidy().await;
    made
}
