//! The sandbox and `--user`, seen from outside.
//!
//! The kernel describes the process, and refuses what it asks for through its monitor. The unit tests have what a
//! confined process can try itself; all other tests show that ordinary service works, for their daemons run in the
//! sandbox.

use super::{VUBLK, directory, end, run, stderr, use_disk};
use crate::monitor::{self, Client};
use crate::vhost_user::{LIMIT, SIZE, new_image};
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use vublk_testkit::{Options, Server, seccomp};

const EXPORT: &str =
    "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=s,writable=on";

/// `vublk serve` of `disk.img` at `s`, ready.
fn serve(dir: &Path, more: &[&str]) -> Server {
    let mut command = Command::new(VUBLK);
    command.args(["serve", "-f", "raw", "disk.img", "--socket", "s"]).args(more);
    command.current_dir(dir).stdout(Stdio::piped());
    let mut server = Server::spawn(command).unwrap();
    // What it prints when it is ready it prints in the sandbox.
    let pid = server.pid();
    server.wait_socket(&dir.join("s"), LIMIT).unwrap();
    let confined = !more.contains(&"off");
    let done = || !confined || status(pid, "Seccomp") == "2";
    server.wait_until("the sandbox", LIMIT, done).unwrap();
    server
}

/// A line of /proc/PID/status.
fn status(pid: u32, name: &str) -> String {
    let all = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = all.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}: {all}")).trim().to_owned()
}

#[test]
fn serve_goes_into_the_sandbox_by_itself_and_not_if_reported() {
    let dir = directory();
    for (more, confined) in
        [(&[][..], true), (&["--sandbox", "on"], true), (&["--sandbox", "off"], false)]
    {
        let server = serve(dir.path(), more);
        let pid = server.pid();
        let (seccomp, privileges) = if confined { ("2", "1") } else { ("0", "0") };
        // The whole suite may run under a filter of its own.
        let own = status(std::process::id(), "Seccomp");
        if own == "0" || confined {
            assert_eq!(status(pid, "Seccomp"), seccomp, "{more:?}");
            assert_eq!(status(pid, "NoNewPrivs"), privileges, "{more:?}");
        }
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let none = core.split_whitespace().skip(4).take(2).all(|limit| limit == "1");
        assert!(none || !confined, "{core}");
        // One front end after the other.
        use_disk(&dir.path().join("s"));
        use_disk(&dir.path().join("s"));
        assert_eq!(end(server), "");
        assert!(!dir.path().join("s").exists(), "its socket is gone");
    }
}

