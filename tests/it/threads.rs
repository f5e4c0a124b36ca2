//! A daemon where io_uring is refused.
//!
//! The whole suite can run that way (`make test-without-io-uring`); this holds what is particular to it.

use crate::vhost_user::{LIMIT, SIZE, new_image, pattern};
use std::os::unix::process::CommandExt;
use std::process::Command;
use vublk_testkit::{Disk, Options, Server, seccomp};

#[test]
fn threads_take_over_with_one_warning_for_all_workers() {
    assert_threads_take_over_without(seccomp::IO_URING_SETUP);
}

#[test]
fn threads_take_over_where_rings_can_be_made_but_not_entered_or_not_set_up() {
    for call in [seccomp::IO_URING_ENTER, seccomp::IO_URING_REGISTER] {
        assert_threads_take_over_without(call);
    }
}

fn assert_threads_take_over_without(call: u32) {
    let dir = tempfile::tempdir().unwrap();
    new_image(&dir.path().join("disk.img"), SIZE);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    let arguments = ["serve", "-f", "raw", "disk.img", "-s", "socket", "--workers", "2"];
    command.args(arguments).args(["--cache", "writeback"]).current_dir(dir.path());
    command.stdout(std::process::Stdio::null());
    // SAFETY: makes two system calls and allocates nothing.
    unsafe { command.pre_exec(move || seccomp::forbid(call)) };
    let mut server = Server::spawn(command).unwrap();
    let socket = dir.path().join("socket");
    server.wait_socket(&socket, LIMIT).unwrap();
    let mut disk = Disk::open(&socket, &Options { num_queues: 2, ..Options::default() }).unwrap();
    let written = pattern(64 << 10, 3);
    disk.write(8, &written).unwrap();
    disk.flush().unwrap();
    let mut read = vec![0; written.len()];
    disk.read(8, &mut read).unwrap();
    assert!(read == written);
    let image = std::fs::read(dir.path().join("disk.img")).unwrap();
    assert!(image[8 * 512..][..written.len()] == written);
    drop(disk);
    server.signal(libc::SIGTERM).unwrap();
    assert!(server.wait_exit(LIMIT).unwrap().success());
    let warnings = server.stderr().matches("io_uring cannot be used").count();
    assert_eq!(warnings, 1, "{}", server.stderr());
    assert!(!server.stderr().contains("ERROR"), "{}", server.stderr());
}
