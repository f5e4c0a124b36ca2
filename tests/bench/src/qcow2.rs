//! qcow2: allocated clusters, allocating writes, large tables, two workers, and checks.
//!
//! Allocated clusters are compared with a raw image; large tables do not fit into the cache; the two workers share
//! one image; the checked image is large.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use vublk_testkit::{Error, Result};

use crate::groups::{self, Contestant, DataFile, FILE_SIZE, LOAD_CPU, Plan, SERVER_CPU};
use crate::load::{Chains, Measured, Mode, Once};
use crate::results::{Cell, Results, Who, grouped, median};
use crate::servers::{self, Content, Kind, Setup};
use crate::targets::Verdict;

pub const CLUSTER: u64 = 64 << 10;
const US: Who = Who::Server(Kind::Vublk);
const QSD: Who = Who::Server(Kind::Qsd);

/// A file that goes when it is dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(dir: &Path, name: &str) -> Result<Scratch> {
        let io = |e| Error::Io(format!("directory {}", dir.display()), e);
        std::fs::create_dir_all(dir).map_err(io)?;
        // The servers have other working directories.
        let dir = dir.canonicalize().map_err(io)?;
        Ok(Scratch(dir.join(format!("vublk-bench-{}-{name}", std::process::id()))))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs qemu-img.
pub fn qemu_img(arguments: &[&str]) -> Result<()> {
    image_tool("qemu-img", arguments)
}

/// Runs qemu-img, or vublk, which takes the same commands.
pub fn image_tool(tool: &str, arguments: &[&str]) -> Result<()> {
    let out = Command::new(tool).args(arguments).output();
    let out = out.map_err(|e| Error::Io(tool.into(), e))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(Error::Peer(format!(
            "{tool} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&out.stderr).trim()
        ))),
    }
}

/// A path that is text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// Requests of 4 KiB all over the disk.
pub fn random(write: bool, depth: u16, mode: Mode, queues: usize) -> Cell {
    Cell { block: 4096, random: true, write, depth, indirect: true, mode, queues }
}

/// A ratio beside its target.
pub fn ratio(what: String, value: f64, limit: f64, at_least: bool) -> Verdict {
    Verdict { what, value, limit, at_least }
}

/// An image `name` of a format, with the bytes of a file, all its clusters allocated.
pub fn full_image(data: &DataFile, dir: &Path, format: &str, name: &str) -> Result<Scratch> {
    full_image_by("qemu-img", data, dir, format, name)
}

/// As [`full_image`], made by qemu-img or vublk.
pub fn full_image_by(
    tool: &str,
    data: &DataFile,
    dir: &Path,
    format: &str,
    name: &str,
) -> Result<Scratch> {
    let image = Scratch::new(dir, name)?;
    let (from, to) = (text(&data.0), text(&image.0));
    image_tool(tool, &["convert", "-f", "raw", "-O", format, "-S", "0", from, to])?;
    Ok(image)
}

/// Allocated clusters on tmpfs: each server has a copy of one image, and vublk a raw one besides.
pub fn allocated(plan: &Plan) -> Result<(Results, Vec<Verdict>)> {
    let shm = Path::new("/dev/shm");
    let data = DataFile::new(shm)?;
    let mut contestants: Vec<Contestant> = Vec::new();
    let mut images = Vec::new();
    for kind in plan.kinds(&[Kind::Vublk, Kind::Qsd]) {
        let image = full_image(&data, shm, "qcow2", &format!("{kind:?}.qcow2"))?;
        let content = Content::image("qcow2", &image.0);
        contestants.push((Who::Server(kind), kind, Setup::one(content)));
        images.push(image);
    }
    let raw = Content::File { path: data.0.clone(), direct: false };
    contestants.push((Who::OnRaw, Kind::Vublk, Setup::one(raw)));
    let mut cells = Vec::new();
    for write in [false, true] {
        for mode in [Mode::Wait, Mode::Poll] {
            cells.push(random(write, 32, mode, 1));
        }
    }
    let results = groups::take_turns(plan, &contestants, &cells, None)?;
    let mut verdicts = Vec::new();
    for cell in &cells {
        let get = |who, figure: fn(&Measured) -> f64| {
            results.median(cell, who, figure).unwrap_or(f64::NAN)
        };
        let cpu = get(US, |m| m.cpu_ns);
        verdicts.push(ratio(
            format!("{cell}: CPU ÷ raw"),
            cpu / get(Who::OnRaw, |m| m.cpu_ns),
            1.15,
            false,
        ));
        let rate = get(US, Measured::per_second) / get(QSD, Measured::per_second);
        verdicts.push(ratio(format!("{cell}: requests/s ÷ qsd"), rate, 2.0, true));
    }
    Ok((results, verdicts))
}

