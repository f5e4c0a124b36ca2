//! What every export stands on, whatever its transport.
//!
//! * [`failure`]: what becomes of a request that the storage fails. [`held`]: requests that are held.
//! * [`watch`]: requests that the kernel does not finish. [`cut_off`]: the end of a front end's connection.
//! * [`loss`]: a failed fsync, over restarts, until an operator accepts it.
//! * [`write_cache`]: the guest's choice of a write cache.
//! * [`hand_over`]: which daemon has the disk while a guest moves.
//! * [`journal`]: the image's journal in memory that a front end keeps.
//! * [`door`]: where front ends come from; [`socket`]: the files of sockets.
//! * [`metrics`]: what is counted for those who watch.

pub mod cut_off;
pub mod door;
pub mod failure;
pub mod hand_over;
pub mod held;
pub mod journal;
pub mod loss;
pub mod metrics;
pub mod socket;
pub mod watch;
pub mod write_cache;

pub use door::{Address, Socket, listening_fd, socket_fd};
pub use failure::{Failure, FailureOptions, IoError, IoErrors, ReadErrors, WriteErrors};
pub use metrics::ExportMetrics;
