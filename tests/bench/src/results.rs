//! What was measured, by cell and server; medians over the rounds; the tables.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use crate::load::{Measured, Mode};
use crate::servers::Kind;

/// Who did the work of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    Server(Kind),
    /// vublk, on a raw image of the same bytes.
    OnRaw,
    /// fio, with the kernel's worker threads.
    Fio,
    /// fio by its own report, without them.
    FioReported,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Server(kind) => kind.fmt(f),
            Who::OnRaw => f.pad("vublk, raw"),
            Who::Fio => f.pad("fio io_uring"),
            Who::FioReported => f.pad("fio io_uring, its report"),
        }
    }
}

/// One row's kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    pub block: u32,
    pub random: bool,
    pub write: bool,
    pub depth: u16,
    pub indirect: bool,
    pub mode: Mode,
    /// Queues, each with a worker.
    pub queues: usize,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = if self.random { "random" } else { "sequential" };
        let what = if self.write { "write" } else { "read" };
        match self.block {
            b if b >= 1 << 20 => write!(f, "{} MiB", b >> 20)?,
            b => write!(f, "{} KiB", b >> 10)?,
        }
        write!(f, " {order} {what}, depth {}", self.depth)?;
        if self.indirect {
            write!(f, ", indirect")?;
        }
        if self.mode == Mode::Poll {
            write!(f, ", polled")?;
        }
        if self.queues > 1 {
            write!(f, ", {} queues", self.queues)?;
        }
        Ok(())
    }
}

/// All that was measured of one group.
#[derive(Default)]
pub struct Results {
    cells: Vec<Cell>,
    samples: BTreeMap<(usize, Who), Vec<Measured>>,
}

impl Results {
    pub fn add(&mut self, cell: Cell, who: Who, measured: Measured) {
        let index = match self.cells.iter().position(|c| *c == cell) {
            Some(index) => index,
            None => {
                self.cells.push(cell);
                self.cells.len() - 1
            }
        };
        self.samples.entry((index, who)).or_default().push(measured);
    }

    /// The cells, in the order they were first measured.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Median of `figure` over the rounds.
    pub fn median(&self, cell: &Cell, who: Who, figure: fn(&Measured) -> f64) -> Option<f64> {
        let index = self.cells.iter().position(|c| c == cell)?;
        let samples = self.samples.get(&(index, who))?;
        median(samples.iter().map(figure).collect())
    }

    /// The group as a Markdown table; ratios are to qemu-storage-daemon.
    pub fn table(&self) -> String {
        let mut out = String::from(
            "| load | server | requests/s | server CPU ns/request | p50 µs | p99 µs | requests/s ÷ qsd | CPU ÷ qsd |\n\
             |---|---|--:|--:|--:|--:|--:|--:|\n",
        );
        let base = Who::Server(Kind::Qsd);
        for (index, cell) in self.cells.iter().enumerate() {
            for who in self.samples.keys().filter(|k| k.0 == index).map(|k| k.1) {
                let get = |who, figure| self.median(cell, who, figure);
                let ratio =
                    |figure: fn(&Measured) -> f64| match (get(who, figure), get(base, figure)) {
                        (Some(a), Some(b)) if b > 0.0 => format!("{:.2}", a / b),
                        _ => "–".into(),
                    };
                let number = |figure: fn(&Measured) -> f64| get(who, figure).unwrap_or(f64::NAN);
                // Writing to a string cannot fail.
                let _ = writeln!(
                    out,
                    "| {cell} | {who} | {} | {} | {:.1} | {:.1} | {} | {} |",
                    grouped(number(Measured::per_second)),
                    grouped(number(|m| m.cpu_ns)),
                    number(|m| m.p50_ns as f64) / 1000.0,
                    number(|m| m.p99_ns as f64) / 1000.0,
                    ratio(Measured::per_second),
                    ratio(|m| m.cpu_ns),
                );
            }
        }
        out
    }
}

/// The middle value; the mean of the middle two.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        n if n % 2 == 1 => Some(values[n / 2]),
        n => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

/// A whole number with a comma every three digits.
pub fn grouped(value: f64) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let digits = format!("{:.0}", value);
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_thousands() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
        assert_eq!(grouped(1_234_567.4), "1,234,567");
        assert_eq!(grouped(999.0), "999");
    }
}
