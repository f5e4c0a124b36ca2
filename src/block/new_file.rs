//! Files that a creation makes, which it removes when it fails, so that the space they took is free again.

use super::create::Creation;
use super::{DriverEntry, Error};
use std::path::PathBuf;

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
