//! The servers under comparison, and their configurations for the same disk.

use std::fmt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vublk_testkit::{Result, Server, seccomp};

const START_LIMIT: Duration = Duration::from_secs(20);

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Kind {
    /// vublk.
    Vublk,
    /// qemu-storage-daemon.
    Qsd,
    /// A null disk on the stock vhost-user-backend crate.
    Stock,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Vublk => "vublk",
            Kind::Qsd => "qemu-storage-daemon",
            Kind::Stock => "stock backend",
        })
    }
}

/// What is served.
#[derive(Debug, Clone)]
pub enum Content {
    Null,
    File {
        path: PathBuf,
        direct: bool,
    },
    /// An image in a file, with more options of the driver.
    Image {
        format: &'static str,
        path: PathBuf,
        options: &'static str,
        /// Without the page cache.
        direct: bool,
    },
}

impl Content {
    /// An image through the page cache.
    pub fn image(format: &'static str, path: &Path) -> Content {
        Content::Image { format, path: path.to_owned(), options: "", direct: false }
    }
}

/// How it is served.
#[derive(Debug, Clone)]
pub struct Setup {
    pub content: Content,
    /// Disks in the one process.
    pub disks: usize,
    pub queues: usize,
    /// Threads that serve; each disk's queues are dealt to all of them.
    pub workers: usize,
    /// Whether the kernel lets them have an io_uring.
    pub io_uring: bool,
    /// Whether guests may write.
    pub writable: bool,
    /// Whether a file is locked: without, requests in flight are not tracked, but servers can take
    /// turns on it.
    pub locking: bool,
    /// Whether vublk is in its sandbox.
    pub sandbox: bool,
    /// Whether it offers metrics.
    pub metrics: bool,
}

impl Setup {
    pub fn one(content: Content) -> Setup {
        let (disks, queues, workers) = (1, 1, 1);
        let (io_uring, writable, locking) = (true, true, false);
        let (sandbox, metrics) = (false, false);
        Setup { content, disks, queues, workers, io_uring, writable, locking, sandbox, metrics }
    }
}

/// Where the programs are.
#[derive(Clone)]
pub struct Programs {
    pub vublk: PathBuf,
    /// Another build of vublk, to compare with.
    pub before: Option<PathBuf>,
    pub qsd: PathBuf,
}

/// A server that runs, and the directory with its sockets.
pub struct Running {
    pub server: Server,
    dir: tempfile::TempDir,
}

impl Running {
    /// The socket of disk `i`.
    pub fn socket(&self, i: usize) -> PathBuf {
        socket(self.dir.path(), i)
    }
}

/// The socket of disk `i` in a directory.
pub fn socket(dir: &Path, i: usize) -> PathBuf {
    dir.join(format!("disk{i}"))
}

/// Starts a server and waits until it is ready. Every thread it has is pinned to `cpu`, if given.
pub fn start(
    programs: &Programs,
    kind: Kind,
    setup: &Setup,
    cpu: Option<usize>,
) -> Result<Running> {
    let dir = tempfile::tempdir()
        .map_err(|e| vublk_testkit::Error::Io("directory for sockets".into(), e))?;
    let server = match kind {
        Kind::Stock => start_stock(dir.path(), cpu)?,
        Kind::Vublk => {
            let args = vublk_args(dir.path(), setup);
            start_daemon(&programs.vublk, &args, setup, dir.path(), cpu)?
        }
        Kind::Qsd => {
            let args = daemon_args(dir.path(), setup);
            start_daemon(&programs.qsd, &args, setup, dir.path(), cpu)?
        }
    };
    Ok(Running { server, dir })
}

fn start_stock(dir: &Path, cpu: Option<usize>) -> Result<Server> {
    let program = std::env::current_exe()
        .map_err(|e| vublk_testkit::Error::Io("path of this program".into(), e))?;
    let path = socket(dir, 0);
    let args = ["null-server".as_ref(), path.as_os_str()];
    let mut server = Server::start(&program, &args)?;
    // No probe by connecting: each connection makes it start a new set of threads.
    server.wait_until("its socket", START_LIMIT, || path.exists())?;
    if let Some(cpu) = cpu {
        server.pin(cpu)?;
    }
    Ok(server)
}

fn start_daemon(
    program: &Path,
    args: &[String],
    setup: &Setup,
    dir: &Path,
    cpu: Option<usize>,
) -> Result<Server> {
    let mut command = Command::new(program);
    command.args(args);
    if !setup.io_uring {
        // SAFETY: makes two system calls and allocates nothing.
        unsafe { command.pre_exec(seccomp::forbid_io_uring) };
    }
    let mut server = Server::spawn(command)?;
    server.wait_pidfile(&dir.join("pid"), START_LIMIT)?;
    if let Some(cpu) = cpu {
        server.pin(cpu)?;
    }
    Ok(server)
}

/// What vublk is started with.
pub fn vublk_args(dir: &Path, setup: &Setup) -> Vec<String> {
    let mut args = vec!["daemon".to_owned()];
    args.extend(daemon_args(dir, setup));
    if setup.sandbox {
        args.extend(["--sandbox".to_owned(), "on".to_owned()]);
    }
    if setup.metrics {
        let at = format!("unix:{}", dir.join("metrics").display());
        args.extend(["--metrics".to_owned(), at]);
    }
    args
}

/// The options of qemu-storage-daemon, which `vublk daemon` takes, too.
fn daemon_args(dir: &Path, setup: &Setup) -> Vec<String> {
    let mut args = Vec::new();
    let mut option = |name: &str, value: String| {
        args.push(format!("--{name}"));
        args.push(value);
    };
    for w in 0..setup.workers {
        option("object", format!("iothread,id=io{w}"));
    }
    let threads = match setup.workers {
        1 => "iothread=io0".to_owned(),
        n => (0..n).map(|w| format!("iothread.{w}=io{w}")).collect::<Vec<_>>().join(","),
    };
    for i in 0..setup.disks {
        match &setup.content {
            Content::Image { format, path, options, direct } => {
                let direct = if *direct { "on" } else { "off" };
                let file = format!(
                    "driver=file,node-name=f{i},filename={},aio=io_uring,discard=unmap,cache.direct={direct}",
                    path.display()
                );
                option("blockdev", file);
                option("blockdev", format!("driver={format},node-name=n{i},file=f{i}{options}"));
            }
            Content::Null => {
                let size = 1u64 << 30;
                option("blockdev", format!("driver=null-co,node-name=n{i},size={size}"));
            }
            Content::File { path, direct } => {
                let aio = if setup.io_uring { "io_uring" } else { "threads" };
                let direct = if *direct { "on" } else { "off" };
                let locking = if setup.locking { "on" } else { "off" };
                let file = format!(
                    "driver=file,node-name=f{i},filename={},aio={aio},cache.direct={direct},locking={locking}",
                    path.display()
                );
                option("blockdev", file);
                option("blockdev", format!("driver=raw,node-name=n{i},file=f{i}"));
            }
        }
        let path = socket(dir, i);
        option(
            "export",
            format!(
                "type=vhost-user-blk,id=e{i},node-name=n{i},addr.type=unix,addr.path={},writable={},num-queues={},{threads}",
                path.display(),
                if setup.writable { "on" } else { "off" },
                setup.queues
            ),
        );
    }
    option("pidfile", dir.join("pid").display().to_string());
    args
}
