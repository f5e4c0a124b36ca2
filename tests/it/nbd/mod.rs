//! The NBD server, in a process of its own: beside qemu-storage-daemon with other programs' clients, and byte by byte.

mod beside_qsd;
mod changes;
mod client;
mod hostile;

use crate::vhost_user::Daemon;

/// Arguments for a server at `DIR/nbd.sock` with the image `DIR/disk.img` as the export `vol`.
pub const SERVER: [&str; 6] = [
    "--blockdev",
    "driver=file,node-name=f,filename=DIR/disk.img,discard=unmap",
    "--nbd-server",
    "addr.type=unix,addr.path=DIR/nbd.sock",
    "--export",
    "type=nbd,id=e,node-name=f,name=vol,writable=on",
];

/// A daemon with [`SERVER`], and more arguments.
pub fn daemon(more: &[&str]) -> Daemon {
    Daemon::start(&[&SERVER, more].concat())
}
