//! Disks whose changes are discarded: an overlay in an unlinked temporary file.

use super::{Creation, Error, Registry, Role};
use crate::io::{Errno, offload};
use crate::options::{Map, Value, bytes};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where such files are made, if TMPDIR does not say.
const FOLDER: &str = "/var/tmp";

/// An empty image that has its name until this is dropped.
pub struct TemporaryImage {
    path: PathBuf,
    format: &'static str,
}

impl TemporaryImage {
    /// Makes an image of a disk of `len` bytes, which nobody but the user of this process can open.
    pub async fn create(
        registry: &'static Registry,
        format: &'static str,
        len: u64,
    ) -> Result<TemporaryImage, Error> {
        let folder = std::env::var_os("TMPDIR").unwrap_or_else(|| FOLDER.into());
        let path = offload(move || make_file(Path::new(&folder))).await?;
        let image = TemporaryImage { path, format };
        let file = image.file(registry)?;
        Creation::new(registry, format, (&image.name(), file), Map::new(), Some(len))?
            .run()
            .await?;
        Ok(image)
    }

    /// The options of its node, `name`, which stands on the node `base`.
    pub fn options(&self, registry: &Registry, name: &str, base: &str) -> Result<Map, Error> {
        let on = |keys: &[&str]| {
            Value::Map(keys.iter().map(|&key| (key, Value::Text("on".into()))).collect())
        };
        let mut file = self.file(registry)?;
        // Nobody else knows the file, and a process that comes later does not find it.
        file.insert("locking", "off");
        let mut node = Map::from_iter([("driver", self.format), ("node-name", name)]);
        node.insert(Role::Backing.name(), base);
        node.insert("discard", "unmap");
        node.insert("cache", on(&["no-flush"]));
        node.insert(Role::File.name(), Value::Map(file));
        Ok(node)
    }

    /// The options of the file's node.
    fn file(&self, registry: &Registry) -> Result<Map, Error> {
        let driver = registry.of_files()?.name;
        Ok(Map::from_iter([("driver", driver), ("filename", &*self.name())]))
    }

    fn name(&self) -> String {
        bytes::text_of_name(self.path.as_os_str())
    }
}

fn make_file(folder: &Path) -> Result<PathBuf, Error> {
    loop {
        let letters: String = (0..6).map(|_| fastrand::alphanumeric()).collect();
        let path = folder.join(format!("vl.{letters}"));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(_) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                let what = format!("Could not open temporary file '{}'", path.display());
                return Err(Error::os(what, Errno::from(error)));
            }
        }
    }
}

impl Drop for TemporaryImage {
    fn drop(&mut self) {
        // If it is gone already, that is what was wanted.
        let _ = std::fs::remove_file(&self.path);
    }
}
