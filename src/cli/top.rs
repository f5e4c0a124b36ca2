//! `vublk top`: what the exports of a running daemon do, live.
//!
//! It knows what every scraper of the metrics knows: it asks twice and shows the difference.

use super::columns;
use super::outlet::{Outlet, standard};
use super::process::{EndSignals, ended_within};
use super::sockets;
use crate::metrics::{self, Sample};
use crate::options::{Map, Value, json};
use crate::service::SOCKET_PATIENCE;
use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Show what a daemon's exports do, from its metrics
#[derive(clap::Args)]
pub struct Top {
    /// Where the daemon offers its metrics: a path, unix:PATH or ADDRESS:PORT
    #[arg(short, long, value_name = "PATH")]
    socket: String,
    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    /// Show one interval and end
    #[arg(long)]
    once: bool,
    /// Print each interval as a line of JSON
    #[arg(long)]
    json: bool,
}

/// How long an answer may take, and how many bytes it may have.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a wait looks whether a signal has come.
const LOOK: Duration = Duration::from_millis(50);
const LONGEST: usize = 64 << 20;

/// How a good answer begins.
const GOOD: &str = "HTTP/1.1 200 ";

const CLEAR: &str = "\x1b[H\x1b[J";
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

impl Top {
    pub fn run(self) -> super::Outcome {
        let address = match self.socket.parse() {
            Ok(address) => address,
            Err(_) if self.socket.contains('/') || !self.socket.contains(':') => {
                metrics::Address::Unix((&self.socket).into())
            }
            Err(error) => return Err(error.into()),
        };
        let stop = EndSignals::block().descriptor()?;
        let Some(mut before) = look(&address)? else { return Ok(()) };
        let live = !self.once && !self.json && std::io::stdout().is_terminal();
        let out = Outlet::start("stdout", standard(libc::STDOUT_FILENO), |_| Vec::new());
        let out = out.map_err(|e| format!("standard output: {e}"))?;
        let screen = live.then(|| Screen::enter(&out));
        while !ended_within(&stop, self.interval) {
            let Some(now) = look(&address)? else { break };
            let report = Report::between(&before, &now);
            let text = match (self.json, live) {
                (true, _) => json::to_text(&report.to_value()) + "\n",
                (false, true) => CLEAR.to_owned() + &cut(&report.table(), terminal_size()),
                (false, false) => report.table(),
            };
            out.push(text);
            let ended = !wait_for_reader(&out, &stop);
            // A report that could not be written has no reader any more.
            if ended || self.once || out.dropped() > 0 {
                break;
            }
            before = now;
        }
        drop(screen);
        out.drain();
        Ok(())
    }
}

/// Waits until the reader has taken all. False if a signal came first.
fn wait_for_reader(out: &Outlet, stop: &OwnedFd) -> bool {
    while !out.is_empty() {
        if ended_within(stop, LOOK) {
            return false;
        }
    }
    true
}

/// The terminal's other screen, until it is dropped.
struct Screen<'a>(&'a Outlet);

impl Screen<'_> {
    fn enter(out: &Outlet) -> Screen<'_> {
        out.push(ENTER);
        Screen(out)
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        self.0.push(LEAVE);
    }
}

/// Columns and rows.
fn terminal_size() -> (usize, usize) {
    // SAFETY: all zeroes are a valid size, and the kernel writes one.
    let size = unsafe {
        let mut size = std::mem::zeroed::<libc::winsize>();
        libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size);
        size
    };
    match (size.ws_col, size.ws_row) {
        (0, _) | (_, 0) => (80, 24),
        (columns, rows) => (columns.into(), rows.into()),
    }
}

/// What fits; the last line ends without a new one.
fn cut(text: &str, (width, rows): (usize, usize)) -> String {
    let lines = text.lines().take(rows).map(|line| columns::cut(line, width));
    lines.collect::<Vec<_>>().join("\r\n")
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is not a number of seconds"))?;
    match (0.1..=3600.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(format!("'{text}' is not between 0.1 and 3600 seconds")),
    }
}

/// What a daemon has told, and when.
struct Look {
    at: Instant,
    samples: Vec<Sample>,
}

