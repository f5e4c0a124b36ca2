//! The vhost-user-blk export against the testkit's front end.
//!
//! There is no virtual machine: every message and every byte of the rings is under the test's control.

mod budget;
mod config;
mod daemon;
mod descriptors;
mod differential;
mod dirty_log;
mod fence;
mod hand_over;
mod hostile;
mod idle;
pub mod inflight;
mod kills;
mod layouts;
mod lifecycle;
pub mod lone_queue;
mod long_chains;
mod lost_memory;
pub mod memory;
mod memory_slots;
mod messages;
mod negotiation;
mod queue_end;
mod queues;
mod requests;
mod turns;
mod write_cache;

pub use crate::disks::seed;
pub use daemon::{Daemon, LIMIT, SIZE, export_of, new_image};

/// Bytes that tell which of 256 kinds they are and where in the buffer they stood.
pub fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ (i as u8).rotate_left(3) ^ salt).collect()
}
