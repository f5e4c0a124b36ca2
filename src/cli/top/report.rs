//! The output of `vublk top`: the difference between two scrapes, as a table and as JSON.

use crate::cli::columns;
use crate::metrics::Sample;
use crate::options::{Map, Value};
use std::collections::BTreeMap;

/// What happened between two looks.
pub struct Report {
    seconds: f64,
    /// Processor time used, in processors.
    cpu: f64,
    resident: f64,
    version: String,
    exports: BTreeMap<String, Export>,
}

#[derive(Default)]
struct Export {
    connected: bool,
    /// Requests and bytes; of reads, of writes, and of all else.
    figures: [Figures; 3],
    in_flight: f64,
    held: f64,
    /// Requests failed to the guest since the export began.
    errors: f64,
    storage_errors: f64,
}

#[derive(Default)]
struct Figures {
    requests: f64,
    bytes: f64,
    /// Upper bounds in seconds, and how many requests are below.
    buckets: Vec<(f64, f64)>,
}

impl Report {
    /// From samples and other, later ones.
    pub fn between(before: &[Sample], now: &[Sample], seconds: f64) -> Report {
        let key = |sample: &Sample| (sample.name.clone(), sample.labels.clone());
        let old: std::collections::HashMap<_, _> =
            before.iter().map(|sample| (key(sample), sample.value)).collect();
        let mut report = Report {
            seconds,
            cpu: 0.0,
            resident: 0.0,
            version: String::new(),
            exports: BTreeMap::new(),
        };
        for sample in now {
            // A counter that is new, or smaller than it was, started at 0.
            let was = old.get(&key(sample)).copied().filter(|was| *was <= sample.value);
            report.add(sample, sample.value - was.unwrap_or(0.0));
        }
        report.cpu /= seconds;
        report
    }

    /// `grown`: by how much a counter has grown meanwhile.
    fn add(&mut self, sample: &Sample, grown: f64) {
        let Some(name) = sample.label("export") else {
            match &*sample.name {
                "process_cpu_seconds_total" => self.cpu = grown,
                "process_resident_memory_bytes" => self.resident = sample.value,
                "vublk_build_info" => {
                    self.version = sample.label("version").unwrap_or_default().to_owned();
                }
                _ => {}
            }
            return;
        };
        let export = self.exports.entry(name.escape_debug().to_string()).or_default();
        let figures = match sample.label("operation") {
            Some("read") => &mut export.figures[0],
            Some("write") => &mut export.figures[1],
            _ => &mut export.figures[2],
        };
        match &*sample.name {
            "vublk_queue_requests_total" => figures.requests += grown,
            "vublk_queue_bytes_total" => figures.bytes += grown,
            "vublk_queue_latency_seconds_bucket" => {
                let bound = sample.label("le").and_then(|le| le.parse().ok());
                let bound = bound.unwrap_or(f64::INFINITY);
                match figures.buckets.iter_mut().find(|(other, _)| *other == bound) {
                    Some((_, below)) => *below += grown,
                    None => figures.buckets.push((bound, grown)),
                }
            }
            "vublk_queue_errors_total" => export.errors += sample.value,
            "vublk_queue_storage_errors_total" => export.storage_errors += sample.value,
            "vublk_queue_in_flight" => export.in_flight += sample.value,
            "vublk_queue_held" => export.held += sample.value,
            "vublk_export_connected" => export.connected = sample.value == 1.0,
            _ => {}
        }
    }

    /// The table for a terminal of this many columns, or for one without an end.
    pub fn table(&self, width: Option<usize>) -> String {
        let Report { version, cpu, resident, seconds, exports } = self;
        let mib = resident / f64::from(1 << 20);
        let mut text = format!(
            "vublk {version}: {:.0} % of a processor, {mib:.1} MiB resident; {} exports, {seconds:.1} s\n",
            cpu * 100.0,
            exports.len()
        );
        let is_narrow = width.is_some_and(|width| width < FULL_WIDTH);
        let shown: Vec<&Column> = COLUMNS.iter().filter(|c| c.is_first || !is_narrow).collect();
        text += &columns::pad("EXPORT", NAME_WIDTH);
        for Column { head, width, .. } in &shown {
            text += &format!(" {head:>width$}");
        }
        for (name, export) in exports {
            let name = if export.connected { name.clone() } else { format!("({name})") };
            text.push('\n');
            text += &columns::pad(columns::cut(&name, NAME_WIDTH), NAME_WIDTH);
            for Column { width, cell, .. } in &shown {
                text += &format!(" {:>width$}", cell(export, *seconds));
            }
        }
        text.push('\n');
        text
    }

    /// The same for scripts.
    pub fn to_value(&self) -> Value {
        let exports = self.exports.iter().map(|(name, export)| {
            let mut map = Map::from_iter([
                ("export", Value::from(&**name)),
                ("connected", Value::from(export.connected)),
                ("in-flight", Value::from(export.in_flight as u64)),
                ("held", Value::from(export.held as u64)),
                ("errors", Value::from(export.errors as u64)),
                ("storage-errors", Value::from(export.storage_errors as u64)),
            ]);
            for (operation, figures) in ["read", "write", "other"].into_iter().zip(&export.figures)
            {
                let ns = |at| {
                    figures.quantile(at).map_or(Value::Null, |s| Value::from((s * 1e9) as u64))
                };
                let per_second = |n: f64| Value::from((n / self.seconds).round() as u64);
                map.insert(
                    operation,
                    Map::from_iter([
                        ("requests-per-second", per_second(figures.requests)),
                        ("bytes-per-second", per_second(figures.bytes)),
                        ("p50-ns", ns(0.5)),
                        ("p99-ns", ns(0.99)),
                    ]),
                );
            }
            Value::Map(map)
        });
        let exports = exports.collect();
        Value::Map(Map::from_iter([
            ("interval-ms", Value::from((self.seconds * 1e3) as u64)),
            ("cpu-percent", Value::from((self.cpu * 100.0).round() as u64)),
            ("resident-bytes", Value::from(self.resident as u64)),
            ("exports", Value::List(exports)),
        ]))
    }
}

