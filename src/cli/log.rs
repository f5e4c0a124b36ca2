//! The log: lines on standard error, for people or as JSON, and no more of them than can be read.
//!
//! The rule held here: whatever guests, front ends and failing storage do, the log stays small. One limiter holds for
//! all lines: of each place in the program, and of each export there, [`BURST`] lines come at once, then one in each
//! [`PERIOD`], with the number of those left out. With debug lines, none is left out.
//!
//! A thread of its own writes the lines ([`Outlet`]): no other thread waits for the reader of standard error.

use super::outlet::{Outlet, standard};
use crate::options::{Map, Value, bytes, json};
use crate::tools::output::errln;
use ::log::{Level, LevelFilter, Metadata, Record};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::HashMap;
use std::panic::PanicHookInfo;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Lines of a kind that come at once.
const BURST: u32 = 8;

/// After those, one comes in this time.
const PERIOD: Duration = Duration::from_secs(10);

/// Kinds of lines that are remembered. Places are few, but exports come and go.
const KINDS: usize = 4096;

// A doc comment here would become the description of the commands that take these options.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct LogArgs {
    /// How log lines are written
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// The process's log, once it has started. The last lines of the program go there as well.
static LINES: OnceLock<Arc<Lines>> = OnceLock::new();

/// Logs to standard error from now on: warnings, and with `verbosity` more. RUST_LOG overrides this. Starts a thread:
/// to be called after any fork, and with the signals blocked that end the program.
///
/// # Errors
/// No thread can be started.
pub fn start(verbosity: u8, args: LogArgs) -> Result<(), String> {
    let level = match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| level.into());
    let mut builder = env_filter::Builder::new();
    let wrong = builder.try_parse(&wanted).err();
    if wrong.is_some() {
        // A level is always right.
        let _ = builder.try_parse(level);
    }
    let filter = builder.build();
    let most = filter.filter();
    let limiter = (most < LevelFilter::Debug).then(Mutex::default);
    let lines = Lines::start(args.log_format).map_err(|e| format!("cannot start the log: {e}"))?;
    let lines = LINES.get_or_init(|| Arc::new(lines)).clone();
    let panics = lines.clone();
    std::panic::set_hook(Box::new(move |info| panics.panicked(info)));
    if ::log::set_boxed_logger(Box::new(Log { filter, lines, limiter })).is_ok() {
        ::log::set_max_level(most);
    }
    if let Some(error) = wrong {
        ::log::warn!("RUST_LOG: {error}");
    }
    Ok(())
}

/// Waits until the lines so far are written, for a bounded time. For a process that ends, or is about to have
/// another standard error.
pub fn drain() {
    if let Some(lines) = LINES.get() {
        lines.outlet.drain();
    }
}

/// Lines that were dropped because standard error was not read, or could not be written.
pub fn dropped() -> u64 {
    LINES.get().map_or(0, |lines| lines.outlet.dropped())
}

/// Reports why the program ends: its name, the error, and lines of advice.
pub fn report_failure(program: &str, lines: impl Iterator<Item = String>) {
    let messages: Vec<String> = lines.collect();
    match LINES.get() {
        Some(lines) if lines.format == LogFormat::Json => {
            lines.write(Level::Error, "vublk", None, &messages.join(" "));
        }
        Some(lines) => {
            let text = format!("{program}: {}\n", messages.join("\n"));
            lines.outlet.push(bytes::bytes_of(&text));
        }
        None => errln!("{program}: {}", messages.join("\n")),
    }
    drain();
}

struct Log {
    filter: env_filter::Filter,
    lines: Arc<Lines>,
    /// `None`: all lines come.
    limiter: Option<Mutex<Limiter>>,
}

impl ::log::Log for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let export = record.key_values().get("export".into()).map(|export| export.to_string());
        let export = export.filter(|export| !export.is_empty());
        let export = export.as_deref();
        let (level, target) = (record.level(), record.target());
        if let Some(limiter) = &self.limiter {
            let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
            let place = Place { target: target.into(), line: record.line().unwrap_or(0) };
            let verdict = limiter.ask((place, export.map(Into::into)), Instant::now());
            drop(limiter);
            match verdict {
                Verdict::Say { suppressed: 0 } => {}
                Verdict::Say { suppressed } => {
                    let line = format!("{suppressed} more suppressed of lines like the next");
                    self.lines.write(level, target, export, &line);
                }
                Verdict::Suppress => return,
            }
        }
        self.lines.write(level, target, export, &record.args().to_string());
    }

    /// Reports the number of lines that were left out since the last report, and waits as [`drain`] does. For a
    /// process that ends.
    fn flush(&self) {
        if let Some(limiter) = &self.limiter {
            let untold = limiter.lock().unwrap_or_else(PoisonError::into_inner).take_suppressed();
            for ((Place { target, line }, export), suppressed) in untold {
                let line =
                    format!("{suppressed} more suppressed of lines from {target}, line {line}");
                self.lines.write(Level::Info, &target, export.as_deref(), &line);
            }
        }
        self.lines.outlet.drain();
    }
}

