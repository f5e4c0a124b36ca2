//! The groups of loads, and the order of the servers in each.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vublk_testkit::process::pin_thread;
use vublk_testkit::{Disk, Error, MemoryLayout, Options, Result, Server};

use crate::fio;
use crate::load::{Chains, Load, Measured, Mode};
use crate::machine::AwakeCpus;
use crate::results::{Cell, Results, Who};
use crate::servers::{self, Content, Kind, Programs, Running, Setup};

/// The load's CPU and the server's.
pub const LOAD_CPU: usize = 0;
pub const SERVER_CPU: usize = 1;

pub const FILE_SIZE: u64 = 256 << 20;
const MIB: u32 = 1 << 20;

/// What the command line chose.
pub struct Plan {
    pub programs: Programs,
    pub only: Vec<Kind>,
    pub seconds: f64,
    pub rounds: usize,
    pub quick: bool,
    pub event_idx: bool,
    pub awake: bool,
}

impl Plan {
    fn load(&self, cell: &Cell, cpus: [usize; 2]) -> Load {
        Load {
            queues: cell.queues,
            chains: Chains {
                depth: cell.depth,
                block: cell.block,
                write: cell.write,
                indirect: cell.indirect,
            },
            random: cell.random,
            mode: cell.mode,
            event_idx: self.event_idx,
            tracked: false,
            cpus,
            warm_up: Duration::from_secs_f64(self.seconds * 0.1),
            time: Duration::from_secs_f64(self.seconds),
        }
    }

    /// Keeps the CPUs from halting while a load sleeps.
    fn awake(&self, cell: &Cell) -> Option<AwakeCpus> {
        (self.awake && cell.mode == Mode::Wait).then(|| AwakeCpus::new(&[LOAD_CPU, SERVER_CPU]))
    }

    pub fn kinds(&self, among: &[Kind]) -> Vec<Kind> {
        let chosen = |k: &&Kind| self.only.contains(k);
        among.iter().filter(chosen).copied().collect()
    }
}

/// Depths, and how the load waits. A waiting load makes the server pay for waking another CPU, which
/// in a virtual machine can cost more than everything else; a polling one leaves that out.
const DEPTHS: [(u16, Mode); 6] = [
    (1, Mode::Wait),
    (1, Mode::Poll),
    (32, Mode::Wait),
    (32, Mode::Poll),
    (128, Mode::Wait),
    (128, Mode::Poll),
];

/// 4 KiB random loads, with direct chains as well or with indirect ones only, and 1 MiB sequential.
fn cells(direct_too: bool, sequential: bool, quick: bool) -> Vec<Cell> {
    let mut cells = Vec::new();
    let layouts: &[bool] = if direct_too { &[false, true] } else { &[true] };
    for write in [false, true] {
        for &indirect in layouts {
            for (depth, mode) in DEPTHS {
                cells.push(Cell {
                    block: 4096,
                    random: true,
                    write,
                    depth,
                    indirect,
                    mode,
                    queues: 1,
                });
            }
        }
        if sequential {
            cells.push(Cell {
                block: MIB,
                random: false,
                write,
                depth: 4,
                indirect: true,
                mode: Mode::Wait,
                queues: 1,
            });
        }
    }
    cells.retain(|c| !quick || c.depth != 128 && !(c.depth == 1 && c.indirect && direct_too));
    cells
}

/// Who takes turns, which server that is, and what it serves.
pub type Contestant = (Who, Kind, Setup);

/// Servers that all serve the same.
fn all_serve(kinds: &[Kind], setup: &Setup) -> Vec<Contestant> {
    kinds.iter().map(|&kind| (Who::Server(kind), kind, setup.clone())).collect()
}

