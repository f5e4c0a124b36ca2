//! Slow commands, which delay neither other clients nor the end of the process.

use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::json;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const SECOND: [&str; 4] =
    ["--chardev", "socket,id=n,path=DIR/n.sock,server=on,wait=off", "--monitor", "chardev=n"];

fn two_monitors() -> Daemon {
    two_monitors_with(&[])
}

/// A daemon with monitors at `DIR/m.sock` and `DIR/n.sock`, and more arguments.
pub fn two_monitors_with(more: &[&str]) -> Daemon {
    Daemon::start(&[&MONITOR, &SECOND, more].concat())
}

/// A lease on a file: whoever opens it waits in open(2), as on storage that hangs, until the lease is
/// given up (or the kernel has waited for that long enough: 45 seconds).
pub fn lease(path: &Path) -> File {
    /// As Linux numbers it; the libc crate has no name for it.
    const F_SETSIG: libc::c_int = 10;
    let file = File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: integers are all that the calls take.
    unsafe {
        // That somebody waits is told by a signal that is ignored, not by one that kills.
        assert_eq!(libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG), 0);
        assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK), 0);
    }
    file
}

fn blockdev(daemon: &Daemon) -> serde_json::Value {
    json!({"driver": "file", "node-name": "d0", "filename": daemon.path("disk.img")})
}

pub fn assert_no_answer(client: &mut Client) {
    let stream = client.stream.get_ref();
    stream.set_nonblocking(true).unwrap();
    let early = (&*stream).read(&mut [0]).unwrap_err();
    assert_eq!(early.kind(), ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
}

#[test]
fn while_one_client_waits_for_storage_others_are_served_and_its_commands_stay_in_order() {
    let daemon = two_monitors();
    let [mut first, mut second] = ["m.sock", "n.sock"].map(|m| Client::connect(&daemon.path(m)));
    let leased = lease(&daemon.path("disk.img"));
    let add = json!({"execute": "blockdev-add", "arguments": blockdev(&daemon), "id": 1});
    first.send(format!("{add} {{'execute': 'query-version', 'id': 2}}").as_bytes());
    for _ in 0..3 {
        second.run("query-version", json!({}));
        assert_eq!(second.run("query-named-block-nodes", json!({})), json!([]));
        assert_eq!(second.run("query-block-exports", json!({})), json!([]));
    }
    assert_no_answer(&mut first);
    drop(leased);
    let replies = [first.reply(), first.reply()];
    assert_eq!(replies[0], json!({"return": {}, "id": 1}));
    assert_eq!(replies[1]["id"], json!(2));
    second.run("blockdev-del", json!({"node-name": "d0"}));
}

#[test]
fn a_client_that_goes_while_its_command_is_under_way_leaves_the_monitor_free() {
    let daemon = two_monitors();
    let mut first = Client::connect(&daemon.path("m.sock"));
    let leased = lease(&daemon.path("disk.img"));
    let add = json!({"execute": "blockdev-add", "arguments": blockdev(&daemon)});
    first.send(format!("{add} {{'execute': 'query-version'}}").as_bytes());
    let mut second = Client::connect(&daemon.path("n.sock"));
    second.run("query-version", json!({}));
    drop(first);
    second.run("query-version", json!({}));
    drop(leased);
    let mut third = Client::connect(&daemon.path("m.sock"));
    assert_eq!(third.run("query-version", json!({}))["qemu"]["major"], json!(7));
    third.run("blockdev-del", json!({"node-name": "d0"}));
}

#[test]
fn quit_is_answered_while_another_client_waits_for_storage() {
    let mut daemon = two_monitors();
    let [mut first, mut second] = ["m.sock", "n.sock"].map(|m| Client::connect(&daemon.path(m)));
    let leased = lease(&daemon.path("disk.img"));
    let add = json!({"execute": "blockdev-add", "arguments": blockdev(&daemon)});
    first.send(add.to_string().as_bytes());
    assert_eq!(second.ask("quit", json!({})), json!({"return": {}}));
    drop(leased);
    assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
}

/// Locks an image for writing as QEMU does, by a file that no process has open: it is in a socket.
/// The lock ends with the sockets.
pub fn lock_by_nobody(path: &Path) -> (UnixStream, UnixStream) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for byte in [100, 101, 201] {
        // SAFETY: all zeroes are a valid flock, and the descriptor is open.
        unsafe {
            let mut lock = std::mem::zeroed::<libc::flock>();
            lock.l_type = libc::F_RDLCK as libc::c_short;
            (lock.l_start, lock.l_len) = (byte, 1);
            assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock), 0);
        }
    }
    let (a, b) = UnixStream::pair().unwrap();
    a.send_with_fd(&[0u8][..], file.as_raw_fd()).unwrap();
    (a, b)
}

#[test]
fn a_locked_image_is_refused_in_qemus_words_and_taken_once_it_is_free() {
    let daemon = two_monitors();
    let mut client = Client::connect(&daemon.path("m.sock"));
    let locked = lock_by_nobody(&daemon.path("disk.img"));
    client.run("blockdev-add", blockdev(&daemon));
    let export = json!({"type": "vhost-user-blk", "id": "e0", "node-name": "d0", "writable": true,
                        "addr": {"type": "unix", "path": daemon.path("e0.sock")}});
    let refused = client.refusal("block-export-add", export.clone());
    assert_eq!(refused, "Failed to get \"write\" lock");
    drop(locked);
    client.run("block-export-add", export);
}