/// Writes lines to standard error.
struct Lines {
    format: LogFormat,
    outlet: Outlet,
}

impl Lines {
    fn start(format: LogFormat) -> std::io::Result<Lines> {
        let missing_line = move |dropped| {
            let message = match dropped {
                1 => "1 log line was dropped".to_owned(),
                _ => format!("{dropped} log lines were dropped"),
            };
            line(format, Level::Warn, "vublk", None, &message)
        };
        Ok(Lines {
            format,
            outlet: Outlet::start("log", standard(libc::STDERR_FILENO), missing_line)?,
        })
    }

    fn write(&self, level: Level, target: &str, export: Option<&str>, message: &str) {
        self.outlet.push(line(self.format, level, target, export, message));
    }

    /// Reports a panic, past filter and limiter, and waits as [`drain`] does: the process may be about to end.
    fn panicked(&self, info: &PanicHookInfo<'_>) {
        let thread = std::thread::current();
        let mut message = format!("thread '{}' {info}", thread.name().unwrap_or("unnamed"));
        // RUST_BACKTRACE asks for it.
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            message += &format!("\n{backtrace}");
        }
        self.write(Level::Error, "vublk", None, &message);
        self.outlet.drain();
    }
}

/// A line of the log, its end included. Names in text are written as the bytes that they are.
fn line(
    format: LogFormat,
    level: Level,
    target: &str,
    export: Option<&str>,
    message: &str,
) -> Vec<u8> {
    match format {
        LogFormat::Text => {
            let export = export.map_or(String::new(), |export| format!("{export}: "));
            bytes::bytes_of(&format!("[{level:<5}] {export}{message}\n")).into_owned()
        }
        LogFormat::Json => {
            let level = level.as_str().to_ascii_lowercase();
            let mut object = Map::from_iter([
                ("time", Value::from(time())),
                ("level", Value::from(level)),
                ("target", Value::from(target)),
                ("message", Value::from(message)),
            ]);
            if let Some(export) = export {
                object.insert("export", export);
            }
            (json::to_text(&Value::Map(object)) + "\n").into_bytes()
        }
    }
}

/// Now, as RFC 3339 has it.
fn time() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = now.as_secs() as libc::time_t;
    // SAFETY: all zeroes are a valid tm, and both places are locals.
    let tm = unsafe {
        let mut tm = std::mem::zeroed::<libc::tm>();
        libc::gmtime_r(&seconds, &mut tm);
        tm
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        now.subsec_millis()
    )
}

/// Where a line comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    target: String,
    line: u32,
}

type Kind = (Place, Option<String>);

/// How many lines of each kind may still come.
#[derive(Default)]
struct Limiter {
    kinds: HashMap<Kind, Allowance>,
}

struct Allowance {
    left: u32,
    /// Since when what is left grows.
    since: Instant,
    /// Lines left out since the last that came.
    suppressed: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Say { suppressed: u64 },
    Suppress,
}

impl Limiter {
    fn ask(&mut self, kind: Kind, now: Instant) -> Verdict {
        if self.kinds.len() >= KINDS && !self.kinds.contains_key(&kind) {
            self.kinds.retain(|_, allowance| !allowance.is_full(now));
            // All remembered kinds are at their limit: no new kind is logged meanwhile.
            if self.kinds.len() >= KINDS {
                return Verdict::Suppress;
            }
        }
        let full = || Allowance { left: BURST, since: now, suppressed: 0 };
        let allowance = self.kinds.entry(kind).or_insert_with(full);
        allowance.grow(now);
        if allowance.left == 0 {
            allowance.suppressed += 1;
            return Verdict::Suppress;
        }
        allowance.left -= 1;
        Verdict::Say { suppressed: std::mem::take(&mut allowance.suppressed) }
    }

    fn take_suppressed(&mut self) -> Vec<(Kind, u64)> {
        let untold = self.kinds.iter_mut().filter(|(_, allowance)| allowance.suppressed > 0);
        untold.map(|(kind, all)| (kind.clone(), std::mem::take(&mut all.suppressed))).collect()
    }
}