/// Reads of an image with eight times the L2 tables that the cache has room for.
pub fn cold(plan: &Plan) -> Result<(Results, Vec<Verdict>)> {
    let shm = Path::new("/dev/shm");
    let image = Scratch::new(shm, "cold.qcow2")?;
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
        text(&image.0),
        "64G",
    ])?;
    let contestants: Vec<Contestant> = plan
        .kinds(&[Kind::Vublk, Kind::Qsd])
        .into_iter()
        .map(|kind| {
            let options = ",l2-cache-size=1048576,read-only=on";
            let content =
                Content::Image { format: "qcow2", path: image.0.clone(), options, direct: false };
            (Who::Server(kind), kind, Setup { writable: false, ..Setup::one(content) })
        })
        .collect();
    let cells = [random(false, 32, Mode::Wait, 1), random(false, 32, Mode::Poll, 1)];
    let results = groups::take_turns(plan, &contestants, &cells, None)?;
    let verdict = |cell: &Cell| {
        let get = |who| results.median(cell, who, Measured::per_second).unwrap_or(f64::NAN);
        ratio(format!("{cell}: requests/s ÷ qsd"), get(US) / get(QSD), 1.0, true)
    };
    let verdicts = cells.iter().map(verdict).collect();
    Ok((results, verdicts))
}

/// One queue on one worker, then two on two, each queue's load and worker on one CPU; beside a raw image.
pub fn queues(plan: &Plan) -> Result<(Results, Vec<Verdict>)> {
    let shm = Path::new("/dev/shm");
    let data = DataFile::new(shm)?;
    let image = Scratch::new(shm, "queues.qcow2")?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-S", "0", text(&data.0), text(&image.0)])?;
    let content = Content::image("qcow2", &image.0);
    let raw = Content::File { path: data.0.clone(), direct: false };
    let mut results = Results::default();
    let mut verdicts = Vec::new();
    for write in [false, true] {
        let cells = [1, 2].map(|queues| random(write, 32, Mode::Wait, queues));
        for _ in 0..plan.rounds {
            for cell in cells {
                for (who, content) in [(US, &content), (Who::OnRaw, &raw)] {
                    results.add(cell, who, groups::paired(plan, Kind::Vublk, content, &cell)?);
                }
            }
        }
        let dearer = |who| {
            let [one, two] =
                cells.map(|c| results.median(&c, who, |m| m.cpu_ns).unwrap_or(f64::NAN));
            two / one
        };
        // What two threads that write to one file cost each other is in both.
        let raw = dearer(Who::OnRaw);
        let what =
            format!("{} on 2 workers: CPU ÷ 1 queue on 1 worker (a raw image: {raw:.2})", cells[1]);
        verdicts.push(ratio(what, dearer(US), 1.2, false));
    }
    Ok((results, verdicts))
}

/// What an allocating write has below it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Below {
    Nothing,
    Raw,
    Qcow2,
}

/// A row of the allocating writes.
#[derive(Clone, Copy)]
struct Fill {
    what: &'static str,
    block: u32,
    below: Below,
    /// Without the page cache.
    direct: bool,
    /// Of qemu-storage-daemon's rate.
    target: f64,
}

impl Fill {
    const fn new(what: &'static str, block: u32, below: Below, target: f64) -> Fill {
        Fill { what, block, below, direct: false, target }
    }
}

const FILLS: [Fill; 4] = [
    Fill::new("4 KiB into fresh clusters", 4096, Below::Nothing, 4.0),
    Fill::new("64 KiB, fresh clusters", 65536, Below::Nothing, 1.2),
    Fill::new("4 KiB over a raw backing file", 4096, Below::Raw, 1.2),
    Fill::new("4 KiB over a qcow2 backing file", 4096, Below::Qcow2, 1.2),
];

