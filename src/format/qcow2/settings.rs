//! The settings of an open image: the options given, and constant facts from its header.

use super::header::Compression;

/// See the module's text. Nothing of it changes.
pub struct Settings {
    /// The node's name, for what is logged.
    pub name: String,
    pub compression: Compression,
    pub is_writable: bool,
    /// Others may write to an external data file that is only read here.
    pub readers_share: bool,
    /// Refcounts are right when the image is closed, and need not be before.
    pub lazy_refcounts: bool,
    /// The external data file is to be a disk image by itself.
    pub raw_data: bool,
    pub discards: Discards,
}

/// Which clusters the storage is notified of when they are not used any more.
pub struct Discards {
    /// Those that a guest's discard has freed.
    pub guest: bool,
    /// Those that a snapshot's end has freed.
    pub snapshot: bool,
    /// What becomes free otherwise.
    pub other: bool,
    /// What a guest discards keeps its host cluster.
    pub keeps: bool,
}
