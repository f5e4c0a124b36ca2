//! The project's targets, compared with what was measured.

use crate::load::Measured;
use crate::results::{Cell, Results, Who};
use crate::servers::Kind;

/// One target on one load.
pub struct Verdict {
    pub what: String,
    pub value: f64,
    pub limit: f64,
    /// Does a larger value meet it?
    pub at_least: bool,
}

impl Verdict {
    pub fn met(&self) -> bool {
        if self.at_least { self.value >= self.limit } else { self.value <= self.limit }
    }

    /// One line of the closing list.
    pub fn line(&self) -> String {
        let sign = if self.at_least { "≥" } else { "≤" };
        let met = if self.met() { "met   " } else { "MISSED" };
        format!("- {met} {}: {:.2} ({sign} {:.2})", self.what, self.value, self.limit)
    }
}

const US: Who = Who::Server(Kind::Vublk);
const QSD: Who = Who::Server(Kind::Qsd);

type Figure = fn(&Measured) -> f64;

const CPU: Figure = |m| m.cpu_ns;
const RATE: Figure = Measured::per_second;
const P50: Figure = |m| m.p50_ns as f64;

fn compare(
    results: &Results,
    cell: &Cell,
    (to, figure): (Who, Figure),
    what: &str,
    limit: f64,
    at_least: bool,
) -> Option<Verdict> {
    let ours = results.median(cell, US, figure)?;
    let theirs = results.median(cell, to, figure)?;
    Some(Verdict { what: format!("{cell}: {what}"), value: ours / theirs, limit, at_least })
}

/// Depth 1: no later than qemu-storage-daemon, at less CPU.
fn depth_one(results: &Results, cell: &Cell) -> Vec<Option<Verdict>> {
    vec![
        compare(results, cell, (QSD, P50), "p50 latency ÷ qsd", 1.0, false),
        compare(results, cell, (QSD, CPU), "CPU ÷ qsd", 1.0, false),
    ]
}

/// Null disk: a fifth of the CPU per request from depth 32 on.
pub fn null(results: &Results) -> Vec<Verdict> {
    let each = |cell: &Cell| match cell.depth {
        1 => depth_one(results, cell),
        _ => vec![compare(results, cell, (QSD, CPU), "CPU ÷ qsd", 0.2, false)],
    };
    results.cells().iter().flat_map(each).flatten().collect()
}

/// File on tmpfs: twice the requests and half the CPU at depth 32, and near fio's own cost.
pub fn tmpfs(results: &Results) -> Vec<Verdict> {
    let each = |cell: &Cell| {
        let floor = compare(results, cell, (Who::Fio, CPU), "CPU ÷ fio", 1.15, false);
        match (cell.depth, cell.random) {
            (1, _) => depth_one(results, cell),
            (32, true) => vec![
                compare(results, cell, (QSD, RATE), "requests/s ÷ qsd", 2.0, true),
                compare(results, cell, (QSD, CPU), "CPU ÷ qsd", 0.5, false),
                floor,
            ],
            _ => vec![floor],
        }
    };
    results.cells().iter().flat_map(each).flatten().collect()
}

/// Load and worker on one CPU, where no wake-up crosses CPUs: a fifth of the CPU per request, and
/// two queues on two workers cost what one on one does, since nothing is shared on the road.
pub fn queues(results: &Results) -> Vec<Verdict> {
    let mut out = Vec::new();
    for one in results.cells().iter().filter(|c| c.queues == 1) {
        out.extend(compare(results, one, (QSD, CPU), "CPU ÷ qsd", 0.2, false));
    }
    for two in results.cells().iter().filter(|c| c.queues == 2) {
        let one = Cell { queues: 1, ..*two };
        let (Some(a), Some(b)) = (results.median(two, US, CPU), results.median(&one, US, CPU))
        else {
            continue;
        };
        out.push(Verdict {
            what: format!("{two} on 2 workers: CPU ÷ 1 queue on 1 worker"),
            value: a / b,
            limit: 1.1,
            at_least: false,
        });
    }
    out
}
