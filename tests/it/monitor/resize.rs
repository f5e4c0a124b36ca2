//! A resize reaches the front end as soon as possible, without waiting for it.

use super::{Client, daemon};
use crate::guest::boot::Guest;
use crate::vhost_user::{Daemon, LIMIT, SIZE};
use serde_json::json;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::VhostUserFrontend;
use vublk_testkit::spec::protocol;
use vublk_testkit::{Disk, Options};

const SERVED: [&str; 4] = [
    "--blockdev",
    "driver=file,node-name=d0,filename=DIR/disk.img",
    "--export",
    "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=DIR/e0.sock,writable=on,\
     num-queues=2",
];

/// A front end that is to be told, and the socket that it is told on.
fn open(daemon: &Daemon) -> (Disk, UnixStream) {
    let protocol = protocol::DEFAULT | protocol::BACKEND_REQ;
    let mut disk = daemon.open(&Options { protocol, ..Options::default() });
    let ours = give_socket(&mut disk).0;
    (disk, ours)
}

/// Gives the daemon one end of a new pair of sockets. Returns the other, and a copy of the one.
fn give_socket(disk: &mut Disk) -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    disk.connection().vhost().set_backend_request_fd(&theirs).unwrap();
    (ours, theirs)
}

/// Waits for a message on the socket, and checks that it is VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
fn assert_notified(mut socket: &UnixStream) {
    let mut header = [0; 12];
    socket.read_exact(&mut header).unwrap();
    assert_eq!(header, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

fn resize(client: &mut Client, size: u64) {
    client.run("block_resize", json!({"node-name": "d0", "size": size}));
}

fn capacity(disk: &mut Disk) -> u64 {
    disk.connection().config().unwrap().capacity_sectors * 512
}

#[test]
fn a_front_end_without_rings_is_reported_once_they_run() {
    let daemon = daemon(&SERVED);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let (mut disk, socket) = open(&daemon);
    disk.stop().unwrap();
    resize(&mut client, 2 * SIZE);
    // Long enough to have been told, if that were wanted.
    socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    let early = (&socket).read(&mut [0; 12]);
    assert_eq!(early.unwrap_err().kind(), ErrorKind::WouldBlock);
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let base = disk.queue(0).ring().resume_base();
    disk.start_queue(0, base).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    assert_notified(&socket);
}

#[test]
fn a_front_end_is_reported_once_of_each_resize() {
    let daemon = daemon(&SERVED);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let (mut disk, socket) = open(&daemon);
    for size in [2 * SIZE, SIZE / 2, SIZE] {
        resize(&mut client, size);
        assert_notified(&socket);
        assert_eq!(capacity(&mut disk), size);
    }
    // A socket that is given later takes the place of the first.
    let (second, copy) = give_socket(&mut disk);
    drop(copy);
    resize(&mut client, 3 * SIZE);
    assert_notified(&second);
    assert_eq!((&socket).read(&mut [0]).unwrap(), 0, "the first one is still open");
    drop(disk);
    assert_eq!((&second).read(&mut [0]).unwrap(), 0, "more was said, or the socket was kept");
}

#[test]
fn a_front_end_that_does_not_read_holds_up_nobody() {
    let mut daemon = daemon(&SERVED);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let (mut disk, _) = open(&daemon);
    let (ours, mut theirs) = give_socket(&mut disk);
    // Both have one buffer: what it takes from here it does not take from the daemon.
    theirs.set_nonblocking(true).unwrap();
    while let Ok(n) = theirs.write(&[0xff; 4096]) {
        assert!(n > 0);
    }
    while theirs.write(&[0xff]).is_ok() {}
    theirs.set_nonblocking(false).unwrap();
    resize(&mut client, 2 * SIZE);
    daemon.wait_log("the front end was not told of the disk's new size", 1);
    assert_eq!(capacity(&mut disk), 2 * SIZE);
    disk.write(SIZE / 512, &[1; 512]).unwrap();
    // Once it is read, the next one is reported.
    ours.set_nonblocking(true).unwrap();
    let mut left = Vec::new();
    let emptied = (&ours).read_to_end(&mut left).unwrap_err();
    assert!(emptied.kind() == ErrorKind::WouldBlock && left.iter().all(|byte| *byte == 0xff));
    ours.set_nonblocking(false).unwrap();
    resize(&mut client, SIZE);
    assert_notified(&ours);
    // One that has gone costs no more than a line.
    drop((ours, theirs));
    resize(&mut client, 2 * SIZE);
    daemon.wait_log("the front end was not told of the disk's new size", 2);
    disk.write(SIZE / 512, &[1; 512]).unwrap();
}

#[test]
fn a_front_end_that_comes_back_is_reported_what_it_missed() {
    let mut daemon = daemon(&SERVED);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let (disk, socket) = open(&daemon);
    drop((disk, socket));
    daemon.wait_log("front end disconnected", 1);
    resize(&mut client, 2 * SIZE);
    // One that does not want to be told is none of those that were.
    drop(daemon.open(&Options::default()));
    let (mut disk, socket) = open(&daemon);
    assert_notified(&socket);
    assert_eq!(capacity(&mut disk), 2 * SIZE);
}

#[test]
fn descriptors_are_taken_from_sockets_that_are_given_again_and_again() {
    let mut daemon = daemon(&SERVED);
    let (mut disk, _) = open(&daemon);
    capacity(&mut disk);
    let before = daemon.server.open_files();
    for _ in 0..50 {
        give_socket(&mut disk);
    }
    capacity(&mut disk);
    assert_eq!(daemon.server.open_files(), before);
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn a_running_guest_sees_its_disk_grow_and_shrink_and_uses_the_new_space() {
    let mut daemon = daemon(&SERVED);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut guest = Guest::new().reconnecting_disk(&daemon.socket(0), 2).boot(
        r#"
        # Waits for a size in sectors.
        sees() {
            until [ "$(cat /sys/block/vda/size)" = "$1" ]; do sleep 0.05; done
            echo "size $1"
        }
        sees 16384
        read -r go
        sees 65536
        dd if=/dev/urandom of=/dev/vda bs=1M seek=24 count=8 oflag=direct 2>/dev/null || exit 1
        echo "sum $(dd if=/dev/vda bs=1M skip=24 iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1)"
        read -r go
        sees 8192
        dd if=/dev/zero of=/dev/vda bs=512 seek=8191 count=1 oflag=direct 2>/dev/null || exit 1
        dd if=/dev/zero of=/dev/vda bs=512 seek=8192 count=1 oflag=direct 2>/dev/null && exit 1
        echo edge
        read -r go
        sees 32768
        "#,
    );
    guest.wait_for("size 16384");
    let socket = daemon.path("m.sock");
    resize(&mut client, 32 << 20);
    guest.say("go");
    guest.wait_for("sum");
    let image = daemon.path("disk.img");
    let upper = std::process::Command::new("sh")
        .args(["-c", "tail -c 8M \"$1\" | sha256sum", "sh", image.to_str().unwrap()])
        .output()
        .unwrap();
    drop(client);
    // The same from a shell.
    let ctl = |size: &str| {
        let dir = crate::cli::directory();
        let arguments = ["ctl", "--socket", socket.to_str().unwrap(), "block_resize", size];
        let output = crate::cli::run(dir.path(), &[crate::cli::VUBLK], &arguments);
        assert!(output.status.success(), "{}", crate::cli::stderr(&output));
    };
    ctl("node-name=d0,size=4M");
    guest.say("go");
    guest.wait_for("edge");
    ctl("node-name=d0,size=16M");
    guest.say("go");
    let console = guest.finish();
    let sum = String::from_utf8(upper.stdout).unwrap();
    assert_eq!(sum.split(' ').next(), Some(console.value("sum")), "the new space on the host");
    assert!(daemon.server.try_wait().unwrap().is_none());
}
