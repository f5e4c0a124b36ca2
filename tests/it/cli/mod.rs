//! The command lines: `vublk daemon` beside the real `qemu-storage-daemon`, what a daemon does to
//! its process, and `vublk serve`.

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

use std::path::Path;
use std::process::{Command, Output, Stdio};

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

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