impl Allowance {
    fn grow(&mut self, now: Instant) {
        let periods = now.duration_since(self.since).as_nanos() / PERIOD.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        if self.left.saturating_add(periods) >= BURST {
            (self.left, self.since) = (BURST, now);
        } else {
            self.left += periods;
            self.since += PERIOD * periods;
        }
    }

    /// Whether forgetting it changes nothing.
    fn is_full(&self, now: Instant) -> bool {
        let missing = BURST - self.left;
        self.suppressed == 0 && now.duration_since(self.since) >= PERIOD * missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(line: u32, export: &str) -> Kind {
        (Place { target: "here".into(), line }, Some(export.into()))
    }

    const SAY: Verdict = Verdict::Say { suppressed: 0 };

    #[test]
    fn of_a_flood_a_burst_comes_and_then_a_line_now_and_then_with_the_number_of_the_others() {
        let (mut limiter, began) = (Limiter::default(), Instant::now());
        let mut ask = |after, line, export| limiter.ask(kind(line, export), began + after);
        for _ in 0..BURST {
            assert_eq!(ask(Duration::ZERO, 1, "a"), SAY);
        }
        for _ in 0..1000 {
            assert_eq!(ask(PERIOD / 2, 1, "a"), Verdict::Suppress);
        }
        // Others have their own.
        assert_eq!([ask(PERIOD / 2, 1, "b"), ask(PERIOD / 2, 2, "a")], [SAY, SAY]);
        assert_eq!(ask(PERIOD, 1, "a"), Verdict::Say { suppressed: 1000 });
        assert_eq!(ask(PERIOD, 1, "a"), Verdict::Suppress);
        assert_eq!(ask(PERIOD * 2, 1, "a"), Verdict::Say { suppressed: 1 });
        // After a quiet time there is a burst again.
        let later = PERIOD * (2 + BURST);
        for _ in 0..BURST {
            assert_eq!(ask(later, 1, "a"), SAY);
        }
        assert_eq!(ask(later, 1, "a"), Verdict::Suppress);
        assert_eq!(limiter.take_suppressed(), [(kind(1, "a"), 1)]);
        assert_eq!(limiter.take_suppressed(), []);
    }

    /// Runs this test's program again, in a process that panics with a log in that format.
    fn panicking(format: &str) -> std::process::Command {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let name =
            "cli::log::tests::a_panic_is_reported_in_the_form_of_the_log_and_ends_the_process";
        command.args(["--exact", name, "--nocapture"]).env("VUBLK_TEST_PANIC", format);
        command.env("RUST_BACKTRACE", "0");
        command
    }

    #[test]
    fn a_panic_is_reported_in_the_form_of_the_log_and_ends_the_process() {
        use crate::io::{Worker, WorkerOptions};
        use std::os::unix::process::ExitStatusExt;
        if let Ok(format) = std::env::var("VUBLK_TEST_PANIC") {
            let json = format == "json";
            let log_format = if json { LogFormat::Json } else { LogFormat::Text };
            start(0, LogArgs { log_format }).unwrap();
            let worker = Worker::start("panics", WorkerOptions::default()).unwrap();
            worker.send(|_| panic!("on purpose"));
            std::thread::sleep(Duration::from_secs(60));
            return;
        }
        for (format, form) in [
            ("text", "[ERROR] thread 'panics' panicked at "),
            ("json", "\"message\": \"thread 'panics' panicked at "),
        ] {
            let output = panicking(format).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{said}");
            assert!(said.contains(form) && said.contains("on purpose"), "{said}");
            assert!(said.contains("the process ends"), "{said}");
        }
        // Nor does it wait for a reader.
        let (_reader, mut writer) = std::io::pipe().unwrap();
        // SAFETY: names no memory, and the descriptor is open.
        let set = |writer: &std::io::PipeWriter, flags: libc::c_int| unsafe {
            libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(writer), libc::F_SETFL, flags)
        };
        set(&writer, libc::O_NONBLOCK);
        while std::io::Write::write(&mut writer, &[b' '; 4096]).is_ok() {}
        while std::io::Write::write(&mut writer, b" ").is_ok() {}
        set(&writer, 0);
        let status = panicking("text").stderr(writer).stdout(std::process::Stdio::null()).status();
        assert_eq!(status.unwrap().signal(), Some(libc::SIGABRT));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        for export in 0..2 * KINDS {
            limiter.ask(kind(0, &export.to_string()), now);
        }
        assert_eq!(limiter.kinds.len(), KINDS);
        assert_eq!(limiter.ask(kind(1, "new"), now + PERIOD), SAY);
        assert_eq!(limiter.kinds.len(), 1);
    }
}
