//! What a daemon does to its process: the pid file, the background, signals, its name.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use vublk_testkit::{Disk, Options, Server};

use super::{VUBLK, directory, run, stderr};
use crate::vhost_user::{Daemon, LIMIT};

const NODE: &str = "driver=file,node-name=d0,filename=disk.img";
const EXPORT: &str = "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=s.sock";

/// `vublk daemon` with an export, in `dir`.
fn start(dir: &Path, more: &[&str]) -> Server {
    let mut command = Command::new(VUBLK);
    command.args(["daemon", "--blockdev", NODE, "--export", EXPORT]);
    command.args(more).current_dir(dir);
    Server::spawn(command).unwrap()
}

#[test]
fn the_pid_file_holds_the_pid_is_locked_and_goes_with_the_process() {
    let dir = directory();
    let pid_file = dir.path().join("pid");
    let mut daemon = start(dir.path(), &["--pidfile", "pid"]);
    daemon.wait_pidfile(&pid_file, LIMIT).unwrap();
    assert!(dir.path().join("s.sock").exists(), "written when everything is ready");
    let text = std::fs::read_to_string(&pid_file).unwrap();
    assert_eq!(text, format!("{}\n", daemon.pid()));
    let mode = std::fs::metadata(&pid_file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // A second one is refused, and leaves the first one's file alone.
    let second = ["--blockdev", "driver=null-co,node-name=n", "--pidfile", "pid"];
    for program in [&[VUBLK, "daemon"][..], &["qemu-storage-daemon"]] {
        let Ok(_) = Command::new(program[0]).arg("--version").output() else { continue };
        let output = run(dir.path(), program, &second);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("cannot create PID file: Cannot lock pid file: "), "{said}");
        assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), text);
    }
    daemon.signal(libc::SIGTERM).unwrap();
    assert!(daemon.wait_exit(LIMIT).unwrap().success());
    assert!(!pid_file.exists() && !dir.path().join("s.sock").exists());
}

#[test]
fn a_pid_file_that_a_crash_left_behind_is_taken_over() {
    let dir = directory();
    let pid_file = dir.path().join("pid");
    std::fs::write(&pid_file, "99999999 and more that is longer\n").unwrap();
    let mut daemon = start(dir.path(), &["--pidfile", "pid"]);
    let want = format!("{}\n", daemon.pid());
    daemon
        .wait_until("the new pid", LIMIT, || {
            std::fs::read_to_string(&pid_file).is_ok_and(|text| text == want)
        })
        .unwrap();
}

#[test]
fn each_signal_that_ends_the_daemon_ends_it_with_success() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let dir = directory();
        let mut daemon = start(dir.path(), &["--pidfile", "pid"]);
        daemon.wait_pidfile(&dir.path().join("pid"), LIMIT).unwrap();
        // A broken pipe is no reason to end.
        daemon.signal(libc::SIGPIPE).unwrap();
        daemon.signal(signal).unwrap();
        let status = daemon.wait_exit(LIMIT).unwrap();
        assert_eq!(status.code(), Some(0), "signal {signal}: {}", daemon.stderr());
        assert!(!dir.path().join("pid").exists() && !dir.path().join("s.sock").exists());
    }
}

/// Ends the process of a pid file when the test does, however it does.
pub struct EndPid(pub i32);

