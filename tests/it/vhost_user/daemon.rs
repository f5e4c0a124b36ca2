//! A daemon to test: the built program, or qemu-storage-daemon beside it, in a directory of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vublk_testkit::{Disk, Options, Server};

/// Bytes of the image that [`Daemon::file`] serves.
pub const SIZE: u64 = 8 << 20;

/// No step of a test takes this long unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A running daemon. Its files are in its own directory, which goes with it.
pub struct Daemon {
    pub server: Server,
    program: Vec<String>,
    dir: tempfile::TempDir,
}

impl Daemon {
    /// `vublk daemon` with these arguments, in which `DIR` stands for its directory. The image
    /// `DIR/disk.img` of [`SIZE`] bytes is there. Returns once the pid file is.
    pub fn start(arguments: &[&str]) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        new_image(&dir.path().join("disk.img"), SIZE);
        Daemon::start_in(dir, &[env!("CARGO_BIN_EXE_vublk"), "daemon"], arguments)
    }

    /// The same with any program, in a directory that is prepared.
    pub fn start_in(dir: tempfile::TempDir, program: &[&str], arguments: &[&str]) -> Daemon {
        let here = dir.path().to_str().unwrap();
        let mut program: Vec<String> = program.iter().map(|&word| word.to_owned()).collect();
        // In the sandbox, as `vublk serve` is by itself: whatever a test does must work there.
        let sandbox = ["--sandbox", "on", "--sandbox-path", "DIR"];
        let ours = program.get(1).is_some_and(|word| word == "daemon");
        let all = if ours { [&sandbox, arguments].concat() } else { arguments.to_vec() };
        program.extend(all.iter().map(|a| a.replace("DIR", here)));
        let server = spawn(&program, &dir.path().join("pid"));
        Daemon { server, program, dir }
    }

    /// Starts it again, as it was started first; it must have ended.
    pub fn restart(&mut self) {
        let _ = std::fs::remove_file(self.path("pid"));
        self.server = spawn(&self.program, &self.path("pid"));
    }

    /// One export, `DIR/e0.sock`, of the node `d0`.
    pub fn serve(blockdev: &str, export: &str) -> Daemon {
        let export = format!("{},{export}", export_of("d0", 0));
        Daemon::start(&["--blockdev", blockdev, "--export", export.trim_end_matches(',')])
    }

    /// A file of [`SIZE`] bytes, writable.
    pub fn file(export: &str) -> Daemon {
        let blockdev = "driver=file,node-name=d0,filename=DIR/disk.img,discard=unmap";
        Daemon::serve(blockdev, &format!("writable=on,{export}"))
    }

    /// A disk that keeps nothing, writable; `options` are null-co's.
    pub fn null(options: &str, export: &str) -> Daemon {
        let blockdev = format!("driver=null-co,node-name=d0,read-zeroes=on,{options}");
        let blockdev = blockdev.trim_end_matches(',');
        Daemon::serve(blockdev, &format!("writable=on,{export}"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self, number: usize) -> PathBuf {
        self.path(&format!("e{number}.sock"))
    }

    pub fn open(&self, options: &Options) -> Disk {
        self.open_number(0, options)
    }

    pub fn open_number(&self, number: usize, options: &Options) -> Disk {
        Disk::open(&self.socket(number), options)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.server.stderr()))
    }

    pub fn image(&self) -> Vec<u8> {
        std::fs::read(self.path("disk.img")).unwrap()
    }

    /// Waits until the log holds `text` this many times, and gives the log.
    pub fn wait_log(&mut self, text: &str, times: usize) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let log = self.server.stderr();
            if log.matches(text).count() >= times {
                return log;
            }
            assert!(Instant::now() < end, "no {text:?} in the log:\n{log}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The daemon lives and serves: a fresh front end reads from export `number`.
    pub fn assert_serves(&mut self, number: usize) {
        assert!(self.server.try_wait().unwrap().is_none(), "ended:\n{}", self.server.stderr());
        self.open_number(number, &Options::default()).read(0, &mut [0; 512]).unwrap();
    }

    /// Ends it by SIGTERM, which it does with success. Gives its log.
    pub fn end(mut self) -> String {
        self.server.signal(libc::SIGTERM).unwrap();
        let status = self.server.wait_exit(LIMIT).unwrap();
        assert!(status.success(), "{status}:\n{}", self.server.stderr());
        self.wait_log(": ended: requests=", 1)
    }
}

/// Starts a daemon, and returns once its pid file is there.
fn spawn(program: &[String], pid_file: &Path) -> Server {
    let mut command = Command::new(&program[0]);
    command.args(&program[1..]).arg("--pidfile").arg(pid_file).env("RUST_LOG", "debug");
    let mut server = Server::spawn(command).unwrap();
    server.wait_pidfile(pid_file, LIMIT).unwrap();
    server
}

/// The fixed part of `--export` for a node: export `eN` on the socket `DIR/eN.sock`.
pub fn export_of(node: &str, number: usize) -> String {
    format!(
        "type=vhost-user-blk,id=e{number},node-name={node},addr.type=unix,addr.path=DIR/e{number}.sock"
    )
}

/// A sparse file.
pub fn new_image(path: &Path, size: u64) {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
}

/// A figure of the line with which an export ends, such as `flushes`.
pub fn figure(log: &str, name: &str) -> u64 {
    let line = log.lines().rfind(|line| line.contains(": ended: ")).unwrap();
    let value = line.split_whitespace().find_map(|word| word.strip_prefix(&format!("{name}=")));
    value.unwrap_or_else(|| panic!("no {name} in {line:?}")).parse().unwrap()
}
