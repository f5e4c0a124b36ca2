//! Sockets of `vublk serve` other than a path of its own.
//!
//! They are inherited descriptors, systemd's, and sockets of front ends; also the command line of QEMU's conventions
//! for back ends.

use super::{VUBLK, directory, end, run, stderr};
use crate::vhost_user::LIMIT;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use vublk_testkit::{Disk, Options, Server};

/// The number that a descriptor has in the program.
const FD: RawFd = 3;

/// Starts a shell line in `dir` with `fd` as its descriptor 3.
fn start(dir: &Path, line: &str, fd: Option<OwnedFd>) -> Server {
    let mut command = Command::new("sh");
    command.args(["-c", line]).env("VUBLK", VUBLK).env("RUST_LOG", "info").current_dir(dir);
    command.stdout(Stdio::null());
    if let Some(fd) = fd {
        // SAFETY: the closure makes system calls and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                let passed = match fd.as_raw_fd() {
                    // It has the number already, and must only outlive the exec.
                    FD => libc::fcntl(FD, libc::F_SETFD, 0),
                    other => libc::dup2(other, FD),
                };
                if passed < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            })
        };
    }
    Server::spawn(command).unwrap()
}

fn serve(dir: &Path, socket: &str, fd: Option<OwnedFd>) -> Server {
    start(dir, &format!("exec \"$VUBLK\" serve -f raw disk.img --socket {socket}"), fd)
}

/// Writes to the disk, and reads it back, as one front end at that socket.
fn use_at(path: &Path, salt: u8) {
    use_disk(Disk::open(path, &Options::default()).unwrap(), salt);
}

fn use_disk(mut disk: Disk, salt: u8) {
    let (written, mut read) = ([salt; 4096], [0; 4096]);
    disk.write(u64::from(salt), &written).unwrap();
    disk.read(u64::from(salt), &mut read).unwrap();
    assert_eq!(read, written);
}

#[test]
fn a_listening_descriptor_meets_front_end_after_front_end_and_its_file_stays() {
    let dir = directory();
    let path = dir.path().join("theirs");
    let listener = UnixListener::bind(&path).unwrap();
    let server = serve(dir.path(), "fd:3", Some(listener.into()));
    use_at(&path, 1);
    use_at(&path, 2);
    end(server);
    assert!(path.exists());
}

