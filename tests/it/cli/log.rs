//! The log: its JSON form, and its bounded size whatever guests and front ends do.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use vublk_testkit::request::Request;
use vublk_testkit::spec::status;
use vublk_testkit::{Disk, Options, Server};

use super::{VUBLK, directory, run, stderr};
use crate::vhost_user::{LIMIT, export_of};

/// `vublk daemon` in `dir` with the exports `e0` and `e1`, whose reads fail.
fn daemon(dir: &Path, level: &str, more: &[&str]) -> Server {
    let mut command = Command::new(VUBLK);
    command.arg("daemon").args(more).args(["--pidfile", "pid"]).env("RUST_LOG", level);
    for number in 0..2 {
        let node = format!(
            "driver=blkdebug,node-name=d{number},image.driver=null-co,image.size=1048576,\
             inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5"
        );
        let export = export_of(&format!("d{number}"), number).replace("DIR/", "");
        command.args(["--blockdev", &node, "--export", &export]);
    }
    command.current_dir(dir);
    let mut server = Server::spawn(command).unwrap();
    server.wait_pidfile(&dir.join("pid"), LIMIT).unwrap();
    server
}

/// Ends it; gives all that it said.
fn end(mut server: Server) -> String {
    server.signal(libc::SIGTERM).unwrap();
    assert!(server.wait_exit(LIMIT).unwrap().success());
    let end = Instant::now() + LIMIT;
    // The pipe's reader may be a moment behind.
    while !server.stderr().contains("e1: ended: ") && !server.stderr().contains("\"e1\"") {
        assert!(Instant::now() < end, "{}", server.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::thread::sleep(std::time::Duration::from_millis(50));
    server.stderr()
}

/// Lines of a kind that may have come in the time since then: a burst, then one in ten seconds.
fn most(since: Instant) -> usize {
    8 + since.elapsed().as_secs() as usize / 10 + 1
}

#[test]
fn a_storm_of_reconnects_and_errors_costs_a_few_lines_and_hides_nothing_of_others() {
    let dir = directory();
    let began = Instant::now();
    let server = daemon(dir.path(), "info", &[]);
    for _ in 0..200 {
        let mut stream = UnixStream::connect(dir.path().join("e0.sock")).unwrap();
        // No message of vhost-user's.
        let _ = stream.write_all(&[0xff; 12]);
    }
    let mut disk = Disk::open(&dir.path().join("e0.sock"), &Options::default()).unwrap();
    let read = |disk: &mut Disk| {
        assert_eq!(disk.run(&Request::In { sector: 0, len: 512 }).unwrap().status, status::IOERR);
    };
    (0..200).for_each(|_| read(&mut disk));
    let mut other = Disk::open(&dir.path().join("e1.sock"), &Options::default()).unwrap();
    read(&mut other);
    drop((disk, other));
    let log = end(server);
    let most = most(began);
    for words in ["e0: front end connected", "e0: connection ended", "e0: d0: read of 512 bytes"] {
        let count = log.lines().filter(|line| line.contains(words)).count();
        assert!((1..=most).contains(&count), "{words}: {count}, not up to {most}:\n{log}");
    }
    assert!(
        log.contains("e1: d1: read of 512 bytes at 0 failed: Input/output error (error 1)"),
        "{log}"
    );
    assert!(log.contains("[INFO ] e1: front end connected\n"), "{log}");
    let suppressed = |line: &str| {
        let (count, _) =
            line.strip_prefix("[INFO ] e0: ")?.split_once(" more suppressed of lines")?;
        count.parse::<usize>().ok()
    };
    let counts: Vec<_> = log.lines().filter_map(suppressed).collect();
    assert!(counts.len() >= 3 && counts.iter().sum::<usize>() >= 3 * (200 - most), "{log}");
}

#[test]
fn those_who_ask_for_debug_lines_are_spared_nothing() {
    let dir = directory();
    let server = daemon(dir.path(), "debug", &[]);
    let mut disk = Disk::open(&dir.path().join("e0.sock"), &Options::default()).unwrap();
    for _ in 0..30 {
        disk.run(&Request::In { sector: 0, len: 512 }).unwrap();
    }
    drop(disk);
    let log = end(server);
    assert_eq!(log.matches("e0: d0: read of 512 bytes at 0 failed").count(), 30, "{log}");
}

#[test]
fn as_json_each_line_is_an_object_with_time_level_target_message_and_export() {
    let dir = directory();
    let server = daemon(dir.path(), "info", &["--log-format", "json"]);
    let mut disk = Disk::open(&dir.path().join("e1.sock"), &Options::default()).unwrap();
    disk.run(&Request::In { sector: 0, len: 512 }).unwrap();
    drop(disk);
    let log = end(server);
    let lines = log.lines().map(|line| {
        let line: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        for key in ["time", "level", "target", "message"] {
            assert!(line[key].is_string(), "{line}");
        }
        let time = line["time"].as_str().unwrap();
        assert!(time.len() == 24 && time.starts_with("20") && time.ends_with('Z'), "{time}");
        line
    });
    let lines: Vec<_> = lines.collect();
    let failed = lines.iter().find(|line| line["level"] == "warn").unwrap();
    assert_eq!(failed["export"], "e1");
    assert_eq!(
        failed["message"],
        "d1: read of 512 bytes at 0 failed: Input/output error (error 1)"
    );
    assert_eq!(failed["target"], "vublk::export::core::disk");
    // Why it ends, too.
    for arguments in [
        &["serve", "-f", "raw", "none", "-s", "a.sock", "--log-format", "json"][..],
        &["daemon", "--log-format=json", "--export", "none"],
    ] {
        let said = stderr(&run(dir.path(), &[VUBLK], arguments));
        let line: serde_json::Value =
            serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        assert_eq!(line["level"], "error", "{said}");
        assert!(line["message"].as_str().unwrap().contains("none"), "{said}");
    }
}