/// Columns of an export's name.
const NAME_WIDTH: usize = 14;
/// Columns of the whole table.
const FULL_WIDTH: usize = 112;

/// A column of the table.
struct Column {
    head: &'static str,
    width: usize,
    /// Shown on terminals of 80 columns too.
    is_first: bool,
    /// Its text for an export, in an interval of this many seconds.
    cell: fn(&Export, f64) -> String,
}

const fn first(head: &'static str, width: usize, cell: fn(&Export, f64) -> String) -> Column {
    Column { head, width, is_first: true, cell }
}

const fn more(head: &'static str, width: usize, cell: fn(&Export, f64) -> String) -> Column {
    Column { head, width, is_first: false, cell }
}

/// What needs an operator comes first.
const COLUMNS: [Column; 12] = [
    first("ERRORS", 6, |export, _| export.errors.to_string()),
    first("HELD", 4, |export, _| export.held.to_string()),
    first("READ/s", 8, |export, seconds| export.figures[0].rate(seconds)),
    first("WRITE/s", 8, |export, seconds| export.figures[1].rate(seconds)),
    more("OTHER/s", 8, |export, seconds| export.figures[2].rate(seconds)),
    first("R MB/s", 7, |export, seconds| export.figures[0].megabytes(seconds)),
    first("W MB/s", 7, |export, seconds| export.figures[1].megabytes(seconds)),
    more("R p50", 6, |export, _| export.figures[0].latency(0.5)),
    first("R p99", 6, |export, _| export.figures[0].latency(0.99)),
    more("W p50", 6, |export, _| export.figures[1].latency(0.5)),
    first("W p99", 6, |export, _| export.figures[1].latency(0.99)),
    more("DEPTH", 6, |export, _| export.in_flight.to_string()),
];

impl Figures {
    fn rate(&self, seconds: f64) -> String {
        format!("{:.0}", self.requests / seconds)
    }

    fn megabytes(&self, seconds: f64) -> String {
        format!("{:.1}", self.bytes / seconds / 1e6)
    }

    fn latency(&self, quantile: f64) -> String {
        self.quantile(quantile).map_or("-".to_owned(), duration)
    }

    /// The latency, in seconds, that so much of the requests stayed below: inside its bucket they are taken to be
    /// evenly. None without requests.
    fn quantile(&self, quantile: f64) -> Option<f64> {
        let (_, all) = *self.buckets.last().filter(|(_, all)| *all > 0.0)?;
        let (mut low, mut below) = (0.0, 0.0);
        for &(bound, up_to) in &self.buckets {
            if up_to >= all * quantile {
                let part = (all * quantile - below) / (up_to - below);
                // Of what is above all bounds no more is known.
                return Some(if bound.is_finite() { low + (bound - low) * part } else { low });
            }
            (low, below) = (bound, up_to);
        }
        Some(low)
    }
}

/// Three digits or so, and a unit.
fn duration(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s < 1e-6 => (s * 1e9, "ns"),
        s if s < 1e-3 => (s * 1e6, "us"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    if value < 10.0 { format!("{value:.1}{unit}") } else { format!("{value:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_in_the_bucket_that_holds_it() {
        let figures =
            |buckets: &[(f64, f64)]| Figures { buckets: buckets.to_vec(), ..Figures::default() };
        assert_eq!(figures(&[]).quantile(0.5), None);
        assert_eq!(figures(&[(1.0, 0.0), (f64::INFINITY, 0.0)]).quantile(0.5), None);
        let some = figures(&[(1.0, 0.0), (2.0, 10.0), (4.0, 90.0), (f64::INFINITY, 100.0)]);
        assert_eq!(some.quantile(0.05), Some(1.5));
        assert_eq!(some.quantile(0.5), Some(3.0));
        assert_eq!(some.quantile(0.99), Some(4.0));
    }

    #[test]
    fn times_have_a_unit_that_suits_them() {
        let shown = [2.5e-7, 1.234e-6, 0.0000456, 0.0123, 2.0].map(duration);
        assert_eq!(shown, ["250ns", "1.2us", "46us", "12ms", "2.0s"]);
    }

    #[test]
    fn a_terminal_of_80_columns_has_errors_and_held_requests_first() {
        let exports = BTreeMap::from([("a-name-that-is-long".to_owned(), Export::default())]);
        let report =
            Report { seconds: 1.0, cpu: 0.0, resident: 0.0, version: "0.1.0".into(), exports };
        let narrow = report.table(Some(80));
        assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
        let head: Vec<_> = narrow.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(head[..3], ["EXPORT", "ERRORS", "HELD"]);
        let wide = report.table(Some(FULL_WIDTH));
        assert!(wide.contains("DEPTH") && wide == report.table(None), "{wide}");
        assert!(wide.lines().all(|line| line.chars().count() <= FULL_WIDTH), "{wide}");
    }
}
