//! QMP: `vublk daemon`'s monitor, by itself and beside qemu-storage-daemon's.

mod beside_qsd;
mod bitmaps;
pub mod client;
mod clients;
mod ctl;
mod deep;
mod drains;
mod jobs;
mod listings;
mod live;
mod names;
mod overlays;
mod reopen;
mod resize;
pub mod slow;
mod snapshots;
mod stalled;
mod threshold;
mod transaction;

use crate::vhost_user::Daemon;
pub use client::{Client, is_same_but_for_advice};

pub const MONITOR: [&str; 4] = [
    "--chardev",
    "socket,id=m,path=DIR/m.sock,server=on,wait=off",
    "--monitor",
    "chardev=m,mode=control",
];

/// A daemon with a monitor at `DIR/m.sock`, and more arguments.
pub fn daemon(more: &[&str]) -> Daemon {
    Daemon::start(&[&MONITOR, more].concat())
}
