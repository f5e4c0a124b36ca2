//! `vublk top`: what the exports of a running daemon do, live.
//!
//! It knows what every scraper of the metrics knows: it asks twice and shows the difference. It outlives the daemon: a
//! restart is what an operator watches.

mod keys;
mod report;

use super::columns;
use super::outlet::{Outlet, standard};
use super::process::{EndSignals, ended_within};
use super::sockets;
use crate::metrics::{self, Sample};
use crate::options::json;
use crate::service::SOCKET_PATIENCE;
use crate::tools::output::errln;
use keys::{Event, Keys};
use report::Report;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Show what a daemon's exports do, from its metrics
#[derive(clap::Args)]
pub struct Top {
    /// Where the daemon offers its metrics: a path, unix:PATH or ADDRESS:PORT
    #[arg(short, long, value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
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
    /// Seconds that an answer may take
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = sockets::parse_timeout)]
    timeout: Duration,
}

/// How often a wait looks whether a signal has come.
const LOOK: Duration = Duration::from_millis(50);
/// Longest answer, in bytes.
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
        let Some(first) = self.scrape(&address)? else { return Ok(()) };
        let live = !self.once && !self.json && std::io::stdout().is_terminal();
        let out = Outlet::start("stdout", standard(libc::STDOUT_FILENO), |_| Vec::new());
        let out = out.map_err(|e| format!("standard output: {e}"))?;
        let screen = live.then(|| Screen::enter(&out));
        let result = self.watch(&address, first, &stop, &out, live);
        drop(screen);
        out.drain();
        result
    }

    /// Shows what happens until a signal or a key ends it, or the reader has gone.
    fn watch(
        &self,
        address: &metrics::Address,
        first: Scrape,
        stop: &OwnedFd,
        out: &Outlet,
        live: bool,
    ) -> super::Outcome {
        let keys = if live { Keys::open() } else { None };
        let mut before = Some(first);
        let mut shows_help = false;
        loop {
            match keys::wait(keys.as_ref(), stop, self.interval) {
                Event::End | Event::Key(b'q') => return Ok(()),
                Event::Key(b'?') => shows_help = !shows_help,
                Event::Key(_) => continue,
                Event::Time => {}
            }
            let text = match self.scrape(address) {
                Ok(None) => return Ok(()),
                Ok(Some(now)) => {
                    let text = before.as_ref().map(|before| self.show(before, &now, live));
                    before = Some(now);
                    text.unwrap_or_default()
                }
                Err(error) if self.once => return Err(error.into()),
                Err(error) => {
                    // Once for each time that it is away; a screen shows it as long as that takes.
                    let is_new = before.take().is_some();
                    if !live && is_new {
                        errln!("vublk: {error}: waiting for the daemon");
                    }
                    if live { format!("{error}\nwaiting for the daemon\n") } else { String::new() }
                }
            };
            if live {
                let text = if shows_help { HELP } else { &*text };
                out.push(CLEAR.to_owned() + &cut(text, terminal_size()));
            } else if !text.is_empty() {
                out.push(text);
            }
            let ended = !wait_for_reader(out, stop);
            // A report that could not be written has no reader any more.
            if ended || self.once || out.dropped() > 0 {
                return Ok(());
            }
        }
    }

    /// What has happened between two looks.
    fn show(&self, before: &Scrape, now: &Scrape, live: bool) -> String {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let report = Report::between(&before.samples, &now.samples, seconds);
        match self.json {
            true => json::to_text(&report.to_value()) + "\n",
            false => report.table(live.then(|| terminal_size().0)),
        }
    }

    /// Asks the daemon. None if a signal ends the program meanwhile.
    fn scrape(&self, address: &metrics::Address) -> Result<Option<Scrape>, String> {
        let failed = |error: String| format!("{address}: {error}");
        let answer = match fetch(address, self.timeout) {
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
        Ok(Some(Scrape { at, samples }))
    }
}

/// What `?` shows.
const HELP: &str = "\
q  quit
?  this help, and back

A name in parentheses: no guest is connected. ERRORS: requests that failed for the guest since the export began.
HELD: requests that the storage failed and that are tried again. R and W: reads and writes; MB/s: 10^6 bytes;
p50, p99: half, and 99 of 100, took less. DEPTH: requests in flight.
";

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
struct Scrape {
    at: Instant,
    samples: Vec<Sample>,
}

/// The answer, which may take so long.
fn fetch(address: &metrics::Address, timeout: Duration) -> std::io::Result<String> {
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
    let end = Instant::now() + timeout;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_shows_what_fits() {
        assert_eq!(cut("abcd\nefgh\nijkl\n", (3, 2)), "abc\r\nefg");
    }
}
