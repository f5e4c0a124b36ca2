//! What it costs to track requests in flight: CPU per request with it and without, on one server, in
//! many short turns.

use std::time::Duration;

use vublk_testkit::Result;

use crate::groups::{LOAD_CPU, SERVER_CPU};
use crate::load::{Chains, Load, Mode};
use crate::machine::AwakeCpus;
use crate::servers::{self, Content, Kind, Programs, Setup};
use crate::targets::Verdict;

/// One load, with and without.
pub struct Compared {
    pub what: String,
    /// Medians, in ns of the server's CPU per request.
    pub off: f64,
    pub on: f64,
    /// Of each pair of turns that follow each other: the median of on ÷ off, and its quartiles.
    pub ratio: f64,
    pub quartiles: [f64; 2],
    pub pairs: usize,
}

/// Depth, whether it writes, and how the load waits. One that polls keeps the wake-up of another
/// CPU, which the tracking has no part in, out of the figure.
const LOADS: [(u16, bool, Mode); 4] = [
    (1, false, Mode::Wait),
    (32, false, Mode::Poll),
    (32, true, Mode::Poll),
    (128, false, Mode::Poll),
];

/// Takes `pairs` pairs of turns of `seconds` on each load.
pub fn compare(
    programs: &Programs,
    disk: &str,
    content: &Content,
    pairs: usize,
    seconds: f64,
) -> Result<Vec<Compared>> {
    let setup = Setup { locking: true, ..Setup::one(content.clone()) };
    let server = servers::start(programs, Kind::Vublk, &setup, Some(SERVER_CPU))?;
    let mut all = Vec::new();
    for (depth, write, mode) in LOADS {
        let load = |tracked| Load {
            queues: 1,
            chains: Chains { depth, block: 4096, write, indirect: true },
            random: true,
            mode,
            event_idx: true,
            tracked,
            cpus: [LOAD_CPU; 2],
            warm_up: Duration::from_secs_f64(seconds * 0.1),
            time: Duration::from_secs_f64(seconds),
        };
        let turn = |tracked| -> Result<f64> {
            let load: Load = load(tracked);
            let mut disk = load.open(&server.socket(0))?;
            server.server.pin(SERVER_CPU)?;
            let _awake = (mode == Mode::Wait).then(|| AwakeCpus::new(&[LOAD_CPU, SERVER_CPU]));
            Ok(load.run(&mut disk, || server.server.cpu_ns())?.cpu_ns)
        };
        let (mut off, mut on) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            // Each comes first as often as the other, so that a drift is nobody's.
            for tracked in [pair % 2 == 1, pair % 2 == 0] {
                let cpu = turn(tracked)?;
                if tracked { on.push(cpu) } else { off.push(cpu) }
            }
        }
        let ratios: Vec<f64> = on.iter().zip(&off).map(|(on, off)| on / off).collect();
        let (verb, waits) = (
            if write { "write" } else { "read" },
            if mode == Mode::Poll { ", polled" } else { "" },
        );
        all.push(Compared {
            what: format!("{disk}: 4 KiB random {verb}, depth {depth}{waits}"),
            off: quantile(off, 0.5),
            on: quantile(on, 0.5),
            ratio: quantile(ratios.clone(), 0.5),
            quartiles: [quantile(ratios.clone(), 0.25), quantile(ratios, 0.75)],
            pairs,
        });
        eprintln!("  {}", all.last().map_or("", |one| &one.what));
    }
    Ok(all)
}

fn quantile(mut values: Vec<f64>, at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(((values.len() - 1) as f64 * at).round() as usize).copied().unwrap_or(f64::NAN)
}

impl Compared {
    /// A row of the table.
    pub fn row(&self) -> String {
        let Compared { what, off, on, ratio, quartiles: [low, high], pairs } = self;
        format!("| {what} | {pairs} | {off:.0} | {on:.0} | {ratio:.3} | {low:.3} to {high:.3} |")
    }

    pub fn verdict(&self) -> Verdict {
        Verdict {
            what: format!("{}: CPU with tracking ÷ without", self.what),
            value: self.ratio,
            limit: 1.05,
            at_least: false,
        }
    }
}

/// The table's head.
pub const HEAD: &str =
    "| load | pairs | ns off | ns on | on ÷ off | quartiles |\n|---|--:|--:|--:|--:|--:|";
