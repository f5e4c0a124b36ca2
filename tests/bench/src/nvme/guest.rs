//! The measurements inside the guest: each server in turn, with each load.
//!
//! A load runs twice on a server: once as it is, and once with the server's system calls counted.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use vublk_testkit::{Disk, Error, Result, Server};

use super::trace::{BEGIN_SECTORS, END_SECTORS};
use super::{FOR_KERNEL, FOR_VFIO, Report, Who};
use crate::load::{Chains, Load, Measured, Mode};
use crate::servers::socket;

/// How long an open may take before it counts as hung, and how often it is tried: qemu-storage-daemon
/// 7.2 enables its controller before its interrupts, and hangs in a third to a half of its opens.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
const OPENS: usize = 12;

const SERVER_CPU: usize = 0;
const LOAD_CPU: usize = 1;

/// Depth, write or read, and how the load waits.
const LOADS: [(u16, bool, Mode); 5] = [
    (32, false, Mode::Poll),
    (32, true, Mode::Poll),
    (32, false, Mode::Wait),
    (32, true, Mode::Wait),
    (1, false, Mode::Wait),
];

pub fn run(vublk: &Path, seconds: f64, who: &[Who]) -> Result<()> {
    for &who in who {
        for mode in [Mode::Poll, Mode::Wait] {
            serve(vublk, seconds, who, mode)?;
        }
    }
    Ok(())
}

/// One server, for all loads that wait in that way.
fn serve(vublk: &Path, seconds: f64, who: Who, mode: Mode) -> Result<()> {
    let dir = tempfile::tempdir().map_err(Error::io("directory for sockets"))?;
    let mut server = open(vublk, who, mode, dir.path())?;
    for (depth, write, _) in LOADS.into_iter().filter(|load| load.2 == mode) {
        let verb = if write { "write" } else { "read" };
        let polled = if mode == Mode::Poll { ", polled" } else { "" };
        let load = Load {
            // The second one carries the marks.
            queues: 2,
            chains: Chains { depth, block: 4096, write, indirect: true },
            random: true,
            mode,
            event_idx: true,
            tracked: false,
            cpus: [LOAD_CPU; 2],
            warm_up: Duration::from_secs_f64(seconds * 0.2),
            time: Duration::from_secs_f64(seconds),
        };
        let mut disk = load.open(&socket(dir.path(), 0))?;
        let plain = marked(&load, &mut disk, &server)?;
        drop(disk);
        let mut disk = load.open(&socket(dir.path(), 0))?;
        let calls = calls(&server, dir.path(), || marked(&load, &mut disk, &server))?;
        let report = Report {
            who,
            load: format!("4 KiB random {verb}, depth {depth}{polled}"),
            per_second: plain.per_second(),
            cpu_ns: plain.cpu_ns,
            calls,
        };
        let text = serde_json::to_string(&report);
        println!("report {}", text.map_err(|e| Error::Peer(e.to_string()))?);
    }
    // qemu-storage-daemon does not always end when it is asked to.
    server.signal(libc::SIGTERM)?;
    if let Err(error) = server.wait_exit(OPEN_LIMIT) {
        println!("{error}: killed");
        server.kill();
    }
    Ok(())
}

/// One load between its marks.
fn marked(load: &Load, disk: &mut Disk, server: &Server) -> Result<Measured> {
    let sectors = disk.config().capacity_sectors;
    disk.queue(1).read(8, &mut [0; BEGIN_SECTORS * 512])?;
    let measured = load.run_on(&mut disk.queues[..1], sectors, || server.cpu_ns())?;
    disk.queue(1).read(16, &mut [0; END_SECTORS * 512])?;
    Ok(measured)
}

