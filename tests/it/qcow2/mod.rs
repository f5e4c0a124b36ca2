//! qcow2 beside QEMU: images that qemu-img and qemu-io have made, read, written and checked by both.

mod bitmap_crash;
mod caches;
mod consistency;
mod crash;
mod damaged;
mod discards;
mod failing;
mod fast_writes;
mod full;
mod header_crash;
mod images;
pub mod journal;
pub mod judge;
mod kills;
mod marks;
mod model;
mod read;
mod resize;
mod resize_backing;
mod resize_crash;
pub mod sim;
mod snapshot_crash;
mod snapshot_model;
mod snapshots;
mod write;
