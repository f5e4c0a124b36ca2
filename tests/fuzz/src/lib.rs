//! The fuzz targets, as functions of bytes.
//!
//! libFuzzer calls them from `fuzz_targets`; the project's tests include these files and call them with seeded inputs
//! (`tests/fuzz_smoke.rs`).

pub mod bochs;
pub mod cloop;
mod dirty_log;
mod disk;
pub mod dmg;
mod events;
mod guest;
mod image;
mod inflight;
mod input;
mod mapped;
pub mod nbd;
pub mod nvme;
mod opened;
pub mod options;
pub mod parallels;
pub mod parallels_bundle;
pub mod qcow;
pub mod qcow2_bitmaps;
pub mod qcow2_check;
pub mod qcow2_header;
pub mod qcow2_snapshots;
mod scribbler;
pub mod vhdx;
pub mod vhost_user_messages;
pub mod virtqueue;
pub mod vmdk;
pub mod vpc;
mod worker;