/// Starts a server on its controller, as often as that takes.
fn open(vublk: &Path, who: Who, mode: Mode, dir: &Path) -> Result<Server> {
    let pidfile = dir.join("pid");
    let mut tried = 0;
    loop {
        tried += 1;
        let mut command = match who {
            Who::Qsd => Command::new("qemu-storage-daemon"),
            Who::Vublk | Who::Kernel => Command::new(vublk),
        };
        if who != Who::Qsd {
            command.arg("daemon");
        }
        let node = match who {
            Who::Kernel => {
                let disk = kernel_disk()?;
                format!("driver=host_device,filename=/dev/{disk},cache.direct=on,aio=io_uring")
            }
            Who::Vublk | Who::Qsd => format!("driver=nvme,device={FOR_VFIO},namespace=1"),
        };
        let export = "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,writable=on,num-queues=2";
        let socket = socket(dir, 0);
        let export = format!("{export},iothread=io,addr.path={}", socket.display());
        // Where system calls are counted, who has something in flight on an emulated controller shall not
        // go to sleep; where processor time is, it is the default.
        let poll_max_ns = if mode == Mode::Poll { 64_000_000 } else { 32_768 };
        let thread = format!("iothread,id=io,poll-max-ns={poll_max_ns}");
        command.args(["--object", &thread, "--blockdev", &format!("{node},node-name=n")]);
        command.args(["--export", &export]).arg("--pidfile").arg(&pidfile);
        let mut server = Server::spawn(command)?;
        match server.wait_pidfile(&pidfile, OPEN_LIMIT) {
            Ok(()) => {
                println!("{} opened in try {tried}", who.name());
                server.pin(SERVER_CPU)?;
                return Ok(server);
            }
            Err(Error::Timeout(..)) if tried < OPENS => server.kill(),
            Err(error) => return Err(error),
        }
    }
}

/// The disk of the controller that the kernel keeps.
fn kernel_disk() -> Result<String> {
    let folder = format!("/sys/bus/pci/devices/{FOR_KERNEL}/nvme");
    let names = |folder: &str| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    for controller in names(&folder) {
        let disks = names(&format!("{folder}/{controller}"));
        if let Some(disk) = disks.into_iter().find(|name| name.starts_with("nvme")) {
            return Ok(disk);
        }
    }
    Err(Error::Peer(format!("{folder}: no disk")))
}

/// The server's system calls during `work`, as strace counts them; most frequent first.
fn calls<T>(
    server: &Server,
    dir: &Path,
    work: impl FnOnce() -> Result<T>,
) -> Result<Vec<(String, u64)>> {
    let table = dir.join("calls");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-o"]).arg(&table).args(["-p", &server.pid().to_string()]);
    let mut strace = Server::spawn(strace)?;
    let threads = format!("/proc/{}/task", server.pid());
    strace.wait_until("it has all threads", Duration::from_secs(30), || traced(&threads))?;
    let done = work();
    sleep(Duration::from_millis(100));
    strace.signal(libc::SIGINT)?;
    strace.wait_exit(Duration::from_secs(30))?;
    done?;
    let text = fs::read_to_string(&table).map_err(Error::io("strace's table"))?;
    Ok(parse(&text))
}

/// Whether every thread below the folder has a tracer.
fn traced(threads: &str) -> bool {
    let mut all = fs::read_dir(threads).into_iter().flatten().flatten().peekable();
    let has_tracer = |status: String| {
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        tracer.is_some_and(|pid| pid.trim() != "0")
    };
    all.peek().is_some()
        && all.all(|thread| fs::read_to_string(thread.path().join("status")).is_ok_and(has_tracer))
}

/// Lines of strace's table: share, seconds, microseconds per call, calls, errors if any, name.
fn parse(table: &str) -> Vec<(String, u64)> {
    let mut calls: Vec<(String, u64)> = table
        .lines()
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            words.first()?.parse::<f64>().ok()?;
            let name = words.last()?;
            (*name != "total").then_some(())?;
            Some(((*name).to_owned(), words.get(3)?.parse().ok()?))
        })
        .collect();
    calls.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn straces_table_is_read() {
        let table = "\
            % time     seconds  usecs/call     calls    errors syscall\n\
            ------ ----------- ----------- --------- --------- ----------------\n\
             72.41    0.000021          21         1           io_uring_enter\n\
             27.59    0.000008           4         2         1 ioctl\n\
            ------ ----------- ----------- --------- --------- ----------------\n\
            100.00    0.000029           9         3         1 total\n";
        assert_eq!(parse(table), [("ioctl".to_owned(), 2), ("io_uring_enter".to_owned(), 1)]);
    }
}
