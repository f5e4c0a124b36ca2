//! The processes that serve disks to the guests: `vublk serve` and qemu-storage-daemon.
//!
//! qemu-storage-daemon is there where two daemons meet on one image. Guards that a server never outlives its test.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a server may take to open its sockets, or to end: far beyond what it needs on a busy
/// machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A `vublk serve` of raw images.
pub fn vublk_serve(images: &[&Path], options: &[&str]) -> Serve {
    vublk_serve_in(&[], images, options)
}

/// The same behind a command that runs it somewhere else.
pub fn vublk_serve_in(enter: &[String], images: &[&Path], options: &[&str]) -> Serve {
    serve_as(enter, "raw", images, options)
}

/// A `vublk serve` of images of some format.
pub fn vublk_serve_as(format: &str, images: &[&Path], options: &[&str]) -> Serve {
    serve_as(&[], format, images, options)
}

fn serve_as(enter: &[String], format: &str, images: &[&Path], options: &[&str]) -> Serve {
    let dir = tempfile::tempdir().unwrap();
    let sockets: Vec<_> = (0..images.len()).map(|i| dir.path().join(format!("{i}.sock"))).collect();
    let words = enter.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_vublk")]);
    let words: Vec<_> = words.collect();
    let mut command = tied_to_this_thread(words[0]);
    command.args(&words[1..]).args(["serve", "-f", format]).args(options);
    for (image, socket) in images.iter().zip(&sockets) {
        command.arg(image).arg("--socket").arg(socket);
    }
    Serve { command, sockets, dir }
}

/// A qemu-storage-daemon that serves one raw image, writable or not.
pub fn qemu_storage_daemon(image: &Path, writable: bool) -> Serve {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qsd.sock");
    let (read_only, writable) = if writable { ("off", "on") } else { ("on", "off") };
    let mut command = tied_to_this_thread("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name=file,filename={},read-only={read_only}",
        image.display()
    ));
    command
        .arg("--blockdev")
        .arg(format!("driver=raw,node-name=disk,file=file,read-only={read_only}"));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={writable}",
        socket.display()
    ));
    Serve { command, sockets: vec![socket], dir }
}

/// A server that is ready to be started.
pub struct Serve {
    command: Command,
    sockets: Vec<PathBuf>,
    dir: TempDir,
}

impl Serve {
    /// Starts the server and waits for its sockets; fails the test if it ends instead.
    pub fn start(self) -> Server {
        let mut server = self.spawn();
        let started = Instant::now();
        while !server.sockets.iter().all(|socket| socket.exists()) {
            if let Some(status) = server.process.try_wait().unwrap() {
                panic!("the server ended ({status}) before its sockets stood:\n{}", server.log());
            }
            assert!(
                started.elapsed() < PATIENCE,
                "no sockets after {PATIENCE:?}:\n{}",
                server.log()
            );
            sleep(Duration::from_millis(10));
        }
        server
    }

    /// Starts a server that is expected to refuse, and returns what it said; fails the test if it
    /// keeps running or succeeds.
    pub fn refused(self) -> String {
        let mut server = self.spawn();
        let status = server.wait();
        assert!(!status.success(), "the server should have failed:\n{}", server.log());
        server.log()
    }

    fn spawn(mut self) -> Server {
        let log = File::create(self.dir.path().join("log")).unwrap();
        let process = self
            .command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.command.get_program()));
        Server { process, command: self.command, sockets: self.sockets, dir: self.dir }
    }
}

/// A running server. Ended with the value, by force if it still runs.
pub struct Server {
    process: Child,
    command: Command,
    sockets: Vec<PathBuf>,
    dir: TempDir,
}

impl Server {
    /// The socket of the image at `index`.
    pub fn socket(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    /// Asks the server to end, and returns its output; fails the test unless it ends with exit code
    /// 0.
    pub fn stop(mut self) -> String {
        self.end();
        self.log()
    }

    fn end(&mut self) {
        // The shell's own kill: the program of that name is not on every machine.
        output_of("sh", ["-c", &format!("kill -TERM {}", self.process.id())]);
        let status = self.wait();
        assert!(status.success(), "the server ended with {status}:\n{}", self.log());
    }

    /// Asks the server to end, and starts it again once it has.
    pub fn stop_and_restart(&mut self) {
        self.end();
        self.process = self.command.spawn().unwrap();
    }

    /// Starts the next server while this one still serves, which is asked to end `later`.
    pub fn start_next_and_stop(&mut self, later: Duration) {
        let next = self.command.spawn().unwrap();
        sleep(later);
        self.end();
        self.process = next;
    }

    /// Kills the server and starts it again, as it was started first.
    pub fn kill_and_restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = self.command.spawn().unwrap();
    }

    /// Waits until the server's output holds `text` this many times; fails the test if it ends before.
    pub fn wait_for(&mut self, text: &str, times: usize) {
        let started = Instant::now();
        while self.log().matches(text).count() < times {
            let ended = self.process.try_wait().unwrap();
            assert!(
                ended.is_none() && started.elapsed() < PATIENCE,
                "{text:?} is not there {times} times ({ended:?}):\n{}",
                self.log()
            );
            sleep(Duration::from_millis(5));
        }
    }

    fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "the server still ran after {PATIENCE:?}:\n{}",
                self.log()
            );
            sleep(Duration::from_millis(10));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when the process has already been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command for a process that the kernel kills when the thread that started it ends, however that
/// happens.
pub fn tied_to_this_thread(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a program of the host and returns what it printed; fails the test unless it succeeds.
pub fn output_of(program: &str, arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> String {
    let (success, output) = outcome_of(program, arguments);
    assert!(success, "{program} failed:\n{output}");
    output
}

/// Runs a program of the host; whether it succeeded, and all it printed.
pub fn outcome_of(
    program: &str,
    arguments: impl IntoIterator<Item: AsRef<OsStr>>,
) -> (bool, String) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}
