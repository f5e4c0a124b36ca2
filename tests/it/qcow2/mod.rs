//! qcow2 beside QEMU: images that qemu-img and qemu-io have made, read and checked by both.

mod images;
mod read;
