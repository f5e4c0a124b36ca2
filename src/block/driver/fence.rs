//! Fences, which tell the next process that the I/O of a killed one has ended.

use std::fs::File;
use std::sync::Arc;

/// How the next process knows that a killed one's I/O has ended. What the kernel or a server were still
/// doing for it when it died could otherwise undo what comes later.
#[derive(Clone, Debug)]
pub enum Fence {
    /// It does not.
    Never,
    /// The I/O ends with the workers' rings; nothing of this storage tells when these have ended.
    Rings,
    /// As `Rings`; and the next process needs locks that belong to these open files. While a ring keeps
    /// the files ([`crate::io::Local::attach_pinned`]), the locks outlive all that is in flight in it,
    /// on whichever storage.
    Locks(Vec<Arc<File>>),
    /// Opening the storage waits for the I/O.
    Storage,
}

impl Fence {
    /// Of two storages that one request may need.
    pub fn and(self, other: Fence) -> Fence {
        match (self, other) {
            (Fence::Never, _) | (_, Fence::Never) => Fence::Never,
            (Fence::Locks(mut all), Fence::Locks(more)) => {
                all.extend(more);
                Fence::Locks(all)
            }
            (Fence::Locks(files), _) | (_, Fence::Locks(files)) => Fence::Locks(files),
            (Fence::Rings, _) | (_, Fence::Rings) => Fence::Rings,
            (Fence::Storage, Fence::Storage) => Fence::Storage,
        }
    }

    /// Whether the next process does know.
    pub fn holds(&self) -> bool {
        matches!(self, Fence::Locks(_) | Fence::Storage)
    }

    /// The files that rings with I/O of the storage have to keep open.
    pub fn files(&self) -> &[Arc<File>] {
        match self {
            Fence::Locks(files) => files,
            _ => &[],
        }
    }
}
