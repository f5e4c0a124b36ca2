//! Displays of metrics: `vublk top`, and the dashboard for Grafana.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use vublk_testkit::{Options, Server};

use super::{Scrape, connect, daemon, page};
use crate::cli::{VUBLK, directory, run, stderr};
use crate::vhost_user::{Daemon, LIMIT, export_of};

fn two_disks() -> Daemon {
    let exports = [export_of("d0", 0), export_of("d1", 1)].map(|export| export + ",writable=on");
    daemon(&[
        "--blockdev",
        "driver=null-co,node-name=d0,read-zeroes=on",
        "--export",
        &exports[0],
        "--blockdev",
        "driver=null-co,node-name=d1",
        "--export",
        &exports[1],
    ])
}

/// What `vublk top` prints while a guest reads and writes.
fn top(daemon: &Daemon, arguments: &[&str]) -> String {
    let mut command = Command::new(VUBLK);
    command.args(["top", "--interval", "0.5", "--socket"]).arg(daemon.path("metrics.sock"));
    let mut disk = daemon.open(&Options::default());
    disk.read(0, &mut [0; 4096]).unwrap();
    let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        disk.read(0, &mut [0; 4096]).unwrap();
        disk.write(0, &[0; 512]).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn top_shows_what_each_export_does() {
    let daemon = two_disks();
    let text = top(&daemon, &["--once"]);
    let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let [first, head, one, two] = &*lines else { panic!("{text}") };
    assert_eq!(first[..2], ["vublk", "0.1.0:"]);
    assert_eq!((&head[..3], head.last()), (&["EXPORT", "ERRORS", "HELD"][..], Some(&"DEPTH")));
    assert_eq!((one[0], two[0]), ("e0", "(e1)"), "the other is not connected:\n{text}");
    assert!(one[3].parse::<u64>().unwrap() > 0 && one[4].parse::<u64>().unwrap() > 0, "{text}");
    assert_eq!(two[3..5], ["0", "0"], "{text}");
    assert!(!text.contains('\x1b'), "no terminal, no escapes: {text:?}");

    let text = top(&daemon, &["--once", "--json"]);
    let seen: Value = serde_json::from_str(&text).unwrap();
    let [one, two] = &**seen["exports"].as_array().unwrap() else { panic!("{text}") };
    assert_eq!((&one["export"], &one["connected"]), (&"e0".into(), &true.into()));
    assert_eq!((&two["export"], &two["connected"]), (&"e1".into(), &false.into()));
    let read = &one["read"];
    let (requests, bytes) = (&read["requests-per-second"], &read["bytes-per-second"]);
    let (requests, bytes) = (requests.as_f64().unwrap(), bytes.as_f64().unwrap());
    assert!(requests > 0.0 && (bytes / requests / 4096.0 - 1.0).abs() < 0.1, "{text}");
    let (p50, p99) = (read["p50-ns"].as_u64().unwrap(), read["p99-ns"].as_u64().unwrap());
    assert!(p50 > 0 && p50 <= p99, "{text}");
    assert_eq!(two["read"]["p50-ns"], Value::Null);
    assert_eq!((&one["errors"], &one["held"]), (&0.into(), &0.into()));
}

#[test]
fn top_goes_on_when_the_daemon_has_been_restarted() {
    let mut daemon = two_disks();
    let mut command = Command::new(VUBLK);
    command.args(["top", "--json", "--interval", "0.1", "--socket"]);
    let (printed, stdout) = std::io::pipe().unwrap();
    command.arg(daemon.path("metrics.sock")).stdout(stdout);
    let mut top = Server::spawn(command).unwrap();
    let mut lines = BufReader::new(printed).lines();
    lines.next().unwrap().unwrap();
    daemon.server.signal(libc::SIGKILL).unwrap();
    daemon.server.wait_exit(LIMIT).unwrap();
    let end = Instant::now() + LIMIT;
    while !top.stderr().contains(": waiting for the daemon\n") {
        assert!(Instant::now() < end, "{}", top.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    daemon.restart();
    // Nobody was connected before.
    let disk = daemon.open(&Options::default());
    let connected = lines.find(|line| {
        let seen: Value = serde_json::from_str(line.as_ref().unwrap()).unwrap();
        seen["exports"][0]["connected"] == true
    });
    assert!(connected.is_some(), "{}", top.stderr());
    drop(disk);
    top.signal(libc::SIGTERM).unwrap();
    assert!(top.wait_exit(LIMIT).unwrap().success());
}

#[test]
fn top_says_in_one_line_why_it_shows_nothing() {
    let dir = directory();
    let refused = |socket: &str, words: &str| {
        let output = run(dir.path(), &[VUBLK, "top"], &["--once", "--socket", socket]);
        let said = stderr(&output);
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains(words), "{said}");
    };
    refused("none.sock", "unix:none.sock: No such file or directory");
    refused("10.0.0.1:9100", "is not an address of the loopback interface");
    // A monitor has no metrics.
    let daemon = crate::monitor::daemon(&[]);
    refused(daemon.path("m.sock").to_str().unwrap(), "it offers no metrics");
}

/// The words in a query that can only be a metric's name.
fn names(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("vublk_") || word.starts_with("process_"))
}

#[test]
fn every_metric_of_the_dashboard_is_in_a_scrape() {
    let daemon = two_disks();
    daemon.open(&Options::default()).read(0, &mut [0; 512]).unwrap();
    let scrape = Scrape::until(&daemon, |scrape| {
        scrape.0.iter().any(|sample| sample.name == "vublk_queue_latency_seconds_bucket")
    });
    let offered: BTreeSet<_> = scrape.0.iter().map(|sample| &*sample.name).collect();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/examples/grafana-dashboard.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let targets = panel["targets"].as_array().unwrap();
        queries.extend(targets.iter().map(|target| target["expr"].as_str().unwrap()));
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        queries.extend(variable["definition"].as_str());
    }
    assert!(queries.len() > 10, "{queries:?}");
    for query in queries {
        assert!(names(query).next().is_some(), "no metric in {query}");
        for name in names(query) {
            assert!(offered.contains(name), "{query}: there is no {name}");
        }
    }
    // And each has its help and its type.
    let page = page(connect(&daemon.path("metrics.sock")));
    for name in offered {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| {
            name.strip_suffix(end)
                .filter(|name| page.contains(&format!("# TYPE {name} histogram\n")))
        });
        let family = family.unwrap_or(name);
        for word in ["HELP", "TYPE"] {
            assert_eq!(page.matches(&format!("# {word} {family} ")).count(), 1, "{word} {family}");
        }
    }
}