/// Writes that touch each cluster once, in random order, flushed at the end, on the file system of
/// `dir`, through its page cache and without; beside them vublk's plain reads and writes of the bytes that move.
pub fn allocating(plan: &Plan, dir: &Path) -> Result<(String, Vec<Verdict>)> {
    let count = if plan.quick { 512 } else { FILE_SIZE / CLUSTER };
    let data = DataFile::new(dir)?;
    let backing = Scratch::new(dir, "backing.qcow2")?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&data.0), text(&backing.0)])?;
    let mut table = String::from(
        "| load | vublk req/s | CPU µs/req | qsd req/s | CPU µs/req | req/s ÷ | CPU ÷ | plain CPU µs/req | CPU ÷ plain |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut verdicts = Vec::new();
    let direct = FILLS.iter().map(|fill| Fill { direct: true, ..*fill });
    for fill in FILLS.iter().copied().chain(direct) {
        let what = format!("{}{}", fill.what, if fill.direct { ", cache.direct=on" } else { "" });
        let (mut ours, mut theirs, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            ours.push(fill.run(plan, Kind::Vublk, dir, (&data.0, &backing.0), count)?);
            theirs.push(fill.run(plan, Kind::Qsd, dir, (&data.0, &backing.0), count)?);
            plain.push(fill.plain(plan, dir, &data.0, count)?);
        }
        let rate = |all: &[Measured]| middle(all, Measured::per_second);
        let cpu = |all: &[Measured]| middle(all, |m| m.cpu_ns / 1000.0);
        let faster = rate(&ours) / rate(&theirs);
        let dearer = cpu(&ours) / cpu(&plain);
        table += &format!(
            "| {what} | {} | {:.1} | {} | {:.1} | {faster:.2} | {:.2} | {:.1} | {dearer:.2} |\n",
            grouped(rate(&ours)),
            cpu(&ours),
            grouped(rate(&theirs)),
            cpu(&theirs),
            cpu(&ours) / cpu(&theirs),
            cpu(&plain),
        );
        verdicts.push(ratio(format!("{what}: req/s ÷ qsd"), faster, fill.target, true));
        verdicts.push(ratio(format!("{what}: CPU ÷ plain"), dearer, 1.25, false));
        eprintln!("  {what}");
    }
    Ok((table, verdicts))
}

/// The median of a figure.
pub fn middle(all: &[Measured], figure: impl Fn(&Measured) -> f64) -> f64 {
    median(all.iter().map(figure).collect()).unwrap_or(f64::NAN)
}

impl Fill {
    fn once(&self, block: u32, write: bool, count: u64) -> Once {
        let chains = Chains { depth: 32, block, write, indirect: true };
        Once { chains, step: CLUSTER, count, cpu: LOAD_CPU }
    }

    /// A server fills a new image.
    fn run(
        &self,
        plan: &Plan,
        kind: Kind,
        dir: &Path,
        (raw, qcow2): (&Path, &Path),
        count: u64,
    ) -> Result<Measured> {
        let image = Scratch::new(dir, "fill.qcow2")?;
        let raw = raw.canonicalize().map_err(|e| Error::Io("the data file".into(), e))?;
        let size = (count * CLUSTER).to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        match self.below {
            Below::Nothing => {}
            Below::Raw => arguments.extend(["-F", "raw", "-b", text(&raw)]),
            Below::Qcow2 => arguments.extend(["-F", "qcow2", "-b", text(qcow2)]),
        }
        arguments.extend([text(&image.0), &size]);
        qemu_img(&arguments)?;
        let path = image.0.clone();
        let content = Content::Image { format: "qcow2", path, options: "", direct: self.direct };
        once(plan, kind, content, &self.once(self.block, true, count))
    }

