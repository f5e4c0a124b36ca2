//! The base of every export, independent of any transport.
//!
//! * [`export`]: the interface for creating, listing and ending an export.
//! * [`disk`]: what its requests rely on, and their slow path.
//! * [`failure`]: what becomes of a request that the storage fails. [`held`]: requests that are held.
//! * [`watch`]: requests that the kernel does not finish. [`cut_off`]: the end of a front end's connection.
//! * [`loss`]: a failed fsync, over restarts, until an operator accepts it.
//! * [`write_cache`]: the guest's choice of a write cache.
//! * [`hand_over`]: which daemon has the disk while a guest moves.
//! * [`kept`]: memory that outlives the process. [`journal`]: what the image keeps there.
//! * [`address`], [`listener`]: where front ends come from; [`socket`]: the files of sockets.
//! * [`server_events`]: events for the thread that serves front ends. [`metrics`]: the counters.

pub mod address;
pub mod cut_off;
pub mod disk;
pub mod export;
pub mod failure;
pub mod hand_over;
pub mod held;
pub mod journal;
pub mod kept;
pub mod listener;
pub mod loss;
pub mod metrics;
pub mod server_events;
pub mod socket;
pub mod watch;
pub mod write_cache;

pub use address::{Address, Socket, listening_fd, socket_fd};
pub use disk::{Disk, DiskOptions};
pub use export::{Export, Parts, Transport};
pub use failure::{Failure, FailureOptions, IoError, IoErrors, ReadErrors, WriteErrors};
pub use metrics::ExportMetrics;
