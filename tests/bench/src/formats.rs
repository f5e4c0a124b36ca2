//! Writable formats beside qemu-storage-daemon and beside a raw image.
//!
//! It measures allocated clusters, and writes that allocate.
//!
//! Each server has images that its own tool has made. qemu-img puts the blocks of a vdi image at the first multiple of 512
//! bytes behind the map, so that 4 KiB of the guest lie across two pages of the file unless that is a multiple
//! of 4096, too; ours begin at whole MiB.

use std::path::Path;

use vublk_testkit::Result;

use crate::groups::{self, Contestant, DataFile, FILE_SIZE, LOAD_CPU, Plan};
use crate::load::{Chains, Measured, Mode, Once};
use crate::qcow2::{
    CLUSTER, Scratch, full_image_by, image_tool, middle, once, random, ratio, text,
};
use crate::results::{Who, grouped};
use crate::servers::{Content, Kind, Setup};
use crate::targets::Verdict;

/// A format, and what is wanted of it.
struct Format {
    name: &'static str,
    /// Most CPU time of a request to an allocated cluster, as a multiple of a raw image's.
    over_raw: f64,
    /// Least rate of writes that allocate, as a multiple of qemu-storage-daemon's.
    first_writes: f64,
}

/// All of them.
const FORMATS: &[Format] = &[
    Format { name: "qcow2", over_raw: 1.15, first_writes: 4.0 },
    Format { name: "qed", over_raw: 1.15, first_writes: 4.0 },
    Format { name: "vdi", over_raw: 1.15, first_writes: 3.0 },
    Format { name: "parallels", over_raw: 1.2, first_writes: 3.0 },
    Format { name: "vhdx", over_raw: 1.15, first_writes: 1.2 },
    Format { name: "vpc", over_raw: 1.15, first_writes: 3.0 },
    Format { name: "vmdk", over_raw: 1.20, first_writes: 4.0 },
];

const US: Who = Who::Server(Kind::Vublk);
const QSD: Who = Who::Server(Kind::Qsd);

/// Reads and writes of allocated clusters on tmpfs: each server has a copy of one image, and vublk a raw one besides.
pub fn allocated(plan: &Plan) -> Result<(String, Vec<Verdict>)> {
    let shm = Path::new("/dev/shm");
    let data = DataFile::new(shm)?;
    let mut table = String::from(
        "| format | load | vublk req/s | CPU ns/req | qsd req/s | CPU ns/req | raw CPU ns/req | req/s ÷ qsd | CPU ÷ qsd | CPU ÷ raw |\n\
         |---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut verdicts = Vec::new();
    for format in FORMATS {
        let mut contestants: Vec<Contestant> = Vec::new();
        let mut images = Vec::new();
        for kind in plan.kinds(&[Kind::Vublk, Kind::Qsd]) {
            let (tool, name) = (tool(plan, kind), format!("{kind:?}.{}", format.name));
            let image = full_image_by(tool, &data, shm, format.name, &name)?;
            let content = Content::image(format.name, &image.0);
            contestants.push((Who::Server(kind), kind, Setup::one(content)));
            images.push(image);
        }
        let raw = Content::File { path: data.0.clone(), direct: false };
        contestants.push((Who::OnRaw, Kind::Vublk, Setup::one(raw)));
        let cells = [false, true].map(|write| random(write, 32, Mode::Poll, 1));
        let results = groups::take_turns(plan, &contestants, &cells, None)?;
        for cell in &cells {
            let get = |who, figure: fn(&Measured) -> f64| {
                results.median(cell, who, figure).unwrap_or(f64::NAN)
            };
            let [ours, theirs] = [US, QSD].map(|who| get(who, Measured::per_second));
            let [cpu, their_cpu, raw_cpu] = [US, QSD, Who::OnRaw].map(|who| get(who, |m| m.cpu_ns));
            let load = if cell.write { "random write" } else { "random read" };
            table += &format!(
                "| {} | {load} | {} | {} | {} | {} | {} | {:.2} | {:.2} | {:.2} |\n",
                format.name,
                grouped(ours),
                grouped(cpu),
                grouped(theirs),
                grouped(their_cpu),
                grouped(raw_cpu),
                ours / theirs,
                cpu / their_cpu,
                cpu / raw_cpu,
            );
            let what = format!("{}: {load}: CPU ÷ raw", format.name);
            verdicts.push(ratio(what, cpu / raw_cpu, format.over_raw, false));
        }
    }
    Ok((table, verdicts))
}

/// Writes of 4 KiB that touch each 64 KiB of a new image once, in random order, flushed at the end, in `dir`.
pub fn first_writes(plan: &Plan, dir: &Path) -> Result<(String, Vec<Verdict>)> {
    let count = if plan.quick { 512 } else { FILE_SIZE / CLUSTER };
    let mut table = String::from(
        "| format | vublk req/s | CPU µs/req | qsd req/s | CPU µs/req | req/s ÷ qsd | CPU ÷ qsd |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut verdicts = Vec::new();
    for format in FORMATS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            for kind in plan.kinds(&[Kind::Vublk, Kind::Qsd]) {
                let measured = fill(plan, kind, format, dir, count)?;
                if kind == Kind::Vublk { &mut ours } else { &mut theirs }.push(measured);
            }
        }
        let rate = |all: &[Measured]| middle(all, Measured::per_second);
        let cpu = |all: &[Measured]| middle(all, |m| m.cpu_ns / 1000.0);
        let faster = rate(&ours) / rate(&theirs);
        table += &format!(
            "| {} | {} | {:.1} | {} | {:.1} | {faster:.2} | {:.2} |\n",
            format.name,
            grouped(rate(&ours)),
            cpu(&ours),
            grouped(rate(&theirs)),
            cpu(&theirs),
            cpu(&ours) / cpu(&theirs),
        );
        let what = format!("{}: first writes: req/s ÷ qsd", format.name);
        verdicts.push(ratio(what, faster, format.first_writes, true));
        eprintln!("  {}", format.name);
    }
    Ok((table, verdicts))
}

/// What makes the images of a server.
fn tool(plan: &Plan, kind: Kind) -> &str {
    match kind {
        Kind::Vublk => text(&plan.programs.vublk),
        _ => "qemu-img",
    }
}

/// A server fills a new image.
fn fill(plan: &Plan, kind: Kind, format: &Format, dir: &Path, count: u64) -> Result<Measured> {
    let image = Scratch::new(dir, &format!("fill.{}", format.name))?;
    let size = (count * CLUSTER).to_string();
    image_tool(tool(plan, kind), &["create", "-q", "-f", format.name, text(&image.0), &size])?;
    let chains = Chains { depth: 32, block: 4096, write: true, indirect: true };
    let load = Once { chains, step: CLUSTER, count, cpu: LOAD_CPU };
    once(plan, kind, Content::image(format.name, &image.0), &load)
}
