//! The cost of an option, or of a change of the program: CPU per request with and without it.
//!
//! Both are measured in many short rounds.

use std::time::Duration;

use vublk_testkit::Result;

use crate::groups::{LOAD_CPU, SERVER_CPU};
use crate::load::{Chains, Load, Mode};
use crate::machine::AwakeCpus;
use crate::servers::{self, Content, Kind, Programs, Running, Setup};
use crate::targets::Verdict;

/// What is compared with its absence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Requests in flight are tracked.
    Tracking,
    /// The server is in its sandbox.
    Sandbox,
    /// It offers metrics.
    Metrics,
    /// It is this build, not the one before ([`Programs::before`]).
    Build,
}

/// One load, with and without.
pub struct Compared {
    pub option: What,
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
/// CPU, which the option has no part in, out of the figure.
const LOADS: [(u16, bool, Mode); 4] = [
    (1, false, Mode::Wait),
    (32, false, Mode::Poll),
    (32, true, Mode::Poll),
    (128, false, Mode::Poll),
];

/// Takes `pairs` pairs of turns of `seconds` on each load. The two servers have a disk each; both may be the same
/// file where nothing is locked.
pub fn compare(
    programs: &Programs,
    option: What,
    disk: &str,
    content: [&Content; 2],
    pairs: usize,
    seconds: f64,
) -> Result<Vec<Compared>> {
    let (without, with) = servers_for(programs, option, content)?;
    let with = with.as_ref().unwrap_or(&without);
    let mut all = Vec::new();
    for (depth, write, mode) in LOADS {
        let load = |on| Load {
            queues: 1,
            chains: Chains { depth, block: 4096, write, indirect: true },
            random: true,
            mode,
            event_idx: true,
            tracked: on && option == What::Tracking,
            cpus: [LOAD_CPU; 2],
            warm_up: Duration::from_secs_f64(seconds * 0.1),
            time: Duration::from_secs_f64(seconds),
        };
        let turn = |on| -> Result<f64> {
            let load: Load = load(on);
            let server = if on { with } else { &without };
            let mut disk = load.open(&server.socket(0))?;
            server.server.pin(SERVER_CPU)?;
            let _awake = (mode == Mode::Wait).then(|| AwakeCpus::new(&[LOAD_CPU, SERVER_CPU]));
            Ok(load.run(&mut disk, || server.server.cpu_ns())?.cpu_ns)
        };
        let (mut off, mut on) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            // Each comes first as often as the other, so that a drift is nobody's.
            for is_on in [pair % 2 == 1, pair % 2 == 0] {
                let cpu = turn(is_on)?;
                if is_on { on.push(cpu) } else { off.push(cpu) }
            }
        }
        let ratios: Vec<f64> = on.iter().zip(&off).map(|(on, off)| on / off).collect();
        let (verb, waits) = (
            if write { "write" } else { "read" },
            if mode == Mode::Poll { ", polled" } else { "" },
        );
        all.push(Compared {
            option,
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

/// A server without the option and one with it, unless it is the load's to use it or not.
fn servers_for(
    programs: &Programs,
    option: What,
    [off, on]: [&Content; 2],
) -> Result<(Running, Option<Running>)> {
    let start = |setup| servers::start(programs, Kind::Vublk, &setup, Some(SERVER_CPU));
    let (one, other) = (Setup::one(off.clone()), Setup::one(on.clone()));
    match option {
        What::Tracking => Ok((start(Setup { locking: true, ..one })?, None)),
        What::Sandbox => {
            let with = Setup { sandbox: true, ..other };
            Ok((start(one)?, Some(start(with)?)))
        }
        What::Metrics => {
            let with = Setup { metrics: true, ..other };
            Ok((start(one)?, Some(start(with)?)))
        }
        What::Build => {
            let before =
                Programs { vublk: programs.before.clone().unwrap_or_default(), ..programs.clone() };
            let old = servers::start(&before, Kind::Vublk, &one, Some(SERVER_CPU))?;
            Ok((old, Some(start(other)?)))
        }
    }
}

fn quantile(mut values: Vec<f64>, at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(((values.len() - 1) as f64 * at).round() as usize).copied().unwrap_or(f64::NAN)
}

impl Compared {
    /// A row of the table.
    pub fn row(&self) -> String {
        let Compared { what, off, on, ratio, quartiles: [low, high], pairs, .. } = self;
        format!("| {what} | {pairs} | {off:.0} | {on:.0} | {ratio:.3} | {low:.3} to {high:.3} |")
    }

    pub fn verdict(&self) -> Verdict {
        let option = match self.option {
            What::Tracking => "tracking",
            What::Sandbox => "sandbox",
            What::Metrics => "metrics",
            What::Build => "this build",
        };
        Verdict {
            what: format!("{}: CPU with {option} ÷ without", self.what),
            value: self.ratio,
            limit: 1.05,
            at_least: false,
        }
    }
}

/// The table's head.
pub const HEAD: &str =
    "| load | pairs | ns off | ns on | on ÷ off | quartiles |\n|---|--:|--:|--:|--:|--:|";
