//! Measures vublk beside qemu-storage-daemon, a stock vhost-user-backend server and fio.
//!
//! They alternate in one run; the result is medians, ratios and whether the project's targets are met.

mod convert;
mod costs;
mod fio;
mod formats;
mod groups;
mod load;
mod machine;
mod null_backend;
mod nvme;
mod qcow2;
mod restart;
mod results;
mod servers;
mod targets;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use costs::What;
use groups::{DataFile, Idle, Plan};
use restart::End;
use servers::{Content, Kind, Programs};
use targets::Verdict;

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Role>,
    /// Groups to run [default: all]
    #[arg(long, value_delimiter = ',')]
    groups: Vec<Group>,
    /// Servers to run [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<Kind>,
    /// Seconds of measurement per load and turn
    #[arg(long, default_value_t = 0.7)]
    seconds: f64,
    /// Turns of each server on each load
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// One short round of fewer loads: does it run, not what is the figure
    #[arg(long)]
    quick: bool,
    /// Leave VIRTIO_RING_F_EVENT_IDX out
    #[arg(long)]
    no_event_idx: bool,
    /// Let the CPUs halt while the load waits (a virtual machine's wake-up is then measured, too)
    #[arg(long)]
    let_halt: bool,
    /// Directory for the O_DIRECT file
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    #[arg(long, default_value = "target/release/vublk")]
    vublk: PathBuf,
    /// Another build of vublk: measure the two against each other, and nothing else
    #[arg(long, value_name = "VUBLK")]
    before: Option<PathBuf>,
    #[arg(long, default_value = "qemu-storage-daemon")]
    qsd: PathBuf,
}

