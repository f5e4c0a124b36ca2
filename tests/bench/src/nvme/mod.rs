//! The cost per request of an NVMe controller in a guest with an IOMMU.
//!
//! vublk's driver, qemu-storage-daemon's driver, and vublk on the kernel's driver serve it.
//!
//! Under emulation time says little. What is exact is counted: what the emulated controller sees
//! (QEMU's trace points for doorbells and interrupts) and the server's system calls. Both are counted
//! between two reads of odd sizes, which mark a load's begin and end in the trace.

mod guest;
mod trace;

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use vublk_testkit::{Error, Result};

use crate::targets::Verdict;
use trace::Window;

/// The controller that vfio-pci gets, and the one that the kernel keeps.
const FOR_VFIO: &str = "0000:00:10.0";
const FOR_KERNEL: &str = "0000:00:11.0";

/// Seconds after which the guest is ended, whatever it does: an open of qemu-storage-daemon's may take
/// several tries of ten seconds.
const LIMIT_S: u64 = 900;

#[derive(clap::Args)]
pub struct Nvme {
    /// Seconds of measurement per load
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Who serves [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<Who>,
    /// Prints the guest's console, too
    #[arg(long)]
    console: bool,
}

/// What the guest of a run is told.
#[derive(clap::Args)]
pub struct InGuest {
    seconds: f64,
    vublk: PathBuf,
    #[arg(required = true)]
    who: Vec<Who>,
}

/// Who serves the disk, and whose driver the controller has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize, Deserialize)]
pub enum Who {
    /// vublk's own driver
    Vublk,
    /// qemu-storage-daemon's
    Qsd,
    /// vublk on a block device of the kernel's driver
    Kernel,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Vublk => "vublk, nvme",
            Who::Qsd => "qemu-storage-daemon, nvme",
            Who::Kernel => "vublk on the kernel's nvme",
        }
    }

    fn argument(self) -> &'static str {
        match self {
            Who::Vublk => "vublk",
            Who::Qsd => "qsd",
            Who::Kernel => "kernel",
        }
    }
}

/// What the guest measured of one load.
#[derive(Serialize, Deserialize)]
struct Report {
    who: Who,
    load: String,
    per_second: f64,
    cpu_ns: f64,
    /// System calls in the second window, in which the server is traced, most frequent first.
    calls: Vec<(String, u64)>,
}

impl Report {
    fn calls(&self) -> u64 {
        self.calls.iter().map(|(_, count)| count).sum()
    }

    fn ioctls(&self) -> u64 {
        self.calls.iter().filter(|(name, _)| name == "ioctl").map(|(_, count)| count).sum()
    }
}

/// The role of this program inside the guest.
pub fn in_guest(options: &InGuest) -> Result<()> {
    guest::run(&options.vublk, options.seconds, &options.who)
}

/// Boots the guest, joins what it says with what its controllers saw, and prints both.
pub fn bench(options: &Nvme, vublk: &Path) -> Result<Vec<Verdict>> {
    let dir = tempfile::tempdir().map_err(Error::io("temporary folder"))?;
    let trace = dir.path().join("trace");
    let reports = boot(options, vublk, dir.path(), &trace)?;
    let log = BufReader::new(File::open(&trace).map_err(Error::io("QEMU's trace"))?);
    let windows = trace::windows(log).map_err(Error::io("QEMU's trace"))?;
    if windows.len() != 2 * reports.len() {
        let (windows, reports) = (windows.len(), reports.len());
        return Err(Error::Peer(format!("{windows} loads in QEMU's trace, {reports} reports")));
    }
    let pairs = windows.chunks(2).map(|pair| (pair[0], pair[1]));
    let all: Vec<_> = reports.iter().zip(pairs).collect();
    print(&all);
    Ok(verdicts(&all))
}

type Measured<'a> = (&'a Report, (Window, Window));

