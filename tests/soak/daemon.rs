//! The `vublk daemon` of the soak, in many lives: each has a log and a monitor of its own.

use crate::client::Client;
use crate::server::{output_of, tied_to_this_thread};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// No step of a daemon's takes this long unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(120);

/// One life of the daemon. Ended with the value, by force if it still runs.
pub struct Daemon {
    process: Child,
    pub log: PathBuf,
    monitor: PathBuf,
}

impl Daemon {
    /// Starts life number `life` with these options, in `dir`.
    pub fn start(dir: &Path, life: usize, options: &[String]) -> Daemon {
        let log = dir.join(format!("daemon-{life}.log"));
        let monitor = dir.join(format!("monitor-{life}"));
        let file = File::create(&log).unwrap();
        let chardev = format!("socket,id=monitor,path={},server=on,wait=off", monitor.display());
        let process = tied_to_this_thread(env!("CARGO_BIN_EXE_vublk"))
            .args(["daemon", "--chardev", &chardev, "--monitor", "chardev=monitor,mode=control"])
            .args(["--sandbox", "on", "--sandbox-path"])
            .arg(dir)
            .args(options)
            .env("RUST_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Daemon { process, log, monitor }
    }

    /// Its monitor, once it serves.
    pub fn monitor(&mut self) -> Client {
        self.wait_until("its monitor", |daemon| daemon.monitor.exists());
        Client::connect(&self.monitor)
    }

    /// Waits until its log holds `text` this many times.
    pub fn wait_log(&mut self, text: &str, times: usize) {
        self.wait_until(text, |daemon| daemon.said().matches(text).count() >= times);
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// SIGTERM; it must end with success.
    pub fn end(&mut self) {
        // The shell's own kill: the program of that name is not on every machine.
        output_of("sh", ["-c", &format!("kill -TERM {}", self.process.id())]);
        let end = Instant::now() + LIMIT;
        let status: ExitStatus = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "the daemon does not end:\n{}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "the daemon ended with {status}:\n{}", self.said());
    }

    fn wait_until(&mut self, what: &str, ready: impl Fn(&Daemon) -> bool) {
        let end = Instant::now() + LIMIT;
        while !ready(self) {
            let ended = self.process.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < end,
                "waited for {what:?} of the daemon ({ended:?}):\n{}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only when the process has already been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
