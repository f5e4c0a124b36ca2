//! The time that a guest is without its disk when its daemon is killed and restarted.
//!
//! Requests are in flight at the kill; the front end is our own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{Disk, Error, MemoryLayout, Options, Result, Server};

use crate::servers::{self, Content, Programs, Setup};

/// Writes that are made available before the end, so many that most are in flight when the first of
/// them is done.
const IN_FLIGHT: u64 = 96;

/// Bytes of each.
const BLOCK: usize = 256 << 10;

/// What one restart took, in milliseconds.
#[derive(Clone, Copy)]
pub struct Restart {
    /// From the start of the process until it listens.
    pub listens: f64,
    /// From the connection to the first completed request.
    pub first: f64,
    /// The part of it until every message of the front end was answered: what is left is the request.
    pub handshake: f64,
    /// Requests that the new daemon found in flight.
    pub begun_again: usize,
}

/// How the daemon before ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Killed,
    /// By SIGTERM: nothing is in flight then, and no lock is left to wait for.
    Asked,
}

/// Restarts of a daemon that serves `content`, one after another.
pub fn restarts(
    programs: &Programs,
    content: &Content,
    end: End,
    times: usize,
) -> Result<Vec<Restart>> {
    let dir = tempfile::tempdir().map_err(|e| Error::Io("directory for sockets".into(), e))?;
    let setup = Setup { locking: true, ..Setup::one(content.clone()) };
    let args = servers::vublk_args(dir.path(), &setup);
    let socket = servers::socket(dir.path(), 0);
    let mut daemon = Server::start(&programs.vublk, &args)?;
    daemon.wait_pidfile(&dir.path().join("pid"), Duration::from_secs(20))?;
    let options = Options {
        protocol: protocol::DEFAULT | protocol::INFLIGHT_SHMFD,
        layout: MemoryLayout::single(64 << 20),
        ..Options::default()
    };
    let mut disk = Disk::open(&socket, &options)?;
    let mut all = Vec::new();
    for _ in 0..times {
        let queue = disk.queue(0);
        for n in 0..IN_FLIGHT {
            let data = vec![n as u8; BLOCK];
            let request = Request::Out { sector: n * BLOCK as u64 / 512, data };
            queue.add(&request, &Shape::indirect())?;
        }
        queue.publish()?;
        // Until it has begun: a daemon that is killed before it wakes up leaves nothing behind.
        finish_one(&mut disk)?;
        match end {
            End::Killed => daemon.kill(),
            End::Asked => {
                daemon.signal(libc::SIGTERM)?;
                daemon.wait_exit(Duration::from_secs(20))?;
            }
        }
        // What came back before the end is the old daemon's.
        while disk.queue(0).reap()?.is_some() {}
        let begun_again = disk.queue(0).in_flight();
        if begun_again == 0 {
            disk.queue(0).add(&Request::In { sector: 0, len: 4096 }, &Shape::indirect())?;
        }
        let started = Instant::now();
        daemon = Server::start(&programs.vublk, &args)?;
        wait_listening(&socket, started)?;
        let connect = Instant::now();
        disk.reconnect()?;
        let greeted = connect.elapsed();
        disk.queue(0).publish()?;
        finish_one(&mut disk)?;
        let first = connect.elapsed();
        all.push(Restart {
            listens: ms(connect - started),
            first: ms(first),
            handshake: ms(greeted),
            begun_again,
        });
        disk.queue(0).drain()?;
    }
    Ok(all)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Waits for one request, by looking and not by sleeping.
fn finish_one(disk: &mut Disk) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(40);
    while Instant::now() < end {
        match disk.queue(0).reap()? {
            Some(done) if done.status == status::OK => return Ok(()),
            Some(done) => return Err(Error::Status(done.status)),
            None => std::hint::spin_loop(),
        }
    }
    Err(Error::Timeout("completion after a restart".into(), Duration::from_secs(40)))
}

/// Waits until somebody listens, without connecting: by the kernel's list of sockets.
fn wait_listening(socket: &Path, since: Instant) -> Result<()> {
    let wanted = format!(" {}", socket.display());
    while since.elapsed() < Duration::from_secs(40) {
        let list = std::fs::read_to_string("/proc/net/unix")
            .map_err(|e| Error::Io("/proc/net/unix".into(), e))?;
        // Flags with __SO_ACCEPTCON: it listens.
        if list.lines().any(|line| line.ends_with(&wanted) && line.contains(" 00010000 ")) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Err(Error::Timeout(format!("socket {}", socket.display()), Duration::from_secs(40)))
}

/// A row of the table.
pub fn row(what: &str, all: &[Restart]) -> String {
    let show = |figure: fn(&Restart) -> f64| {
        let mut values: Vec<f64> = all.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.get(values.len() / 2).copied().unwrap_or_default();
        format!("{middle:.2} / {:.2}", values.last().copied().unwrap_or_default())
    };
    let with_some = all.iter().filter(|one| one.begun_again > 0).count();
    format!(
        "| {what} | {} | {with_some} | {} | {} | {} | {} |",
        all.len(),
        show(|r| r.first),
        show(|r| r.handshake),
        show(|r| r.listens),
        show(|r| r.listens + r.first)
    )
}

/// The table's head; times in ms, "median / worst".
pub const HEAD: &str = "| disk | restarts | with requests in flight | connect to first completion | of it messages | start to listening | start to first completion |\n|---|--:|--:|--:|--:|--:|--:|";

/// The disks that are restarted.
pub fn disks(file: &Path, direct: &Path) -> [(&'static str, Content); 2] {
    let content = |path: &Path, direct| Content::File { path: PathBuf::from(path), direct };
    [("raw on tmpfs", content(file, false)), ("raw, O_DIRECT", content(direct, true))]
}
