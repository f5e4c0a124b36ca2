//! Clients of metrics: permitted ones, others, and badly behaved ones.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use vublk_testkit::Server;

use super::{Scrape, ask, connect, connect_port, daemon, page};
use crate::cli::{VUBLK, directory, run, stderr};
use crate::vhost_user::{Daemon, LIMIT, export_of};

const NULL: [&str; 2] = ["--blockdev", "driver=null-co,node-name=d0"];

/// A port that is free; a moment later it may not be, so whoever uses it tries again with another.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn clients_that_say_nothing_or_nonsense_hold_up_nobody() {
    let export = export_of("d0", 0);
    let daemon = daemon(&[&NULL[..], &["--export", &export]].concat());
    let path = daemon.path("metrics.sock");
    let silent: Vec<_> = (0..20).map(|_| connect(&path)).collect();
    for mut client in (0..20).map(|_| connect(&path)) {
        client.write_all(b"GET /metr").unwrap();
        assert_eq!(Scrape::of(&daemon).sum("vublk_export_info", &[]), 1.0);
    }
    let status = |request: &str| {
        let answer = ask(connect(&path), request);
        answer.lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
    assert_eq!(status("PUT /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
    assert_eq!(status("{\"execute\": 1}\n\n"), "HTTP/1.1 400 Bad Request");
    // It may see no more than that the connection ends: it has not read its answer before.
    let long = format!("GET /metrics HTTP/1.1\r\na: {}", "b".repeat(1 << 20));
    let answer = status(&long);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    // Some that want an answer and do not read it.
    for mut client in &silent {
        let _ = client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
    }
    assert_eq!(Scrape::of(&daemon).sum("vublk_export_info", &[]), 1.0);
    daemon.end();
    assert!(!path.exists(), "its file is left");
}

#[test]
fn a_scraper_may_ask_for_openmetrics_or_for_the_head_alone() {
    let daemon = daemon(&NULL);
    let connect = || connect(&daemon.path("metrics.sock"));
    let accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5";
    let open = ask(connect(), &format!("GET /metrics HTTP/1.1\r\n{accept}\r\n\r\n"));
    assert!(
        open.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0"),
        "{open}"
    );
    assert!(open.contains("\n# TYPE process_cpu_seconds counter\n"), "{open}");
    assert!(open.ends_with("\n# EOF\n"), "{open}");
    let head = ask(connect(), "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(page(connect()).contains("\n# TYPE process_cpu_seconds_total counter\n"));
}

#[test]
fn metrics_are_offered_on_a_port_of_the_loopback_interface() {
    let dir = directory();
    let started = (0..20).find_map(|_| {
        let (port, socket) = (free_port(), dir.path().join(format!("{}.sock", free_port())));
        let address = format!("127.0.0.1:{port}");
        let image = dir.path().join("disk.img");
        let (image, socket) = (image.to_str().unwrap(), socket.to_str().unwrap());
        let arguments = ["serve", "-f", "raw", image, "-s", socket, "--metrics", &address];
        let mut command = std::process::Command::new(VUBLK);
        command.args(arguments).stdout(std::process::Stdio::null());
        let mut server = Server::spawn(command).unwrap();
        let listens = || std::net::TcpStream::connect(&*address).is_ok();
        let ready = server.wait_until("its port", LIMIT, listens).is_ok();
        ready.then_some((server, port))
    });
    let (mut server, port) = started.expect("a free port");
    assert!(page(connect_port(port)).contains("vublk_export_connected{export=\"disk\"} 0\n"));
    server.signal(libc::SIGTERM).unwrap();
    assert!(server.wait_exit(LIMIT).unwrap().success());
}

#[test]
fn other_addresses_and_sockets_in_use_are_refused_in_one_line() {
    let dir = directory();
    let refused = |program: &[&str], arguments: &[&str], words: &str| {
        let output = run(dir.path(), program, arguments);
        let said = stderr(&output);
        assert_ne!(output.status.code(), Some(0), "{said}");
        assert!(said.contains(words), "{said}");
        said
    };
    let serve = |at| ["-f", "raw", "disk.img", "-s", "a.sock", "--metrics", at];
    let outside = "is not an address of the loopback interface";
    refused(&[VUBLK, "serve"], &serve("0.0.0.0:9100"), outside);
    let said = refused(&[VUBLK, "daemon"], &["--metrics", "[::]:9100"], outside);
    assert_eq!(said.lines().count(), 1, "{said}");
    let taken = UnixListener::bind(dir.path().join("m.sock")).unwrap();
    let words = "--metrics: another process listens on the socket 'm.sock'";
    let said = refused(&[VUBLK, "daemon"], &["--metrics", "unix:m.sock"], words);
    assert_eq!(said.lines().count(), 1, "{said}");
    drop(taken);
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    let words = format!("--metrics: cannot listen on {address}: Address already in use");
    refused(&[VUBLK, "serve"], &serve(&address), &words);
    // The file of a daemon that was killed is no obstacle.
    let daemon =
        Daemon::start(&["--metrics", &format!("unix:{}", dir.path().join("m.sock").display())]);
    page(connect(&dir.path().join("m.sock")));
    drop(daemon);
}