#[test]
fn a_data_file_that_the_image_names_is_served_as_far_as_the_policy_goes() {
    let dir = directory();
    let create = ["create", "-q", "-f", "qcow2", "-o", "data_file=data", "disk.qcow2", "8M"];
    let made = Command::new("qemu-img").args(create).current_dir(dir.path()).status().unwrap();
    assert!(made.success());
    let serve = |more: &[&str]| {
        let mut command = Command::new(VUBLK);
        command.args(["serve", "-f", "qcow2", "disk.qcow2", "--socket", "s", "--sandbox", "on"]);
        command.args(more).current_dir(dir.path()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let refused = serve(&["--backing-files", "never"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("'data' is named by the image only"), "{said}");
    let mut server = Server::spawn(serve(&[])).unwrap();
    server.wait_socket(&dir.path().join("s"), LIMIT).unwrap();
    use_disk(&dir.path().join("s"));
    assert_eq!(end(server), "");
    let data = std::fs::read(dir.path().join("data")).unwrap();
    assert_eq!(data[4096..8192], [7; 4096], "the guest's bytes are where the guest has them");
    let mut check = Command::new("qemu-img");
    check.args(["check", "-q", "disk.qcow2"]).current_dir(dir.path());
    assert!(check.status().unwrap().success());
}

#[test]
fn every_thread_of_a_server_is_in_the_sandbox() {
    let dir = directory();
    let server = serve(dir.path(), &["--workers", "3"]);
    use_disk(&dir.path().join("s"));
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let mut count = 0;
    for task in tasks {
        let path = task.unwrap().path();
        let Ok(all) = std::fs::read_to_string(path.join("status")) else { continue };
        // The kernel's own, which work for the rings.
        if !all.contains("Name:\tiou-") {
            assert!(all.contains("NoNewPrivs:\t1") && all.contains("Seccomp:\t2"), "{all}");
            count += 1;
        }
    }
    assert!(count >= 5, "{count} threads");
    end(server);
}

#[test]
fn a_daemon_in_the_sandbox_grows_inside_its_folders_only() {
    let outside = directory();
    let outside = outside.path().join("disk.img");
    let blockdev = "driver=file,node-name=d0,filename=DIR/disk.img";
    let export = EXPORT.replace("=s,", "=DIR/e0.sock,");
    let daemon = monitor::daemon(&["--blockdev", blockdev, "--export", &export]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let node =
        |name: &str, file: &Path| json!({"driver": "file", "node-name": name, "filename": file});
    let refused = client.ask("blockdev-add", node("d1", &outside));
    let words = format!(
        "Could not open '{}': Permission denied: the sandbox keeps it out, unless --sandbox-path {} \
         is given",
        outside.display(),
        outside.parent().unwrap().display()
    );
    assert_eq!(refused["error"]["desc"], words, "{refused}");
    let more = json!({"node-name": "d0", "snapshot-file": outside, "snapshot-node-name": "s"});
    let actions = json!([{"type": "blockdev-snapshot-sync", "data": more}]);
    let refused = client.refusal("transaction", json!({"actions": actions}));
    assert!(refused.contains("the sandbox keeps it out, unless"), "{refused}");
    let again = json!({"driver": "file", "node-name": "d0", "filename": daemon.path("disk.img")});
    client.run("blockdev-reopen", json!({"options": [again]}));
    new_image(&daemon.path("more.img"), SIZE);
    let done = json!({"return": {}});
    assert_eq!(client.ask("blockdev-add", node("d1", &daemon.path("more.img"))), done);
    // More iothreads than rings were made ahead for: the others have threads.
    for number in 0..34 {
        let iothread = json!({"qom-type": "iothread", "id": format!("io{number}")});
        assert_eq!(client.ask("object-add", iothread), done);
    }
    for (number, iothread) in [(1, "io0"), (2, "io33")] {
        let path = daemon.socket(number);
        let address = json!({"type": "unix", "path": path});
        let export = json!({"type": "vhost-user-blk", "id": format!("e{number}"),
            "node-name": "d1", "iothread": iothread, "addr": address});
        assert_eq!(client.ask("block-export-add", export), done);
        let mut disk = daemon.open_number(number, &Options::default());
        disk.read(0, &mut [0; 4096]).unwrap();
        drop(disk);
        assert_eq!(client.ask("block-export-del", json!({"id": format!("e{number}")})), done);
        assert!(!path.exists());
    }
    let resized = json!({"node-name": "d1", "size": 2 * SIZE});
    assert_eq!(client.ask("block_resize", resized), done);
    let said = daemon.end();
    assert!(said.contains("(the sandbox has none left): threads do the I/O"), "{said}");
}

/// Runs `vublk serve` where the kernel refuses a system call, until it ends or is ready.
fn start_without(dir: &Path, call: libc::c_long, more: &[&str]) -> Server {
    let mut command = Command::new(VUBLK);
    command.args(["serve", "-f", "raw", "disk.img", "--socket", "s"]).args(more);
    command.current_dir(dir).stdout(Stdio::null());
    // SAFETY: makes two system calls and allocates nothing.
    unsafe { command.pre_exec(move || seccomp::forbid(call as u32)) };
    Server::spawn(command).unwrap()
}

#[test]
fn what_the_kernel_does_not_offer_is_reported_once_and_is_an_error_if_it_was_asked_for() {
    let dir = directory();
    for (call, words) in [
        (
            libc::SYS_landlock_create_ruleset,
            "files are not confined (the kernel offers no Landlock)",
        ),
        (libc::SYS_seccomp, "system calls are not confined (Error calling `seccomp`: "),
    ] {
        let mut server = start_without(dir.path(), call, &[]);
        server.wait_socket(&dir.path().join("s"), LIMIT).unwrap();
        use_disk(&dir.path().join("s"));
        let said = end(server);
        assert_eq!(said.matches("sandbox: ").count(), 1, "{said}");
        assert!(said.contains(words), "{said}");

        let mut server = start_without(dir.path(), call, &["--sandbox", "on"]);
        assert_eq!(server.wait_exit(LIMIT).unwrap().code(), Some(1));
        let line = format!("vublk: --sandbox on: {words}");
        let said = || server.stderr();
        let began = std::time::Instant::now();
        while !said().contains(&line) {
            assert!(began.elapsed() < LIMIT, "{}", said());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// `vublk serve` that is to end at once.
fn fails(dir: &Path, more: &[&str]) -> Output {
    let line = ["-f", "raw", "disk.img", "--socket", "s"];
    run(dir, &[VUBLK, "serve"], &[&line, more].concat())
}

#[test]
fn a_server_becomes_the_user_that_it_is_reported_with_its_groups_and_gives_it_the_socket() {
    let dir = directory();
    // SAFETY: takes no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        let said = stderr(&fails(dir.path(), &["--user", "4242:4243"]));
        assert!(said.contains("Operation not permitted"), "{said}");
        return;
    }
    let server = serve(dir.path(), &["--user", "4242:4243"]);
    let pid = server.pid();
    assert_eq!(status(pid, "Uid"), "4242\t4242\t4242\t4242");
    assert_eq!(status(pid, "Gid"), "4243\t4243\t4243\t4243");
    assert_eq!(status(pid, "Groups"), "4243");
    assert_eq!(status(pid, "CapEff"), "0000000000000000");
    let socket = std::fs::metadata(dir.path().join("s")).unwrap();
    assert_eq!((socket.uid(), socket.gid()), (4242, 4243));
    use_disk(&dir.path().join("s"));
    end(server);
    // The folder is root's, so the socket stays, and the next one takes its place.
    let more = ["--user", "nobody", "--socket-owner", "4244:4245", "--sandbox", "off"];
    let server = serve(dir.path(), &more);
    let socket = std::fs::metadata(dir.path().join("s")).unwrap();
    assert_eq!((socket.uid(), socket.gid()), (4244, 4245));
    server_is_nobody(server.pid());
    use_disk(&dir.path().join("s"));
    end(server);
}

fn server_is_nobody(pid: u32) {
    let began = std::time::Instant::now();
    while !status(pid, "Uid").starts_with("65534\t65534") {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn users_and_places_that_are_not_there_are_refused() {
    let dir = directory();
    for (more, words) in [
        (["--user", "nobody-here"], "there is no user 'nobody-here'"),
        (["--user", "4242"], "give its group too"),
        (["--sandbox", "maybe"], "invalid value 'maybe'"),
    ] {
        let output = fails(dir.path(), &more);
        assert!(!output.status.success());
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    let line = ["--sandbox", "on", "--sandbox-path", "ro:missing"];
    let output = run(dir.path(), &[VUBLK, "daemon"], &line);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("'missing': No such file or directory"),
        "{}",
        stderr(&output)
    );
}