impl Drop for EndPid {
    fn drop(&mut self) {
        // SAFETY: the process is the one that this test has started.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

#[test]
fn a_daemon_in_the_background_is_ready_when_its_parent_ends() {
    in_the_background("off");
}

#[test]
fn a_daemon_in_the_background_is_in_its_sandbox_when_its_parent_ends() {
    in_the_background("on");
}

fn in_the_background(sandbox: &str) {
    let dir = directory();
    let arguments = ["--blockdev", NODE, "--export", EXPORT, "--pidfile", "pid", "--daemonize"];
    let program = [VUBLK, "daemon", "--sandbox", sandbox];
    let output = run(dir.path(), &program, &arguments);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
    let pid_file = dir.path().join("pid");
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let end = EndPid(pid);
    let mut disk = Disk::open(&dir.path().join("s.sock"), &Options::default()).unwrap();
    disk.read(0, &mut [0; 512]).unwrap();
    drop(disk);
    let proc = Path::new("/proc").join(pid.to_string());
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    assert!(sandbox == "off" || status.contains("Seccomp:\t2"), "{status}");
    assert_eq!(std::fs::read_link(proc.join("cwd")).unwrap(), Path::new("/"));
    for fd in ["0", "1", "2"] {
        let target = std::fs::read_link(proc.join("fd").join(fd)).unwrap();
        assert_eq!(target, Path::new("/dev/null"));
    }
    // SAFETY: as in `EndPid`.
    unsafe {
        assert_eq!(libc::getsid(pid), pid, "a session of its own");
        libc::kill(pid, libc::SIGTERM);
    }
    // The pid file's path was relative to a directory that the daemon has left.
    let begin = Instant::now();
    while pid_file.exists() {
        assert!(begin.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(end);
    assert!(!dir.path().join("s.sock").exists(), "nor its socket's");
}

#[test]
fn a_daemon_that_cannot_start_in_the_background_says_why_and_fails() {
    let dir = directory();
    for (more, words) in [
        (["--blockdev", "driver=file,node-name=x,filename=nothere"], "No such file or directory"),
        (["--pidfile", "nodir/pid"], "cannot create PID file"),
    ] {
        let arguments =
            [&["--blockdev", NODE, "--export", EXPORT, "--daemonize"][..], &more].concat();
        let output = run(dir.path(), &[VUBLK, "daemon"], &arguments);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
        assert!(!dir.path().join("s.sock").exists(), "the socket is gone");
    }
}

#[test]
fn called_by_the_name_of_qemu_storage_daemon_it_is_that_program() {
    let dir = directory();
    let link = dir.path().join("qemu-storage-daemon");
    symlink(VUBLK, &link).unwrap();
    let program = [link.to_str().unwrap()];
    let output = run(dir.path(), &program, &["--version"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.starts_with("qemu-storage-daemon version "), "{text}");
    let output = run(dir.path(), &program, &["--blockdev", "driver=bogus,node-name=a"]);
    let said = stderr(&output);
    assert!(
        said.starts_with("qemu-storage-daemon: --blockdev driver=bogus,node-name=a: "),
        "{said}"
    );
    let mut daemon = Daemon::start_in(
        dir,
        &program,
        &[
            "--blockdev",
            "null-co,node-name=d0,read-zeroes=on",
            "--export",
            "vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=DIR/e0.sock",
        ],
    );
    daemon.assert_serves(0);
    daemon.end();
}

#[test]
fn a_listening_socket_may_be_handed_over_by_its_number() {
    let dir = directory();
    let path = dir.path().join("handed.sock");
    let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let number = listener.as_raw_fd();
    let mut command = Command::new(VUBLK);
    let export = "type=vhost-user-blk,id=e0,node-name=d0,addr.type=fd,addr.str=7";
    command.args(["daemon", "--blockdev", NODE, "--export", export]).current_dir(dir.path());
    command.stdout(Stdio::null());
    // SAFETY: dup2 may be called between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::dup2(number, 7) {
            7 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let mut daemon = Server::spawn(command).unwrap();
    drop(listener);
    for _ in 0..3 {
        let mut disk = Disk::open(&path, &Options::default()).unwrap();
        disk.read(0, &mut [0; 512]).unwrap();
    }
    daemon.signal(libc::SIGTERM).unwrap();
    assert!(daemon.wait_exit(LIMIT).unwrap().success());
    assert!(path.exists(), "the file of a socket that was handed over is not ours to remove");
}

#[test]
fn descriptors_that_are_no_listening_sockets_are_refused() {
    let dir = directory();
    // SAFETY: a fresh descriptor that nobody else has.
    let socket = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)) };
    let number = socket.as_raw_fd();
    let mut command = Command::new(VUBLK);
    let export = "type=vhost-user-blk,id=e0,node-name=d0,addr.type=fd,addr.str=7";
    command.args(["daemon", "--blockdev", NODE, "--export", export]).current_dir(dir.path());
    // SAFETY: dup2 may be called between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::dup2(number, 7) {
            7 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("File descriptor '7' is not a listening socket"));
}
