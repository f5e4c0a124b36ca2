//! Clients that come, go, send garbage or do not read.

use super::{Client, daemon};
use crate::vhost_user::{Daemon, LIMIT, seed};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const NULL: [&str; 2] = ["--blockdev", "driver=null-co,node-name=n,size=1048576"];

#[test]
fn a_reconnect_gives_a_new_greeting_and_must_negotiate_again() {
    let daemon = daemon(&[]);
    for _ in 0..3 {
        let mut client = Client::greet(&daemon.path("m.sock"));
        assert_eq!(client.greeting["QMP"]["capabilities"], json!([]));
        assert_eq!(client.greeting["QMP"]["version"]["qemu"]["major"], json!(7));
        let refused = client.refusal("query-block", json!({}));
        assert_eq!(refused, "Expecting capabilities negotiation with 'qmp_capabilities'");
        client.run("qmp_capabilities", json!({}));
        assert_eq!(client.run("query-block", json!({})), json!([]));
    }
}

#[test]
fn a_second_client_waits_until_the_first_has_gone() {
    let daemon = daemon(&[]);
    let mut first = Client::connect(&daemon.path("m.sock"));
    let mut second = UnixStream::connect(daemon.path("m.sock")).unwrap();
    // The first is served while the second waits.
    first.run("query-block", json!({}));
    second.set_nonblocking(true).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    second.set_nonblocking(false).unwrap();
    second.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut greeting = [0; 6];
    second.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"{\"QMP\"");
}

#[test]
fn events_go_to_all_monitors_that_have_negotiated() {
    let mut arguments = vec![
        "--chardev",
        "socket,id=two,path=DIR/two.sock,server=on,wait=off",
        "--monitor",
        "{\"chardev\":\"two\",\"pretty\":false}",
    ];
    arguments.extend(NULL);
    let export = "type=vhost-user-blk,id=e0,node-name=n,addr.type=unix,addr.path=DIR/e0.sock";
    arguments.extend(["--export", export]);
    let daemon = daemon(&arguments);
    let mut one = Client::connect(&daemon.path("m.sock"));
    let mut two = Client::connect(&daemon.path("two.sock"));
    one.run("block-export-del", json!({"id": "e0"}));
    for client in [&mut one, &mut two] {
        let event = client.event();
        assert_eq!(event["event"], json!("BLOCK_EXPORT_DELETED"));
        assert_eq!(event["data"], json!({"id": "e0"}));
        assert!(event["timestamp"]["seconds"].is_u64());
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
    }
    // Nothing but the reply follows, for a monitor that has not negotiated.
    drop(two);
    let mut two = Client::greet(&daemon.path("two.sock"));
    one.run(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "e1", "node-name": "n",
               "addr": {"type": "unix", "path": daemon.path("e1.sock")}}),
    );
    one.run("block-export-del", json!({"id": "e1"}));
    two.run("qmp_capabilities", json!({}));
    assert!(two.events.is_empty());
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody_else() {
    let daemon = daemon(&[
        "--chardev",
        "socket,id=two,path=DIR/two.sock,server=on,wait=off",
        "--monitor",
        "two",
        NULL[0],
        NULL[1],
    ]);
    let mut slow = Client::connect(&daemon.path("two.sock"));
    let stream = slow.stream.get_mut();
    stream.set_nonblocking(true).unwrap();
    // Until the daemon takes no more: its memory for this client is bounded.
    let mut sent = 0usize;
    let line = b"{\"execute\":\"query-named-block-nodes\"}".repeat(100);
    let mut at_rest = 0;
    while at_rest < 20 {
        match stream.write(&line) {
            Ok(n) => (sent, at_rest) = (sent + n, 0),
            Err(_) => {
                std::thread::sleep(Duration::from_millis(5));
                at_rest += 1;
            }
        }
        assert!(sent < 64 << 20, "the daemon takes requests without end");
    }
    let mut quick = Client::connect(&daemon.path("m.sock"));
    quick.run("query-block", json!({}));
    assert_eq!(daemon_end(daemon), Some(0));
}

