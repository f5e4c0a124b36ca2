//! Metrics: the contents of a scrape, and access to it.

mod clients;
mod counts;
mod shown;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use vublk::metrics::{Sample, parse};

use crate::vhost_user::{Daemon, LIMIT};

/// A daemon that offers metrics at `DIR/metrics.sock`, with a monitor.
pub fn daemon(more: &[&str]) -> Daemon {
    crate::monitor::daemon(&[&["--metrics", "unix:DIR/metrics.sock"], more].concat())
}

/// What is answered to a request.
pub fn ask(mut stream: impl Read + Write, request: &str) -> String {
    // Who is refused early may see the connection end first.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

pub fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

pub fn connect_port(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// The text of a page, by plain GET.
pub fn page(stream: impl Read + Write) -> String {
    let answer = ask(stream, "GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
    let (head, page) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("\r\nContent-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", page.len())), "{head}");
    page.to_owned()
}

/// One look at a daemon.
pub struct Scrape(pub Vec<Sample>);

impl Scrape {
    pub fn of(daemon: &Daemon) -> Scrape {
        Scrape(parse(&page(connect(&daemon.path("metrics.sock")))).unwrap())
    }

    /// Scrapes until it is as it should be.
    pub fn until(daemon: &Daemon, is_right: impl Fn(&Scrape) -> bool) -> Scrape {
        let end = Instant::now() + LIMIT;
        loop {
            let scrape = Scrape::of(daemon);
            if is_right(&scrape) {
                return scrape;
            }
            assert!(Instant::now() < end, "{:#?}", scrape.0);
        }
    }

    /// The sum of a metric's samples with these labels, which there are.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let is = |s: &&Sample| s.name == name && labels.iter().all(|(l, v)| s.label(l) == Some(v));
        let found: Vec<_> = self.0.iter().filter(is).map(|sample| sample.value).collect();
        assert!(!found.is_empty(), "no {name} {labels:?}");
        found.iter().sum()
    }

    /// A figure of operations, all queues of `e0` together.
    pub fn operations(&self, figure: &str, operation: &str) -> f64 {
        let name = format!("vublk_queue_{figure}");
        self.sum(&name, &[("export", "e0"), ("operation", operation)])
    }
}