    /// vublk moves the same bytes on raw files.
    fn plain(&self, plan: &Plan, dir: &Path, data: &Path, count: u64) -> Result<Measured> {
        let target = Scratch::new(dir, "plain.raw")?;
        let file = std::fs::File::create(&target.0).and_then(|f| f.set_len(count * CLUSTER));
        file.map_err(|e| Error::Io("a raw image".into(), e))?;
        let block = if self.below == Below::Nothing { self.block } else { CLUSTER as u32 };
        let content = Content::File { path: target.0.clone(), direct: self.direct };
        let mut all = once(plan, Kind::Vublk, content, &self.once(block, true, count))?;
        if self.below != Below::Nothing {
            let content = Content::File { path: data.to_owned(), direct: self.direct };
            let reads = once(plan, Kind::Vublk, content, &self.once(block, false, count))?;
            all.cpu_ns += reads.cpu_ns;
            all.seconds += reads.seconds;
        }
        Ok(all)
    }
}

/// A load on a disk that a server was just started for, with a queue for its flush.
pub fn once(plan: &Plan, kind: Kind, content: Content, load: &Once) -> Result<Measured> {
    let setup = Setup { queues: 2, locking: true, ..Setup::one(content) };
    let running = servers::start(&plan.programs, kind, &setup, Some(SERVER_CPU))?;
    running.server.pin(SERVER_CPU)?;
    load.run(&running.socket(0), || running.server.cpu_ns())
}

/// What a program that ran to its end has used.
pub struct Used {
    pub seconds: f64,
    pub cpu_seconds: f64,
    resident_mib: f64,
}

/// Checks an image of 1 TiB whose clusters are all allocated.
pub fn check(plan: &Plan, dir: &Path) -> Result<(String, Vec<Verdict>)> {
    let image = Scratch::new(dir, "check.qcow2")?;
    let size = if plan.quick { "64G" } else { "1T" };
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
        text(&image.0),
        size,
    ])?;
    let vublk = plan.programs.vublk.as_os_str();
    let mut ours = Command::new(vublk);
    ours.args(["check", "-q", "-f", "qcow2"]).arg(&image.0);
    let mut theirs = Command::new("qemu-img");
    theirs.args(["check", "-q", "-f", "qcow2"]).arg(&image.0);
    let (mut us, mut qemu) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        us.push(used(&mut ours)?);
        qemu.push(used(&mut theirs)?);
    }
    let middle = |all: &[Used], figure: fn(&Used) -> f64| {
        median(all.iter().map(figure).collect()).unwrap_or(f64::NAN)
    };
    let mut table = format!(
        "| check of {size}, all allocated | seconds | CPU s | resident MiB |\n|---|--:|--:|--:|\n"
    );
    for (name, all) in [("vublk", &us), ("qemu-img", &qemu)] {
        table += &format!(
            "| {name} | {:.2} | {:.2} | {:.0} |\n",
            middle(all, |u| u.seconds),
            middle(all, |u| u.cpu_seconds),
            middle(all, |u| u.resident_mib)
        );
    }
    let verdicts = vec![
        ratio("check: seconds".into(), middle(&us, |u| u.seconds), 1.0, false),
        ratio("check: resident MiB".into(), middle(&us, |u| u.resident_mib), 64.0, false),
        ratio(
            "check: seconds ÷ qemu-img".into(),
            middle(&us, |u| u.seconds) / middle(&qemu, |u| u.seconds),
            1.0,
            false,
        ),
    ];
    Ok((table, verdicts))
}

/// Runs a program to its end.
pub fn used(command: &mut Command) -> Result<Used> {
    let began = Instant::now();
    let child = command.stdin(Stdio::null()).spawn().map_err(|e| Error::Io("a check".into(), e))?;
    let mut status = 0;
    // SAFETY: an all-zero rusage is a valid one; the call fills it for a child of ours that nobody
    // else waits for.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        if libc::wait4(child.id() as i32, &mut status, 0, &mut usage) < 0 {
            return Err(Error::Io("a check".into(), std::io::Error::last_os_error()));
        }
        usage
    };
    let status = std::process::ExitStatus::from_raw(status);
    if !status.success() {
        return Err(Error::Peer(format!("{command:?} ended with {status}")));
    }
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    Ok(Used {
        seconds: began.elapsed().as_secs_f64(),
        cpu_seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        resident_mib: usage.ru_maxrss as f64 / 1024.0,
    })
}
