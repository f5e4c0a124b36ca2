//! Server processes: starting, waiting, pinning, measuring, and ending them in every case.
//!
//! Guards that no process outlives its [`Server`]: dropping one kills and reaps it.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A running program.
pub struct Server {
    child: Child,
    name: String,
    stderr: Arc<Mutex<Vec<u8>>>,
}

/// Resident memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// Memory of the process's own.
    pub anonymous: u64,
    /// Mapped files: the program and its libraries.
    pub file: u64,
    /// Shared memory: the guest's, as far as it was touched.
    pub shared: u64,
}

/// CPU time of one thread, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadTime {
    pub tid: i32,
    pub name: String,
    pub cpu_ns: u64,
}

impl Server {
    /// Starts `program`; its standard error is kept, its standard input is empty.
    pub fn start<A: AsRef<OsStr>>(program: &Path, args: &[A]) -> Result<Server> {
        let mut command = Command::new(program);
        command.args(args);
        Server::spawn(command)
    }

    /// Starts a prepared command; its standard error is kept.
    pub fn spawn(mut command: Command) -> Result<Server> {
        command.stderr(Stdio::piped());
        Server::spawn_unheard(command)
    }

    /// Starts a prepared command, whose standard error stays where it was sent.
    pub fn spawn_unheard(mut command: Command) -> Result<Server> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null());
        let mut child = command.spawn().map_err(Error::io(format!("start of {name}")))?;
        let stderr = Arc::new(Mutex::new(Vec::new()));
        if let Some(mut pipe) = child.stderr.take() {
            let kept = stderr.clone();
            std::thread::spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.extend_from_slice(&chunk[..n]);
                }
            });
        }
        Ok(Server { child, name, stderr })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open once that has stayed the same for a while: some are open for moments only.
    pub fn open_files(&self) -> usize {
        let mut same = 0;
        let mut last = 0;
        while same < 10 {
            let open = std::fs::read_dir(format!("/proc/{}/fd", self.pid()));
            let count = open.map_or(0, Iterator::count);
            same = if count == last { same + 1 } else { 0 };
            last = count;
            std::thread::sleep(Duration::from_millis(20));
        }
        last
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        let kept = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }

    /// Waits until `ready` is true. Fails at once if the program ends, with what it said.
    pub fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        while !ready() {
            if let Some(status) = self.try_wait()? {
                // The pipe's reader may be a moment behind the end of the process.
                std::thread::sleep(Duration::from_millis(20));
                return Err(Error::Peer(format!(
                    "{} ended with {status} before {what}: {}",
                    self.name,
                    self.stderr().trim()
                )));
            }
            if Instant::now() > end {
                return Err(Error::Timeout(format!("{}: {what}", self.name), limit));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until the program has written its pid into `path`: QEMU's sign that it is ready.
    pub fn wait_pidfile(&mut self, path: &Path, limit: Duration) -> Result<()> {
        self.wait_until(&format!("pid file {}", path.display()), limit, || {
            fs::read_to_string(path).is_ok_and(|s| s.trim().parse::<u32>().is_ok())
        })
    }

    /// Waits until something listens at `path`. The program sees a connection that ends at once.
    pub fn wait_socket(&mut self, path: &Path, limit: Duration) -> Result<()> {
        self.wait_until(&format!("socket {}", path.display()), limit, || {
            UnixStream::connect(path).is_ok()
        })
    }

    /// The exit status, if it has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(Error::io(format!("wait for {}", self.name)))
    }

    /// Waits for the program to end by itself.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                return Err(Error::Timeout(format!("end of {}", self.name), limit));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal, such as `libc::SIGTERM`.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: the process is ours and not yet reaped, so the pid is still its own.
        match unsafe { libc::kill(self.pid() as i32, signal) } {
            0 => Ok(()),
            _ => Err(Error::last_os(format!("signal {signal} to {}", self.name))),
        }
    }

    /// SIGKILL, and reaps it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// CPU time of all its threads, ended ones included, in nanoseconds (the process's CPU clock).
    pub fn cpu_ns(&self) -> Result<u64> {
        let mut clock: libc::clockid_t = 0;
        // SAFETY: `clock` is a valid place for the answer.
        let error = unsafe { libc::clock_getcpuclockid(self.pid() as i32, &mut clock) };
        if error != 0 {
            let e = std::io::Error::from_raw_os_error(error);
            return Err(Error::Io(format!("CPU clock of {}", self.name), e));
        }
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a clock id from the kernel and a valid place for the answer.
        if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
            return Err(Error::last_os(format!("CPU time of {}", self.name)));
        }
        Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// CPU time of each living thread, from its `schedstat`. A thread that runs right now is a
    /// tick behind.
    pub fn threads(&self) -> Result<Vec<ThreadTime>> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid()));
        let mut threads = Vec::new();
        for entry in fs::read_dir(&tasks).map_err(Error::io("list of threads"))? {
            let path = entry.map_err(Error::io("list of threads"))?.path();
            // A thread may end while we look: it is then none of the living.
            let (Ok(stat), Ok(name)) =
                (fs::read_to_string(path.join("schedstat")), fs::read_to_string(path.join("comm")))
            else {
                continue;
            };
            let number = |s: Option<&str>| s.and_then(|s| s.parse::<u64>().ok());
            let cpu = number(stat.split_whitespace().next());
            let tid = number(path.file_name().and_then(OsStr::to_str));
            if let (Some(cpu_ns), Some(tid)) = (cpu, tid) {
                threads.push(ThreadTime { tid: tid as i32, name: name.trim().to_owned(), cpu_ns });
            }
        }
        Ok(threads)
    }

    /// Puts every thread it has now (and those they start later) on one CPU.
    pub fn pin(&self, cpu: usize) -> Result<()> {
        for thread in self.threads()? {
            pin_thread(thread.tid, cpu)?;
        }
        Ok(())
    }

    /// Resident memory, by kind.
    pub fn resident(&self) -> Result<Resident> {
        let path = format!("/proc/{}/status", self.pid());
        let text = fs::read_to_string(&path).map_err(Error::io(path))?;
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
                .and_then(|kib| kib.parse::<u64>().ok())
                .map(|kib| kib * 1024)
                .ok_or_else(|| Error::Peer(format!("no {name} in its status")))
        };
        Ok(Resident {
            anonymous: field("RssAnon:")?,
            file: field("RssFile:")?,
            shared: field("RssShmem:")?,
        })
    }
}