#[test]
fn garbage_ends_neither_the_daemon_nor_the_connection_for_good() {
    let daemon = daemon(&NULL);
    let mut random = fastrand::Rng::with_seed(seed());
    for _ in 0..50 {
        let mut stream = UnixStream::connect(daemon.path("m.sock")).unwrap();
        let mut bytes = b"{\"execute\":\"qmp_capabilities\"}".to_vec();
        let pieces: [&[u8]; 8] =
            [b"{", b"}", b"\"", b"[", b"]", b"{\"execute\":", b"\"query-version\"", b","];
        for _ in 0..random.usize(..3000) {
            match random.u8(..3) {
                0 => bytes.push(random.u8(..)),
                _ => bytes.extend_from_slice(pieces[random.usize(..8)]),
            }
        }
        let _ = stream.write_all(&bytes);
    }
    Client::connect(&daemon.path("m.sock")).run("query-block", json!({}));
    assert_eq!(daemon_end(daemon), Some(0));
}

#[test]
fn quit_replies_reports_the_exports_and_ends_with_success() {
    let export = "type=vhost-user-blk,id=e0,node-name=n,addr.type=unix,addr.path=DIR/e0.sock";
    let mut daemon = daemon(&[&NULL[..], &["--export", export]].concat());
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("quit", json!({}));
    assert_eq!(client.event()["data"], json!({"id": "e0"}));
    assert_eq!(client.receive(), None);
    let status = daemon.server.wait_exit(Duration::from_secs(60)).unwrap();
    assert_eq!(status.code(), Some(0));
    for name in ["m.sock", "e0.sock", "pid"] {
        assert!(!daemon.path(name).exists(), "{name} is left");
    }
}

#[test]
fn a_monitor_on_a_loopback_port_and_one_in_pretty_print() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let chardev = format!("socket,id=m,host=127.0.0.1,port={port},server=on,wait=off");
    let daemon = Daemon::start(&["--chardev", &chardev, "--monitor", "chardev=m,pretty=on"]);
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}").unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("{\n    \"QMP\": {\n        \"version\""), "{said}");
    assert!(
        said.ends_with("}\r\n{\n    \"return\": {}\n}\r\n{\n    \"return\": {}\n}\r\n"),
        "{said}"
    );
    drop(daemon);
}

/// Sets the limit on a process's descriptors; gives the one before.
fn limit_descriptors(pid: u32, limit: libc::rlim_t) -> libc::rlim_t {
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structures live through the calls; the process is a child of this one.
    unsafe {
        let pid = pid as libc::pid_t;
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &mut old), 0);
        let new = libc::rlimit { rlim_cur: limit, ..old };
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, &new, std::ptr::null_mut()), 0);
    }
    old.rlim_cur
}

#[test]
fn a_daemon_out_of_descriptors_serves_the_clients_it_has_and_takes_others_later() {
    let daemon = crate::metrics::daemon(&[
        "--chardev",
        "socket,id=two,path=DIR/two.sock,server=on,wait=off",
        "--monitor",
        "two",
    ]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let pid = daemon.server.pid();
    let is_free = |number: &u64| !std::fs::exists(format!("/proc/{pid}/fd/{number}")).unwrap();
    let before = limit_descriptors(pid, (0..).find(is_free).unwrap());
    let mut other = UnixStream::connect(daemon.path("two.sock")).unwrap();
    let scraper = crate::metrics::connect(&daemon.path("metrics.sock"));
    for said in ["monitor 'two': accept: ", "metrics: accept: "] {
        let began = Instant::now();
        while !daemon.server.stderr().contains(said) {
            assert!(began.elapsed() < LIMIT, "{}", daemon.server.stderr());
            client.run("query-block", json!({}));
        }
    }
    limit_descriptors(pid, before);
    other.set_read_timeout(Some(LIMIT)).unwrap();
    let mut greeting = [0; 6];
    other.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"{\"QMP\"");
    assert!(crate::metrics::page(scraper).contains("vublk_build_info"));
    assert_eq!(daemon_end(daemon), Some(0));
}

/// Ends the daemon by a signal, and gives its exit code.
fn daemon_end(mut daemon: Daemon) -> Option<i32> {
    daemon.server.signal(libc::SIGTERM).unwrap();
    daemon.server.wait_exit(Duration::from_secs(60)).unwrap().code()
}