/// Runs every cell on every server in turn, round after round, the order turning with the round.
pub fn take_turns(
    plan: &Plan,
    contestants: &[Contestant],
    cells: &[Cell],
    fio_on: Option<&Path>,
) -> Result<Results> {
    let mut running: Vec<(Who, Running)> = Vec::new();
    for (who, kind, setup) in contestants {
        let server = servers::start(&plan.programs, *kind, setup, Some(SERVER_CPU))?;
        running.push((*who, server));
    }
    let mut results = Results::default();
    let mut fio_start_up = None;
    for round in 0..plan.rounds {
        for cell in cells {
            running.rotate_left(round.min(1));
            for (who, server) in &running {
                let measured = one_cell(plan, cell, server).map_err(|e| blame(*who, cell, e))?;
                results.add(*cell, *who, measured);
            }
            // fio knows no polling load and no descriptors: one of the cells stands for both.
            if let Some(file) = fio_on
                && cell.mode == Mode::Wait
            {
                let job = fio::Job {
                    file,
                    write: cell.write,
                    random: cell.random,
                    block: cell.block,
                    depth: cell.depth,
                    direct: false,
                    seconds: plan.seconds.max(if plan.quick { 0.0 } else { 1.0 }),
                    cpu: SERVER_CPU,
                };
                let start_up = match fio_start_up {
                    Some(ns) => ns,
                    None => fio::start_up_ns(&job).map_err(Error::Peer)?,
                };
                fio_start_up = Some(start_up);
                let cost = fio::run(&job, start_up).map_err(Error::Peer)?;
                results.add(*cell, Who::Fio, cost.whole);
                results.add(*cell, Who::FioReported, cost.reported);
            }
        }
        eprintln!("  round {} of {}", round + 1, plan.rounds);
    }
    Ok(results)
}

fn blame(who: Who, cell: &Cell, e: Error) -> Error {
    Error::Peer(format!("{who}: {cell}: {e}"))
}

fn one_cell(plan: &Plan, cell: &Cell, server: &Running) -> Result<Measured> {
    let load = plan.load(cell, [LOAD_CPU, LOAD_CPU]);
    let mut disk = load.open(&server.socket(0))?;
    // Threads made for the connection inherit the CPU, except where the server says otherwise.
    server.server.pin(SERVER_CPU)?;
    let _awake = plan.awake(cell);
    load.run(&mut disk, || server.server.cpu_ns())
}

/// Group 1: a disk that does nothing, so that only the server's own work is left.
pub fn null(plan: &Plan) -> Result<Results> {
    let kinds = plan.kinds(&[Kind::Vublk, Kind::Qsd, Kind::Stock]);
    let cells = cells(true, false, plan.quick);
    take_turns(plan, &all_serve(&kinds, &Setup::one(Content::Null)), &cells, None)
}

/// A file full of data, removed when dropped.
pub struct DataFile(pub PathBuf);

impl DataFile {
    pub fn new(dir: &Path) -> Result<DataFile> {
        let io = |e| Error::Io(format!("data file in {}", dir.display()), e);
        fs::create_dir_all(dir).map_err(io)?;
        let data = DataFile(dir.join(format!("vublk-bench-{}.raw", std::process::id())));
        let mut file = File::create(&data.0).map_err(io)?;
        let chunk: Vec<u8> = (0..MIB).map(|i| (i >> 9) as u8 ^ i as u8 | 1).collect();
        for _ in 0..FILE_SIZE / u64::from(MIB) {
            file.write_all(&chunk).map_err(io)?;
        }
        file.sync_all().map_err(io)?;
        Ok(data)
    }
}

impl Drop for DataFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Group 2: a raw file on tmpfs, beside fio's own engine.
pub fn tmpfs(plan: &Plan) -> Result<Results> {
    let file = DataFile::new(Path::new("/dev/shm"))?;
    let content = Content::File { path: file.0.clone(), direct: false };
    let kinds = plan.kinds(&[Kind::Vublk, Kind::Qsd]);
    let cells = cells(false, true, plan.quick);
    take_turns(plan, &all_serve(&kinds, &Setup::one(content)), &cells, Some(&file.0))
}

/// Group 3: a raw file in `dir` with O_DIRECT.
pub fn direct(plan: &Plan, dir: &Path) -> Result<Results> {
    let file = DataFile::new(dir)?;
    let content = Content::File { path: file.0.clone(), direct: true };
    let kinds = plan.kinds(&[Kind::Vublk, Kind::Qsd]);
    let mut cells = cells(false, true, plan.quick);
    // The device's own time hides what polling would show.
    cells.retain(|c| c.depth == 1 || c.mode == Mode::Wait);
    take_turns(plan, &all_serve(&kinds, &Setup::one(content)), &cells, None)
}

/// Group 6: the file of group 2 where the kernel refuses io_uring, and threads do the I/O.
pub fn threads(plan: &Plan) -> Result<Results> {
    let file = DataFile::new(Path::new("/dev/shm"))?;
    let content = Content::File { path: file.0.clone(), direct: false };
    let setup = Setup { io_uring: false, ..Setup::one(content) };
    let kinds = plan.kinds(&[Kind::Vublk, Kind::Qsd]);
    let mut cells = cells(false, true, plan.quick);
    cells.retain(|c| c.mode == Mode::Wait);
    take_turns(plan, &all_serve(&kinds, &setup), &cells, None)
}