/// Asks the daemon. None if a signal ends the program meanwhile.
fn look(address: &metrics::Address) -> Result<Option<Look>, String> {
    let failed = |error: String| format!("{address}: {error}");
    let answer = match fetch(address) {
        Ok(answer) => answer,
        Err(_) if EndSignals::have_come() => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    let at = Instant::now();
    let (head, page) = answer.split_once("\r\n\r\n").unwrap_or_default();
    if !head.starts_with(GOOD) {
        return Err(failed("it offers no metrics".into()));
    }
    let samples = metrics::parse(page).map_err(failed)?;
    Ok(Some(Look { at, samples }))
}

fn fetch(address: &metrics::Address) -> std::io::Result<String> {
    trait Stream: Read + Write {}
    impl<T: Read + Write> Stream for T {}
    let mut stream: Box<dyn Stream> = match address {
        metrics::Address::Unix(path) => {
            let stream = sockets::connect(path, EndSignals::have_come)?;
            stream.set_read_timeout(Some(LOOK))?;
            Box::new(stream)
        }
        metrics::Address::Tcp(address) => {
            let stream = connect_port(address)?;
            stream.set_read_timeout(Some(LOOK))?;
            Box::new(stream)
        }
    };
    let end = Instant::now() + PATIENCE;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    // Who speaks otherwise, as a monitor does, may never close the connection.
    while answer.len() < LONGEST && GOOD.as_bytes().iter().zip(&answer).all(|(a, b)| a == b) {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
            Err(error)
                if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Err(error);
            }
            Err(_) if Instant::now() > end || EndSignals::have_come() => {
                return Err(std::io::Error::new(ErrorKind::TimedOut, "it does not answer"));
            }
            Err(_) => {}
        }
    }
    String::from_utf8(answer).map_err(std::io::Error::other)
}

/// Connects to a port of this host. One that takes no connections is tried for [`SOCKET_PATIENCE`].
fn connect_port(address: &SocketAddr) -> std::io::Result<TcpStream> {
    let end = Instant::now() + SOCKET_PATIENCE;
    loop {
        match TcpStream::connect_timeout(address, LOOK) {
            Err(error)
                if error.kind() == ErrorKind::TimedOut
                    && Instant::now() < end
                    && !EndSignals::have_come() => {}
            result => return result,
        }
    }
}

/// What happened between two looks.
struct Report {
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
    /// Upper bounds in seconds, and how many requests lie below.
    buckets: Vec<(f64, f64)>,
}

impl Report {
    fn between(before: &Look, now: &Look) -> Report {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let key = |sample: &Sample| (sample.name.clone(), sample.labels.clone());
        let old: std::collections::HashMap<_, _> =
            before.samples.iter().map(|sample| (key(sample), sample.value)).collect();
        let mut report = Report {
            seconds,
            cpu: 0.0,
            resident: 0.0,
            version: String::new(),
            exports: BTreeMap::new(),
        };
        for sample in &now.samples {
            // A counter that is new, or smaller than it was, has begun anew.
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

    fn table(&self) -> String {
        let Report { version, cpu, resident, seconds, exports } = self;
        let mib = resident / f64::from(1 << 20);
        let mut text = format!(
            "vublk {version}: {:.0} % of a processor, {mib:.1} MiB resident; {} exports, {seconds:.1} s\n",
            cpu * 100.0,
            exports.len()
        );
        let mut row = |cells: [String; 13]| {
            let [name, rest @ ..] = cells;
            let widths = [9, 9, 8, 8, 8, 8, 8, 8, 8, 6, 7, 5];
            text += &columns::pad(&name, 16);
            for (cell, width) in rest.iter().zip(widths) {
                text += &format!(" {cell:>width$}");
            }
            text.push('\n');
        };
        row([
            "EXPORT", "READ/s", "WRITE/s", "OTHER/s", "R MB/s", "W MB/s", "R p50", "R p99",
            "W p50", "W p99", "DEPTH", "ERRORS", "HELD",
        ]
        .map(str::to_owned));
        for (name, export) in exports {
            let [read, write, other] = &export.figures;
            let rate = |figures: &Figures| format!("{:.0}", figures.requests / seconds);
            let mb = |figures: &Figures| format!("{:.1}", figures.bytes / seconds / 1e6);
            let at = |figures: &Figures, quantile| {
                figures.quantile(quantile).map_or("-".to_owned(), duration)
            };
            let name = if export.connected { name.clone() } else { format!("({name})") };
            row([
                name,
                rate(read),
                rate(write),
                rate(other),
                mb(read),
                mb(write),
                at(read, 0.5),
                at(read, 0.99),
                at(write, 0.5),
                at(write, 0.99),
                export.in_flight.to_string(),
                export.errors.to_string(),
                export.held.to_string(),
            ]);
        }
        text
    }

    fn to_value(&self) -> Value {
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

impl Figures {
    /// The latency, in seconds, that so much of the requests stayed below: inside its bucket they are
    /// taken to lie evenly. None without requests.
    fn quantile(&self, quantile: f64) -> Option<f64> {
        let (_, all) = *self.buckets.last().filter(|(_, all)| *all > 0.0)?;
        let (mut low, mut below) = (0.0, 0.0);
        for &(bound, up_to) in &self.buckets {
            if up_to >= all * quantile {
                let part = (all * quantile - below) / (up_to - below);
                // Of what lies above all bounds no more is known.
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
    fn a_screen_shows_what_fits() {
        assert_eq!(cut("abcd\nefgh\nijkl\n", (3, 2)), "abc\r\nefg");
    }
}
