//! `vublk serve`: its output, its sockets, and what it refuses.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use vublk_testkit::spec::feature;
use vublk_testkit::{Disk, Error, Options, Server, message};

use super::{VUBLK, directory, end, run, stderr};
use crate::vhost_user::LIMIT;

/// `vublk serve` in `dir`, ready: it has told so through the socket that systemd would give it.
pub fn serve(dir: &Path, arguments: &[&str]) -> Server {
    let notify = dir.join(format!("notify{}", arguments.len()));
    let _ = std::fs::remove_file(&notify);
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = Command::new(VUBLK);
    command.arg("serve").args(arguments).current_dir(dir);
    command.env("NOTIFY_SOCKET", &notify).stdout(Stdio::null());
    let mut server = Server::spawn(command).unwrap();
    let mut text = [0; 256];
    let n = loop {
        socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
        match socket.recv(&mut text) {
            Ok(n) => break n,
            Err(_) => assert!(server.try_wait().unwrap().is_none(), "ended: {}", server.stderr()),
        }
    };
    assert!(String::from_utf8_lossy(&text[..n]).lines().any(|line| line == "READY=1"));
    server
}

fn open(dir: &Path, socket: &str) -> Disk {
    Disk::open(&dir.join(socket), &Options::default()).unwrap()
}

/// Exit code 1 and one line that holds `words`.
pub fn assert_refused(dir: &Path, arguments: &[&str], words: &str) {
    let output = run(dir, &[VUBLK, "serve"], arguments);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert!(said.contains(words), "{arguments:?}: {said}");
}

#[test]
fn the_lines_that_attach_each_disk_are_printed() {
    let dir = directory();
    std::fs::copy(dir.path().join("disk.img"), dir.path().join("b.img")).unwrap();
    let mut command = Command::new(VUBLK);
    command.current_dir(dir.path()).stdout(std::fs::File::create(dir.path().join("out")).unwrap());
    command.args(["serve", "-f", "raw", "disk.img", "b.img", "--socket", "a.sock", "-s", "b.sock"]);
    let mut server = Server::spawn(command).unwrap();
    let printed = || std::fs::read_to_string(dir.path().join("out")).unwrap();
    server.wait_until("its lines", LIMIT, || printed().lines().count() >= 8).unwrap();
    let here = dir.path().canonicalize().unwrap();
    for name in ["a.sock", "b.sock"] {
        let path = here.join(name).display().to_string();
        let text = printed();
        assert!(text.contains(&format!("{path}: ready\n")), "{text}");
        for words in ["-chardev socket,id=vublk,path=", "--disk vhost_user=true,socket="] {
            assert!(text.contains(&format!("{words}{path}")), "{text}");
        }
        open(dir.path(), name).write(8, &[7; 512]).unwrap();
    }
    end(server);
    for image in ["disk.img", "b.img"] {
        let bytes = std::fs::read(dir.path().join(image)).unwrap();
        assert_eq!(bytes[4096..4608], [7; 512]);
    }
}

#[test]
fn a_disk_is_offered_with_the_defaults_of_an_expert() {
    let dir = directory();
    let server = serve(dir.path(), &["-f", "raw", "disk.img", "--socket", "a.sock"]);
    let mut disk = open(dir.path(), "a.sock");
    assert_eq!(disk.connection().max_queues(), 256, "QEMU refuses fewer than its device asks for");
    assert_eq!(disk.config().wce, 1);
    assert!(disk.has(feature::DISCARD | feature::WRITE_ZEROES | feature::FLUSH | feature::MQ));
    assert_eq!(disk.get_id().unwrap(), "vublk0");
    drop(disk);
    end(server);
}

