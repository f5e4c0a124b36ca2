//! Disks for virtual machines over vhost-user-blk.
//!
//! * [`server`]: one front end at a time. [`session`]: the messages of one connection.
//! * [`memory`]: the guest's memory. [`memory_loss`]: what happens when a front end takes it away.
//! * [`ring`]: a virtqueue in it.
//! * [`inflight`]: what is in flight, for the daemon after a killed one.
//! * [`dirty_log`]: which of the guest's pages were written, for live migration.
//! * [`queue`]: the hot loop of one virtqueue. [`request`]: block requests and their slow road.
//! * [`calls`]: when the guest is told in the middle of a turn.
//! * [`config`]: what the guest is told of the disk. [`notices`]: that this has changed.
//! * `peek`, `handler`: what the `vhost` crate does not tell of messages, and does not do by itself.

pub mod calls;
pub mod config;
pub mod dirty_log;
mod handler;
pub mod inflight;
pub mod memory;
pub mod memory_loss;
pub mod notices;
pub mod peek;
pub mod queue;
pub mod request;
pub mod ring;
pub mod server;
pub mod session;

pub use config::DiskOptions;
pub use server::{Export, ExportOptions};
