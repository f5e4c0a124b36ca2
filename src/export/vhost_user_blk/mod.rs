//! Disks for virtual machines over vhost-user-blk.
//!
//! * [`server`]: one front end at a time. [`session`]: the messages of one connection.
//! * [`memory`]: the guest's memory. [`memory_loss`]: what happens when a front end takes it away.
//! * [`ring`]: a virtqueue in it.
//! * [`inflight`]: what is in flight, for the daemon after a killed one.
//! * [`dirty_log`]: which of the guest's pages were written, for live migration.
//! * [`queue`]: the hot loop of one virtqueue. [`request`]: block requests and their slow path.
//! * [`calls`]: when the guest is notified in the middle of a turn.
//! * `options`: how an export is configured. [`device`]: the disk as its guests see it.
//! * [`config`]: features and configuration space. [`channel`]: notifications of their changes.
//! * `peek`, `handler`: what the `vhost` crate does not report of messages, and does not do by itself.

pub mod calls;
pub mod channel;
pub mod config;
pub mod device;
pub mod dirty_log;
mod handler;
pub mod inflight;
pub mod memory;
pub mod memory_loss;
mod options;
pub mod peek;
pub mod queue;
mod queues;
pub mod request;
pub mod ring;
pub mod server;
pub mod session;

pub use device::DeviceOptions;
pub use options::{MAX_QUEUES, Options, check_block_size};
pub use server::Server;

use super::ExportEntry;

/// The type's place in the list of exports.
pub const ENTRY: ExportEntry =
    ExportEntry { name: "vhost-user-blk", parse: options::parse, has_error_policies: true };