#[test]
fn a_qcow2_image_is_served_and_qemu_finds_what_was_written() {
    let dir = directory();
    let image = |tool: &str, arguments: &[&str]| {
        let mut command = Command::new(tool);
        command.args(arguments).current_dir(dir.path()).stdout(Stdio::null());
        assert!(command.status().unwrap().success(), "{tool} {arguments:?}");
    };
    image("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
    image("qemu-io", &["-c", "write -P 7 1M 64k", "a.qcow2"]);
    let server = serve(dir.path(), &["-f", "qcow2", "a.qcow2", "--socket", "a.sock"]);
    let mut disk = open(dir.path(), "a.sock");
    for (sector, wanted) in [(2048, 7), (0, 0)] {
        let mut found = [0xaa; 1024];
        disk.read(sector, &mut found).unwrap();
        assert_eq!(found, [wanted; 1024]);
    }
    disk.write(2049, &[8; 512]).unwrap();
    disk.write(8192, &[9; 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    end(server);
    image("qemu-img", &["check", "-q", "a.qcow2"]);
    for pattern in ["-P 7 1M 512", "-P 8 1049088 512", "-P 9 4M 4k", "-P 0 4198400 4k"] {
        image("qemu-io", &["-r", "-c", &format!("read {pattern}"), "a.qcow2"]);
    }

    let server = serve(dir.path(), &["-r", "-f", "qcow2", "a.qcow2", "--socket", "b.sock"]);
    assert!(open(dir.path(), "b.sock").has(feature::RO));
    end(server);
}

#[test]
fn each_option_shows_in_the_disk() {
    let dir = directory();
    let arguments = [
        "-f",
        "raw",
        "disk.img",
        "-s",
        "a.sock",
        "--read-only",
        "--num-queues",
        "3",
        "--serial",
        "01234567890123456789",
        "--logical-block-size",
        "4k",
        "--cache",
        "writeback",
        "--workers",
        "2",
        "--worker-cpus",
        "0",
        "--poll-max-us",
        "0",
        "--socket-mode",
        "620",
        "-v",
    ];
    let server = serve(dir.path(), &arguments);
    let mode = std::fs::metadata(dir.path().join("a.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o620);
    let mut disk = open(dir.path(), "a.sock");
    assert!(disk.has(feature::RO));
    assert_eq!((disk.connection().max_queues(), disk.config().blk_size), (3, 4096));
    assert_eq!(disk.get_id().unwrap(), "01234567890123456789");
    assert!(matches!(disk.write(0, &[0; 4096]), Err(Error::Status(1))));
    let workers = server.threads().unwrap();
    let mut pinned = workers.iter().filter(|t| t.name.starts_with("worker")).map(|t| {
        let status = format!("/proc/{}/task/{}/status", server.pid(), t.tid);
        let status = std::fs::read_to_string(status).unwrap();
        status.lines().any(|line| line.starts_with("Cpus_allowed_list:") && line.ends_with("\t0"))
    });
    assert_eq!((pinned.next(), pinned.next(), pinned.next()), (Some(true), Some(true), None));
    drop(disk);
    end(server);
}

#[test]
fn cache_and_discard_modes_decide_what_is_offered() {
    for (option, value, wce, discard) in [
        ("--cache", "none", 1, true),
        ("--cache", "unsafe", 1, true),
        ("--cache", "writethrough", 0, true),
        ("--cache", "directsync", 0, true),
        ("--discard", "ignore", 1, false),
    ] {
        let dir = directory();
        let server = serve(dir.path(), &["-f", "raw", "disk.img", "-s", "a.sock", option, value]);
        let mut disk = open(dir.path(), "a.sock");
        assert_eq!(disk.config().wce, wce, "{option} {value}");
        assert_eq!(disk.has(feature::DISCARD), discard, "{option} {value}");
        disk.write(0, &[5; 4096]).unwrap();
        disk.flush().unwrap();
        let mut back = [0; 4096];
        disk.read(0, &mut back).unwrap();
        assert_eq!(back, [5; 4096]);
        drop(disk);
        end(server);
    }
}

#[test]
fn command_lines_that_are_wrong_are_refused_with_a_reason() {
    let dir = directory();
    let here = dir.path();
    let long = "x".repeat(120);
    std::fs::write(here.join("file"), "mine").unwrap();
    let good = ["-f", "raw", "disk.img", "--socket", "a.sock"];
    let with = |more: &[&'static str]| [&good[..], more].concat();
    assert_refused(here, &["nothere", "--socket", "a.sock"], "nothere");
    assert_refused(
        here,
        &["-f", "raw", "disk.img", "disk.img", "-s", "a"],
        "2 images but 1 sockets",
    );
    assert_refused(
        here,
        &["-f", "raw", "disk.img", "-s", "a", "-s", "b"],
        "1 images but 2 sockets",
    );
    assert_refused(here, &["-f", "raw", "disk.img"], "--socket");
    assert_refused(here, &["-f", "raw", "nothere", "-s", "a"], "nothere");
    assert_refused(here, &["-f", "vmdk0", "disk.img", "-s", "a"], "[possible values: ");
    assert_refused(here, &["-f", "raw", "disk.img", "-s", &long], "is too long");
    assert_refused(
        here,
        &["-f", "raw", "disk.img", "-s", "nodir/a"],
        "There is no folder 'nodir'.",
    );
    assert_refused(here, &["-f", "raw", "disk.img", "-s", "file"], "is not a socket");
    assert_refused(here, &with(&["--serial", "012345678901234567890"]), "at most 20 bytes");
    assert_refused(here, &with(&["--logical-block-size", "1000"]), "power of 2");
    assert_refused(
        here,
        &with(&["--logical-block-size", "4q"]),
        "a number with k, M, G, T, P or E",
    );
    assert_refused(here, &with(&["--num-queues", "0"]), "num-queues");
    assert_refused(here, &with(&["--num-queues", "257"]), "num-queues");
    assert_refused(here, &with(&["--worker-cpus", "x"]), "not the number of a processor");
    assert_refused(here, &with(&["--worker-cpus", "0,1023"]), "there is no processor 1023");
    assert_refused(here, &with(&["--worker-cpus", "99999"]), "there is no processor 99999");
    assert_refused(here, &with(&["--name", "a", "--name", "b"]), "1 images but 2 names");
    assert_refused(here, &with(&["--name", ""]), "not a name");
    assert_refused(here, &with(&["--socket-mode", "999"]), "octal");
    assert_refused(here, &with(&["--socket-owner", "nobody"]), "numeric");
    assert_refused(here, &with(&["--cache", "sometimes"]), "sometimes");
    assert_refused(here, &with(&["--backing-files", "all"]), "all");
    assert_refused(here, &with(&["--rw-whitelist", "file"]), "Driver 'raw' is not whitelisted");
    assert_refused(
        here,
        &with(&["--rw-whitelist", "file", "--ro-whitelist", "qcow2,raw"]),
        "Driver 'raw' can only be used for read-only devices",
    );
    assert_eq!(std::fs::read_to_string(here.join("file")).unwrap(), "mine");
    let left: Vec<_> = std::fs::read_dir(here)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_socket())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced_and_a_live_one_is_not() {
    let dir = directory();
    let path = dir.path().join("a.sock");
    // Closed, but its file stays.
    drop(UnixListener::bind(&path).unwrap());
    let arguments = ["-f", "raw", "disk.img", "--socket", "a.sock"];
    let server = serve(dir.path(), &arguments);
    open(dir.path(), "a.sock").read(0, &mut [0; 512]).unwrap();
    let other = ["-f", "raw", "--read-only", "disk.img", "--socket", "a.sock"];
    std::fs::copy(dir.path().join("disk.img"), dir.path().join("b.img")).unwrap();
    let other = other.map(|word| if word == "disk.img" { "b.img" } else { word });
    assert_refused(dir.path(), &other, "another process listens");
    open(dir.path(), "a.sock").read(0, &mut [0; 512]).unwrap();
    end(server);
    assert!(!path.exists());
}

#[test]
fn a_socket_file_that_somebody_put_in_the_place_of_ours_stays() {
    let dir = directory();
    let path = dir.path().join("a.sock");
    let server = serve(dir.path(), &["-f", "raw", "disk.img", "--socket", "a.sock"]);
    std::fs::remove_file(&path).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    end(server);
    assert!(path.exists(), "only our own socket is removed");
}

#[test]
fn an_image_locked_by_what_no_process_has_open_is_waited_for() {
    let dir = directory();
    let locked = crate::monitor::slow::lock_by_nobody(&dir.path().join("disk.img"));
    let mut command = Command::new(VUBLK);
    command.current_dir(dir.path()).stdout(Stdio::null());
    command.args(["serve", "-f", "raw", "disk.img", "--socket", "a.sock"]);
    let mut server = Server::spawn(command).unwrap();
    let end_of_wait = std::time::Instant::now() + LIMIT;
    while !server.stderr().contains("trying for") {
        assert!(server.try_wait().unwrap().is_none(), "ended: {}", server.stderr());
        assert!(std::time::Instant::now() < end_of_wait);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // The socket may stand already, but nobody is let in.
    let early = UnixStream::connect(dir.path().join("a.sock")).unwrap();
    message::send(&early, 1, message::VERSION, None, &[], &[]).unwrap();
    early.set_nonblocking(true).unwrap();
    let none = std::io::Read::read(&mut &early, &mut [0]).unwrap_err();
    assert_eq!(none.kind(), std::io::ErrorKind::WouldBlock);
    drop(locked);
    early.set_nonblocking(false).unwrap();
    assert_eq!(message::receive(&early, LIMIT).unwrap().unwrap().request, 1);
    drop(early);
    open(dir.path(), "a.sock").read(0, &mut [0; 512]).unwrap();
    let said = server.stderr();
    assert_eq!(said.matches("trying for").count(), 1, "{said}");
    end(server);
}

#[test]
fn a_daemon_that_waits_for_a_lock_is_ended_by_a_signal() {
    let dir = directory();
    let _locked = crate::monitor::slow::lock_by_nobody(&dir.path().join("disk.img"));
    let mut command = Command::new(VUBLK);
    command.current_dir(dir.path()).stdout(Stdio::null());
    command.args(["serve", "-f", "raw", "disk.img", "--socket", "a.sock"]);
    let mut server = Server::spawn(command).unwrap();
    while !server.stderr().contains("trying for") {
        assert!(server.try_wait().unwrap().is_none(), "ended: {}", server.stderr());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    server.signal(libc::SIGTERM).unwrap();
    assert_eq!(server.wait_exit(LIMIT).unwrap().code(), Some(1));
    assert!(server.stderr().contains("Failed to get \"write\" lock"), "{}", server.stderr());
}

#[test]
fn the_process_that_holds_a_locked_image_is_named() {
    let dir = directory();
    let first = serve(dir.path(), &["-f", "raw", "disk.img", "--socket", "a.sock"]);
    let held = format!("It is held by vublk (pid {})", first.pid());
    assert_refused(dir.path(), &["-f", "raw", "disk.img", "--socket", "b.sock"], &held);
    // The holder may be the process itself.
    let twice = ["-f", "raw", "b.img", "b.img", "--socket", "b.sock", "--socket", "c.sock"];
    std::fs::copy(dir.path().join("disk.img"), dir.path().join("b.img")).unwrap();
    assert_refused(dir.path(), &twice, "It is held by vublk (pid");
    end(first);
}
