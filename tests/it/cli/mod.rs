//! The command lines: `vublk daemon` beside the real `qemu-storage-daemon`, and `vublk serve`.
//!
//! Also what a daemon does to its process.

mod beside_qsd;
mod help;
mod jail;
mod log;
mod looks;
mod process;
mod sandbox;
mod serve;
mod sockets;
mod unread;

use crate::vhost_user::LIMIT;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use vublk_testkit::{Disk, Options, Server};

pub const VUBLK: &str = env!("CARGO_BIN_EXE_vublk");

/// A directory with an image `disk.img` of 1 MiB.
pub fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    crate::vhost_user::new_image(&dir.path().join("disk.img"), 1 << 20);
    dir
}

/// Runs a program in a directory to its end, which it comes to by itself.
pub fn run(dir: &Path, program: &[&str], arguments: &[&str]) -> Output {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).args(arguments).current_dir(dir);
    command.stdin(Stdio::null()).env_remove("RUST_LOG").env("LC_ALL", "C").output().unwrap()
}

/// Writes to a disk, flushes it, and reads back what was written.
pub fn use_disk(socket: &Path) {
    let mut disk = Disk::open(socket, &Options::default()).unwrap();
    let (written, mut read) = ([7; 4096], [0; 4096]);
    disk.write(8, &written).unwrap();
    disk.flush().unwrap();
    disk.read(8, &mut read).unwrap();
    assert_eq!(read, written);
}

/// Ends a server, which must succeed at that. All that it has said.
pub fn end(mut server: Server) -> String {
    server.signal(libc::SIGTERM).unwrap();
    let status = server.wait_exit(LIMIT).unwrap();
    assert!(status.success(), "{status}: {}", server.stderr());
    server.stderr()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
