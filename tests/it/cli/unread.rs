//! Readers that do not read: of the log, of standard output, of the service manager, of metrics.
//!
//! They delay no disk, no monitor and no shutdown.

use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;
use vublk_testkit::request::Request;
use vublk_testkit::spec::status;
use vublk_testkit::{Disk, Options, Server};

use super::{VUBLK, directory, end};
use crate::metrics::{Scrape, connect};
use crate::monitor::Client;
use crate::vhost_user::{LIMIT, export_of};

/// Reads of the failing disk, each of which is a line of the log: more than a pipe, the log's queue, and what its
/// thread has in hand can hold.
const FAILURES: u64 = 12_000;

/// What fills a pipe.
const FILL: u8 = b'\n';

/// Sets O_NONBLOCK or takes it back.
fn set_nonblocking(file: &impl AsRawFd, on: bool) {
    let flags = if on { libc::O_NONBLOCK } else { 0 };
    // SAFETY: names no memory, and the descriptor is open.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }, 0);
}

/// A pipe without room.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    set_nonblocking(&writer, true);
    for len in [4096, 1] {
        while writer.write(&vec![FILL; len]).is_ok() {}
    }
    set_nonblocking(&writer, false);
    (reader, writer)
}

/// `vublk daemon` in `dir`, ready: `e0`, whose reads fail, `e1`, a monitor and metrics.
fn daemon(dir: &Path, stderr: PipeWriter, level: &str, more: &[&str]) -> Server {
    let failing = "driver=blkdebug,node-name=d0,image.driver=null-co,image.size=1073741824,\
                   inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5";
    let mut command = Command::new(VUBLK);
    command.args(["daemon", "--blockdev", failing, "--pidfile", "pid", "--metrics", "unix:m.sock"]);
    command.args(["--blockdev", "driver=null-co,node-name=d1,read-zeroes=on"]);
    for number in 0..2 {
        let export = export_of(&format!("d{number}"), number).replace("DIR/", "");
        command.args(["--export", &export]);
    }
    command.args(["--chardev", "socket,id=m,path=q.sock,server=on,wait=off", "--monitor", "m"]);
    command.args(more).current_dir(dir).stderr(stderr).env("RUST_LOG", level);
    let mut server = Server::spawn_unheard(command).unwrap();
    server.wait_pidfile(&dir.join("pid"), LIMIT).unwrap();
    server
}

fn open(dir: &Path, socket: &str) -> Disk {
    Disk::open(&dir.join(socket), &Options::default()).unwrap()
}

/// Reads that fail, of one sector each.
fn fail(disk: &mut Disk, sectors: std::ops::Range<u64>) {
    for sector in sectors {
        let read = Request::In { sector, len: 512 };
        assert_eq!(disk.run(&read).unwrap().status, status::IOERR);
    }
}

/// The number of lines that the log says it has lost.
fn dropped(dir: &Path) -> f64 {
    let page = crate::metrics::page(connect(&dir.join("m.sock")));
    Scrape(vublk::metrics::parse(&page).unwrap()).sum("vublk_log_dropped_lines_total", &[])
}

#[test]
fn a_log_that_nobody_reads_holds_up_no_disk_no_monitor_no_scraper_and_no_end() {
    for more in [&["--sandbox", "on"][..], &["--log-format", "json"]] {
        let dir = directory();
        let (_reader, writer) = full_pipe();
        let server = daemon(dir.path(), writer, "warn", more);
        let (mut failing, mut healthy) = (open(dir.path(), "e0.sock"), open(dir.path(), "e1.sock"));
        fail(&mut failing, 0..10);
        healthy.read(0, &mut [0; 4096]).unwrap();
        Client::connect(&dir.path().join("q.sock")).run("query-block", json!({}));
        assert_eq!(dropped(dir.path()), 0.0, "a few lines can wait");
        end(server);
    }
}

/// The line's sector, of one about a failed read.
fn sector(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("d0: read of 512 bytes at ")?;
    let (offset, _) = rest.split_once(" failed")?;
    Some(offset.parse::<u64>().unwrap() / 512)
}

/// The number in a line about those that were dropped.
fn number_dropped(line: &str) -> Option<u64> {
    let (rest, _) = line.split_once(" log line")?;
    let digits = rest.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    Some(digits.parse().unwrap())
}

#[test]
fn lines_that_nobody_reads_are_dropped_in_number_and_the_others_come_in_their_order() {
    for format in ["text", "json"] {
        let dir = directory();
        let (mut reader, writer) = full_pipe();
        // At this level the limiter leaves nothing out.
        let server = daemon(dir.path(), writer, "debug", &["--log-format", format]);
        let mut failing = open(dir.path(), "e0.sock");
        fail(&mut failing, 0..FAILURES);
        let counted = dropped(dir.path());
        assert!(counted > 0.0);
        open(dir.path(), "e1.sock").read(0, &mut [0; 512]).unwrap();
        let log = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        end(server);
        let log = log.join().unwrap();
        let (mut seen, mut missing, mut next) = (0, 0, 0);
        for line in log.lines() {
            if let Some(sector) = sector(line) {
                assert!(sector >= next, "{line} comes after the one of sector {next}");
                assert!(sector == next || missing > 0, "nothing is said of sector {next}: {line}");
                (seen, next) = (seen + 1, sector + 1);
            }
            missing += number_dropped(line).unwrap_or(0);
        }
        assert!(seen > 100 && missing as f64 >= counted, "{seen} lines, {missing} missing");
        // Others are missing as well.
        assert!(seen + missing >= FAILURES, "{seen} lines, {missing} missing");
    }
}

