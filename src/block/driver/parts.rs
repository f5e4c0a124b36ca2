//! Optional parts of drivers: hand-over, memory that outlives the process, locks.

use crate::block::{Error, Perms};
use crate::io::IoResult;
use crate::io::task::LocalFuture;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What a driver does when its image becomes ours, and when it becomes another's
/// ([`crate::block::graph::Activity`]). The defaults suit one that keeps nothing of what is in the image.
pub trait HandOver: Send + Sync {
    /// Others may have changed the image since it was opened or ours: the driver forgets what it knows of
    /// the image and reads it again. The nodes below have done so, the locks are held, and no request is
    /// in flight.
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Writes all that it has to; the node is flushed afterwards. No request is in flight, and none but reads comes
    /// before [`HandOver::activate`]. The nodes below it are still active.
    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Memory that outlives the process, for the process that takes over after a kill. New memory is zeroes; memory
/// that comes from another process may hold anything.
pub trait Survivor: Send + Sync {
    fn words(&self) -> &[AtomicU64];
}

/// What a driver keeps in memory that outlives the process, instead of waiting for the storage.
pub trait Journaled: Send + Sync {
    /// Takes up what an earlier process has left there, and keeps its own there from now on, if nobody
    /// else's memory is used. No request of those that the memory comes from is in flight.
    ///
    /// # Errors
    /// What was left cannot be taken up: it is lost if anybody writes to the disk.
    fn attach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, Result<(), Error>>;

    /// Forgets what an earlier process has left there, which cannot be taken up; how many clusters of the guest's disk
    /// that are.
    fn forget(&self, memory: &dyn Survivor) -> usize;

    /// Hands over all that it keeps, and uses the memory no more; also if it fails.
    fn detach(&self, memory: Arc<dyn Survivor>) -> LocalFuture<'_, IoResult>;
}

/// How permissions reach other processes: prepared for all nodes of a change first, and then either
/// all committed or all rolled back.
pub trait Locks: Send + Sync {
    /// Takes what `new` has and `old` has not; gives nothing up. May open the file a second time.
    fn prepare(&self, old: Perms, new: Perms) -> Result<(), Error>;
    /// Gives up what only `old` has. Cannot fail.
    fn commit(&self, old: Perms, new: Perms);
    /// Undoes `prepare`. Cannot fail.
    fn rollback(&self, old: Perms, new: Perms);
    /// Takes what stands for `held`, which nobody objects to, as `from` has it: the locks of another node with the
    /// same storage, which gives them up then.
    ///
    /// # Errors
    /// It is other storage.
    fn take_over(&self, from: &dyn Locks, held: Perms) -> Result<(), Error>;
    /// The device and the number of the file that is locked, if it is one.
    fn file(&self) -> Option<(u64, u64)> {
        None
    }
}