#[test]
fn sockets_of_systemd_are_taken_in_turn_or_by_name() {
    let dir = directory();
    let activated = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=disk";
    for (socket, fine) in [("systemd", true), ("systemd:disk", true), ("systemd:other", false)] {
        let path = dir.path().join(socket);
        let listener = UnixListener::bind(&path).unwrap();
        let line = format!("{activated} exec \"$VUBLK\" serve -f raw disk.img --socket {socket}");
        let mut server = start(dir.path(), &line, Some(listener.into()));
        if fine {
            use_at(&path, 3);
            end(server);
        } else {
            assert_eq!(server.wait_exit(LIMIT).unwrap().code(), Some(1));
            let said = "vublk: systemd has passed no socket of the name 'other'";
            // The end may be known before the last line has come through.
            let began = std::time::Instant::now();
            while !server.stderr().contains(said) {
                assert!(began.elapsed() < LIMIT, "{}", server.stderr());
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
}

#[test]
fn a_connection_is_served_and_the_program_ends_with_it() {
    let dir = directory();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = serve(dir.path(), "fd:3", Some(theirs.into()));
    use_disk(Disk::from_stream(ours, &Options::default()).unwrap(), 4);
    let status = server.wait_exit(LIMIT).unwrap();
    assert!(status.success(), "{status}: {}", server.stderr());
}

#[test]
fn sockets_of_front_ends_are_connected_to_as_often_as_they_listen() {
    let dir = directory();
    let path = dir.path().join("theirs");
    let mut server = serve(dir.path(), "connect:theirs", None);
    let missing = "no front end at 'theirs': No such file or directory";
    let mut waited = std::time::Duration::ZERO;
    while !server.stderr().contains(missing) {
        let step = std::time::Duration::from_millis(5);
        std::thread::sleep(step);
        waited += step;
        assert!(waited < LIMIT && server.try_wait().unwrap().is_none(), "{}", server.stderr());
    }
    for salt in [5, 6] {
        let listener = UnixListener::bind(&path).unwrap();
        for more in [0, 10] {
            let (stream, _) = listener.accept().unwrap();
            use_disk(Disk::from_stream(stream, &Options::default()).unwrap(), salt + more);
        }
        std::fs::remove_file(&path).unwrap();
    }
    end(server);
}

#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_holds_up_nobody_else() {
    use std::io::Write;
    let dir = directory();
    std::fs::copy(dir.path().join("disk.img"), dir.path().join("b.img")).unwrap();
    let line = "exec \"$VUBLK\" serve -f raw disk.img b.img --socket a --socket b";
    let mut server = start(dir.path(), line, None);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    server.wait_socket(&b, LIMIT).unwrap();
    for half in [&[1, 0, 0][..], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 2]] {
        let mut stalled = UnixStream::connect(&a).unwrap();
        stalled.write_all(half).unwrap();
        use_at(&b, 7);
        drop(stalled);
        use_at(&a, 8);
    }
    let mut stalled = UnixStream::connect(&a).unwrap();
    stalled.write_all(&[1, 0, 0]).unwrap();
    end(server);
}

#[test]
fn descriptors_and_words_that_are_no_sockets_are_refused() {
    let dir = directory();
    for (socket, words) in [
        ("fd:0", "File descriptor '0' is not a socket"),
        ("fd:99", "File descriptor '99' is not a socket"),
        ("fd:x", "'x' is not the number of a descriptor"),
        ("systemd", "systemd has passed no other socket"),
    ] {
        let arguments = ["-f", "raw", "disk.img", "--socket", socket];
        let output = run(dir.path(), &[VUBLK, "serve"], &arguments);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{socket}: {said}");
        assert!(said.contains(words), "{socket}: {said}");
    }
}

#[test]
fn under_the_name_of_the_conventions_it_keeps_to_them() {
    let dir = directory();
    let link = dir.path().join("vhost-user-block");
    std::os::unix::fs::symlink(VUBLK, &link).unwrap();
    let link = link.to_str().unwrap();
    let output = run(dir.path(), &[link], &["--bogus", "--print-capabilities"]);
    assert!(output.status.success());
    let reported: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(reported["type"], "block");
    assert_eq!(reported["features"], serde_json::json!(["read-only", "blk-file"]));
    for (arguments, words) in [
        (&[][..], "--socket-path or --fd is wanted"),
        (&["--socket-path", "s"], "--blk-file is wanted"),
        (&["--socket-path", "s", "--fd", "3", "--blk-file", "disk.img"], "cannot be used with"),
        (&["--bogus"], "--bogus"),
    ] {
        let output = run(dir.path(), &[link], arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = stderr(&output);
        assert!(said.starts_with("vhost-user-block: ") && said.contains(words), "{said}");
    }
    let program = format!("exec {link} --blk-file disk.img");
    let mut server = start(dir.path(), &format!("{program} --socket-path=fd:s"), None);
    let socket = dir.path().join("fd:s");
    server.wait_socket(&socket, LIMIT).unwrap();
    use_at(&socket, 9);
    end(server);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server =
        start(dir.path(), &format!("{program} --read-only --fd=3"), Some(theirs.into()));
    let mut disk = Disk::from_stream(ours, &Options::default()).unwrap();
    let mut read = [0; 4096];
    disk.read(9, &mut read).unwrap();
    assert_eq!(read, [9; 4096]);
    assert!(disk.write(9, &read).is_err());
    drop(disk);
    assert!(server.wait_exit(LIMIT).unwrap().success());
}

/// A socket whose listener takes no more connections: its backlog is full.
struct Full(
    #[allow(dead_code, reason = "kept open")] UnixListener,
    #[allow(dead_code, reason = "kept open")] Vec<UnixStream>,
);

impl Full {
    fn bind(path: &Path) -> Full {
        let listener = UnixListener::bind(path).unwrap();
        // SAFETY: names no memory, and the descriptor is open.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        // So many it takes, and one more than its backlog.
        let waiting = vec![UnixStream::connect(path).unwrap()];
        Full(listener, waiting)
    }
}

#[test]
fn a_start_on_a_socket_whose_backlog_is_full_is_refused_in_one_line() {
    let dir = directory();
    let _full = Full::bind(&dir.path().join("s"));
    let output = run(dir.path(), &[VUBLK, "serve"], &["-f", "raw", "disk.img", "--socket", "s"]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said, "vublk: disk.img: another process listens on the socket 's'\n");
}

#[test]
fn ctl_and_top_say_in_one_line_that_a_socket_takes_no_connections() {
    let dir = directory();
    let _full = Full::bind(&dir.path().join("s"));
    for (arguments, shown) in
        [(&["ctl", "--socket", "s", "query-block"][..], "s"), (&["top", "--socket", "s"], "unix:s")]
    {
        let output = run(dir.path(), &[VUBLK], arguments);
        let why = "the process that listens there takes no more connections";
        assert_eq!(stderr(&output), format!("vublk: {shown}: {why}\n"));
        assert_eq!(output.status.code(), Some(1));
    }
}

#[test]
fn ctl_says_that_it_waits_where_the_monitor_serves_another_client() {
    let daemon = crate::monitor::daemon(&[]);
    let first = crate::monitor::Client::connect(&daemon.path("m.sock"));
    let mut command = Command::new(VUBLK);
    command.args(["ctl", "--timeout", "600", "query-block", "--socket"]).arg(daemon.path("m.sock"));
    command.stdout(Stdio::piped());
    let mut ctl = Server::spawn(command).unwrap();
    let began = std::time::Instant::now();
    while !ctl.stderr().ends_with("waiting for the monitor, which may serve another client\n") {
        assert!(began.elapsed() < LIMIT, "{}", ctl.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(first);
    assert!(ctl.wait_exit(LIMIT).unwrap().success());
}

#[test]
fn a_start_on_a_socket_whose_backlog_is_full_goes_on_when_the_listener_has_gone() {
    for removes_its_file in [true, false] {
        let dir = directory();
        let path = dir.path().join("s");
        let full = Full::bind(&path);
        let server = serve(dir.path(), "s", None);
        std::thread::sleep(std::time::Duration::from_millis(200));
        if removes_its_file {
            std::fs::remove_file(&path).unwrap();
        }
        drop(full);
        use_at(&path, 9);
        end(server);
    }
}

#[test]
fn a_program_that_waits_for_a_listener_with_a_full_backlog_hears_signals() {
    let dir = directory();
    let _full = Full::bind(&dir.path().join("s"));
    for line in [
        "exec \"$VUBLK\" serve -f raw disk.img --socket s",
        "exec \"$VUBLK\" serve -f raw disk.img --socket connect:s",
        "exec \"$VUBLK\" serve -f raw disk.img --socket t --metrics unix:s",
        "exec \"$VUBLK\" daemon --chardev socket,id=c,path=s --monitor c",
        "exec \"$VUBLK\" top --socket s",
        "exec \"$VUBLK\" ctl --socket s query-block",
    ] {
        let mut server = start(dir.path(), line, None);
        std::thread::sleep(std::time::Duration::from_millis(200));
        server.signal(libc::SIGTERM).unwrap();
        server.wait_exit(LIMIT).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

#[test]
fn of_the_daemons_that_start_on_one_stale_socket_one_serves() {
    let dir = directory();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let images: Vec<_> = (0..4).map(|n| format!("{n}.img")).collect();
    let mut servers: Vec<_> = images
        .iter()
        .map(|image| {
            std::fs::copy(dir.path().join("disk.img"), dir.path().join(image)).unwrap();
            let line = format!("exec \"$VUBLK\" serve -f raw {image} --socket s");
            start(dir.path(), &line, None)
        })
        .collect();
    let began = std::time::Instant::now();
    let mut refused = 0;
    while refused < 3 {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(20));
        servers.retain_mut(|server| match server.try_wait().unwrap() {
            Some(status) => {
                assert_eq!(status.code(), Some(1), "{}", server.stderr());
                refused += 1;
                false
            }
            None => true,
        });
    }
    use_at(&path, 3);
    end(servers.pop().unwrap());
    assert!(!path.exists());
}