#[test]
fn serve_serves_and_ends_while_nobody_reads_what_it_prints() {
    let dir = directory();
    let (_reader, writer) = full_pipe();
    let mut command = Command::new(VUBLK);
    command.args(["serve", "-vv", "-f", "raw", "disk.img", "-s", "s"]).current_dir(dir.path());
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut server = Server::spawn_unheard(command).unwrap();
    server.wait_socket(&dir.path().join("s"), LIMIT).unwrap();
    open(dir.path(), "s").write(0, &[1; 512]).unwrap();
    end(server);
}

#[test]
fn a_daemon_goes_to_the_background_while_nobody_reads_its_warnings() {
    let dir = directory();
    let (_reader, writer) = full_pipe();
    let mut command = Command::new(VUBLK);
    // A short form is warned of.
    let chardev = "socket,id=m,path=q.sock,server,nowait";
    command.args(["daemon", "--chardev", chardev, "--monitor", "m", "--pidfile", "pid"]);
    command.arg("--daemonize").current_dir(dir.path()).stdout(Stdio::null()).stderr(writer);
    let mut parent = Server::spawn_unheard(command).unwrap();
    assert!(parent.wait_exit(LIMIT).unwrap().success());
    Client::connect(&dir.path().join("q.sock")).run("quit", json!({}));
    let began = Instant::now();
    while dir.path().join("pid").exists() {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// A service manager's socket at `path`, whose queue is full.
fn full_manager(path: &Path) -> UnixDatagram {
    let manager = UnixDatagram::bind(path).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    fill(path);
    manager
}

fn fill(path: &Path) {
    // A sender may be out of room of its own: only a fresh one that cannot send anything shows a full queue.
    loop {
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_nonblocking(true).unwrap();
        let mut sent = 0;
        let error = loop {
            match sender.send_to(b"FILL=1", path) {
                Ok(_) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
        if sent == 0 {
            return;
        }
    }
}

/// The next thing that the manager is told, not by [`fill`].
fn message(manager: &UnixDatagram) -> String {
    let mut text = [0; 256];
    loop {
        let n = manager.recv(&mut text).unwrap();
        if &text[..n] != b"FILL=1" {
            return String::from_utf8_lossy(&text[..n]).into_owned();
        }
    }
}

#[test]
fn a_service_manager_that_does_not_read_holds_up_nothing_and_is_reported_later() {
    let daemon = [
        "daemon",
        "--blockdev",
        "driver=file,node-name=d,filename=disk.img",
        "--export",
        "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=s",
    ];
    for arguments in [&["serve", "-f", "raw", "disk.img", "-s", "s"][..], &daemon] {
        let dir = directory();
        let path = dir.path().join("notify");
        let manager = full_manager(&path);
        let start = || {
            let mut command = Command::new(VUBLK);
            command.args(arguments).current_dir(dir.path()).stdout(Stdio::null());
            command.env("NOTIFY_SOCKET", &path);
            let mut server = Server::spawn(command).unwrap();
            server.wait_socket(&dir.path().join("s"), LIMIT).unwrap();
            open(dir.path(), "s").read(0, &mut [0; 512]).unwrap();
            server
        };
        end(start());
        let server = start();
        assert_eq!(message(&manager), "READY=1");
        fill(&path);
        end(server);
        while message_now(&manager).is_some_and(|text| text == "FILL=1") {}
        // A manager that reads is notified of the end.
        let server = start();
        assert_eq!(message(&manager), "READY=1");
        end(server);
        assert_eq!(message(&manager), "STOPPING=1");
    }
}

/// What the manager has been told and not read.
fn message_now(manager: &UnixDatagram) -> Option<String> {
    let mut text = [0; 256];
    manager.set_nonblocking(true).unwrap();
    let n = manager.recv(&mut text);
    manager.set_nonblocking(false).unwrap();
    n.ok().map(|n| String::from_utf8_lossy(&text[..n]).into_owned())
}

#[test]
fn scrapers_that_ask_and_do_not_read_hold_up_nobody() {
    let dir = directory();
    let (_reader, writer) = std::io::pipe().unwrap();
    let server = daemon(dir.path(), writer, "off", &[]);
    // Many samples: an answer that no socket holds.
    let options = Options { num_queues: 1, ..Options::default() };
    let mut client = Client::connect(&dir.path().join("q.sock"));
    let mut disks = Vec::new();
    for number in 0..32 {
        let path = dir.path().join(format!("more{number}.sock"));
        let name = format!("{}{number}", "x".repeat(200));
        let addr = json!({"type": "unix", "path": path});
        let export = json!({"type": "vhost-user-blk", "id": name, "node-name": "d1", "addr": addr});
        client.run("block-export-add", export);
        let mut disk = Disk::open(&path, &options).unwrap();
        disk.read(0, &mut [0; 512]).unwrap();
        disks.push(disk);
    }
    let socket = dir.path().join("m.sock");
    let silent: Vec<UnixStream> = (0..3)
        .map(|_| {
            let mut stream = connect(&socket);
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
            stream
        })
        .collect();
    for _ in 0..3 {
        assert!(crate::metrics::page(connect(&socket)).len() > 256 << 10);
    }
    disks[0].read(0, &mut [0; 512]).unwrap();
    client.run("query-block", json!({}));
    end(server);
    drop(silent);
}
