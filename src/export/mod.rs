//! How disks leave the process: one folder for each transport, and what they share.

pub mod core;
pub mod vhost_user_blk;
