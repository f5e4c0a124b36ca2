//! How disks leave the process: one folder for each transport.

pub mod vhost_user_blk;