#[derive(Subcommand)]
enum Role {
    /// Serve a null disk with the stock vhost-user-backend crate
    NullServer { socket: PathBuf },
    /// Measure an emulated NVMe controller in a guest
    Nvme(nvme::Nvme),
    /// What runs inside that guest
    #[command(hide = true)]
    NvmeGuest(nvme::InGuest),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Null disk
    Null,
    /// Raw file on tmpfs, and fio
    Tmpfs,
    /// Raw file with O_DIRECT
    Direct,
    /// Two queues on two workers
    Queues,
    /// A hundred idle disks
    Idle,
    /// Raw file on tmpfs, without io_uring
    Threads,
    /// Restarts after a kill
    Restart,
    /// CPU with requests in flight tracked
    Tracking,
    /// CPU in the sandbox
    Sandbox,
    /// qcow2: allocated clusters, more tables than cache, two workers
    Qcow2,
    /// qcow2: writes that allocate
    Allocating,
    /// qcow2: a check of 1 TiB
    Check,
    /// Each format that is written: allocated clusters, and writes that allocate
    Formats,
    /// CPU with metrics offered
    Metrics,
    /// convert: raw to qcow2 and back, compressed
    Convert,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Some(Role::NullServer { socket }) => null_backend::serve(socket),
        Some(Role::Nvme(options)) => nvme::bench(options, &cli.vublk)
            .map(|verdicts| conclude(&verdicts))
            .map_err(|e| e.to_string()),
        Some(Role::NvmeGuest(options)) => nvme::in_guest(options).map_err(|e| e.to_string()),
        None => bench(cli).map_err(|e| e.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vublk-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: Cli) -> vublk_testkit::Result<()> {
    let compares = cli.before.is_some();
    let chosen = |group| !compares && (cli.groups.is_empty() || cli.groups.contains(&group));
    let plan = Plan {
        programs: Programs { vublk: cli.vublk, before: cli.before, qsd: cli.qsd },
        only: match cli.only.is_empty() {
            true => Kind::value_variants().to_vec(),
            false => cli.only.clone(),
        },
        seconds: if cli.quick { 0.2 } else { cli.seconds },
        rounds: if cli.quick { 1 } else { cli.rounds },
        quick: cli.quick,
        event_idx: !cli.no_event_idx,
        awake: !cli.let_halt,
    };
    print_header(&plan);
    let mut verdicts = Vec::new();
    if chosen(Group::Null) {
        headline("Null disk (null-co)");
        let results = groups::null(&plan)?;
        println!("{}", results.table());
        verdicts.extend(under("null", targets::null(&results)));
    }
    if chosen(Group::Tmpfs) {
        headline("Raw file on tmpfs, io_uring");
        let results = groups::tmpfs(&plan)?;
        println!("{}", results.table());
        verdicts.extend(under("tmpfs", targets::tmpfs(&results)));
    }
    if chosen(Group::Direct) {
        headline(&format!("Raw file in {}, cache.direct=on, io_uring", cli.dir.display()));
        println!("{}", groups::direct(&plan, &cli.dir)?.table());
    }
    if chosen(Group::Queues) {
        headline("Null disk, each queue's load and worker together on one CPU");
        let results = groups::queues(&plan)?;
        println!("{}", results.table());
        verdicts.extend(under("null, one CPU", targets::queues(&results)));
    }
    if chosen(Group::Idle) {
        headline("Idle disks, connected, in one process");
        verdicts.extend(report_idle(&groups::idle(&plan)?));
    }
    if chosen(Group::Threads) {
        headline("Raw file on tmpfs, io_uring refused by the kernel");
        println!("{}", groups::threads(&plan)?.table());
    }
    if chosen(Group::Restart) {
        headline("Restarts with requests in flight (ms, median / worst)");
        restarts(&plan, &cli.dir)?;
    }
    if chosen(Group::Tracking) {
        headline("CPU per request, requests in flight tracked or not (ns)");
        verdicts.extend(cost(&plan, What::Tracking)?);
    }
    if chosen(Group::Sandbox) {
        headline("CPU per request, in the sandbox or not (ns)");
        verdicts.extend(cost(&plan, What::Sandbox)?);
    }
    if chosen(Group::Qcow2) {
        verdicts.extend(qcow2_served(&plan)?);
    }
    if chosen(Group::Allocating) {
        headline(&format!(
            "qcow2 in {}: each cluster written to once, flush included",
            cli.dir.display()
        ));
        let (table, more) = qcow2::allocating(&plan, &cli.dir)?;
        println!("{table}");
        verdicts.extend(under("qcow2", more));
    }
    if chosen(Group::Check) {
        headline("qcow2: check");
        let (table, more) = qcow2::check(&plan, &cli.dir)?;
        println!("{table}");
        verdicts.extend(under("qcow2", more));
    }
    if chosen(Group::Formats) {
        headline(
            "Formats on tmpfs, images of each side's own tool, all allocated: 4 KiB, depth 32, polled",
        );
        let (table, more) = formats::allocated(&plan)?;
        println!("{table}");
        verdicts.extend(more);
        headline(&format!(
            "Formats in {}, images of each side's own tool: each 64 KiB written to once with 4 KiB, flush included",
            cli.dir.display()
        ));
        let (table, more) = formats::first_writes(&plan, &cli.dir)?;
        println!("{table}");
        verdicts.extend(more);
    }
    if chosen(Group::Metrics) {
        headline("CPU per request, with metrics offered or not (ns)");
        verdicts.extend(cost(&plan, What::Metrics)?);
    }
    if chosen(Group::Convert) {
        headline(&format!("convert in {}", cli.dir.display()));
        let (table, more) = convert::convert(&plan, &cli.dir)?;
        println!("{table}");
        verdicts.extend(more);
    }
    if let Some(before) = &plan.programs.before {
        headline(&format!(
            "CPU per request: {} before, this build after (ns)",
            machine::version(before)
        ));
        verdicts.extend(cost(&plan, What::Build)?);
    }
    conclude(&verdicts);
    Ok(())
}

/// Prints the tables of images that are read and written over; returns their targets.
fn qcow2_served(plan: &Plan) -> vublk_testkit::Result<Vec<Verdict>> {
    type Served = fn(&Plan) -> vublk_testkit::Result<(results::Results, Vec<Verdict>)>;
    let groups: [(&str, Served); 3] = [
        ("qcow2 on tmpfs, clusters allocated", qcow2::allocated),
        ("qcow2 on tmpfs, 8 MiB of L2 tables, 1 MiB of cache", qcow2::cold),
        ("qcow2 on tmpfs, each queue's load and worker together on one CPU", qcow2::queues),
    ];
    let mut verdicts = Vec::new();
    for (what, group) in groups {
        headline(what);
        let (results, more) = group(plan)?;
        println!("{}", results.table());
        verdicts.extend(under("qcow2", more));
    }
    Ok(verdicts)
}

/// Prints the table of restarts.
fn restarts(plan: &Plan, dir: &Path) -> vublk_testkit::Result<()> {
    let (file, direct) = (DataFile::new(Path::new("/dev/shm"))?, DataFile::new(dir)?);
    let times = if plan.quick { 3 } else { 30 };
    println!("{}", restart::HEAD);
    for (disk, content) in restart::disks(&file.0, &direct.0) {
        for (end, how) in [(End::Killed, "killed"), (End::Asked, "SIGTERM")] {
            let all = restart::restarts(&plan.programs, &content, end, times)?;
            println!("{}", restart::row(&format!("{disk}, {how}"), &all));
        }
    }
    Ok(())
}

/// Prints the table of an option's cost; returns its targets.
fn cost(plan: &Plan, option: What) -> vublk_testkit::Result<Vec<Verdict>> {
    let file = DataFile::new(Path::new("/dev/shm"))?;
    let on_tmpfs = Content::File { path: file.0.clone(), direct: false };
    // Many short turns: what else the machine does then falls on both alike.
    let (pairs, seconds) = if plan.quick { (2, 0.05) } else { (plan.rounds * 10, 0.2) };
    println!("{}", costs::HEAD);
    let mut disks = vec![
        ("null", [Content::Null, Content::Null]),
        ("raw on tmpfs", [on_tmpfs.clone(), on_tmpfs]),
    ];
    let mut images = Vec::new();
    if option == What::Build {
        for name in ["before.qcow2", "after.qcow2"] {
            images.push(qcow2::full_image(&file, Path::new("/dev/shm"), "qcow2", name)?);
        }
        let content = |image: &qcow2::Scratch| Content::image("qcow2", &image.0);
        disks.push(("qcow2 on tmpfs", [content(&images[0]), content(&images[1])]));
    }
    let mut verdicts = Vec::new();
    for (disk, [off, on]) in &disks {
        for one in costs::compare(&plan.programs, option, disk, [off, on], pairs, seconds)? {
            println!("{}", one.row());
            verdicts.push(one.verdict());
        }
    }
    Ok(verdicts)
}

/// Says what disk the verdicts are on.
fn under(disk: &str, mut verdicts: Vec<Verdict>) -> Vec<Verdict> {
    for verdict in &mut verdicts {
        verdict.what = format!("{disk}: {}", verdict.what);
    }
    verdicts
}

fn headline(text: &str) {
    eprintln!("{text}");
    println!("\n## {text}\n");
}

fn print_header(plan: &Plan) {
    println!("# vublk-bench, {}\n", machine::date());
    println!("- {}", machine::describe());
    println!("- load average before: {}", machine::load_average());
    for kind in &plan.only {
        match kind {
            Kind::Vublk => println!("- {}", machine::version(&plan.programs.vublk)),
            Kind::Qsd => println!("- {}", machine::version(&plan.programs.qsd)),
            Kind::Stock => println!("- stock backend: a null disk on the vhost-user-backend crate"),
        }
    }
    println!("- {}", machine::version("fio".as_ref()));
    if let Ok(ns) = load::own_cost_ns() {
        println!(
            "- the load costs at most {ns:.1} ns per request on its own CPU (depth 32, a device that only echoes)"
        );
    }
    println!(
        "- medians of {} turns of {} s; the server on CPU {}, the load on CPU {}; event index {}",
        plan.rounds,
        plan.seconds,
        groups::SERVER_CPU,
        groups::LOAD_CPU,
        if plan.event_idx { "on" } else { "off" }
    );
    println!(
        "- the load sleeps for a call unless \"polled\" is said; meanwhile idle-class spinners keep the CPUs from halting: {}",
        if plan.awake { "yes" } else { "no" }
    );
    println!(
        "- \"fio io_uring\": fio does the same I/O on the file itself; CPU with the kernel's worker threads, which fio's report leaves out"
    );
}

/// Prints the idle table; returns its targets.
fn report_idle(all: &[Idle]) -> Vec<Verdict> {
    println!("| server | disks | seconds | CPU ms | resident MiB without guest memory |");
    println!("|---|--:|--:|--:|--:|");
    let mut verdicts = Vec::new();
    for idle in all {
        println!(
            "| {}{} | {} | {} | {:.3} | {:.1} |",
            idle.kind,
            if idle.metrics { ", with metrics" } else { "" },
            idle.disks,
            idle.seconds,
            idle.cpu_ms,
            idle.resident_mib
        );
        if idle.kind == Kind::Vublk {
            verdicts.push(Verdict {
                what: format!("{} idle disks: CPU ms", idle.disks),
                value: idle.cpu_ms,
                limit: 0.0,
                at_least: false,
            });
            verdicts.push(Verdict {
                what: format!("{} idle disks: resident MiB", idle.disks),
                value: idle.resident_mib,
                limit: 100.0,
                at_least: false,
            });
        }
    }
    println!();
    verdicts
}

fn conclude(verdicts: &[Verdict]) {
    println!("\n## Targets\n");
    for verdict in verdicts {
        println!("{}", verdict.line());
    }
    let met = verdicts.iter().filter(|v| v.met()).count();
    println!("\n{met} of {} met", verdicts.len());
}
