//! Disks for virtual machines over vhost-user-blk.
//!
//! * [`door`]: where front ends come from; [`socket`]: the files of sockets. [`server`]: one of them at a time.
//! * [`session`]: the messages of one connection.
//! * [`memory`]: the guest's memory. [`ring`]: a virtqueue in it.
//! * [`cut_off`]: what happens when a front end takes its memory away.
//! * [`inflight`]: what is in flight, for the daemon after a killed one; `journal`: what its image keeps there.
//! * [`dirty_log`]: which of the guest's pages were written, for live migration.
//! * [`hand_over`]: whose the disk is while a guest moves.
//! * [`queue`]: the hot loop of one virtqueue. [`request`]: block requests and their slow road.
//! * [`failure`]: what becomes of a request that the storage fails. [`held`]: those that are held.
//! * `loss`: a failed fsync, over restarts, until an operator accepts it.
//! * [`watch`]: requests that the kernel does not finish.
//! * [`calls`]: when the guest is told in the middle of a turn.
//! * [`config`]: what the guest is told of the disk. [`notices`]: that this has changed.
//! * `peek`, `handler`: what the `vhost` crate does not tell of messages, and does not do by itself.
//! * [`metrics`]: what is counted for those who watch.
//! * [`write_cache`]: what the guest has made of its write cache.

pub mod calls;
pub mod config;
pub mod cut_off;
pub mod dirty_log;
pub mod door;
pub mod failure;
pub mod hand_over;
mod handler;
pub mod held;
pub mod inflight;
mod journal;
mod loss;
pub mod memory;
pub mod metrics;
pub mod notices;
pub mod peek;
pub mod queue;
pub mod request;
pub mod ring;
pub mod server;
pub mod session;
pub mod socket;
pub mod watch;
pub mod write_cache;

pub use config::DiskOptions;
pub use door::{Address, Socket, listening_fd, socket_fd};
pub use failure::{Failure, FailureOptions, IoError, IoErrors, ReadErrors, WriteErrors};
pub use metrics::ExportMetrics;
pub use server::{Export, ExportOptions};