impl Drop for Server {
    /// What a server does in its ordinary service, its sandbox must let it do.
    fn drop(&mut self) {
        self.kill();
        let said = self.stderr();
        if !std::thread::panicking() {
            assert!(!said.contains("sandbox: refused"), "{said}");
        }
    }
}

/// Puts one thread on one CPU; 0 is the calling thread.
pub fn pin_thread(tid: i32, cpu: usize) -> Result<()> {
    // SAFETY: an all-zero set is an empty set, and CPU_SET checks its bound.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        set
    };
    // SAFETY: `set` is a whole cpu_set_t of the size given.
    if unsafe { libc::sched_setaffinity(tid, size_of_val(&set), &set) } != 0 {
        return Err(Error::last_os(format!("pin of thread {tid} to CPU {cpu}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Server {
        Server::start(Path::new("/bin/sh"), &["-c", script]).unwrap()
    }

    #[test]
    fn a_dropped_server_is_gone() {
        let server = sh("exec sleep 1000");
        let proc = PathBuf::from(format!("/proc/{}", server.pid()));
        assert!(proc.exists());
        drop(server);
        assert!(!proc.exists());
    }

    #[test]
    fn a_server_that_ends_early_is_an_error_with_its_last_words() {
        let mut server = sh("echo no such disk >&2; exit 3");
        let never = Path::new("/nonexistent/pidfile");
        let error = server.wait_pidfile(never, Duration::from_secs(60));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("no such disk"), "{text}");
    }

    #[test]
    fn cpu_time_by_clock_and_by_schedstat_agree() {
        let mut server =
            sh("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo done >&2; exec sleep 1000");
        let stderr = server.stderr.clone();
        server
            .wait_until("the loop's end", Duration::from_secs(60), || {
                !stderr.lock().unwrap().is_empty()
            })
            .unwrap();
        let clock = server.cpu_ns().unwrap();
        let stat: u64 = server.threads().unwrap().iter().map(|t| t.cpu_ns).sum();
        assert!(clock > 1_000_000, "a loop of 200000 steps took {clock} ns");
        assert!(clock.abs_diff(stat) <= clock / 5, "{clock} and {stat}");
    }
}