fn boot(options: &Nvme, vublk: &Path, dir: &Path, trace: &Path) -> Result<Vec<Report>> {
    let program = std::env::current_exe().map_err(Error::io("path of this program"))?;
    let vublk = fs::canonicalize(vublk).map_err(Error::io("path of vublk"))?;
    let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/boot.sh");
    let who = match &*options.only {
        [] => &[Who::Vublk, Who::Qsd, Who::Kernel],
        only => only,
    };
    let who: Vec<_> = who.iter().map(|who| who.argument()).collect();
    let script = format!(
        "modprobe nvme && modprobe vfio_iommu_type1 && modprobe vfio-pci || exit 1\n\
         {vublk} nvme bind {FOR_VFIO} && exec {program} nvme-guest {} {vublk} {}\n",
        options.seconds,
        who.join(" "),
        vublk = vublk.display(),
        program = program.display(),
    );
    fs::write(dir.join("script"), script).map_err(Error::io("script for the guest"))?;
    let mut command = Command::new("timeout");
    command.arg(LIMIT_S.to_string()).arg(boot).args(["--iommu", "--memory", "1G"]);
    for folder in [Path::new("/usr"), parent(&program), parent(&vublk)] {
        command.arg("--share").arg(folder);
    }
    command.arg(dir.join("script"));
    for (index, address) in [FOR_VFIO, FOR_KERNEL].iter().enumerate() {
        let image = dir.join(format!("d{index}"));
        let made = File::create(&image).and_then(|file| file.set_len(256 << 20));
        made.map_err(Error::io("a drive's file"))?;
        let drive = format!("if=none,id=d{index},format=raw,file={}", image.display());
        let slot = address.trim_start_matches("0000:00:");
        command.args(["-drive", &drive, "-device"]);
        command.arg(format!("nvme,serial=N{index},drive=d{index},addr=0x{slot}"));
    }
    command.arg("-D").arg(trace);
    for event in trace::EVENTS {
        command.args(["-trace", event]);
    }
    let output = command.stdin(Stdio::null()).output().map_err(Error::io("boot.sh"))?;
    let console = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    if options.console || !console.contains("\nGUEST-EXIT 0") {
        // Nobody may be reading any more.
        let _ = std::io::stderr().write_all(console.as_bytes());
        let _ = std::io::stderr().write_all(&output.stderr);
    }
    if !console.contains("\nGUEST-EXIT 0") {
        return Err(Error::Peer("the guest's work failed".into()));
    }
    let reports = console.lines().filter_map(|line| line.strip_prefix("report "));
    let parsed: std::result::Result<Vec<Report>, _> = reports.map(serde_json::from_str).collect();
    parsed.map_err(|error| Error::Peer(format!("a report is not understood: {error}")))
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

fn print(all: &[Measured<'_>]) {
    println!(
        "| load | server | SQ doorbells/request | CQ doorbells | MSI-X | system calls | ioctls | \
         CPU ns/request | requests/s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|"
    );
    for (report, (plain, traced)) in all {
        let per = |count: u64| format!("{:.3}", per_request(count, plain));
        println!(
            "| {} | {} | {} | {} | {} | {:.3} | {:.3} | {:.0} | {:.0} |",
            report.load,
            report.who.name(),
            per(plain.sq_doorbells),
            per(plain.cq_doorbells),
            per(plain.interrupts),
            per_request(report.calls(), traced),
            per_request(report.ioctls(), traced),
            report.cpu_ns,
            report.per_second,
        );
    }
    println!("\nThe system calls of the servers, of all requests of their second window:\n");
    for (report, (_, traced)) in all {
        let calls: Vec<_> =
            report.calls.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let (load, who) = (&report.load, report.who.name());
        println!("- {load}, {who}: {} requests: {}", traced.requests, calls.join(", "));
    }
}

fn per_request(count: u64, window: &Window) -> f64 {
    count as f64 / window.requests.max(1) as f64
}

/// The targets: at depth 32 no system calls while busy, and at most half of QEMU's SQ doorbells.
fn verdicts(all: &[Measured<'_>]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for (report, (plain, traced)) in all {
        if report.who != Who::Vublk || !report.load.contains("depth 32") {
            continue;
        }
        let load = &report.load;
        if load.contains("polled") {
            verdicts.push(Verdict {
                what: format!("{load}: system calls per request"),
                value: per_request(report.calls(), traced),
                // What begins and ends a load is counted with it.
                limit: 0.01,
                at_least: false,
            });
        }
        let qemu = all.iter().find(|(other, _)| other.who == Who::Qsd && other.load == *load);
        let Some((other, (of_qemu, _))) = qemu else { continue };
        let doorbells = |window: &Window| per_request(window.sq_doorbells, window);
        verdicts.push(Verdict {
            what: format!("{load}: SQ doorbells ÷ qemu-storage-daemon's"),
            value: doorbells(plain) / doorbells(of_qemu),
            limit: 0.5,
            at_least: false,
        });
        // A server that polls uses all the time there is, whatever it does.
        if !load.contains("polled") {
            verdicts.push(Verdict {
                what: format!("{load}: CPU per request ÷ qemu-storage-daemon's"),
                value: report.cpu_ns / other.cpu_ns,
                limit: 1.0,
                at_least: false,
            });
        }
    }
    verdicts
}
