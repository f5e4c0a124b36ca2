//! The options of `file` and `host_device`, with QEMU's names, and those that are refused.

use crate::block::{Error, NodeOptions};
use serde::Deserialize;

/// Options of a file or device; those that all nodes have are in [`NodeOptions`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileOptions {
    /// A path. A `file:` in front is not looked at.
    pub filename: String,
    #[serde(default)]
    pub locking: Locking,
    #[serde(default)]
    pub aio: Aio,
    /// Taken for the sake of command lines that have it: batches follow from the workers' turns.
    #[serde(default)]
    pub aio_max_batch: u64,
    /// What the host's page cache holds is dropped when the image comes over from another process.
    #[serde(default = "yes")]
    pub drop_cache: bool,
    pub pr_manager: Option<String>,
    #[serde(default)]
    pub x_check_cache_dropped: bool,
}

fn yes() -> bool {
    true
}

/// Whether locks on the file tell other processes what this one does with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Locking {
    On,
    Off,
    /// Where the kernel can.
    #[default]
    Auto,
}

/// How QEMU would do the I/O. All mean the worker's ring here; each has QEMU's own condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aio {
    #[default]
    Threads,
    Native,
    #[serde(rename = "io_uring")]
    IoUring,
}

impl FileOptions {
    /// The options of a file of which nothing but the name is given.
    pub fn new(filename: impl Into<String>) -> FileOptions {
        FileOptions {
            filename: filename.into(),
            locking: Locking::default(),
            aio: Aio::default(),
            aio_max_batch: 0,
            drop_cache: true,
            pr_manager: None,
            x_check_cache_dropped: false,
        }
    }

    /// Refuses what cannot be had.
    pub(super) fn check(&self, node: &NodeOptions) -> Result<(), Error> {
        if self.filename.starts_with("/dev/fdset/") {
            return Err(Error::new(format!(
                "Could not open '{}': file descriptor sets are not supported yet",
                self.filename
            )));
        }
        if self.aio == Aio::Native && !node.direct {
            return Err(Error::new(
                "aio=native was specified, but it requires cache.direct=on, which was not \
                 specified.",
            ));
        }
        if let Some(name) = &self.pr_manager {
            return Err(Error::new(format!(
                "pr-manager={name}: persistent reservations are not supported"
            )));
        }
        if self.x_check_cache_dropped {
            return Err(Error::new("x-check-cache-dropped=on is not supported"));
        }
        Ok(())
    }
}