/// Group 4: one queue on one worker, then two on two, each queue's load and worker on one CPU.
pub fn queues(plan: &Plan) -> Result<Results> {
    let mut results = Results::default();
    let cell = |depth, queues| Cell {
        block: 4096,
        random: true,
        write: false,
        depth,
        indirect: true,
        mode: Mode::Wait,
        queues,
    };
    for round in 0..plan.rounds {
        for depth in [32, 128] {
            // qemu-storage-daemon serves all queues of a disk from one thread.
            for (kind, queues) in [(Kind::Vublk, 1), (Kind::Vublk, 2), (Kind::Qsd, 1)] {
                if !plan.only.contains(&kind) {
                    continue;
                }
                let cell = cell(depth, queues);
                let who = Who::Server(kind);
                let measured = paired(plan, kind, &Content::Null, &cell);
                results.add(cell, who, measured.map_err(|e| blame(who, &cell, e))?);
            }
        }
        eprintln!("  round {} of {}", round + 1, plan.rounds);
    }
    Ok(results)
}

/// Queue `i` is driven and served on CPU `i`.
pub fn paired(plan: &Plan, kind: Kind, content: &Content, cell: &Cell) -> Result<Measured> {
    let one = Setup::one(content.clone());
    let setup = Setup { queues: cell.queues, workers: cell.queues, ..one };
    let running = servers::start(&plan.programs, kind, &setup, None)?;
    let load = plan.load(cell, [0, 1]);
    let mut disk = load.open(&running.socket(0))?;
    let sectors = disk.config().capacity_sectors;
    for index in 0..cell.queues {
        let worker = busiest(&running.server, || {
            let alone = Load {
                queues: 1,
                cpus: [index, index],
                warm_up: Duration::ZERO,
                time: Duration::from_millis(100),
                ..load
            };
            let queue = &mut disk.queues[index..=index];
            alone.run_on(queue, sectors, || Ok(0)).map(drop)
        })?;
        pin_thread(worker, index)?;
    }
    load.run(&mut disk, || running.server.cpu_ns())
}

/// The thread that used the most CPU time while `work` ran.
fn busiest(server: &Server, work: impl FnOnce() -> Result<()>) -> Result<i32> {
    let before = server.threads()?;
    work()?;
    let used = |t: &vublk_testkit::process::ThreadTime| {
        let old = before.iter().find(|b| b.tid == t.tid).map_or(0, |b| b.cpu_ns);
        t.cpu_ns - old
    };
    let after = server.threads()?;
    let thread = after.iter().max_by_key(|t| used(t));
    thread.map(|t| t.tid).ok_or_else(|| Error::Peer("has no threads".into()))
}

/// What a hundred connected disks cost while nothing happens.
pub struct Idle {
    pub kind: Kind,
    /// It offers metrics.
    pub metrics: bool,
    pub disks: usize,
    pub seconds: f64,
    pub cpu_ms: f64,
    /// Without guest memory.
    pub resident_mib: f64,
}

/// Group 5: idle disks in one process.
pub fn idle(plan: &Plan) -> Result<Vec<Idle>> {
    let seconds = if plan.quick { 1.0 } else { 3.0 };
    let disks = 100;
    let mut all = Vec::new();
    let kinds = plan.kinds(&[Kind::Vublk, Kind::Qsd]);
    let with = kinds.iter().filter(|kind| **kind == Kind::Vublk).map(|kind| (*kind, true));
    for (kind, metrics) in kinds.iter().map(|kind| (*kind, false)).chain(with) {
        let setup = Setup { disks, metrics, ..Setup::one(Content::Null) };
        let running = servers::start(&plan.programs, kind, &setup, None)?;
        let options = Options { layout: MemoryLayout::single(1 << 20), ..Options::default() };
        let mut open = Vec::new();
        for i in 0..disks {
            let mut disk = Disk::open(&running.socket(i), &options)?;
            disk.read(0, &mut [0; 4096])?;
            open.push(disk);
        }
        // What the last request started (a spin, a timer) may end first.
        std::thread::sleep(Duration::from_secs(1));
        let before = running.server.cpu_ns()?;
        std::thread::sleep(Duration::from_secs_f64(seconds));
        let cpu = running.server.cpu_ns()? - before;
        let resident = running.server.resident()?;
        all.push(Idle {
            kind,
            metrics,
            disks: open.len(),
            seconds,
            cpu_ms: cpu as f64 / 1e6,
            resident_mib: (resident.anonymous + resident.file) as f64 / f64::from(MIB),
        });
    }
    Ok(all)
}
